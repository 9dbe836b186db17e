"""Runs on other tokens of a file: those from a row on, as if the file had no others before them."""

from pathlib import Path

import h5py
import numpy as np
import pytest
from result_files import make_run

from awq_pycuda.errors import InputError
from awq_pycuda.layers.files import describe_layers, load_layers
from awq_pycuda.layers.writer import LayerWriter
from awq_pycuda.results.reader import read, read_channels

ROWS = 24


def written(path: Path, rows: slice = slice(None), fewer: int = ROWS) -> Path:
    """Three layers, the second with the input of the first, the third with `fewer` rows."""
    random = np.random.default_rng(0)
    x, other = random.standard_normal((2, ROWS, 8)).astype(np.float32)
    with LayerWriter(path) as writer:
        for name, tokens in {"a": x[rows], "b": x[rows], "c": other[rows][:fewer]}.items():
            layer = writer.add(name, random.standard_normal((6, 8)).astype(np.float32), tokens=None)
            writer.append(layer, tokens, "new-0" if name == "b" else None)
    return path


@pytest.mark.parametrize("chunks", ["null", "5"])
@pytest.mark.parametrize("more", [[], ["inputs.holdout=0.25"]], ids=["all", "held out"])
def test_a_run_on_rows_of_a_file_is_that_on_a_file_of_these_rows(chunks, more, tmp_path):
    more = [*more, f"inputs.chunk_tokens={chunks}", "search=output", "share=inputs", "timing=once", "inputs=file"]
    whole = written(tmp_path / "whole.h5")
    part = written(tmp_path / "part.h5", slice(4, 16))
    one, other = (
        make_run(tmp_path / path.stem, f"inputs.path={path}", "layers=null", *given, *more)
        for path, given in ((whole, ["inputs.first_token=4", "tokens=12"]), (part, ["tokens=null"]))
    )
    found, expected = read(one), read(other)
    for layer, alike in zip(found.layers, expected.layers, strict=True):
        assert layer.metrics == alike.metrics
        np.testing.assert_array_equal(layer.error, alike.error)
    for channels, alike in zip(read_channels(one, range(3)), read_channels(other, range(3)), strict=True):
        for name, values in channels.items():
            np.testing.assert_array_equal(values, alike[name])
    assert found.root["config_hash"] != expected.root["config_hash"]


def test_rows_are_counted_from_the_first_one(tmp_path):
    path = written(tmp_path / "layers.h5", fewer=10)
    assert [layer.tokens for layer in describe_layers(path, first=4)] == [20, 20, 6]
    assert [layer.tokens for layer in describe_layers(path, tokens=8, first=4)] == [8, 8, 6]
    layers = load_layers(path, tokens=8, first=4)
    with h5py.File(path) as file:
        np.testing.assert_array_equal(layers[0].activations, file["layers/000/activations"][4:12])
        np.testing.assert_array_equal(layers[2].activations, file["layers/002/activations"][4:])
    assert layers[1].activations is layers[0].activations


def test_a_first_row_that_is_not_there_is_refused(tmp_path):
    path = written(tmp_path / "layers.h5", fewer=10)
    lines = {
        10: r"inputs\.first_token=10: layer 2 \(c\) of inputs\.path holds activations of 10 tokens; allowed are 0 to 9",
        9: r"tokens=16: inputs\.path holds activations of at most 15 tokens from inputs\.first_token=9 on, those of "
        r"layer 0 \(a\); allowed are 1 to 15",
    }
    for first, line in lines.items():
        with pytest.raises(InputError, match=f"^{line}$"):
            load_layers(path, tokens=16, first=first)
    np.savez(tmp_path / "weights.npz", **{"000.weight": np.ones((4, 4), np.float32)})
    with pytest.raises(InputError, match=r"^inputs\.first_token=1: inputs\.path holds no activations; allowed is 0$"):
        load_layers(tmp_path / "weights.npz", first=1)


def test_a_fault_is_told_by_its_row_in_the_file(tmp_path):
    path = written(tmp_path / "layers.h5")
    with h5py.File(path, "a") as file:
        file["layers/002/activations"][7, 3] = np.nan
    for stored in (False, True):
        with pytest.raises(InputError, match=r"layer 2 \(c\) activations\[7, 3\] is nan; allowed are finite values"):
            load_layers(path, first=4, stored=stored)
        assert len(load_layers(path, first=8, stored=stored)) == 3
