"""What a layer file notes of itself: where its layers come from, and what was said when it was made."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path

import h5py

from awq_pycuda import hdf5
from awq_pycuda.hdf5 import UnreadableError

SAID = "said"  # the dataset with the lines that were said, as JSON in UTF-8


def read_notes(path: Path, names: Collection[str]) -> tuple[dict[str, str], list[str]]:
    """Those of the attributes of these names that there are, as text, and the lines; for a process that may crash.

    Raises:
        UnreadableError: it is no layer file that was captured, or damaged.
    """
    try:
        with h5py.File(path, "r", locking=False) as file:
            hdf5.objects(file.id)
            attributes = {name: str(file.attrs[name]) for name in names if name in file.attrs}
            lines = json.loads(file[SAID][()].tobytes())
            return attributes, [str(line) for line in lines]
    except Exception as error:  # whatever HDF5 makes of damage
        raise UnreadableError(" ".join(str(error).split())) from None
