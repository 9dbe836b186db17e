"""GGUF files that capture refuses for themselves: damaged, parts, without a tokenizer, of kinds that nothing reads."""

import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
from tiny_gguf import HIDDEN, llama_tensors, model, plain, write_gguf
from tiny_models import Refused, out, reason, refused, text


def changed(settings: dict[str, Any]) -> Callable[[gguf.GGUFWriter], None]:
    def change(writer: gguf.GGUFWriter) -> None:
        for key, value in settings.items():
            kind = gguf.GGUFValueType.STRING if isinstance(value, str) else gguf.GGUFValueType.UINT16
            writer.kv_data[0][key] = gguf.GGUFValue(value, kind)

    return change


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"split.no": 1, "split.count": 3}, "is part 2 of 3; allowed: whole GGUF files, as llama-gguf-split --merge"),
        ({"general.type": "adapter"}, "its general.type is adapter; allowed: GGUF files of a whole language model"),
        (
            {"general.architecture": "no-such"},
            "cannot be loaded (ValueError: GGUF model with architecture no-such is not supported yet.)",
        ),
        (
            {"tokenizer.ggml.model": "no-such"},
            "cannot be loaded (ValueError: Cannot build a tokenizer from a GGUF file",
        ),
    ],
)
def test_refuses_files_of_other_kinds(
    settings: dict[str, Any], line: str, model: Any, tmp_path: Path, reason: Refused
) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", llama_tensors(model), changed(settings))
    assert reason(path, "tokens=20").startswith(line)


def test_refuses_a_file_without_a_tokenizer(model: Any, tmp_path: Path, reason: Refused) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", llama_tensors(model), words=False)
    assert reason(path).startswith("holds no tokenizer.ggml.model; allowed: GGUF files of a whole language model")


def test_refuses_a_file_without_tensors(tmp_path: Path, reason: Refused) -> None:
    assert reason(write_gguf(tmp_path / "tiny.gguf", {})).startswith("holds no tensors; allowed: GGUF files of")


CUT = "is a GGUF file cut short or damaged ("


@pytest.mark.parametrize(
    ("damage", "start"),
    [
        (lambda data: data[:-1], CUT),
        (lambda data: data[:200], f"{CUT}it ends within its header, at byte 200); allowed: "),
        (lambda data: data[:4], f"{CUT}it ends within its header, at byte 4); allowed: "),
        (lambda data: data[:4] + struct.pack("<I", 1) + data[8:], "is of GGUF version 1, or of another byte order"),
        (lambda data: data[:4] + struct.pack(">I", 3) + data[8:], "is of GGUF version 50331648, or of another byte"),
        (lambda data: data.replace(b"llama.block_count", b"llama.block\xffcount"), f"{CUT}a name before byte "),
        (lambda data: data.replace(b"blk.1.ffn_up", b"blk.0.ffn_up"), f"{CUT}it holds blk.0.ffn_up.weight twice"),
        # The type of a setting stands behind its name, the type of an array's members behind that.
        (
            lambda data: data.replace(b"context_length\x04", b"context_length\x63"),
            f"{CUT}a setting before byte ",
        ),
        (
            lambda data: data.replace(b"ggml.tokens\x09\0\0\0\x08", b"ggml.tokens\x09\0\0\0\x09"),
            f"{CUT}an array before byte ",
        ),
        (
            lambda data: data.replace(
                b"output_norm.weight" + struct.pack("<IQI", 1, HIDDEN, 0),
                b"output_norm.weight" + struct.pack("<IQI", 1, HIDDEN, 999),
            ),
            "holds output_norm.weight in GGUF's type 999, which gguf does not know; allowed: ",
        ),
    ],
)
def test_refuses_damaged_files(damage: Callable[[bytes], bytes], start: str, plain: Path, reason: Refused) -> None:
    whole = plain.read_bytes()
    plain.write_bytes(damage(whole))
    assert plain.read_bytes() != whole
    assert reason(plain).startswith(start)


@pytest.mark.parametrize("library", ["gguf", "accelerate"])
def test_names_what_to_install(library: str, plain: Path, monkeypatch: pytest.MonkeyPatch, reason: Refused) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    line = reason(plain)
    assert line.startswith(f"to load it, {library} is missing (")
    assert line.endswith("); allowed: after pip install -r requirements-capture.txt")


def test_refuses_files_that_are_no_gguf(tmp_path: Path, refused: Refused) -> None:
    for content in (b"", b"GGU", b"no such thing"):
        path = tmp_path / "model.gguf"
        path.write_bytes(content)
        assert refused(path).startswith(f"model={path}: is neither a folder nor a GGUF file; allowed: a folder with")
