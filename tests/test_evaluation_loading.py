"""A causal language model is loaded with its head, by the same judgments; whatever is none is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_causal import SIZES, llama_config, save_causal
from tiny_gguf import llama, llama_tensors, write_gguf
from tiny_models import bert, gpt2, save_model, with_weights

from awq_pycuda.capturing.fault import Fault
from awq_pycuda.capturing.loading import load


def test_the_head_comes_along_and_the_base_model_is_what_capture_sees(tmp_path: Path) -> None:
    folder = save_causal(tmp_path / "model", llama_config(tie_word_embeddings=False))
    saved = transformers.AutoModelForCausalLM.from_pretrained(folder)
    loaded = load(folder, causal=True)
    assert loaded.model is loaded.causal.model
    assert not loaded.causal.training
    assert torch.equal(loaded.causal.lm_head.weight, saved.lm_head.weight)
    assert load(folder).causal is None
    assert load(folder).heads == ["lm_head.weight"]


@pytest.mark.parametrize("kept", ["model.embed_tokens.weight", "lm_head.weight"])
def test_tied_heads_are_tied_whichever_the_files_hold(kept: str, tmp_path: Path) -> None:
    folder = save_causal(tmp_path / "whole", llama_config(tie_word_embeddings=True))
    expected = load(folder, causal=True)

    def change(state: dict[str, Any]) -> None:
        state[kept] = state.pop("model.embed_tokens.weight")

    loaded = load(with_weights(folder, tmp_path / "model", change), causal=True)
    assert loaded.causal.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(loaded.causal.lm_head.weight, expected.causal.lm_head.weight)


def test_a_gguf_file(tmp_path: Path) -> None:
    base = llama()
    loaded = load(write_gguf(tmp_path / "tiny.gguf", llama_tensors(base)), causal=True)
    assert type(loaded.model) is type(base)
    assert torch.equal(loaded.causal.lm_head.weight, base.embed_tokens.weight)
    for name, tensor in base.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], tensor), name


def test_a_head_of_a_gguf_file_that_is_not_tied(tmp_path: Path) -> None:
    tensors = llama_tensors(llama())
    head = tensors["token_embd.weight"][0][::-1].copy()
    path = write_gguf(tmp_path / "tiny.gguf", {**tensors, "output.weight": (head, None)})
    assert torch.equal(load(path, causal=True).causal.lm_head.weight, torch.from_numpy(head))


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (
            lambda state: state.pop("lm_head.weight"),
            "is no causal language model: its weights lack lm_head.weight, of the head, which was made up",
        ),
        (lambda state: state.pop("model.norm.weight"), "its weights lack model.norm.weight, which was made up"),
        (
            lambda state: state.__setitem__("model.layers.0.mlp.up_proj.lora_A.weight", torch.ones(4, 32)),
            "its weights hold model.layers.0.mlp.up_proj.lora_A.weight, an adapter's, which the model does not take up",
        ),
    ],
)
def test_what_is_not_all_of_the_model_is_refused(change: Callable[[Any], Any], what: str, tmp_path: Path) -> None:
    folder = save_causal(tmp_path / "whole", llama_config(tie_word_embeddings=False))
    with pytest.raises(Fault) as fault:
        load(with_weights(folder, tmp_path / "model", change), causal=True)
    assert fault.value.what == what


def test_a_model_without_its_head_is_refused(bert: Path) -> None:
    with pytest.raises(Fault, match=r"is no causal language model: its weights lack cls\.predictions.*, of the head"):
        load(bert, causal=True)


def test_a_model_that_has_no_such_head_is_refused(tmp_path: Path) -> None:
    config = transformers.AlbertConfig(
        vocab_size=54, embedding_size=8, hidden_size=8, num_attention_heads=2, intermediate_size=8
    )
    with pytest.raises(Fault) as fault:
        load(save_model(tmp_path / "albert", config, special=True), causal=True)
    assert fault.value.what == "is no causal language model (albert)"
    assert fault.value.allowed.startswith("causal language models")


def test_a_base_model_whose_head_is_tied_needs_no_more(gpt2: Path) -> None:
    loaded = load(gpt2, causal=True)
    assert loaded.causal.lm_head.weight is loaded.model.wte.weight


def test_a_class_that_names_another_prefix_than_its_base_model_has(tmp_path: Path) -> None:
    config = transformers.Llama4TextConfig(
        **SIZES, head_dim=16, intermediate_size_mlp=48, num_local_experts=2, moe_layers=[1]
    )
    loaded = load(save_causal(tmp_path / "model", config), causal=True)
    assert loaded.causal.base_model is loaded.causal
    assert loaded.model is loaded.causal.model
