"""Many result files at once, read in processes with limits (`hdf5_worker`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from awq_pycuda.hdf5 import UnreadableError
from awq_pycuda.hdf5_worker import ask
from awq_pycuda.results import evaluation_schema, schema
from awq_pycuda.results.entries import Layout
from awq_pycuda.results.evaluation_reader import read_evaluation_root
from awq_pycuda.results.evaluation_record import EvaluationRecord
from awq_pycuda.results.opened import Reading, opened
from awq_pycuda.results.reader import ResultFile, read_root

Found = ResultFile | EvaluationRecord


def read_files(paths: Sequence[Path]) -> list[Found | str]:
    """The run or evaluation of each file, or the reason why it cannot be read.

    Raises:
        OSError: no worker can be started.
    """
    return [
        str(answer) if isinstance(answer, UnreadableError) else answer for answer in ask([(read_any, p) for p in paths])
    ]


def read_any(path: Path) -> Found:
    """Reads the file of one run or of one evaluation.

    Raises:
        UnreadableError: whatever is wrong with it, in one line.
    """
    evaluations: tuple[Layout, Reading[Found]] = (evaluation_schema, read_evaluation_root)
    return opened(path, schema, lambda file, root: read_root(path, file, root), [evaluations])
