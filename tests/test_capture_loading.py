"""The loader's whole report binds: what the files of a model do not say of its weights, capture refuses."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_models import (
    LAYERS,
    SPECIAL,
    WORDS,
    Refused,
    bert,
    captured,
    out,
    reason,
    refused,
    save_model,
    text,
    with_weights,
)

QUERY = "encoder.layer.0.attention.self.query"


def llama_config(**more: Any) -> transformers.PreTrainedConfig:
    return transformers.LlamaConfig(
        vocab_size=len(SPECIAL + WORDS),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=16,
        **more,
    )


def shorten(state: dict[str, Any], name: str) -> None:
    state[name] = state[name][:-1].contiguous()


def as_int8(state: dict[str, Any], name: str) -> None:
    state[name] = state[name].to(torch.int8)


def as_float8(state: dict[str, Any], name: str) -> None:
    state[name] = state[name].to(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("change", "start"),
    [
        (lambda state: state.pop("embeddings.LayerNorm.bias"), "its weights lack embeddings.LayerNorm.bias"),
        (lambda state: state.pop(f"{QUERY}.bias"), f"its weights lack {QUERY}.bias"),
        (
            lambda state: state.pop("embeddings.token_type_embeddings.weight"),
            "its weights lack embeddings.token_type_embeddings.weight",
        ),
        (
            lambda state: state.__setitem__(f"{QUERY}.wait", state.pop(f"{QUERY}.weight")),
            f"its weights hold {QUERY}.wait, which the model does not take up",
        ),
        (
            lambda state: shorten(state, f"{QUERY}.bias"),
            f"its weights hold {QUERY}.bias as (31,) where the model needs (32,)",
        ),
        (
            lambda state: state.__setitem__(f"{QUERY}.weight_scale", torch.ones(1)),
            f"its weights hold {QUERY}.weight_scale, a scale or code, which the model does not take up",
        ),
        (
            lambda state: state.__setitem__(f"{QUERY}.lora_A.weight", torch.ones(4, 32)),
            f"its weights hold {QUERY}.lora_A.weight, an adapter's, which the model does not take up",
        ),
        (
            lambda state: as_int8(state, f"{QUERY}.weight"),
            f"its weights hold {QUERY}.weight as I8, a type that needs a scale",
        ),
        (
            lambda state: as_float8(state, "embeddings.word_embeddings.weight"),
            "its weights hold embeddings.word_embeddings.weight as F8_E4M3, a type that needs a scale",
        ),
    ],
)
def test_refuses_weights_that_are_not_the_models(
    change: Callable[[dict[str, Any]], Any], start: str, bert: Path, tmp_path: Path, reason: Refused
) -> None:
    model = with_weights(bert, tmp_path / "model", change)
    assert reason(model, "tokens=20").startswith(start)


def test_what_no_captured_layer_needs_may_be_missing(bert: Path, text: Path, tmp_path: Path, out: Path) -> None:
    def change(state: dict[str, Any]) -> None:
        del state["pooler.dense.weight"], state["encoder.layer.1.output.LayerNorm.weight"]

    model = with_weights(bert, tmp_path / "model", change)
    assert [layer.name for layer in captured(model, text, out, "tokens=20")] == LAYERS


def test_heads_and_superseded_buffers_in_the_files_are_harmless(
    bert: Path, text: Path, tmp_path: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def change(state: dict[str, Any]) -> None:
        state["cls.predictions.bias"] = torch.zeros(len(SPECIAL + WORDS))
        state["embeddings.position_ids"] = torch.arange(32)[None]

    model = with_weights(bert, tmp_path / "model", change)
    assert [layer.name for layer in captured(model, text, out, "tokens=20")] == LAYERS
    assert "left out: cls.predictions.bias (a head's; no part of the model that is run)" in capsys.readouterr().err


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_head_gives_the_embedding(
    tied: bool, text: Path, tmp_path: Path, out: Path, capsys: pytest.CaptureFixture[str], reason: Refused
) -> None:
    whole = save_model(tmp_path / "whole", llama_config(tie_word_embeddings=tied), special=False)
    expected = captured(whole, text, out, "tokens=20")
    capsys.readouterr()

    def change(state: dict[str, Any]) -> None:
        state["lm_head.weight"] = state.pop("embed_tokens.weight")

    model = with_weights(whole, tmp_path / "model", change)
    if not tied:
        assert reason(model, "tokens=20").startswith("its weights lack embed_tokens.weight")
        return
    for layer, same in zip(captured(model, text, out, "tokens=20"), expected, strict=True):
        assert layer.activations is not None
        assert same.activations is not None
        assert (layer.activations == same.activations).all()


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "pytorch_lora_weights.bin"])
def test_refuses_an_adapter_beside_the_weights(name: str, bert: Path, tmp_path: Path, reason: Refused) -> None:
    model = with_weights(bert, tmp_path / "model", lambda state: None)
    (model / name).write_text("{}")
    assert reason(model, "tokens=20").startswith(f"holds an adapter, {name}, which changes the weights")


def test_refuses_a_quantization_told_by_the_config(bert: Path, tmp_path: Path, reason: Refused) -> None:
    model = with_weights(bert, tmp_path / "model", lambda state: None)
    config = json.loads((model / "config.json").read_text())
    config["text_config"] = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    (model / "config.json").write_text(json.dumps(config))
    assert reason(model, "tokens=20").startswith("its config.json has quantization_config (gptq): ")


def test_refuses_a_tensor_that_two_files_hold(bert: Path, tmp_path: Path, reason: Refused) -> None:
    model = with_weights(bert, tmp_path / "model", lambda state: None)
    state = load_file(model / "model.safetensors")
    save_file(state, model / "model-00001-of-00002.safetensors", {"format": "pt"})
    name = f"{QUERY}.bias"
    save_file({name: state[name] + 1}, model / "model-00002-of-00002.safetensors", {"format": "pt"})
    files = dict.fromkeys(state, "model-00001-of-00002.safetensors") | {name: "model-00002-of-00002.safetensors"}
    (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    (model / "model.safetensors").unlink()
    assert reason(model, "tokens=20").startswith(
        f"both model-00001-of-00002.safetensors and model-00002-of-00002.safetensors hold {name}"
    )


def test_the_weights_of_an_older_format(bert: Path, text: Path, tmp_path: Path, out: Path) -> None:
    model = with_weights(bert, tmp_path / "model", lambda state: None)
    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    assert [layer.name for layer in captured(model, text, out, "tokens=20")] == LAYERS
