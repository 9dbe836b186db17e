"""How a run ended: the attributes that say it, and reading them from a result file without the rest."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py

from awq_pycuda import hdf5, provenance
from awq_pycuda.hdf5 import UnreadableError
from awq_pycuda.hdf5_worker import ask
from awq_pycuda.results import schema


def status_attributes(failure: str | None) -> dict[str, str | int | bool]:
    """The attributes of a file that say how its run ended, now: complete, or failed with a reason."""
    created = provenance.created()
    if failure is None:
        return {"status": "complete", "created": created}
    return {"status": "failed", "error": failure, "created": created}


def read_status(folder: Path) -> tuple[str, str] | None:
    """Status and error ("" if none) of `folder/results.h5`; None where there is no result file that is whole.

    Raises:
        OSError: the file has no digest, and no process that reads such can be started.
    """
    return _taken(folder / schema.FILE_NAME, _status)


def complete_on(path: Path) -> tuple[str, str] | None:
    """Names of backend and device of a complete run's file; None where it is no such. Its arrays are not looked at.

    Raises:
        OSError: as in `read_status`.
    """
    return _taken(path, _backend_and_device)


def _status(file: h5py.File, found: hdf5.Objects) -> tuple[str, str] | None:
    version = int(file.attrs["schema_version"])
    if file.attrs["schema"] != schema.NAME or not 1 <= version <= schema.VERSION:
        return None
    if schema.entry(schema.DIGEST).needed(version, complete=False):
        found[schema.DIGEST]  # or it is missing
        file.visititems(_read_through)
    return str(file.attrs["status"]), str(file.attrs.get("error", ""))


def _backend_and_device(file: h5py.File, _found: hdf5.Objects) -> tuple[str, str] | None:
    if file.attrs["status"] != "complete":
        return None
    return str(file.attrs["backend"]), str(json.loads(file.attrs["device"])["name"])


def _taken(
    path: Path, take: Callable[[h5py.File, hdf5.Objects], tuple[str, str] | None], limited: bool = False
) -> tuple[str, str] | None:
    """What `take` makes of a file; None where it is damaged.

    Attributes of a file without a digest are read in a process with limits, since damage to them can hang HDF5.
    """
    try:
        if not path.is_file():  # opening a pipe would wait
            return None
        with open(path, "rb") as stream, h5py.File(path, locking=False) as file:
            found = hdf5.checked_objects(file.id, stream)
            if limited or schema.DIGEST in found:
                return take(file, found)
    except Exception:  # whatever HDF5 makes of damage
        return None
    (answer,) = ask([(_taken, path, take, True)])
    return None if isinstance(answer, UnreadableError) else answer


def _read_through(_name: str, node: Any) -> None:
    """Reads a dataset, so that HDF5 compares its checksums."""
    if isinstance(node, h5py.Dataset):
        node[()]
