"""Opens layer files of every kind: the tensors of each layer, not read yet."""

import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
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
from awq_pycuda.layers.rows import StoredFile, StoredRows, read_rows

HDF5_SUFFIXES = (".h5", ".hdf5")
TENSOR_DIMS = {"weight": 2, "activations": 2, "bias": 1}

# Attribute of a layer in HDF5 that no token reached when it was captured: an expert without activations to run on.
UNREACHED = "unreached"

# Attribute of a layer in HDF5 without activations of its own that sees those of another: the name of that one's group.
SHARED = "activations_of"

# What a damaged file raises, over h5py, zipfile, numpy and safetensors.
_DAMAGE = (OSError, ValueError, KeyError, RuntimeError, EOFError, zipfile.BadZipFile, zlib.error, SafetensorError)


@dataclass(frozen=True)
class Tensor:
    """A tensor of an open file, not read yet."""

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[slice], NDArray[np.float32]]
    """Reads consecutive rows as a new float32 array."""
    rows: StoredRows | None = None
    """Reads them later, too, where the format lets that be."""


@dataclass(frozen=True)
class Source:
    """The tensors of one layer of an open file."""

    name: str
    tensors: dict[str, Tensor]
    unreached: bool = False
    key: str = ""
    """Name of its group."""
    shared: str = ""
    """Name of the group whose activations it sees; empty for its own, or none."""


def refuse(path: Path, fault: str) -> InputError:
    """The error for a fault of a layer file."""
    return InputError(f"inputs.path={path}: {fault}")


def allowed_tensors() -> str:
    """Which tensors a layer may have, in words."""
    return f"allowed are {', '.join(TENSOR_DIMS)}"


@contextmanager
def open_sources(path: Path) -> Iterator[list[Source]]:
    """Open a file of any of the formats; whatever its damage raises, also while it is read, becomes an `InputError`."""
    readers = {".safetensors": _open_safetensors, ".npz": _open_npz} | dict.fromkeys(HDF5_SUFFIXES, _open_hdf5)
    suffix = path.suffix.lower()
    if suffix not in readers:
        raise refuse(path, f"the suffix {suffix!r} is unknown; allowed are .h5 or .hdf5, .safetensors and .npz")
    _check_file(path)
    try:
        with readers[suffix](path) as sources:
            yield sources
    except InputError:
        raise
    except hdf5.RefusedError as error:
        raise refuse(path, f"{error}; allowed is a file that holds all of its data itself") from None
    except MemoryError as error:
        raise refuse(path, f"does not fit into memory ({error}); allowed are fewer layers or tokens") from error
    except _DAMAGE as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise refuse(path, f"cannot be read ({reason}); allowed is a whole {suffix} file") from error


def _check_file(path: Path) -> None:
    try:
        if not path.exists():
            raise refuse(path, "no such file; allowed is an existing layer file")
        if not path.is_file():
            raise refuse(path, "is not a file; allowed is a layer file")
        with path.open("rb") as file:
            empty = not file.read(1)
    except OSError as error:
        raise refuse(path, f"cannot be opened ({error.strerror}); allowed is a readable file") from error
    if empty:
        raise refuse(path, "is empty; allowed is a layer file with at least one layer")


@contextmanager
def _open_hdf5(path: Path) -> Iterator[list[Source]]:
    if not h5py.is_hdf5(path):
        raise refuse(path, "is not an HDF5 file; allowed is HDF5 with a group /layers")
    stored = StoredFile(path.absolute())
    with h5py.File(path, "r") as file:
        hdf5.objects(file.id)  # the file's hash shall be that of all that is read
        root = file.get("layers")
        if not isinstance(root, h5py.Group):
            raise refuse(path, "has no group /layers; allowed is HDF5 with tensors such as /layers/000/weight")
        sources = []
        for key in sorted(root):
            group = root.get(key)
            if not isinstance(group, h5py.Group):
                raise refuse(path, f"/layers/{key} is not a group; allowed are tensors such as /layers/000/weight")
            name = group.attrs.get("name", key)
            tensors = {}
            for tensor_name in group:
                dataset = group.get(tensor_name)
                if not isinstance(dataset, h5py.Dataset):
                    raise refuse(path, f"/layers/{key}/{tensor_name} is not a dataset; {allowed_tensors()}")
                # A dataset without a dataspace has the shape None; it then fails as one without dimensions.
                where = f"/layers/{key}/{tensor_name}"
                shape = dataset.shape or ()
                rows = StoredRows(stored, where, dataset) if len(shape) == 2 else None
                tensors[tensor_name] = Tensor(shape, dataset.dtype.name, _hdf5_reader(dataset, where), rows)
            unreached = bool(group.attrs.get(UNREACHED, False)) and "activations" not in tensors
            shared = _text(group.attrs.get(SHARED, ""))
            sources.append(Source(_text(name), tensors, unreached, key, shared))
        _share_activations(path, sources)
        yield sources


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _share_activations(path: Path, sources: Sequence[Source]) -> None:
    """Gives the layers that see another's activations that one's tensor; it must stand before them."""
    before: dict[str, Source] = {}
    for source in sources:
        if source.shared:
            where = f"/layers/{source.key}: attribute {SHARED} is {source.shared!r}"
            if "activations" in source.tensors:
                raise refuse(path, f"{where}, but the layer has activations; allowed is one of them")
            other = before.get(source.shared)
            if other is None or "activations" not in other.tensors or other.shared:
                raise refuse(path, f"{where}; allowed is a layer before it that has activations of its own")
            source.tensors["activations"] = other.tensors["activations"]
        before[source.key] = source


def _hdf5_reader(dataset: Any, where: str) -> Callable[[slice], NDArray[np.float32]]:
    def read(rows: slice) -> NDArray[np.float32]:
        hdf5.check_stored(hdf5.dataset(dataset.id, where), dataset.shape, where)
        return read_rows(dataset, range(dataset.shape[0])[rows])

    return read


@contextmanager
def _open_safetensors(path: Path) -> Iterator[list[Source]]:
    names = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
    # The file is mapped here: only the rows asked for are read.
    with safe_open(path, framework="np") as file:
        tensors = {}
        for key in file.keys():  # noqa: SIM118 - the handle is no mapping
            part = file.get_slice(key)
            dtype = part.get_dtype()
            tensors[key] = Tensor(tuple(part.get_shape()), names.get(dtype, dtype), _safetensors_reader(part))
        yield _group_flat(path, tensors)


def _safetensors_reader(part: Any) -> Callable[[slice], NDArray[np.float32]]:
    return lambda rows: np.ascontiguousarray(part[rows], np.float32)


@contextmanager
def _open_npz(path: Path) -> Iterator[list[Source]]:
    with zipfile.ZipFile(path) as archive:
        tensors = {}
        for member in archive.namelist():
            with archive.open(member) as file:
                version = npy.read_magic(file)
                if version not in ((1, 0), (2, 0)):
                    raise refuse(path, f"{member} has npy version {version}; allowed are 1.0 and 2.0")
                header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
                shape, _, dtype = header(file)
            tensors[member.removesuffix(".npy")] = Tensor(shape, dtype.name, _npz_reader(archive, member))
        yield _group_flat(path, tensors)


def _npz_reader(archive: zipfile.ZipFile, member: str) -> Callable[[slice], NDArray[np.float32]]:
    def read(rows: slice) -> NDArray[np.float32]:
        with archive.open(member) as file:
            # A pickle would run code of the file's author.
            return np.array(npy.read_array(file, allow_pickle=False)[rows], np.float32, order="C")

    return read


def _group_flat(path: Path, tensors: Mapping[str, Tensor]) -> list[Source]:
    grouped: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        group, dot, tensor_name = key.rpartition(".")
        if not dot or not group:
            raise refuse(path, f"the key {key!r} names no layer; allowed are keys such as 000.weight")
        grouped.setdefault(group, {})[tensor_name] = tensor
    return [Source(group, grouped[group]) for group in sorted(grouped)]
