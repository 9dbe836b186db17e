"""Capture: the file holds what the model's linear layers compute with, and every fault ends in one line."""

import dataclasses
import hashlib
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from awq_pycuda import capture
from awq_pycuda.layer_files import FileLayer, load_layers
from awq_pycuda.layer_writer import LayerWriter

WORDS = [f"w{index}" for index in range(50)]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
WINDOW = 16
LAYERS = [
    f"encoder.layer.{index}.{part}"
    for index in range(2)
    for part in (
        "attention.self.query",
        "attention.self.key",
        "attention.self.value",
        "attention.output.dense",
        "intermediate.dense",
        "output.dense",
    )
]


def save_model(folder: Path, config: transformers.PreTrainedConfig, special: bool) -> Path:
    """Save a random model and a tokenizer of whole words, with [CLS] and [SEP] around a text where special."""
    torch.manual_seed(0)
    transformers.AutoModel.from_config(config).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(SPECIAL + WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if special:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=WINDOW, **names if special else {"unk_token": "[UNK]"}
    ).save_pretrained(folder)
    return folder


def bert_config() -> transformers.PreTrainedConfig:
    return transformers.BertConfig(
        vocab_size=len(SPECIAL + WORDS),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=32,
    )


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("bert"), bert_config(), special=True)


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = transformers.GPT2Config(
        vocab_size=len(SPECIAL + WORDS), n_embd=32, n_layer=2, n_head=2, n_positions=WINDOW, n_inner=40
    )
    return save_model(tmp_path_factory.mktemp("gpt2"), config, special=False)


@pytest.fixture(scope="session")
def albert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = transformers.AlbertConfig(
        vocab_size=len(SPECIAL + WORDS),
        embedding_size=16,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=WINDOW,
    )
    return save_model(tmp_path_factory.mktemp("albert"), config, special=True)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Thirty-three words: two whole windows and one of seven tokens with [CLS] and [SEP]."""
    path = tmp_path / "text.txt"
    path.write_text(" ".join(WORDS[index * 7 % 50] for index in range(33)))
    return path


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "layers.h5"


def windows_of(text: Path, special: bool, longest: int = WINDOW) -> list[list[int]]:
    """Cut a text into windows of token ids, counted out by hand."""
    ids = [len(SPECIAL) + WORDS.index(word) for word in text.read_text().split()]
    step = longest - 2 * special
    parts = [ids[start : start + step] for start in range(0, len(ids), step)]
    return [[2, *part, 3] for part in parts] if special else parts


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


def run(*arguments: str) -> int:
    return capture.main(list(arguments))


def captured(folder: Path, text: Path, out: Path, *more: str) -> list[FileLayer]:
    assert run(f"model={folder}", f"text={text}", f"out={out}", *more) == 0
    return load_layers(out)


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
    assert capsys.readouterr().err == "left out: pooler.dense (row count 1 in a window of 16 tokens)\n"


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
    assert "left out: contact_head.regression (never runs)\n" in capsys.readouterr().err


def test_layers_that_run_in_some_windows_only_are_left_out(
    bert: Path, text: Path, out: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    attention = transformers.models.bert.modeling_bert.BertAttention
    forward = attention.forward

    def skip_short_windows(self: Any, hidden: Any, *args: Any, **kwargs: Any) -> Any:
        if self.layer_skips and hidden.shape[1] < WINDOW:
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
    left_out = [
        line for line in capsys.readouterr().err.splitlines() if line.endswith("(does not run in every window)")
    ]
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
    assert result.stderr.splitlines() == ["left out: pooler.dense (row count 1 in a window of 16 tokens)"]
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
    for field in dataclasses.fields(capture.Options):
        assert f"\n  {field.name}=" in printed.out


def refusal(capsys: pytest.CaptureFixture[str], out: Path, arguments: list[str]) -> str:
    """Run the command, which has to refuse its arguments and to leave the folder of ``out`` as it was."""
    before = {path: path.read_bytes() for path in out.parent.iterdir()}
    assert run(*arguments) == 2
    assert {path: path.read_bytes() for path in out.parent.iterdir()} == before
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    return printed.err.rstrip("\n")


KEYS = "allowed keys are model, text, out, tokens, dtype, include"
OUT = "allowed: a file name that ends in .h5 or .hdf5, in an existing folder that can be written"


@pytest.mark.parametrize(
    ("argument", "line"),
    [
        ("tokens", f"tokens: is no key=value; {KEYS}"),
        ("token=5", f"token=5: the key is unknown; {KEYS}"),
        ("tokens.x=5", f"tokens.x=5: the key is unknown; {KEYS}"),
        ("=5", f"=5: the key is unknown; {KEYS}"),
        ("tokens=0", "tokens=0: is too small; allowed: whole numbers of at least 1"),
        ("tokens=-4", "tokens=-4: is too small; allowed: whole numbers of at least 1"),
        ("tokens=abc", "tokens=abc: has another type; allowed: whole numbers of at least 1"),
        ("tokens=1.5", "tokens=1.5: has another type; allowed: whole numbers of at least 1"),
        ("tokens=", "tokens=: has another type; allowed: whole numbers of at least 1"),
        ("tokens=40", "tokens=40: text={text} holds 39 tokens of this model; allowed are 1 to 39"),
        ("dtype=bfloat16", "dtype=bfloat16: has another type; allowed: float32, float16"),
        (
            "include=[",
            "include=[: is no regular expression (unterminated character set at position 0); allowed: a regular",
        ),
        (
            "include=nowhere",
            "include=nowhere: finds no linear layer; allowed: a regular expression that finds the path",
        ),
        ("include=pooler", "include=pooler: finds only layers that cannot be captured (row count 1 in a window of 16"),
        ("include=${x}", "include=${x}: has another type; allowed: a regular expression that finds the path"),
        ("model=", "model=: is missing; allowed: a folder with config.json, weights and tokenizer.json"),
        ("model={tmp}/no", "model={tmp}/no: is no folder; allowed: a folder with config.json"),
        ("model={text}", "model={text}: is no folder; allowed: a folder with config.json"),
        ("model={tmp}", "model={tmp}: holds no config.json; allowed: a folder with config.json"),
        ("text=", "text=: is missing; allowed: a file of UTF-8 text"),
        ("text={tmp}/no", "text={tmp}/no: is no file; allowed: a file of UTF-8 text"),
        ("text={tmp}", "text={tmp}: is no file; allowed: a file of UTF-8 text"),
        ("out=", f"out=: is missing; {OUT}"),
        ("out={tmp}/a.npz", f"out={{tmp}}/a.npz: has the suffix '.npz'; {OUT}"),
        ("out={tmp}/no/a.h5", f"out={{tmp}}/no/a.h5: the folder {{tmp}}/no does not exist; {OUT}"),
        ("out={tmp}/folder.h5", f"out={{tmp}}/folder.h5: is a folder; {OUT}"),
    ],
)
def test_refuses_wrong_values(
    argument: str, line: str, bert: Path, text: Path, tmp_path: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "folder.h5").mkdir()
    places = {"{tmp}": str(tmp_path), "{text}": str(text)}
    for place, path in places.items():
        argument, line = argument.replace(place, path), line.replace(place, path)
    arguments = [f"model={bert}", f"text={text}", f"out={out}", "tokens=20", argument]
    assert refusal(capsys, out, arguments).startswith(line)


@pytest.mark.parametrize("key", ["model", "text", "out"])
def test_refuses_missing_keys(key: str, bert: Path, text: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [f"model={bert}", f"text={text}", f"out={out}"]
    line = refusal(capsys, out, [argument for argument in arguments if not argument.startswith(key)])
    assert line.startswith(f"{key}=: is missing; allowed: a f")


def test_bad_arguments_are_found_before_the_libraries_load(tmp_path: Path) -> None:
    script = "import sys; from awq_pycuda.capture import main; code = main(sys.argv[1:]); print('torch' in sys.modules)"
    command = [sys.executable, "-c", f"{script}; sys.exit(code)", f"model={tmp_path}", "text=x", "out=x.h5"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (2, "False\n")
    assert result.stderr.startswith(f"model={tmp_path}: holds no config.json")


@pytest.mark.parametrize("library", ["torch", "transformers"])
def test_names_what_to_install(
    library: str, bert: Path, text: Path, out: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    line = refusal(capsys, out, [f"model={bert}", f"text={text}", f"out={out}"])
    assert line.startswith(f"model={bert}: to load it, {library} is missing (")
    assert line.endswith("); pip install -r requirements-capture.txt brings it")


@pytest.mark.parametrize(
    ("content", "fault"), [(b"", "is empty"), (b" \n", "is empty"), (b"\xff\xfe", "cannot be read (")]
)
def test_refuses_texts_without_text(
    content: bytes, fault: str, bert: Path, text: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text.write_bytes(content)
    line = refusal(capsys, out, [f"model={bert}", f"text={text}", f"out={out}"])
    assert line.startswith(f"text={text}: {fault}")


def damaged(bert: Path, folder: Path, name: str, content: bytes) -> Path:
    shutil.copytree(bert, folder)
    (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", b"{"),
        ("config.json", b'{"model_type": "no such model"}'),
        ("config.json", b'{"model_type": "bert", "hidden_size": 64}'),
        ("model.safetensors", b""),
        ("model.safetensors", b"no such thing"),
        ("tokenizer.json", b"{"),
    ],
)
def test_refuses_damaged_models(
    name: str, content: bytes, bert: Path, text: Path, tmp_path: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = damaged(bert, tmp_path / "model", name, content)
    line = refusal(capsys, out, [f"model={model}", f"text={text}", f"out={out}", "tokens=20"])
    assert line.startswith(f"model={model}: cannot be loaded (")


def with_weights(bert: Path, folder: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    shutil.copytree(bert, folder)
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    return folder


QUERY = "encoder.layer.1.attention.self.query"


def test_refuses_weights_that_the_folder_lacks(
    bert: Path, text: Path, tmp_path: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = with_weights(bert, tmp_path / "model", lambda state: state.pop(f"{QUERY}.weight"))
    line = refusal(capsys, out, [f"model={model}", f"text={text}", f"out={out}", "tokens=20"])
    assert line.startswith(f"model={model}: its weights lack {QUERY}.weight, which was made up; allowed: ")
    # Of a layer that is not asked for they do not matter.
    captured(model, text, out, "tokens=20", "include=key")


@pytest.mark.parametrize(
    ("tensor", "value", "dtype", "line"),
    [
        ("weight", np.nan, "float32", "model={model}: {query} weight[3, 2] is nan; allowed are finite values"),
        ("bias", np.inf, "float16", "model={model}: {query} bias[3] is inf; allowed are finite values"),
        (
            "weight",
            7e4,
            "float16",
            "dtype=float16: {query} weight[3, 2] is 70000; allowed are magnitudes up to 65504, or dtype=float32",
        ),
    ],
)
def test_refuses_values_that_no_layer_file_may_hold(
    tensor: str,
    value: float,
    dtype: str,
    line: str,
    bert: Path,
    text: Path,
    tmp_path: Path,
    out: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def change(state: dict[str, Any]) -> None:
        state[f"{QUERY}.{tensor}"][(3, 2) if tensor == "weight" else 3] = value

    out.write_text("before")
    model = with_weights(bert, tmp_path / "model", change)
    arguments = [f"model={model}", f"text={text}", f"out={out}", "tokens=20", f"dtype={dtype}"]
    assert refusal(capsys, out, arguments) == line.format(model=model, query=QUERY)


def test_refuses_activations_that_are_not_finite(
    bert: Path, text: Path, tmp_path: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def change(state: dict[str, Any]) -> None:
        # The fifth token of the second window: it lies in the file's row 20.
        state["embeddings.word_embeddings.weight"][windows_of(text, special=True)[1][4]] = np.nan

    model = with_weights(bert, tmp_path / "model", change)
    line = refusal(capsys, out, [f"model={model}", f"text={text}", f"out={out}", "tokens=30"])
    assert line == f"model={model}: {LAYERS[0]} activations[20, 0] is nan; allowed are finite values"


def test_refuses_models_that_need_more_than_a_text(
    text: Path, tmp_path: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = transformers.T5Config(
        vocab_size=len(SPECIAL + WORDS),
        d_model=16,
        d_kv=8,
        d_ff=16,
        num_layers=1,
        num_heads=2,
        decoder_start_token_id=0,
    )
    model = save_model(tmp_path / "t5", config, special=True)
    line = refusal(capsys, out, [f"model={model}", f"text={text}", f"out={out}", "tokens=20"])
    assert line.startswith(f"model={model}: fails on the text alone (ValueError: ")
    assert line.endswith("; allowed are models that need only token ids")


def test_refuses_a_folder_that_cannot_be_written(
    bert: Path, text: Path, out: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # A test that runs as root cannot take the right away by mode bits.
    monkeypatch.setattr(os, "access", lambda *_: False)
    line = refusal(capsys, out, [f"model={bert}", f"text={text}", f"out={out}"])
    assert line == f"out={out}: the folder {out.parent} cannot be written; {OUT}"


def test_a_full_disk_ends_in_one_line(
    bert: Path, text: Path, out: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(LayerWriter, "append", fail)
    line = refusal(capsys, out, [f"model={bert}", f"text={text}", f"out={out}", "tokens=20"])
    assert line == f"out={out}: cannot be written ([Errno 28] No space left on device); {OUT}"
