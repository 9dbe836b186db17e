"""Layer files: what is written is read back exactly, and every fault ends in one line that names it."""

import os
import re
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file

from awq_pycuda.errors import InputError
from awq_pycuda.layers.files import LayerShape, describe_layers, find_fault, load_layers

SUFFIXES = [".h5", ".hdf5", ".safetensors", ".npz"]
Tensors = dict[str, NDArray[Any]]


def write(path: Path, tensors: Tensors) -> Path:
    """Write flat keys such as 000.weight in the format of the suffix, without any check."""
    if path.suffix == ".safetensors":
        save_file(tensors, path)
    elif path.suffix == ".npz":
        np.savez(path, **tensors)
    else:
        with h5py.File(path, "w") as file:
            file.create_group("layers")
            for key, array in tensors.items():
                file["layers/" + "/".join(key.rsplit(".", 1))] = array
    return path


def random(*shape: int, dtype: str = "float32") -> NDArray[Any]:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(dtype)


def chain() -> Tensors:
    """Three layers of different sizes, of which the last brings its own activations."""
    return {
        "000.weight": random(6, 4),
        "000.activations": random(9, 4),
        "000.bias": random(6),
        "001.weight": random(5, 6),
        "002.weight": random(3, 8),
        "002.activations": random(7, 8),
    }


def refusal(path: Path, **arguments: int) -> str:
    with pytest.raises(InputError) as raised:
        load_layers(path, **arguments)
    line = str(raised.value)
    assert "\n" not in line
    return line


FORMATS = [(suffix, dtype) for suffix in SUFFIXES for dtype in ("float32", "float16", ">f4", ">f2")]


# safetensors has no big-endian tensors.
@pytest.mark.parametrize(
    ("suffix", "dtype"), [pair for pair in FORMATS if pair[0] != ".safetensors" or ">" not in pair[1]]
)
def test_reads_what_was_written(tmp_path: Path, suffix: str, dtype: str) -> None:
    tensors = {key: array.astype(dtype) for key, array in chain().items()}
    layers = load_layers(write(tmp_path / f"a{suffix}", tensors))
    assert [layer.name for layer in layers] == ["000", "001", "002"]
    for index, layer in enumerate(layers):
        for name in ("weight", "activations", "bias"):
            array, expected = getattr(layer, name), tensors.get(f"{index:03}.{name}")
            if expected is None:
                assert array is None
                continue
            assert array.dtype == np.float32
            assert array.dtype.isnative
            assert array.flags.c_contiguous
            assert not array.flags.writeable
            np.testing.assert_array_equal(array, expected.astype(np.float32))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_finite_float16_becomes_the_same_float32(tmp_path: Path, suffix: str) -> None:
    values = np.arange(65536, dtype=np.uint16).view(np.float16)
    finite = values[np.isfinite(values)].reshape(2, -1)
    (layer,) = load_layers(write(tmp_path / f"a{suffix}", {"0.weight": finite}))
    np.testing.assert_array_equal(layer.weight.view(np.uint32), finite.astype(np.float32).view(np.uint32))


@pytest.mark.parametrize("suffix", [".npz", ".h5"])
def test_fortran_order_is_turned_into_rows(tmp_path: Path, suffix: str) -> None:
    weight = np.asfortranarray(random(3, 5))
    (layer,) = load_layers(write(tmp_path / f"a{suffix}", {"0.weight": weight}))
    assert layer.weight.flags.c_contiguous
    np.testing.assert_array_equal(layer.weight, weight)


def test_compressed_files_are_read(tmp_path: Path) -> None:
    weight = random(3, 5)
    np.savez_compressed(tmp_path / "a.npz", **{"0.weight": weight})
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("layers/0/weight", data=weight, compression="gzip", chunks=(2, 2))
    for path in (tmp_path / "a.npz", tmp_path / "a.h5"):
        np.testing.assert_array_equal(load_layers(path)[0].weight, weight)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_takes_the_first_layers_and_tokens(tmp_path: Path, suffix: str) -> None:
    tensors = chain()
    path = write(tmp_path / f"a{suffix}", tensors)
    layers = load_layers(path, layers=2, tokens=8)
    assert [layer.weight.shape for layer in layers] == [(6, 4), (5, 6)]
    np.testing.assert_array_equal(layers[0].activations, tensors["000.activations"][:8])
    assert layers[1].activations is None


def test_names_come_from_the_attribute_and_the_order_from_the_groups(tmp_path: Path) -> None:
    path = write(tmp_path / "a.h5", {"b.weight": random(1, 1), "a.weight": random(1, 2), "c.weight": random(2, 1)})
    with h5py.File(path, "r+") as file:
        file["layers/a"].attrs["name"] = "encoder.0.query"
        file["layers/b"].attrs["name"] = np.bytes_(b"encoder.0.key")
    assert [layer.name for layer in load_layers(path)] == ["encoder.0.query", "encoder.0.key", "c"]


@pytest.mark.parametrize("name", [b"\xff", "a\nb"])
def test_refuses_names_that_results_cannot_hold(tmp_path: Path, name: str | bytes) -> None:
    path = write(tmp_path / "a.h5", {"000.weight": random(1, 1)})
    with h5py.File(path, "r+") as file:
        file["layers/000"].attrs["name"] = name
    assert "layer 0 has the name " in refusal(path)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_layers_sort_by_name(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"a{suffix}", {f"{name}.weight": random(2, 2) for name in ("b.x", "10", "a", "2")})
    assert [layer.name for layer in load_layers(path)] == ["10", "2", "a", "b.x"]


def test_describes_what_it_would_load(tmp_path: Path) -> None:
    path = write(tmp_path / "a.h5", chain())
    assert describe_layers(path, tokens=5) == [
        LayerShape("000", out_features=6, in_features=4, tokens=5, has_bias=True),
        LayerShape("001", out_features=5, in_features=6, tokens=None, has_bias=False),
        LayerShape("002", out_features=3, in_features=8, tokens=5, has_bias=False),
    ]
    assert describe_layers(path, layers=1)[0].tokens == 9


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("layers", [-1, 0, 4])
def test_refuses_layers_the_file_lacks(tmp_path: Path, suffix: str, layers: int) -> None:
    path = write(tmp_path / f"a{suffix}", chain())
    assert refusal(path, layers=layers) == f"layers={layers}: inputs.path holds 3 layers; allowed are 1 to 3"


@pytest.mark.parametrize("tokens", [-1, 0, 10])
def test_refuses_tokens_the_file_lacks(tmp_path: Path, tokens: int) -> None:
    assert refusal(write(tmp_path / "a.h5", chain()), tokens=tokens) == (
        f"tokens={tokens}: inputs.path holds activations of at most 9 tokens, those of layer 0 (000); "
        "allowed are 1 to 9"
    )


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_layer_with_fewer_tokens_gives_what_it_has(tmp_path: Path, suffix: str) -> None:
    tensors = chain()
    path = write(tmp_path / f"a{suffix}", tensors)
    first, _, last = load_layers(path, tokens=8)
    np.testing.assert_array_equal(first.activations, tensors["000.activations"][:8])
    np.testing.assert_array_equal(last.activations, tensors["002.activations"])
    assert [shape.tokens for shape in describe_layers(path, tokens=8)] == [8, None, 7]


STRUCTURE = {
    "no weight": ({"000.weight": None}, r"layer 0 \(000\) has no weight; every layer needs one"),
    "weight 1-D": ({"000.weight": random(4)}, r"layer 0 \(000\) weight has shape \(4,\); allowed are 2 dimensions"),
    "weight 3-D": ({"001.weight": random(2, 3, 4)}, r"layer 1 \(001\) weight has shape \(2, 3, 4\); allowed are 2"),
    "bias 2-D": ({"000.bias": random(6, 1)}, r"layer 0 \(000\) bias has shape \(6, 1\); allowed are 1 dimension$"),
    "scalar": ({"000.bias": np.float32([1]).reshape(())}, r"bias has shape \(\); allowed are 1 dimension$"),
    "int": ({"001.weight": np.ones((5, 6), np.int8)}, r"layer 1 \(001\) weight has dtype .*; allowed are float32 and"),
    "float64": (
        {"002.activations": random(7, 8, dtype="float64")},
        r"layer 2 \(002\) activations has dtype .*float16$",
    ),
    "no rows": ({"000.weight": random(0, 4)}, r"weight has shape \(0, 4\); allowed are dimensions of at least 1"),
    "no columns": ({"001.weight": random(5, 0)}, r"weight has shape \(5, 0\); allowed are dimensions of at least 1"),
    "no tokens": ({"002.activations": random(0, 8)}, r"activations has shape \(0, 8\); allowed are dimensions of"),
    "columns": ({"000.activations": random(9, 5)}, r"layer 0 \(000\) activations has 5 columns; .* its 4 in_features"),
    "bias length": ({"000.bias": random(4)}, r"layer 0 \(000\) bias has 4 values; allowed are its 6 out_features"),
    "misspelt": ({"000.wieght": random(6, 4)}, r"layer 0 \(000\) wieght is not known; allowed are weight, activations"),
    "no chain": (
        {"001.weight": random(5, 7)},
        r"layer 1 \(001\) has 7 in_features and no activations of its own; allowed are the 6 out_features of layer 0",
    ),
}


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("case", STRUCTURE)
def test_refuses_tensors_that_do_not_fit(tmp_path: Path, suffix: str, case: str) -> None:
    changes, message = STRUCTURE[case]
    tensors = {key: array for key, array in (chain() | changes).items() if array is not None}
    path = write(tmp_path / f"a{suffix}", tensors)
    line = refusal(path)
    assert line.startswith(f"inputs.path={path}: ")
    assert re.search(message, line)


def test_faults_of_layers_not_chosen_do_not_matter(tmp_path: Path) -> None:
    path = write(tmp_path / "a.h5", chain() | {"002.weight": np.full((3, 8), np.nan, np.float32)})
    assert len(load_layers(path, layers=2)) == 2
    assert "layer 2 (002) weight[0, 0] is nan" in refusal(path)


def test_values_of_tokens_not_chosen_do_not_matter(tmp_path: Path) -> None:
    tensors = chain()
    tensors["000.activations"][8, 1] = np.inf
    path = write(tmp_path / "a.h5", tensors)
    assert load_layers(path, tokens=7)[0].activations is not None
    assert "activations[8, 1] is inf" in refusal(path)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(
    ("key", "index", "value", "message"),
    [
        ("000.weight", (5, 3), np.nan, "layer 0 (000) weight[5, 3] is nan; allowed are finite values"),
        ("001.weight", (2, 0), -np.inf, "layer 1 (001) weight[2, 0] is -inf; allowed are finite values"),
        ("000.bias", (4,), np.inf, "layer 0 (000) bias[4] is inf; allowed are finite values"),
        ("002.activations", (6, 7), np.nan, "layer 2 (002) activations[6, 7] is nan; allowed are finite values"),
        ("001.weight", (1, 1), -2e37, "layer 1 (001) weight[1, 1] is -2e+37; allowed are magnitudes up to 1e+37"),
        ("002.activations", (0, 0), 2e18, "activations[0, 0] is 2e+18; allowed are magnitudes up to 1e+18"),
    ],
)
def test_refuses_values_with_their_place(
    tmp_path: Path, suffix: str, key: str, index: tuple[int, ...], value: float, message: str
) -> None:
    tensors = chain()
    tensors[key][index] = value
    path = write(tmp_path / f"a{suffix}", tensors)
    line = refusal(path)
    assert line.startswith(f"inputs.path={path}: layer")
    assert line.endswith(message)


def test_values_at_the_limits_are_allowed(tmp_path: Path) -> None:
    tensors = {"0.weight": np.full((1, 2), -1e37, np.float32), "0.activations": np.full((1, 2), 1e18, np.float32)}
    (layer,) = load_layers(write(tmp_path / "a.h5", tensors))
    assert layer.weight[0, 0] == np.float32(-1e37)


def test_the_check_of_values_makes_no_copy() -> None:
    array = np.ones((1000, 1024), np.float32)
    tracemalloc.start()
    try:
        assert find_fault(array, 1e37) is None
        assert tracemalloc.get_traced_memory()[1] < array.nbytes / 10
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.bin", b"x", "the suffix '.bin' is unknown; allowed are .h5 or .hdf5, .safetensors and .npz"),
        ("a", b"x", "the suffix '' is unknown"),
        ("a.h5", None, "no such file"),
        ("a.h5", b"", "is empty"),
        ("a.npz", b"", "is empty"),
        ("a.safetensors", b"", "is empty"),
        ("a.h5", b"no such thing", "is not an HDF5 file"),
        ("a.npz", b"no such thing", "cannot be read (File is not a zip file); allowed is a whole .npz file"),
        ("a.safetensors", b"no such thing", "cannot be read ("),
    ],
)
def test_refuses_what_is_no_layer_file(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    assert refusal(path).startswith(f"inputs.path={path}: {message}")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_refuses_a_folder(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"a{suffix}").mkdir()
    assert "is not a file" in refusal(tmp_path / f"a{suffix}")


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("share", [0.01, 0.3, 0.6, 0.99])
def test_refuses_a_truncated_file(tmp_path: Path, suffix: str, share: float) -> None:
    path = write(tmp_path / f"a{suffix}", {"000.weight": random(64, 64), "001.weight": random(64, 64)})
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    assert refusal(path).startswith(f"inputs.path={path}: ")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_refuses_a_file_without_layers(tmp_path: Path, suffix: str) -> None:
    assert "holds no layers" in refusal(write(tmp_path / f"a{suffix}", {}))


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
@pytest.mark.parametrize("key", ["weight", ".weight"])
def test_refuses_keys_that_name_no_layer(tmp_path: Path, suffix: str, key: str) -> None:
    path = write(tmp_path / f"a{suffix}", {key: random(2, 2)})
    assert refusal(path) == f"inputs.path={path}: the key '{key}' names no layer; allowed are keys such as 000.weight"


def test_refuses_bfloat16(tmp_path: Path) -> None:
    header = b'{"0.weight":{"dtype":"BF16","shape":[1,2],"data_offsets":[0,4]}}'
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    assert "layer 0 (0) weight has dtype bfloat16; allowed are float32" in refusal(tmp_path / "a.safetensors")


def test_never_unpickles(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Callable[[str], Any], tuple[str]]:
            return os.mkdir, (str(tmp_path / "trapped"),)

    np.savez(tmp_path / "a.npz", **{"0.weight": np.array([[Trap()]], dtype=object)}, allow_pickle=True)
    assert "layer 0 (0) weight has dtype object" in refusal(tmp_path / "a.npz")
    assert not (tmp_path / "trapped").exists()


def test_refuses_a_member_of_a_zip_that_is_no_array(tmp_path: Path) -> None:
    path = write(tmp_path / "a.npz", chain())
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("notes.txt", "no array")
    assert refusal(path).startswith(f"inputs.path={path}: cannot be read (")


def test_refuses_a_damaged_zip(tmp_path: Path) -> None:
    path = write(tmp_path / "a.npz", {"0.weight": random(64, 64)})
    content = bytearray(path.read_bytes())
    content[5000] ^= 1
    path.write_bytes(content)
    assert "Bad CRC-32" in refusal(path)


def test_refuses_other_hdf5(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file["other"] = 1
    assert "has no group /layers" in refusal(path)
    with h5py.File(path, "w") as file:
        file["layers"] = 1
    assert "has no group /layers" in refusal(path)
    with h5py.File(path, "w") as file:
        file["layers/000"] = 1
    assert "/layers/000 is not a group" in refusal(path)
    with h5py.File(path, "w") as file:
        file.create_group("layers/000/weight")
    assert "/layers/000/weight is not a dataset; allowed are weight, activations, bias" in refusal(path)
    with h5py.File(path, "w") as file:
        file["layers/000/weight"] = h5py.SoftLink("/nowhere")
    assert "/layers/000/weight is not a dataset" in refusal(path)
    with h5py.File(path, "w") as file:
        file["layers/000/weight"] = h5py.Empty("f4")
    assert "weight has shape (); allowed are 2 dimensions" in refusal(path)


def test_refuses_what_cannot_fit_into_memory(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive, archive.open("000.weight.npy", "w") as member:
        np.lib.format.write_array_header_1_0(member, {"shape": (2**29, 2**29), "descr": "<f4", "fortran_order": False})
    assert "does not fit into memory" in refusal(tmp_path / "a.npz")


def test_refuses_a_file_that_cannot_be_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.h5", chain())

    def deny(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    # A test that runs as root cannot take the right away by mode bits.
    monkeypatch.setattr(Path, "open", deny)
    assert refusal(path) == f"inputs.path={path}: cannot be opened (Permission denied); allowed is a readable file"
