"""A file of results made as its schema says, whole or not at all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from h5py import h5a, h5d, h5ds, h5g, h5p, h5s, h5t
from numpy.typing import NDArray

from awq_pycuda import hdf5
from awq_pycuda.results.entries import Entry, Layout
from awq_pycuda.temporary import replacing

_TEXT = h5py.string_dtype()
_SCALAR = h5s.create(h5s.SCALAR)
_CHUNK_BYTES = 64 << 20  # of one dataset's chunk, which is read as a whole; HDF5's limit is 4 GB


def write_whole(path: Path, layout: Layout, root: Mapping[str, Any], filling: Callable[[h5py.File], None]) -> None:
    """Writes a file with the attributes `root` and what `filling` puts into it.

    The file is built in memory (HDF5 itself crashes on a full disk), written under a temporary name in the same folder,
    flushed, fsynced and renamed, so that a reader never sees half a file and a killed run leaves none under the final
    name.

    Raises:
        OSError: the folder cannot be written to; no temporary file is left.
        KeyError: there is something that the schema does not know.
    """
    # HDF5 1.10's format has checksums over metadata, so that most damage is told before it leads HDF5 astray.
    with h5py.File(path.name, "w", driver="core", backing_store=False, libver=("v110", "v110")) as file:
        own = {"schema": layout.NAME, "schema_version": layout.VERSION}
        fill(file, layout, "", attributes("", own | dict(root)))
        filling(file)
        image = hdf5.sealed_image(file)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary, open(temporary, "wb") as written:
        written.writelines(image)


def attributes(group: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Attributes of a group by their paths."""
    return {f"{group}@{name}": value for name, value in values.items()}


def fill(group: h5py.Group, layout: Layout, place: str, values: Mapping[str, Any]) -> None:
    """Writes what stands at `place` of a schema, by path below it, with all that the schema says of it.

    Through h5py's low-level interface: the other one looks up each name anew, and takes as long again.

    Raises:
        KeyError: the schema does not know a path.
    """
    groups = {"": group.id}
    scales: dict[str, h5d.DatasetID] = {}
    for path, value in values.items():
        entry = layout.entry(f"{place}/{path}")
        parent = _group(groups, path.rpartition("/")[0])
        if entry.is_attribute:
            _write_attribute(parent, entry.name, value)
        elif entry.type is None:
            _group(groups, path)
        else:
            _write_dataset(parent, entry, value, scales)


def _group(groups: dict[str, h5g.GroupID], path: str) -> h5g.GroupID:
    """The group of this path, made if it is not there."""
    if path not in groups:
        above, _, name = path.rpartition("/")
        parent = _group(groups, above)
        own = name.encode()
        groups[path] = h5g.open(parent, own) if own in parent else h5g.create(parent, own)
    return groups[path]


def _write_attribute(owner: h5g.GroupID | h5d.DatasetID, name: str, value: Any) -> None:
    """One attribute: a number, a truth value or a text."""
    values = np.array(value, _TEXT if isinstance(value, str) else None)
    h5a.create(owner, name.encode(), _kind(values.dtype), _SCALAR).write(values)


def _write_dataset(group: h5g.GroupID, entry: Entry, value: Any, scales: dict[str, h5d.DatasetID]) -> None:
    """Writes one dataset along the `scales`, which it joins if it is one."""
    values = np.array(value, _TEXT if entry.type == "str" else entry.type, order="C")
    space = h5s.create_simple(values.shape)
    dataset = h5d.create(group, entry.name.encode(), _kind(values.dtype), space, _stored(values))
    if values.size:
        dataset.write(h5s.ALL, h5s.ALL, values)
    _write_attribute(dataset, "units", entry.units)
    _write_attribute(dataset, "description", entry.description)
    if entry.is_scale:
        h5ds.set_scale(dataset, entry.name.encode())
        scales[entry.name] = dataset
        return
    along = [name for name in entry.dims if name in scales]
    if len(along) != values.ndim:
        raise ValueError(f"{entry.path} has the shape {values.shape}, and the dimensions {along}")
    for dimension, name in enumerate(along):
        h5ds.attach_scale(dataset, scales[name], dimension)


@lru_cache(maxsize=64)  # files have few types, and to make what tells of one takes longer than to write a value
def _kind(dtype: np.dtype[Any]) -> h5t.TypeID:
    """The type of such values in a file; those that are objects to NumPy are texts."""
    return h5t.py_create(dtype, logical=True)


def _stored(values: NDArray[Any]) -> h5p.PropDCID:
    """How to store these values: under a checksum.

    HDF5 has none for scalars and strings of variable length, which the digest covers; what is empty needs none.
    """
    stored = h5p.create(h5p.DATASET_CREATE)
    stored.set_obj_track_times(False)  # as h5py does: the file says itself when it was written
    if values.ndim and values.size and values.dtype != object:
        row = max(1, values.nbytes // len(values))
        stored.set_chunk((min(len(values), max(1, _CHUNK_BYTES // row)), *values.shape[1:]))
        stored.set_fletcher32()
    return stored
