"""What capture refuses: one line that names the fault, and the folder of the layer file left as it was."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
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
    refusal,
    refused,
    run,
    save_model,
    text,
    windows_of,
    with_weights,
)

from awq_pycuda.layers.writer import LayerWriter

KEYS = "allowed: model, text, out, tokens, dtype, include"
OUT = "allowed: a file name that ends in .h5 or .hdf5, in an existing folder that can be written"


@pytest.mark.parametrize(
    ("argument", "line"),
    [
        ("tokens", f"tokens: is no key=value; {KEYS}"),
        ("token=5", f"token=5: no such key (did you mean tokens?); {KEYS}"),
        ("tokens.x=5", f"tokens.x=5: no such key (did you mean tokens?); {KEYS}"),
        ("=5", f"=5: no such key; {KEYS}"),
        ("tokens=0", "tokens=0: is too small; allowed: whole numbers of at least 1"),
        ("tokens=-4", "tokens=-4: is too small; allowed: whole numbers of at least 1"),
        ("tokens=abc", "tokens=abc: is no whole number; allowed: whole numbers of at least 1"),
        ("tokens=1.5", "tokens=1.5: is no whole number; allowed: whole numbers of at least 1"),
        ("tokens=", "tokens=: is missing; allowed: whole numbers of at least 1"),
        ("tokens=40", "tokens=40: text={text} holds 39 tokens of this model; allowed: 1 to 39"),
        ("dtype=bfloat16", "dtype=bfloat16: is none of these; allowed: float32, float16"),
        (
            "include=[",
            "include=[: is no regular expression (unterminated character set at position 0); allowed: a regular",
        ),
        (
            "include=nowhere",
            "include=nowhere: finds no linear layer; allowed: a regular expression that finds the path",
        ),
        (
            "include=pooler",
            "include=pooler: finds only layers that cannot be captured (1 row whatever the number",
        ),
        ("include=${x}", "include=${x}: finds no linear layer; allowed: a regular expression that finds the path"),
        ("model=", "model=: is missing; allowed: a folder with config.json, weights and tokenizer.json"),
        ("model={tmp}/no", "model={tmp}/no: is no folder; allowed: a folder with config.json"),
        ("model={text}", "model={text}: is neither a folder nor a GGUF file; allowed: a folder with config.json"),
        (
            "model=bert-base/uncased.v2",
            "model=bert-base/uncased.v2: is no folder; of the model by that name on Hugging Face, "
            "hf download bert-base/uncased.v2 --local-dir FOLDER makes one; allowed: a folder with config.json",
        ),
        ("model=gpt2", "model=gpt2: is no folder; of the model by that name on Hugging Face, hf download gpt2"),
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
    defaults = [f"model={bert}", f"text={text}", f"out={out}", "tokens=20"]
    arguments = [each for each in defaults if each.partition("=")[0] != argument.partition("=")[0]] + [argument]
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
    assert result.stderr.startswith(f"error: model={tmp_path}: holds no config.json")


@pytest.mark.parametrize("library", ["torch", "transformers"])
def test_names_what_to_install(library: str, bert: Path, monkeypatch: pytest.MonkeyPatch, refused: Refused) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    line = refused(bert)
    assert line.startswith(f"model={bert}: to load it, {library} is missing (")
    assert line.endswith("); allowed: after pip install -r requirements-capture.txt")


@pytest.mark.parametrize(
    ("content", "fault"),
    [(b"", "is empty"), (b" \n", "is empty"), (b"ab\xff\xfe", "is no UTF-8 (byte 2: invalid start byte)")],
)
def test_refuses_texts_without_text(content: bytes, fault: str, bert: Path, text: Path, refused: Refused) -> None:
    text.write_bytes(content)
    line = refused(bert)
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
def test_refuses_damaged_models(name: str, content: bytes, bert: Path, tmp_path: Path, refused: Refused) -> None:
    model = damaged(bert, tmp_path / "model", name, content)
    line = refused(model, "tokens=20")
    assert line.startswith(f"model={model}: cannot be loaded (")


QUERY = "encoder.layer.1.attention.self.query"


def test_refuses_weights_that_the_folder_lacks(
    bert: Path, text: Path, tmp_path: Path, out: Path, refused: Refused
) -> None:
    model = with_weights(bert, tmp_path / "model", lambda state: state.pop(f"{QUERY}.weight"))
    line = refused(model, "tokens=20")
    assert line.startswith(f"model={model}: its weights lack {QUERY}.weight, which was made up; allowed: ")
    # What runs behind the last layer that is asked for does not matter.
    captured(model, text, out, "tokens=20", "include=layer.0")


@pytest.mark.parametrize(
    ("tensor", "value", "dtype", "line"),
    [
        ("weight", np.nan, "float32", "model={model}: {query} weight[3, 2] is nan; allowed: finite values"),
        ("bias", np.inf, "float16", "model={model}: {query} bias[3] is inf; allowed: finite values"),
        (
            "weight",
            2e-8,
            "float16",
            "dtype=float16: {query} weight[3, 2] is 2e-08; allowed: 0 and magnitudes above 2.98e-08, or dtype=float32",
        ),
        (
            "bias",
            -1e-9,
            "float16",
            "dtype=float16: {query} bias[3] is -1e-09; allowed: 0 and magnitudes above 2.98e-08, or dtype=float32",
        ),
        (
            "weight",
            7e4,
            "float16",
            "dtype=float16: {query} weight[3, 2] is 70000; allowed: magnitudes up to 65504, or dtype=float32",
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


def test_refuses_activations_that_are_not_finite(bert: Path, text: Path, tmp_path: Path, refused: Refused) -> None:
    def change(state: dict[str, Any]) -> None:
        # The fifth token of the second window: it lies in the file's row 20.
        state["embeddings.word_embeddings.weight"][windows_of(text, special=True)[1][4]] = np.nan

    model = with_weights(bert, tmp_path / "model", change)
    line = refused(model, "tokens=30")
    assert line == f"model={model}: {LAYERS[0]} activations[20, 0] is nan; allowed: finite values"


def test_refuses_models_that_need_more_than_a_text(tmp_path: Path, refused: Refused) -> None:
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
    line = refused(model, "tokens=20")
    assert line.startswith(f"model={model}: asks for decoder_input_ids beside the text (ValueError: ")
    assert line.endswith("; allowed: models that need only token ids")


def test_refuses_a_folder_that_cannot_be_written(
    bert: Path, out: Path, monkeypatch: pytest.MonkeyPatch, refused: Refused
) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    line = refused(bert)
    assert line == f"out={out}: the folder {out.parent} cannot be written; {OUT}"


def test_a_full_disk_ends_in_one_line(bert: Path, out: Path, monkeypatch: pytest.MonkeyPatch, refused: Refused) -> None:
    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(LayerWriter, "append", fail)
    line = refused(bert, "tokens=20")
    assert line == f"out={out}: cannot be written ([Errno 28] No space left on device); {OUT}"
