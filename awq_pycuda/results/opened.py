"""A file of results opened to be read: every value checked, so that a damaged file is told by its reason."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import h5py
import numpy as np
from h5py import h5a, h5f, h5g, h5p, h5s, h5t
from numpy.typing import NDArray

from awq_pycuda import hdf5
from awq_pycuda.hdf5 import UnreadableError
from awq_pycuda.results import schema
from awq_pycuda.results.entries import Entry, Layout

_SIGNATURE = b"\x89HDF\r\n\x1a\n"
# Types in memory of what attributes hold; h5py takes as long to make one as to read a value.
_IN_MEMORY = {h5t.FLOAT: (h5t.NATIVE_DOUBLE, np.dtype("f8")), h5t.INTEGER: (h5t.NATIVE_INT64, np.dtype("i8"))}
_TEXT = {h5t.CSET_ASCII: h5py.string_dtype("ascii"), h5t.CSET_UTF8: h5py.string_dtype()}
_MAX_BYTES = 1 << 30  # of one dataset: a damaged size must not take the machine's memory

Array = NDArray[Any]
Scalar = str | int | float | bool
T = TypeVar("T")
Reading = Callable[["File", Mapping[str, Scalar]], T]  # of an open file and its root attributes
# Types of attributes: as Python has them, and as messages name them.
_KINDS: dict[str, tuple[type | tuple[type, ...], str]] = {
    "str": (str, "text"),
    "i8": (int, "a whole number"),
    "f8": ((int, float), "a number"),
    "bool": (bool, "a truth value"),
}


def opened(path: Path, layout: Layout, reading: Reading[T], others: Sequence[tuple[Layout, Reading[T]]] = ()) -> T:
    """What the reading of its kind makes of an open file and its root attributes.

    Args:
        path: the file.
        layout: what it should be laid out as.
        reading: reads it then.
        others: further kinds of files that it may be of, each with its own reading.

    Raises:
        UnreadableError: whatever is wrong with it, in one line.
    """
    try:
        if not path.is_file():
            path.stat()
            raise UnreadableError("a folder, not a file" if path.is_dir() else "no regular file")
        with open(path, "rb") as start:
            signature = start.read(len(_SIGNATURE))
    except (OSError, ValueError) as error:
        raise UnreadableError(getattr(error, "strerror", None) or str(error)) from None
    if not signature:
        raise UnreadableError("empty file")
    # HDF5 allows a user block before the signature; awq_pycuda writes none.
    if signature != _SIGNATURE:
        raise UnreadableError("not an HDF5 file")
    try:
        access = h5p.create(h5p.FILE_ACCESS)
        # Result files are replaced, never written to, so a lock guards nothing; some network file systems have none.
        access.set_file_locking(False, False)
        access.set_fclose_degree(h5f.CLOSE_STRONG)
        file = h5f.open(bytes(path), h5f.ACC_RDONLY, access)
        try:
            with open(path, "rb") as stream:
                found = hdf5.checked_objects(file, stream)
            root = _attributes(found["/"])
            layout, reading = next((kind for kind in others if root.get("schema") == kind[0].NAME), (layout, reading))
            return reading(File(found, layout, _version(root, layout), root.get("status") == "complete"), root)
        finally:
            file.close()
    except UnreadableError:
        raise
    except hdf5.RefusedError as error:
        raise UnreadableError(f"damaged HDF5 file: {error}") from None
    except Exception as error:  # HDF5 answers damage with whatever it runs into: OSError, KeyError, RuntimeError ...
        first = " ".join(str(error).split()) or type(error).__name__
        raise UnreadableError(f"damaged HDF5 file: {first}") from None


def _version(root: Mapping[str, Scalar], layout: Layout) -> int:
    if root.get("schema") != layout.NAME:
        raise UnreadableError(f"an HDF5 file, but no result of awq_pycuda (no attribute schema={layout.NAME})")
    version = int(_attribute(root, "/", layout.entry("/@schema_version")))
    if version > layout.VERSION:
        raise UnreadableError(f"schema_version {version} is newer than {layout.VERSION}, which this version reads")
    if version < 1:
        raise UnreadableError(f"schema_version {version} is unknown")
    return version


@dataclass
class File:
    """An open file beside the schema: paths are the schema's; `layer` is the number of the layer to read them of."""

    found: hdf5.Objects
    layout: Layout
    version: int
    complete: bool
    _attributes: dict[str, Mapping[str, Scalar]] = field(default_factory=dict)

    def check(self, entries: Iterable[Entry], layer: int = 0) -> None:
        """Raises an error for the first of these entries that a file of this version must have and this one has not."""
        absent = set()
        for entry in entries:
            where = place(entry.path, layer)
            needed = entry.parent not in absent and entry.needed(self.version, self.complete)
            if entry.is_attribute:
                if needed:
                    _attribute(self.attributes(entry.parent, layer), place(entry.parent, layer), entry)
            elif where not in self.found:
                if needed:
                    raise UnreadableError(f"{where} is missing")
                absent.add(entry.path)
            elif entry.type is None:
                group_of(self.found, where)

    def attributes(self, group: str, layer: int = 0) -> Mapping[str, Scalar]:
        """Every attribute of a group that a file of this schema may have."""
        where = place(group, layer)
        if where not in self._attributes:
            self._attributes[where] = _attributes(group_of(self.found, where))
        return self._attributes[where]

    def attribute(self, path: str, layer: int = 0) -> Any:
        """An attribute in its type."""
        entry = self.layout.entry(path)
        return _attribute(self.attributes(entry.parent, layer), place(entry.parent, layer), entry)

    def numbers(self, path: str, layer: int = 0, rank: int | None = None) -> Array:
        """The numbers of a dataset, in float64; `rank` where it may have fewer dimensions than the schema names."""
        return _numbers(self.found, place(path, layer), len(self.layout.entry(path).dims) if rank is None else rank)

    def texts(self, path: str) -> list[str]:
        """The texts of a dataset, in their order."""
        return _texts(self.found, path, len(self.layout.entry(path).dims))


def place(path: str, layer: int) -> str:
    """Where the schema's path is found in a file."""
    return path.replace(schema.LAYER, f"/layers/{layer:03d}", 1)


# h5py's low-level objects, with the types that memory shall have: those above them take twice the time on small files.


def group_of(found: hdf5.Objects, where: str) -> Any:
    """A group of an open file, h5py's low-level object.

    Raises:
        UnreadableError: there is none.
    """
    if where not in found:
        raise UnreadableError(f"{where} is missing")
    if not isinstance(found[where], h5g.GroupID):
        raise UnreadableError(f"{where} is no group")
    return found[where]


def _dataset(found: hdf5.Objects, where: str, rank: int) -> tuple[Any, tuple[int, ...], Any]:
    """A dataset, its shape and its type."""
    if where not in found:
        raise UnreadableError(f"{where} is missing")
    dataset = found[where]
    if not isinstance(dataset, hdf5.Dataset):
        raise UnreadableError(f"{where} is no dataset")
    shape, stored = dataset.id.shape, dataset.id.get_type()
    if len(shape) != rank:
        raise UnreadableError(f"{where} has {len(shape)} dimensions, not {rank}")
    if math.prod(shape) * max(8, stored.get_size()) > _MAX_BYTES:
        raise UnreadableError(f"{where} claims the shape {shape}")
    hdf5.check_stored(dataset, shape, where)
    return dataset.id, shape, stored


def _numbers(found: hdf5.Objects, where: str, rank: int) -> Array:
    dataset, shape, stored = _dataset(found, where, rank)
    if stored.get_class() not in (h5t.FLOAT, h5t.INTEGER):
        raise UnreadableError(f"{where} holds no numbers")
    values = np.empty(shape)
    dataset.read(h5s.ALL, h5s.ALL, values, h5t.NATIVE_DOUBLE)
    return values


def _texts(found: hdf5.Objects, where: str, rank: int) -> list[str]:
    dataset, shape, stored = _dataset(found, where, rank)
    if stored.get_class() != h5t.STRING:
        raise UnreadableError(f"{where} holds no text")
    values = np.empty(shape, stored.dtype)
    dataset.read(h5s.ALL, h5s.ALL, values)
    return [value.decode() for value in values.flat]


def _attributes(location: Any) -> dict[str, Scalar]:
    """Every scalar attribute that is text, a number or a truth value; the schema has no others."""
    names: list[bytes] = []
    h5a.iterate(location, names.append)
    found: dict[str, Scalar] = {}
    for name in names:
        attribute = h5a.open(location, name)
        stored = attribute.get_type()
        kind = stored.get_class()
        # read() writes all the values that there are, so an array must never come to it.
        if attribute.shape != () or kind not in (h5t.FLOAT, h5t.INTEGER, h5t.STRING, h5t.ENUM):
            continue
        memory, dtype = _IN_MEMORY.get(kind, (None, None))
        if kind == h5t.STRING and stored.is_variable_str():
            dtype = _TEXT[stored.get_cset()]
        value = np.zeros((), stored.dtype if dtype is None else dtype)
        attribute.read(value, memory)
        item = value.item()
        found[name.decode()] = item.decode() if isinstance(item, bytes) else item
    return found


def _attribute(attributes: Mapping[str, Scalar], where: str, entry: Entry) -> Any:
    value = attributes.get(entry.name)
    if value is None:
        raise UnreadableError(f"{where}: attribute {entry.name} is missing")
    assert entry.type is not None
    kind, expected = _KINDS[entry.type]
    if isinstance(value, bool) != (kind is bool) or not isinstance(value, kind):
        raise UnreadableError(f"{where}: attribute {entry.name} is {value!r:.40}, not {expected}")
    return float(value) if entry.type == "f8" else value
