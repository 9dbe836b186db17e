"""Many result files at once, read in processes with limits (`hdf5_worker`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from awq_pycuda.hdf5 import UnreadableError
from awq_pycuda.hdf5_worker import ask
from awq_pycuda.results.reader import ResultFile, read


def read_files(paths: Sequence[Path]) -> list[ResultFile | str]:
    """What `read` makes of each file, or the reason why it cannot be read.

    Raises:
        OSError: no worker can be started.
    """
    return [
        str(answer) if isinstance(answer, UnreadableError) else answer for answer in ask([(read, p) for p in paths])
    ]
