"""Random models of a few thousand weights as GGUF files, and the same models as folders."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import transformers
from gguf.quants import quantize
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

# A token for each character of the words w0 to w49, and one for a space before a w: most words are three tokens.
TOKENS = ["<unk>", "w", *"0123456789", "Ġ", "Ġw"]
MERGES = ["Ġ w"]
ATTENTION = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj"}
LLAMA = {
    **ATTENTION,
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
HEADS, KEY_HEADS, HIDDEN, WIDE, BLOCKS = 4, 2, 64, 96, 2
Tensors = dict[str, tuple[NDArray[Any], gguf.GGMLQuantizationType | None]]


def llama() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=HIDDEN,
        intermediate_size=WIDE,
        num_hidden_layers=BLOCKS,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_HEADS,
        max_position_embeddings=16,
        rms_norm_eps=0.001,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        tie_word_embeddings=True,
    )
    return transformers.LlamaModel(config).eval()


def interleaved(weight: NDArray[Any], heads: int) -> NDArray[Any]:
    """A query's or key's rows as GGUF's llama has them: pairs that rotate together lie side by side in each head."""
    size = len(weight) // heads
    order = [
        head * size + half * size // 2 + pair for head in range(heads) for pair in range(size // 2) for half in (0, 1)
    ]
    return weight[order]


def llama_tensors(model: Any, kind: gguf.GGMLQuantizationType | None = None) -> Tensors:
    """The model's tensors under their names in GGUF, its layers of the type ``kind``, or as float32."""
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    tensors: Tensors = {
        "token_embd.weight": (state["embed_tokens.weight"], None),
        "output_norm.weight": (state["norm.weight"], None),
    }
    for block in range(BLOCKS):
        for short, path in LLAMA.items():
            weight = state[f"layers.{block}.{path}.weight"]
            if short in ("attn_q", "attn_k"):
                weight = interleaved(weight, HEADS if short == "attn_q" else KEY_HEADS)
            tensors[f"blk.{block}.{short}.weight"] = (weight, kind if weight.ndim == 2 else None)
    return tensors


def write_gguf(
    path: Path, tensors: Tensors, change: Callable[[gguf.GGUFWriter], None] | None = None, words: bool = True
) -> Path:
    """Write a file of the architecture llama; ``change`` may add settings, ``words`` False leaves the tokenizer out."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(BLOCKS)
    writer.add_context_length(16)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(WIDE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_HEADS)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_rope_freq_base(500.0)
    writer.add_layer_norm_rms_eps(0.001)
    return finish(writer, tensors, change, words)


def finish(
    writer: gguf.GGUFWriter, tensors: Tensors, change: Callable[[gguf.GGUFWriter], None] | None, words: bool
) -> Path:
    if words:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("default")
        writer.add_token_list(TOKENS)
        writer.add_token_merges(MERGES)
        writer.add_unk_token_id(0)
    if change is not None:
        change(writer)
    for name, (values, kind) in tensors.items():
        if kind is None:
            writer.add_tensor(name, values)
        else:
            writer.add_tensor(name, quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Path(writer.path)


def save_folder(model: Any, folder: Path) -> Path:
    """The model as transformers saves it, with the tokenizer that the GGUF files hold, built by itself."""
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(folder)
    vocabulary = {token: index for index, token in enumerate(TOKENS)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [tuple(merge.split()) for merge in MERGES]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model() -> Any:
    return llama()


@pytest.fixture
def plain(model: Any, tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "tiny.gguf", llama_tensors(model))
