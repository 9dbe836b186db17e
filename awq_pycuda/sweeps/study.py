"""A study: the folder of a sweep, with one subfolder per job that its config, kernels and device name.

What is complete there is not run again; a lock per job keeps two sweeps from running one job at the same time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from awq_pycuda import provenance
from awq_pycuda.config import Config, FileInputs
from awq_pycuda.config_text import config_hash
from awq_pycuda.engine.stages import NO_TIMINGS
from awq_pycuda.layers.inputs import file_sha256
from awq_pycuda.locks import locked
from awq_pycuda.results.record import RunRecord
from awq_pycuda.results.schema import FILE_NAME
from awq_pycuda.results.status import complete_on, read_status, status_attributes
from awq_pycuda.results.write import write
from awq_pycuda.temporary import remove_left

INTERNAL = ".sweep"  # in a study's folder: locks, and what the jobs of each sweep report
_FOLDER_DIGITS = 16


def job_folder(study: Path, config: Config, backend: str, device: str) -> Path:
    """The folder of a job's results: a hash of the resolved config, the kernels, and the names of backend and device.

    The content of a layer file counts as config: a study never takes the results of an older file of the same name.
    """
    parts = [config_hash(config), provenance.kernels_sha256(), backend, device]
    if isinstance(config.inputs, FileInputs):
        parts.append(file_sha256(Path(config.inputs.path)))
    return study / hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:_FOLDER_DIGITS]


@contextmanager
def claim(folder: Path) -> Iterator[bool]:
    """Whether this process alone may work on a job's folder, until the block or the process ends.

    Raises:
        OSError: the study's file system has no locks.
    """
    locks = folder.parent / INTERNAL / "locks"
    locks.mkdir(parents=True, exist_ok=True)
    lock = locked(locks / f"{folder.name}.lock")
    if lock is None:
        yield False
        return
    try:
        remove_left(folder / FILE_NAME)
        yield True
    finally:
        lock.release()


def is_complete(folder: Path) -> bool:
    """Whether a job's folder holds a complete result."""
    return (read_status(folder) or ("", ""))[0] == "complete"


def complete_jobs(study: Path) -> dict[str, tuple[str, str]]:
    """The names of the folders of a study that say they are complete, with the names of backend and device there."""
    found = ((path.parent.name, complete_on(path)) for path in study.glob(f"*/{FILE_NAME}"))
    return {name: device for name, device in found if device is not None}


def store_death(folder: Path, origin: dict[str, str | int | bool], reason: str) -> None:
    """Writes the failed result of a job whose process died, unless it had finished or another sweep has taken it.

    Raises:
        OSError: the file cannot be written.
    """
    with claim(folder) as ours:
        if ours and not is_complete(folder):
            write(folder, RunRecord(status_attributes(reason) | origin, [], NO_TIMINGS))
