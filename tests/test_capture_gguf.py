"""Capture from GGUF files: what a folder of the same model gives, and the same judgement of its tensors."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import h5py
import numpy as np
import pytest
import torch
import transformers
from gguf.quants import dequantize, quantize
from tiny_gguf import (
    ATTENTION,
    BLOCKS,
    HEADS,
    HIDDEN,
    LLAMA,
    TOKENS,
    Tensors,
    finish,
    interleaved,
    llama,
    llama_tensors,
    model,
    plain,
    save_folder,
    write_gguf,
)
from tiny_models import Refused, captured, out, reason, refused, text

from awq_pycuda.layers.files import FileLayer

Q8_0, Q4_1 = gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.Q4_1


def check_same(layers: list[FileLayer], expected: list[FileLayer]) -> None:
    assert [layer.name for layer in layers] == [layer.name for layer in expected]
    for layer, same in zip(layers, expected, strict=True):
        np.testing.assert_array_equal(layer.weight, same.weight)
        np.testing.assert_array_equal(layer.activations, same.activations)


def test_gives_what_the_folder_of_the_same_model_gives(
    model: Any, plain: Path, text: Path, tmp_path: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = captured(save_folder(model, tmp_path / "folder"), text, out, "tokens=40")
    told = capsys.readouterr().err
    check_same(captured(plain, text, out, "tokens=40"), expected)
    # The windows of 16 tokens, the norms and the embedding told alike; no progress, and nothing that was dequantized.
    assert capsys.readouterr().err == told
    assert told.startswith("windows of 16 tokens: max_position_embeddings of its configuration is 16\n")
    assert len(expected) == 7 * BLOCKS
    with h5py.File(out) as file:
        assert file.attrs["model"] == "tiny.gguf"
        assert file.attrs["model_type"] == "llama"
        assert file.attrs["gguf_types"] == f"F32 {9 * BLOCKS + 2}"
        assert re.fullmatch(r"\d+\.\d+.*", file.attrs["gguf_version"])


def test_weights_are_what_the_codes_stand_for(
    model: Any, text: Path, tmp_path: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = llama_tensors(model, Q4_1)
    values, _ = tensors["token_embd.weight"]
    tensors["token_embd.weight"] = (values, Q8_0)
    path = write_gguf(tmp_path / "a file of any name", tensors)
    layers = {layer.name: layer for layer in captured(path, text, out, "tokens=20")}
    assert capsys.readouterr().err.startswith("weights: dequantized from GGUF's Q4_1 (14 tensors), Q8_0 (1 tensor)\n")
    # The model of the dequantized weights, its folder captured: activations that went through all of them.
    state = model.state_dict()
    for block in range(BLOCKS):
        for short, part in LLAMA.items():
            name = f"layers.{block}.{part}"
            if f"{name}" in layers:
                stored = dequantize(quantize(tensors[f"blk.{block}.{short}.weight"][0], Q4_1), Q4_1)
                rotated = {"attn_q": HEADS, "attn_k": 2}
                ours = layers[name].weight
                np.testing.assert_array_equal(
                    interleaved(ours, rotated[short]) if short in rotated else ours, stored, strict=True
                )
                state[f"{name}.weight"] = torch.tensor(ours)
    state["embed_tokens.weight"] = torch.from_numpy(dequantize(quantize(values, Q8_0), Q8_0))
    coded = llama()
    coded.load_state_dict(state)
    with h5py.File(out) as file:
        assert file.attrs["gguf_types"] == "Q4_1 14, F32 5, Q8_0 1"
    check_same(list(layers.values()), captured(save_folder(coded, tmp_path / "folder"), text, out, "tokens=20"))


def test_experts(text: Path, tmp_path: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    # The loader does not read how wide experts are: they have the width that is its default.
    config = transformers.Qwen3MoeConfig(
        vocab_size=len(TOKENS),
        hidden_size=32,
        head_dim=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_experts=3,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        max_position_embeddings=16,
        tie_word_embeddings=True,
    )
    model = transformers.Qwen3MoeModel(config).eval()
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    gate, up = np.split(state["layers.0.mlp.experts.gate_up_proj"], 2, axis=1)
    tensors: Tensors = {
        "token_embd.weight": (state["embed_tokens.weight"], None),
        "output_norm.weight": (state["norm.weight"], None),
        "blk.0.ffn_gate_exps.weight": (gate, None),
        "blk.0.ffn_up_exps.weight": (up, None),
        "blk.0.ffn_down_exps.weight": (state["layers.0.mlp.experts.down_proj"], None),
    }
    for short, path in {
        **ATTENTION,
        "attn_output": "self_attn.o_proj",
        "attn_q_norm": "self_attn.q_norm",
        "attn_k_norm": "self_attn.k_norm",
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate_inp": "mlp.gate",
    }.items():
        tensors[f"blk.0.{short}.weight"] = (state[f"layers.0.{path}.weight"], None)
    writer = gguf.GGUFWriter(tmp_path / "experts.gguf", "qwen3moe")
    writer.add_block_count(1)
    writer.add_context_length(16)
    writer.add_embedding_length(32)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_key_length(16)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_expert_count(3)
    writer.add_expert_used_count(2)
    writer.add_expert_feed_forward_length(768)
    path = finish(writer, tensors, None, words=True)
    expected = captured(save_folder(model, tmp_path / "folder"), text, out, "tokens=20")
    told = capsys.readouterr().err
    check_same(captured(path, text, out, "tokens=20"), expected)
    unread = "settings of the file that transformers does not read: qwen3moe.expert_feed_forward_length=768\n"
    assert capsys.readouterr().err == unread + told


def test_a_loader_that_reports_by_itself(
    text: Path, tmp_path: Path, out: Path, capsys: pytest.CaptureFixture[str], reason: Refused
) -> None:
    torch.manual_seed(0)
    config = transformers.Lfm2Config(
        vocab_size=len(TOKENS),
        hidden_size=64,
        intermediate_size=96,
        block_auto_adjust_ff_dim=False,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        layer_types=["conv", "full_attention"],
        max_position_embeddings=16,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    model = transformers.Lfm2Model(config).eval()
    parts = {
        "operator_norm": "attn_norm",
        "ffn_norm": "ffn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.out_proj": "attn_output",
        "self_attn.q_layernorm": "attn_q_norm",
        "self_attn.k_layernorm": "attn_k_norm",
        "feed_forward.w1": "ffn_gate",
        "feed_forward.w3": "ffn_up",
        "feed_forward.w2": "ffn_down",
        "conv.in_proj": "shortconv.in_proj",
        "conv.out_proj": "shortconv.out_proj",
        "conv.conv": "shortconv.conv",
    }
    tensors: Tensors = {}
    for name, tensor in model.state_dict().items():
        if name.startswith("layers."):
            _, block, part = name.removesuffix(".weight").split(".", 2)
            tensors[f"blk.{block}.{parts[part]}.weight"] = (tensor.squeeze().numpy(), None)
        else:
            rest = {"embed_tokens.weight": "token_embd.weight", "embedding_norm.weight": "token_embd_norm.weight"}
            tensors[rest[name]] = (tensor.numpy(), None)

    def write(name: str, tensors: Tensors) -> Path:
        writer = gguf.GGUFWriter(tmp_path / name, "lfm2")
        writer.add_block_count(2)
        writer.add_context_length(16)
        writer.add_embedding_length(64)
        writer.add_feed_forward_length(96)
        writer.add_head_count(2)
        writer.add_head_count_kv([0, 1])
        writer.add_rope_freq_base(10000.0)
        writer.add_layer_norm_rms_eps(config.norm_eps)
        writer.add_shortconv_l_cache(config.conv_L_cache)
        return finish(writer, tensors, None, words=True)

    head = (np.zeros((len(TOKENS), 64), np.float32), None)
    expected = captured(save_folder(model, tmp_path / "folder"), text, out, "tokens=20")
    capsys.readouterr()
    check_same(captured(write("whole.gguf", {**tensors, "output.weight": head}), text, out, "tokens=20"), expected)
    assert "left out: lm_head.weight (a head's; no part of the model that is run)\n" in capsys.readouterr().err
    path = write("more.gguf", {**tensors, "blk.0.ffn_up.bias": (np.zeros(96, np.float32), None)})
    assert reason(path, "tokens=20").startswith(
        "its weights hold model.layers.0.feed_forward.w3.bias, which the model does not"
    )


@pytest.mark.parametrize(
    ("change", "start"),
    [
        (lambda tensors: tensors.pop("blk.0.attn_norm.weight"), "its weights lack layers.0.input_layernorm.weight"),
        (lambda tensors: tensors.pop("blk.1.ffn_up.weight"), "its weights lack layers.1.mlp.up_proj.weight"),
        (lambda tensors: tensors.pop("token_embd.weight"), "its weights lack embed_tokens.weight"),
        (
            lambda tensors: tensors.update({"blk.0.ffn_up.weight": (np.zeros((32, HIDDEN), np.float32), None)}),
            f"its weights hold layers.0.mlp.up_proj.weight as (32, {HIDDEN}) where the model needs (96, {HIDDEN})",
        ),
        (
            lambda tensors: tensors.update({"blk.0.attn_q.bias": (np.zeros(HIDDEN, np.float32), None)}),
            "its weights hold blk.0.attn_q.bias, which the model does not take up",
        ),
        (
            lambda tensors: tensors.update({"rope_freqs.weight": (np.ones(8, np.float32), None)}),
            "its weights hold rope_freqs.weight, which the model does not take up",
        ),
        (
            lambda tensors: tensors.update({"blk.0.ffn_up.weight.lora_a": (np.ones((4, 64), np.float32), None)}),
            "its weights hold blk.0.ffn_up.weight.lora_a, an adapter's, which the model does not take up",
        ),
        (
            lambda tensors: tensors.update({"blk.0.ffn_up.weight": (np.ones((96, HIDDEN), np.int8), None)}),
            "cannot be loaded (NotImplementedError: ",
        ),
    ],
)
def test_refuses_tensors_that_are_not_the_models(
    change: Callable[[Tensors], Any], start: str, model: Any, tmp_path: Path, reason: Refused
) -> None:
    tensors = llama_tensors(model)
    change(tensors)
    assert reason(write_gguf(tmp_path / "tiny.gguf", tensors), "tokens=20").startswith(start)


def test_heads_and_what_runs_behind_the_last_layer_are_not_needed(
    model: Any, plain: Path, text: Path, tmp_path: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = captured(plain, text, out, "tokens=20")
    tensors = llama_tensors(model)
    tensors["output.weight"] = tensors["token_embd.weight"]
    del tensors["output_norm.weight"]
    capsys.readouterr()
    check_same(captured(write_gguf(tmp_path / "head.gguf", tensors), text, out, "tokens=20"), expected)
    assert "left out: output.weight (a head's; no part of the model that is run)\n" in capsys.readouterr().err


def test_a_head_is_no_embedding_where_the_file_does_not_tie_them(model: Any, tmp_path: Path, reason: Refused) -> None:
    tensors = llama_tensors(model)
    tensors["output.weight"] = tensors.pop("token_embd.weight")
    assert reason(write_gguf(tmp_path / "tiny.gguf", tensors), "tokens=20").startswith(
        "its weights lack embed_tokens.weight"
    )


def test_only_the_file_itself_counts(model: Any, plain: Path, text: Path, tmp_path: Path, out: Path) -> None:
    expected = captured(plain, text, out, "tokens=20")
    (tmp_path / "beside").mkdir()
    path = shutil.copy(plain, tmp_path / "beside" / "tiny.gguf")
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json", "adapter_config.json"):
        (path.parent / name).write_text("{")
    check_same(captured(path, text, out, "tokens=20"), expected)


def test_says_what_the_loader_leaves_aside(
    model: Any, text: Path, tmp_path: Path, out: Path, capsys: pytest.CaptureFixture[str], reason: Refused
) -> None:
    def change(writer: gguf.GGUFWriter) -> None:
        writer.add_uint32("llama.attention.sliding_window", 8)
        writer.add_array("llama.rope.dimension_sections", [4, 4])
        writer.add_rope_scaling_type(gguf.RopeScalingType.NONE)
        writer.kv_data[0]["tokenizer.ggml.pre"] = gguf.GGUFValue("poro", gguf.GGUFValueType.STRING)

    captured(write_gguf(tmp_path / "one.gguf", llama_tensors(model), change), text, out, "tokens=20")
    assert capsys.readouterr().err.startswith(
        "settings of the file that transformers does not read: "
        "llama.attention.sliding_window=8, llama.rope.dimension_sections=2 values, llama.rope.scaling.type=none\n"
        "words: transformers knows no rule poro to split a text by, and splits as GPT-2 does\n"
    )
    scaled = write_gguf(
        tmp_path / "two.gguf",
        llama_tensors(model),
        lambda writer: writer.add_rope_scaling_type(gguf.RopeScalingType.YARN),
    )
    assert reason(scaled, "tokens=20").startswith(
        "its llama.rope.scaling.type is yarn, which transformers does not read"
    )
