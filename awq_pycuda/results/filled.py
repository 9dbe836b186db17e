"""A file of results made as its schema says, whole or not at all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from awq_pycuda import hdf5
from awq_pycuda.results import schema
from awq_pycuda.results.schema import Layout
from awq_pycuda.temporary import replacing

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

    Raises:
        KeyError: the schema does not know a path.
    """
    scales: dict[str, h5py.Dataset] = {}
    for path, value in values.items():
        entry = layout.entry(f"{place}/{path}")
        above = path.rpartition("/")[0]
        parent = group.require_group(above) if above else group
        if entry.is_attribute:
            parent.attrs[entry.name] = value
        elif entry.type is None:
            parent.require_group(entry.name)
        else:
            _write_dataset(parent, entry, value, scales)


def _write_dataset(group: h5py.Group, entry: schema.Entry, value: Any, scales: dict[str, h5py.Dataset]) -> None:
    """Writes one dataset along the `scales`, which it joins if it is one."""
    values = value if entry.type == "str" else np.asarray(value, entry.type)
    dataset = group.create_dataset(entry.name, data=values, **_checksum(values))
    dataset.attrs["units"] = entry.units
    dataset.attrs["description"] = entry.description
    if entry.is_scale:
        dataset.make_scale(entry.name)
        scales[entry.name] = dataset
        return
    for dimension, name in zip(dataset.dims, (name for name in entry.dims if name in scales), strict=True):
        dimension.attach_scale(scales[name])


def _checksum(values: Any) -> dict[str, Any]:
    """How to store these values under a checksum.

    HDF5 has none for scalars and strings of variable length, which the digest covers; what is empty needs none.
    """
    if np.ndim(values) == 0 or np.size(values) == 0 or values.dtype == object:
        return {}
    row = max(1, values.nbytes // len(values))
    return {"fletcher32": True, "chunks": (min(len(values), max(1, _CHUNK_BYTES // row)), *values.shape[1:])}
