"""The writer of layer files: what it writes is read back, and half a file never has the final name."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from awq_pycuda.errors import InputError
from awq_pycuda.layers.files import describe_layers, load_layers, unreached_layers
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
