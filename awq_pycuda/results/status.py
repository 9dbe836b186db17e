"""How a run ended: the attributes that say it, and reading them from a result file without the rest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py

from awq_pycuda import hdf5, provenance
from awq_pycuda.results import schema


def status_attributes(failure: str | None) -> dict[str, str | int | bool]:
    """The attributes of a file that say how its run ended, now: complete, or failed with a reason."""
    created = provenance.created()
    if failure is None:
        return {"status": "complete", "created": created}
    return {"status": "failed", "error": failure, "created": created}


def read_status(folder: Path) -> tuple[str, str] | None:
    """Status and error ("" if none) of `folder/results.h5`; None where there is no result file that is whole."""
    path = folder / schema.FILE_NAME
    try:
        if not path.is_file():  # opening a pipe would wait
            return None
        with open(path, "rb") as stream, h5py.File(path, locking=False) as file:
            found = hdf5.checked_objects(file.id, stream)
            version = int(file.attrs["schema_version"])
            if file.attrs["schema"] != schema.NAME or not 1 <= version <= schema.VERSION:
                return None
            if schema.entry(schema.DIGEST).needed(version, complete=False):
                found[schema.DIGEST]  # or it is missing
                file.visititems(_read_through)
            return str(file.attrs["status"]), str(file.attrs.get("error", ""))
    except Exception:  # whatever HDF5 makes of damage
        return None


def peek(path: Path) -> dict[str, Any]:
    """The attributes of a result file as they stand, none where it cannot be opened; nothing is checked."""
    try:
        if path.is_file():
            with h5py.File(path, locking=False) as file:
                return dict(file.attrs)
    except Exception:  # whatever HDF5 makes of damage
        pass
    return {}


def _read_through(_name: str, node: Any) -> None:
    """Reads a dataset, so that HDF5 compares its checksums."""
    if isinstance(node, h5py.Dataset):
        node[()]
