"""Layer files: real weights and activations that a run takes instead of synthetic ones.

A file holds one group of tensors per layer, in HDF5 (``/layers/000/weight``) or as the flat keys ``000.weight`` of
safetensors and npz. `load_layers` refuses whatever the pipeline could not use, with the exact place of the fault.
"""

import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from awq_pycuda import hdf5
from awq_pycuda.errors import InputError

HDF5_SUFFIXES = (".h5", ".hdf5")
TENSOR_DIMS = {"weight": 2, "activations": 2, "bias": 1}

# Larger values would overflow float32 in W*s (s is at most 8) and in the mean of x**2.
MAX_MAGNITUDE = {"weight": 1e37, "activations": 1e18, "bias": 1e37}

# Attribute of a layer in HDF5 that no token reached when it was captured: an expert without activations to run on.
UNREACHED = "unreached"

# What a damaged file raises, over h5py, zipfile, numpy and safetensors.
_DAMAGE = (OSError, ValueError, KeyError, RuntimeError, EOFError, zipfile.BadZipFile, zlib.error, SafetensorError)


@dataclass(frozen=True)
class FileLayer:
    """One layer as read: read-only, C-contiguous float32 arrays whose values are all finite."""

    name: str
    """Path of the module in its model, or the name of the layer's group where the file gives none."""
    weight: NDArray[np.float32]
    """(out_features, in_features)"""
    activations: NDArray[np.float32] | None
    """(tokens, in_features), or None: the layer takes the ReLU of the previous layer's output."""
    bias: NDArray[np.float32] | None
    """(out_features,), or None."""


@dataclass(frozen=True)
class LayerShape:
    """Dimensions of one layer of a file."""

    name: str
    out_features: int
    in_features: int
    tokens: int | None
    """Rows of activations that would be read, or None where the layer brings none of its own."""
    has_bias: bool


@dataclass(frozen=True)
class _Tensor:
    """A tensor of an open file, not read yet."""

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[int], NDArray[np.float32]]
    """Reads the first so many rows as a new float32 array."""


@dataclass(frozen=True)
class _Source:
    """The tensors of one layer of an open file."""

    name: str
    tensors: dict[str, _Tensor]
    unreached: bool = False


def load_layers(path: Path, layers: int | None = None, tokens: int | None = None) -> list[FileLayer]:
    """Read the first ``layers`` layers of a file (default: all), in the order of their group names.

    Layers that no token reached are left out: they have nothing to run on, see `unreached_layers`.
    ``tokens`` takes only the first so many rows of every layer's own activations (default: all), and all of a layer
    that holds fewer, such as an expert to which few tokens were routed. Float16 tensors come back as float32. Raises
    `InputError` for any fault of the file, for more layers than it holds and for more tokens than any of them does.
    """
    loaded = []
    with _open_checked(path, layers, tokens) as sources:
        for index, source in enumerate(sources):
            arrays = {}
            for tensor_name, tensor in source.tensors.items():
                rows = tensor.shape[0]
                array = tensor.read(rows if tokens is None or tensor_name != "activations" else min(rows, tokens))
                fault = find_fault(array, MAX_MAGNITUDE[tensor_name])
                if fault is not None:
                    raise _refuse(path, f"{_label(index, source.name)} {tensor_name}{fault}")
                array.setflags(write=False)
                arrays[tensor_name] = array
            loaded.append(
                FileLayer(source.name, arrays["weight"], arrays.get("activations"), arrays.get("bias")),
            )
    return loaded


def describe_layers(path: Path, layers: int | None = None, tokens: int | None = None) -> list[LayerShape]:
    """Dimensions of what `load_layers` would read, without reading it, so that its memory can be counted first.

    Raises `InputError` as `load_layers` does, except for faults that only the values show.
    """
    shapes = []
    with _open_checked(path, layers, tokens) as sources:
        for source in sources:
            rows = source.tensors["activations"].shape[0] if "activations" in source.tensors else None
            shapes.append(
                LayerShape(
                    name=source.name,
                    out_features=source.tensors["weight"].shape[0],
                    in_features=source.tensors["weight"].shape[1],
                    tokens=rows if rows is None or tokens is None else min(rows, tokens),
                    has_bias="bias" in source.tensors,
                ),
            )
    return shapes


def try_layers(path: Path) -> None:
    """Reads all of an HDF5 file but its tensors, whatever is wrong with it: for a process that may hang or crash."""
    with suppress(InputError):
        describe_layers(path)


def unreached_layers(path: Path) -> list[str]:
    """Names of the layers of a file that `load_layers` leaves out, since no token reached them when it was made.

    Raises `InputError` as `describe_layers` does.
    """
    with _open_sources(path) as sources:
        return [source.name for source in sources if source.unreached]


def find_fault(array: NDArray[Any], limit: float, first_row: int = 0) -> str | None:
    """Say where and how an array breaks a limit on its magnitude, such as ``[17, 3] is nan; allowed are ...``, or None.

    Not a number and infinity break any limit. The first such element in C order is named; ``first_row`` is the place of
    the array's first row in the whole that it is a part of.
    """
    # min and max pass NaN on and make no temporaries; the comparison is written so that NaN fails it.
    if array.min() >= -limit and array.max() <= limit:
        return None
    for row in np.ndindex(array.shape[:-1]):
        bad = np.flatnonzero(~(np.abs(array[row]) <= limit))
        if bad.size:
            index = [*row, int(bad[0])]
            value = float(array[tuple(index)])
            index[0] += first_row
            allowed = f"magnitudes up to {limit:g}" if np.isfinite(value) else "finite values"
            return f"[{', '.join(map(str, index))}] is {value:g}; allowed are {allowed}"
    raise AssertionError("an array beyond its limit has an element beyond it")


@contextmanager
def _open_checked(path: Path, layers: int | None, tokens: int | None) -> Iterator[list[_Source]]:
    """Open a file of any of the formats, with its structure and its shapes checked for the layers chosen."""
    with _open_sources(path) as sources:
        reached = [source for source in sources if not source.unreached]
        if sources and not reached:
            raise _refuse(path, "holds no layer that a token reached; allowed is a file with activations")
        _check_layers(path, reached, layers)
        chosen = reached[:layers]
        _check_structure(path, chosen)
        _check_tokens(chosen, tokens)
        yield chosen


@contextmanager
def _open_sources(path: Path) -> Iterator[list[_Source]]:
    """Open a file of any of the formats; whatever its damage raises, also while it is read, becomes an `InputError`."""
    readers = {".safetensors": _open_safetensors, ".npz": _open_npz} | dict.fromkeys(HDF5_SUFFIXES, _open_hdf5)
    suffix = path.suffix.lower()
    if suffix not in readers:
        raise _refuse(path, f"the suffix {suffix!r} is unknown; allowed are .h5 or .hdf5, .safetensors and .npz")
    _check_file(path)
    try:
        with readers[suffix](path) as sources:
            yield sources
    except InputError:
        raise
    except hdf5.RefusedError as error:
        raise _refuse(path, f"{error}; allowed is a file that holds all of its data itself") from None
    except MemoryError as error:
        raise _refuse(path, f"does not fit into memory ({error}); allowed are fewer layers or tokens") from error
    except _DAMAGE as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise _refuse(path, f"cannot be read ({reason}); allowed is a whole {suffix} file") from error


def _refuse(path: Path, fault: str) -> InputError:
    return InputError(f"inputs.path={path}: {fault}")


def _label(index: int, name: str) -> str:
    return f"layer {index} ({name})"


def _check_file(path: Path) -> None:
    try:
        if not path.exists():
            raise _refuse(path, "no such file; allowed is an existing layer file")
        if not path.is_file():
            raise _refuse(path, "is not a file; allowed is a layer file")
        with path.open("rb") as file:
            empty = not file.read(1)
    except OSError as error:
        raise _refuse(path, f"cannot be opened ({error.strerror}); allowed is a readable file") from error
    if empty:
        raise _refuse(path, "is empty; allowed is a layer file with at least one layer")


@contextmanager
def _open_hdf5(path: Path) -> Iterator[list[_Source]]:
    if not h5py.is_hdf5(path):
        raise _refuse(path, "is not an HDF5 file; allowed is HDF5 with a group /layers")
    with h5py.File(path, "r") as file:
        hdf5.objects(file.id)  # the file's hash shall be that of all that is read
        root = file.get("layers")
        if not isinstance(root, h5py.Group):
            raise _refuse(path, "has no group /layers; allowed is HDF5 with tensors such as /layers/000/weight")
        sources = []
        for key in sorted(root):
            group = root.get(key)
            if not isinstance(group, h5py.Group):
                raise _refuse(path, f"/layers/{key} is not a group; allowed are tensors such as /layers/000/weight")
            name = group.attrs.get("name", key)
            tensors = {}
            for tensor_name in group:
                dataset = group.get(tensor_name)
                if not isinstance(dataset, h5py.Dataset):
                    raise _refuse(path, f"/layers/{key}/{tensor_name} is not a dataset; {_allowed_tensors()}")
                # A dataset without a dataspace has the shape None; it then fails as one without dimensions.
                read = _hdf5_reader(dataset, f"/layers/{key}/{tensor_name}")
                tensors[tensor_name] = _Tensor(dataset.shape or (), dataset.dtype.name, read)
            unreached = bool(group.attrs.get(UNREACHED, False)) and "activations" not in tensors
            sources.append(_Source(name.decode() if isinstance(name, bytes) else str(name), tensors, unreached))
        yield sources


def _hdf5_reader(dataset: Any, where: str) -> Callable[[int], NDArray[np.float32]]:
    def read(rows: int) -> NDArray[np.float32]:
        hdf5.check_stored(hdf5.dataset(dataset.id, where), dataset.shape, where)
        array = np.empty((rows, *dataset.shape[1:]), np.float32)
        dataset.read_direct(array, np.s_[:rows])
        return array

    return read


@contextmanager
def _open_safetensors(path: Path) -> Iterator[list[_Source]]:
    names = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
    # The file is mapped here: only the rows asked for are read.
    with safe_open(path, framework="np") as file:
        tensors = {}
        for key in file.keys():  # noqa: SIM118 - the handle is no mapping
            part = file.get_slice(key)
            dtype = part.get_dtype()
            tensors[key] = _Tensor(tuple(part.get_shape()), names.get(dtype, dtype), _safetensors_reader(part))
        yield _group_flat(path, tensors)


def _safetensors_reader(part: Any) -> Callable[[int], NDArray[np.float32]]:
    return lambda rows: np.ascontiguousarray(part[:rows], np.float32)


@contextmanager
def _open_npz(path: Path) -> Iterator[list[_Source]]:
    with zipfile.ZipFile(path) as archive:
        tensors = {}
        for member in archive.namelist():
            with archive.open(member) as file:
                version = npy.read_magic(file)
                if version not in ((1, 0), (2, 0)):
                    raise _refuse(path, f"{member} has npy version {version}; allowed are 1.0 and 2.0")
                header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
                shape, _, dtype = header(file)
            tensors[member.removesuffix(".npy")] = _Tensor(shape, dtype.name, _npz_reader(archive, member))
        yield _group_flat(path, tensors)


def _npz_reader(archive: zipfile.ZipFile, member: str) -> Callable[[int], NDArray[np.float32]]:
    def read(rows: int) -> NDArray[np.float32]:
        with archive.open(member) as file:
            # A pickle would run code of the file's author.
            return np.array(npy.read_array(file, allow_pickle=False)[:rows], np.float32, order="C")

    return read


def _group_flat(path: Path, tensors: Mapping[str, _Tensor]) -> list[_Source]:
    grouped: dict[str, dict[str, _Tensor]] = {}
    for key, tensor in tensors.items():
        group, dot, tensor_name = key.rpartition(".")
        if not dot or not group:
            raise _refuse(path, f"the key {key!r} names no layer; allowed are keys such as 000.weight")
        grouped.setdefault(group, {})[tensor_name] = tensor
    return [_Source(group, grouped[group]) for group in sorted(grouped)]


def _allowed_tensors() -> str:
    return f"allowed are {', '.join(TENSOR_DIMS)}"


def _check_layers(path: Path, sources: list[_Source], layers: int | None) -> None:
    if not sources:
        raise _refuse(path, "holds no layers; allowed is a file with at least one layer")
    if layers is not None and not 1 <= layers <= len(sources):
        raise InputError(
            f"layers={layers}: inputs.path holds {len(sources)} layers; allowed are 1 to {len(sources)}",
        )


def _check_structure(path: Path, sources: list[_Source]) -> None:
    """Check tensor names, dtypes and shapes, within a layer and from one to the next."""
    out_features = 0
    for index, source in enumerate(sources):
        if not source.name.isprintable():
            # The results could not store bytes that are no UTF-8, or a NUL; tables and messages need one line.
            raise _refuse(path, f"layer {index} has the name {source.name!r}; allowed are printable characters")
        label = _label(index, source.name)
        for tensor_name, tensor in source.tensors.items():
            _check_tensor(path, f"{label} {tensor_name}", tensor_name, tensor)
        if "weight" not in source.tensors:
            raise _refuse(path, f"{label} has no weight; every layer needs one, (out_features, in_features)")
        features = source.tensors["weight"].shape
        if "bias" in source.tensors and source.tensors["bias"].shape[0] != features[0]:
            length = source.tensors["bias"].shape[0]
            raise _refuse(path, f"{label} bias has {length} values; allowed are its {features[0]} out_features")
        if "activations" in source.tensors:
            columns = source.tensors["activations"].shape[1]
            if columns != features[1]:
                raise _refuse(
                    path, f"{label} activations has {columns} columns; allowed are its {features[1]} in_features"
                )
        elif index > 0 and features[1] != out_features:
            raise _refuse(
                path,
                f"{label} has {features[1]} in_features and no activations of its own; "
                f"allowed are the {out_features} out_features of {_label(index - 1, sources[index - 1].name)}",
            )
        out_features = features[0]


def _check_tensor(path: Path, label: str, tensor_name: str, tensor: _Tensor) -> None:
    if tensor_name not in TENSOR_DIMS:
        raise _refuse(path, f"{label} is not known; {_allowed_tensors()}")
    if tensor.dtype not in ("float32", "float16"):
        raise _refuse(path, f"{label} has dtype {tensor.dtype}; allowed are float32 and float16")
    dims = TENSOR_DIMS[tensor_name]
    if len(tensor.shape) != dims:
        raise _refuse(path, f"{label} has shape {tensor.shape}; allowed are {dims} dimension{'s' * (dims > 1)}")
    if 0 in tensor.shape:
        raise _refuse(path, f"{label} has shape {tensor.shape}; allowed are dimensions of at least 1")


def _check_tokens(sources: list[_Source], tokens: int | None) -> None:
    held = {
        index: source.tensors["activations"].shape[0]
        for index, source in enumerate(sources)
        if "activations" in source.tensors
    }
    if tokens is None or not held:
        return
    most = max(held, key=held.__getitem__)
    if not 1 <= tokens <= held[most]:
        raise InputError(
            f"tokens={tokens}: inputs.path holds activations of at most {held[most]} tokens, those of "
            f"{_label(most, sources[most].name)}; allowed are 1 to {held[most]}",
        )
