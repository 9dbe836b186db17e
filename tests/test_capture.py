"""Capture: the file holds what the model's linear layers compute with, and every fault ends in one line."""

import hashlib
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray
from tiny_models import (
    LAYERS,
    SPECIAL,
    WINDOW,
    WORDS,
    albert,
    bert,
    captured,
    gpt2,
    out,
    run,
    save_model,
    text,
    windows_of,
)

from awq_pycuda import capture
from awq_pycuda.layers.files import FileLayer
from awq_pycuda.options import describe


def run_model(folder: Path, windows: list[list[int]]) -> dict[str, list[tuple[Any, Any]]]:
    """Inputs and outputs of every module call, per module path."""
    model = transformers.AutoModel.from_pretrained(folder).eval()
    calls: dict[str, list[tuple[Any, Any]]] = {}
    for name, module in model.named_modules():
        module.register_forward_hook(
            lambda _, args, output, name=name: calls.setdefault(name, []).append((args, output))
        )
    with torch.no_grad():
        for window in windows:
            model(input_ids=torch.tensor([window]))
    return calls


LEFT_OUT = r"left out: pooler\.dense \(1 row whatever the number of tokens; \d+\.\d % of the parameters\)"


def close(left: NDArray[Any], right: Any) -> None:
    np.testing.assert_allclose(left, right.numpy(), rtol=1e-5, atol=1e-6)


def check_against_model(layers: list[FileLayer], calls: dict[str, list[tuple[Any, Any]]], tokens: int) -> None:
    for layer in layers:
        assert layer.activations is not None
        assert layer.bias is not None
        assert layer.activations.shape[0] == tokens
        inputs = torch.cat([args[0].reshape(-1, args[0].shape[-1]) for args, _ in calls[layer.name]])
        outputs = torch.cat([output.reshape(-1, output.shape[-1]) for _, output in calls[layer.name]])
        close(layer.activations, inputs[:tokens])
        close(layer.activations @ layer.weight.T + layer.bias, outputs[:tokens])


# 16 ends with the first window, 20 within the second, 39 with the third, which is all of the text.
@pytest.mark.parametrize("tokens", [16, 20, 39])
def test_holds_what_the_layers_compute_with(bert: Path, text: Path, out: Path, tokens: int) -> None:
    layers = captured(bert, text, out, f"tokens={tokens}")
    assert [layer.name for layer in layers] == LAYERS
    state = transformers.AutoModel.from_pretrained(bert).state_dict()
    for layer in layers:
        np.testing.assert_array_equal(layer.weight, state[f"{layer.name}.weight"].numpy())
        np.testing.assert_array_equal(layer.bias, state[f"{layer.name}.bias"].numpy())
    windows = windows_of(text, special=True)
    assert [len(window) for window in windows] == [16, 16, 7]
    check_against_model(layers, run_model(bert, windows), tokens)


def test_layers_that_see_one_input_have_one_copy(bert: Path, text: Path, out: Path) -> None:
    layers = captured(bert, text, out, "tokens=20")
    by_name = {layer.name: index for index, layer in enumerate(layers)}
    seen = {layers[layer.input_of].name for layer in layers if layer.input_of is not None}
    assert seen == {f"encoder.layer.{block}.attention.self.query" for block in range(2)}
    for block in range(2):
        query, *others = (by_name[f"encoder.layer.{block}.attention.self.{name}"] for name in ("query", "key", "value"))
        assert [layers[other].input_of for other in others] == [query] * 2
    with h5py.File(out) as file:
        assert sum("activations" in layer for layer in file["layers"].values()) == len(layers) - 4


def test_a_window_is_no_longer_than_the_tokens_asked_for(bert: Path, text: Path, out: Path) -> None:
    layers = captured(bert, text, out, "tokens=10")
    check_against_model(layers, run_model(bert, windows_of(text, special=True, longest=10)[:1]), 10)


def test_one_token_still_has_a_token_of_the_text_beside_it(bert: Path, text: Path, out: Path) -> None:
    layers = captured(bert, text, out, "tokens=1")
    check_against_model(layers, run_model(bert, windows_of(text, special=True, longest=3)[:1]), 1)


def test_conv1d_weights_are_transposed(gpt2: Path, text: Path, out: Path) -> None:
    layers = captured(gpt2, text, out, "tokens=33")
    assert [(layer.name, layer.weight.shape) for layer in layers] == [
        (f"h.{index}.{name}", shape)
        for index in range(2)
        for name, shape in (
            ("attn.c_attn", (96, 32)),
            ("attn.c_proj", (32, 32)),
            ("mlp.c_fc", (40, 32)),
            ("mlp.c_proj", (32, 40)),
        )
    ]
    check_against_model(layers, run_model(gpt2, windows_of(text, special=False)), 33)


def test_of_a_layer_that_runs_again_the_first_run_counts(albert: Path, text: Path, out: Path) -> None:
    layers = {layer.name: layer for layer in captured(albert, text, out, "tokens=20")}
    name = "encoder.albert_layer_groups.0.albert_layers.0.ffn"
    runs = run_model(albert, windows_of(text, special=True)[:2])[name]
    assert len(runs) == 6
    first = torch.cat([runs[0][0][0][0], runs[3][0][0][0]])
    close(layers[name].activations, first[:20])


def test_float16(bert: Path, text: Path, out: Path) -> None:
    exact = captured(bert, text, out, "tokens=39")
    halves = captured(bert, text, out, "tokens=39", "dtype=float16")
    with h5py.File(out) as file:
        assert {dataset.dtype.name for group in file["layers"].values() for dataset in group.values()} == {"float16"}
    for half, layer in zip(halves, exact, strict=True):
        assert layer.activations is not None
        np.testing.assert_array_equal(half.weight, layer.weight.astype(np.float16))
        np.testing.assert_array_equal(half.activations, layer.activations.astype(np.float16))


def test_include_takes_the_layers_in_whose_path_it_is_found(bert: Path, text: Path, out: Path) -> None:
    layers = captured(bert, text, out, "tokens=39", r"include=[qv][a-z]+y?$|1\.output")
    assert [layer.name for layer in layers] == [
        "encoder.layer.0.attention.self.query",
        "encoder.layer.0.attention.self.value",
        "encoder.layer.1.attention.self.query",
        "encoder.layer.1.attention.self.value",
        "encoder.layer.1.output.dense",
    ]


def test_layers_that_do_not_see_every_token_are_listed_and_left_out(
    bert: Path, text: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "pooler.dense" not in {layer.name for layer in captured(bert, text, out, "tokens=20")}
    left_out, account = capsys.readouterr().err.splitlines()[1:]
    assert re.fullmatch(LEFT_OUT, left_out)
    assert account.startswith("captured: ")


def test_layers_that_never_run_are_listed_and_left_out(
    tmp_path: Path, text: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = transformers.EsmConfig(
        vocab_size=len(SPECIAL + WORDS),
        mask_token_id=1,
        pad_token_id=0,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=32,
    )
    layers = captured(save_model(tmp_path / "esm", config, special=True), text, out, "tokens=20")
    assert "contact_head.regression" not in {layer.name for layer in layers}
    assert "left out: contact_head.regression (does not run in a window of 13 tokens; " in capsys.readouterr().err


def test_layers_that_run_in_some_windows_only_are_left_out(
    bert: Path, text: Path, out: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    attention = transformers.models.bert.modeling_bert.BertAttention
    forward = attention.forward

    def skip_short_windows(self: Any, hidden: Any, *args: Any, **kwargs: Any) -> Any:
        if self.layer_skips and hidden.shape[1] == 7:
            return hidden, None
        return forward(self, hidden, *args, **kwargs)

    initialize = attention.__init__

    def count(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        initialize(self, config, *args, **kwargs)
        self.layer_skips = kwargs.get("layer_idx") == 0

    monkeypatch.setattr(attention, "__init__", count)
    monkeypatch.setattr(attention, "forward", skip_short_windows)
    layers = captured(bert, text, out, "tokens=39")
    assert [layer.name for layer in layers] == LAYERS[4:]
    assert [layer.activations.shape[0] for layer in layers if layer.activations is not None] == [39] * 8
    left_out = [line for line in capsys.readouterr().err.splitlines() if "(does not run in every window; " in line]
    assert [line.split()[2] for line in left_out] == LAYERS[:4]
    with h5py.File(out) as file:
        assert list(file["layers"]) == [f"{index:03}" for index in range(8)]


def test_notes_where_the_layers_come_from(bert: Path, text: Path, out: Path) -> None:
    captured(bert, text, out, "tokens=20")
    with h5py.File(out) as file:
        assert dict(file.attrs) == {
            "model": bert.name,
            "model_type": "bert",
            "text_sha256": hashlib.sha256(text.read_bytes()).hexdigest(),
            "tokens": 20,
            "window": 16,
            "torch_version": torch.__version__,
            "transformers_version": transformers.__version__,
        }


def test_the_network_is_never_asked(bert: Path, text: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    captured(bert, text, out, "tokens=20")


def test_the_command_prints_a_summary_and_repeats_exactly(bert: Path, text: Path, out: Path, tmp_path: Path) -> None:
    captured(bert, text, out, "tokens=20")
    again = tmp_path / "again.h5"
    command = [sys.executable, "-m", "awq_pycuda.capture", f"model={bert}", f"text={text}", f"out={again}", "tokens=20"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0
    lines = result.stdout.splitlines()
    assert lines[0] == f"{LAYERS[0]} 32x32"
    assert len(lines) == 13
    assert re.fullmatch(rf"12 layers, 20 tokens, 0\.\d MB: {re.escape(str(again))}", lines[-1])
    assert re.fullmatch(LEFT_OUT, result.stderr.splitlines()[1])
    assert again.read_bytes() == out.read_bytes()


def test_a_terminal_gets_a_table(
    bert: Path, text: Path, out: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    captured(bert, text, out, "tokens=20")
    printed = capsys.readouterr().out
    assert "┏━" in printed
    assert all(name in printed for name in LAYERS)
    assert re.search(rf"^12 layers, 20 tokens, 0\.\d MB: {re.escape(str(out))}$", printed, re.MULTILINE)


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("tokens=0", flag) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert printed.out.startswith("Usage: python -m awq_pycuda.capture model=FOLDER text=FILE out=FILE.h5")
    assert describe(capture.Options) in printed.out
