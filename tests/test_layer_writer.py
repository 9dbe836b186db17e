"""The writer of layer files: what it writes is read back, and half a file never has the final name."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from awq_pycuda.errors import InputError
from awq_pycuda.hdf5 import UnreadableError
from awq_pycuda.layers.files import describe_layers, load_layers, stored_weights, unreached_layers
from awq_pycuda.layers.notes import SAID, read_notes
from awq_pycuda.layers.writer import LayerWriter


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_the_writer_writes_what_is_read(tmp_path: Path, dtype: type[np.floating[Any]]) -> None:
    path = tmp_path / "a.h5"
    random = np.random.default_rng(0)
    weight, bias, activations = (random.standard_normal(shape, np.float32) for shape in ((3, 4), 3, (5, 4)))
    with LayerWriter(path, dtype) as writer:
        first = writer.add("one", weight, bias, tokens=5)
        dropped = writer.add("two", weight)
        writer.add("three", weight[:, :3])
        writer.append(first, activations[:2])
        writer.append(first, activations[2:])
        assert writer.rows(first) == 5
        writer.remove(dropped)
        writer.set_attributes({"model": "tiny", "tokens": 5})
        assert not path.exists()
    assert os.listdir(tmp_path) == ["a.h5"]
    one, three = load_layers(path)
    assert (one.name, three.name) == ("one", "three")
    for array, expected in ((one.weight, weight), (one.bias, bias), (one.activations, activations)):
        np.testing.assert_array_equal(array, expected.astype(dtype))
    assert (three.bias, three.activations) == (None, None)
    with h5py.File(path) as file:
        assert list(file["layers"]) == ["000", "001"]
        assert dict(file.attrs) == {"model": "tiny", "tokens": 5}
        dataset = file["layers/000/activations"]
        assert dataset.dtype == dtype
        assert [dimension.label for dimension in dataset.dims] == ["tokens", "in_features"]
        assert set(dataset.attrs) >= {"description", "units"}


def test_rows_as_they_come(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    random = np.random.default_rng(0)
    weight, rows = (random.standard_normal(shape, np.float32) for shape in ((3, 4), (7, 4)))
    with LayerWriter(path) as writer:
        reached, idle = (writer.add(name, weight, tokens=None) for name in ("reached", "idle"))
        writer.append(reached, rows[:2])
        writer.append(reached, rows[2:])
        assert (writer.rows(reached), writer.rows(idle)) == (7, 0)
    (layer,) = load_layers(path)
    np.testing.assert_array_equal(layer.activations, rows)
    assert [shape.name for shape in describe_layers(path)] == ["reached"]
    assert unreached_layers(path) == ["idle"]


def test_a_file_of_layers_that_no_token_reached_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    with LayerWriter(path) as writer:
        writer.add("idle", np.ones((2, 2), np.float32), tokens=None)
    with pytest.raises(InputError, match="holds no layer that a token reached; allowed is a file with activations"):
        load_layers(path)


def test_many_layers_keep_their_order(tmp_path: Path) -> None:
    with LayerWriter(tmp_path / "a.h5") as writer:
        for index in range(1001):
            writer.add(str(index), np.ones((1, 1), np.float32))
    assert [layer.name for layer in describe_layers(tmp_path / "a.h5")] == [str(index) for index in range(1001)]


def test_a_failed_writer_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    path.write_text("before")

    def fail() -> None:
        with LayerWriter(path) as writer:
            writer.add("one", np.ones((2, 2), np.float32))
            raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        fail()
    assert os.listdir(tmp_path) == ["a.h5"]
    assert path.read_text() == "before"


def test_a_killed_writer_leaves_nothing_under_the_final_name(tmp_path: Path) -> None:
    script = """
import os, signal, sys
from pathlib import Path
import numpy as np
from awq_pycuda.layers.writer import LayerWriter
with LayerWriter(Path(sys.argv[1])) as writer:
    writer.add("one", np.ones((2, 2), np.float32))
    os.kill(os.getpid(), signal.SIGKILL)
"""
    result = subprocess.run([sys.executable, "-c", script, str(tmp_path / "a.h5")], check=False)
    assert result.returncode == -9
    assert not (tmp_path / "a.h5").exists()


def shared_layers(path: Path, rows: list[list[tuple[int, int | None]]], tokens: int | None = None) -> list[Any]:
    """Writes three layers of 4 channels, window by window: of each layer which rows it sees, and whose they are."""
    random = np.random.default_rng(1)
    given = [random.standard_normal((2, 4), np.float32) for _ in range(9)]
    with LayerWriter(path) as writer:
        ids = [writer.add(f"layer {index}", np.ones((3, 4), np.float32), tokens=tokens) for index in range(3)]
        for window in rows:
            for layer_id, (which, of) in zip(ids, window, strict=True):
                if which >= 0:
                    writer.append(layer_id, given[which], None if of is None else ids[of])
    seen = [[given[window[index][0]] for window in rows if window[index][0] >= 0] for index in range(3)]
    return [np.concatenate(each) if each else None for each in seen]


SHARING = {
    "one input": ([[(0, None), (0, 0), (0, 0)], [(1, None), (1, 0), (1, 0)]], [None, "000", "000"]),
    "two of three": ([[(0, None), (1, None), (1, 1)], [(2, None), (3, None), (3, 1)]], [None, None, "001"]),
    "the first window alone": ([[(0, None), (0, 0), (0, 0)], [(1, None), (2, None), (1, 0)]], [None, None, "000"]),
    "not the first window": ([[(0, None), (1, None), (0, 0)], [(2, None), (2, 0), (2, 0)]], [None, None, "000"]),
    "another's from the second window on": ([[(0, None), (0, 0), (0, 0)], [(1, None), (2, None), (2, 1)]], [None] * 3),
    "fewer rows": ([[(0, None), (0, 0), (0, 0)], [(1, None), (-1, None), (1, 0)]], [None, None, "000"]),
    "a window missed": (
        [[(0, None), (0, 0), (0, 0)], [(1, None), (-1, None), (1, 0)], [(2, None), (2, 0), (2, 0)]],
        [None, None, "000"],
    ),
}


@pytest.mark.parametrize("name", SHARING)
def test_layers_that_see_the_same_have_one_copy(tmp_path: Path, name: str) -> None:
    path = tmp_path / "a.h5"
    windows, shared = SHARING[name]
    tokens = None if any(which < 0 for window in windows for which, _ in window) else 2 * len(windows)
    expected = shared_layers(path, windows, tokens)
    with h5py.File(path) as file:
        assert [layer.attrs.get("activations_of") for layer in file["layers"].values()] == shared
        own = [index for index, other in enumerate(shared) if other is None]
        assert [index for index, layer in enumerate(file["layers"].values()) if "activations" in layer] == own
    layers = load_layers(path)
    for layer, rows, other in zip(layers, expected, shared, strict=True):
        np.testing.assert_array_equal(layer.activations, rows)
        assert layer.input_of == (None if other is None else int(other))
        assert other is None or layer.activations is layers[int(other)].activations
    assert [shape.input_of for shape in describe_layers(path)] == [layer.input_of for layer in layers]
    assert [len(layer.activations) for layer in load_layers(path, tokens=1)] == [1, 1, 1]


def test_a_layer_whose_input_is_another_s_outlives_it(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    rows = np.arange(8, dtype=np.float32).reshape(2, 4)
    with LayerWriter(path) as writer:
        first, second = (writer.add(name, np.ones((3, 4), np.float32), tokens=2) for name in "ab")
        writer.append(first, rows)
        writer.append(second, rows, first)
        writer.remove(first)
    (layer,) = load_layers(path)
    assert (layer.name, layer.input_of) == ("b", None)
    np.testing.assert_array_equal(layer.activations, rows)


@pytest.mark.parametrize(
    ("attribute", "told"),
    [("007", "allowed is a layer before it"), ("001", "allowed is a layer before it"), ("", None)],
)
def test_whose_activations_a_layer_sees_must_make_sense(tmp_path: Path, attribute: str, told: str | None) -> None:
    path = tmp_path / "a.h5"
    shared_layers(path, SHARING["one input"][0], 4)
    with h5py.File(path, "r+") as file:
        file["layers/002"].attrs["activations_of"] = attribute
        if told is None:
            file["layers/002/activations"] = np.ones((4, 4), np.float32)
            file["layers/002"].attrs["activations_of"] = "000"
            told = "but the layer has activations; allowed is one of them"
    with pytest.raises(InputError, match=f"/layers/002: attribute activations_of is .*{told}"):
        load_layers(path)


def test_a_file_keeps_what_was_said_however_much_it_is(tmp_path: Path) -> None:
    lines = [f"left out: layer {number}, whose γ nobody knows" for number in range(3000)]
    path = tmp_path / "a.h5"
    with LayerWriter(path) as writer:
        writer.add("one", np.ones((3, 4)))
        writer.set_attributes({"model": "tiny", "tokens": 5})
        writer.set_text(SAID, json.dumps(lines), "what is to be said")
    assert read_notes(path, ("model", "tokens", "other")) == ({"model": "tiny", "tokens": "5"}, lines)
    with LayerWriter(tmp_path / "silent.h5") as writer:
        writer.add("one", np.ones((3, 4)))
    (tmp_path / "text.h5").write_text("no HDF5")
    for name in ("silent.h5", "text.h5", "none.h5"):
        with pytest.raises(UnreadableError):
            read_notes(tmp_path / name, ())


def test_weights_are_found_by_the_names_of_layers_that_a_token_reached(tmp_path: Path) -> None:
    path, weights = tmp_path / "a.h5", np.arange(36, dtype=np.float32).reshape(3, 3, 4)
    with LayerWriter(path) as writer:
        for name, weight in zip(("one", "idle", "two"), weights, strict=True):
            layer = writer.add(name, weight, tokens=None)
            if name != "idle":
                writer.append(layer, weight)
    found = stored_weights(path)
    assert list(found) == ["one", "two"]
    np.testing.assert_array_equal(found["two"][:], weights[2])
    np.testing.assert_array_equal(found["one"][1:], weights[0, 1:])
    del found  # which holds the file open
    with h5py.File(path, "a") as file:
        file["layers/002"].attrs["name"] = "one"
    with pytest.raises(InputError, match=r"a\.h5: holds two layers named one$"):
        stored_weights(path)
