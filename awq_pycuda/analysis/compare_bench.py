"""Two benchmarks compared row by row: what became faster or slower, and what only one of them has."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from awq_pycuda.analysis.compare import METRIC_COLUMNS, TIME_COLUMNS, Comparison, time_verdict
from awq_pycuda.analysis.intervals import ratio_of_medians
from awq_pycuda.errors import InputError
from awq_pycuda.hdf5_worker import ask
from awq_pycuda.results.bench_reader import read_bench
from awq_pycuda.results.bench_record import BenchRecord, BenchRow

_MOST_SAMPLES = 400  # of a row: the interval needs every pair of them


def read_benches(*paths: Path) -> list[BenchRecord] | None:
    """The benchmarks of these files; None where none of them is one.

    Raises:
        InputError: some are, and others are not.
    """
    if not all(path.is_file() for path in paths):
        return None
    answers = ask([(read_bench, path) for path in paths])
    found = [each for each in answers if isinstance(each, BenchRecord)]
    if found and len(found) < len(answers):
        path, answer = next(pair for pair in zip(paths, answers, strict=True) if not isinstance(pair[1], BenchRecord))
        raise InputError(f"{path}: {answer}; allowed: two benchmarks, or results of runs")
    return found or None


def compare_benches(a: BenchRecord, b: BenchRecord, tolerance: float = 0.05) -> Comparison:
    """Compares what both have timed: the same stage, variant, peer, shape and state of the cache.

    Verdicts are those of `compare`, from the samples. A benchmark has no metrics.

    Raises:
        InputError: they share nothing.
    """
    own, other = ({row.key: row for row in record.rows} for record in (a, b))
    times = [
        _times(row, other[key], tolerance)
        for key, row in own.items()
        if key in other and row.us.size and other[key].us.size
    ]
    if not times:
        raise InputError(
            "nothing in B is timed that is timed in A; allowed: two benchmarks that share a kernel and shape"
        )
    broken = [_label(row) for key, row in own.items() if row.us.size and key in other and other[key].state == "failed"]
    left = [*_left("A", a, other), *_left("B", b, own)]
    return Comparison(
        times=pd.DataFrame(times, columns=list(TIME_COLUMNS)),
        metrics=pd.DataFrame(columns=list(METRIC_COLUMNS)),
        not_compared=pd.DataFrame(left, columns=["set", "run", "reason"]),
        broken=list(dict.fromkeys(broken)),
        apart=[],
    )


def _times(a: BenchRow, b: BenchRow, tolerance: float) -> tuple[Any, ...]:
    own, other = a.us[:_MOST_SAMPLES] / 1e3, b.us[:_MOST_SAMPLES] / 1e3
    ratio = ratio_of_medians(own, other)
    verdict = time_verdict(own, other, ratio, tolerance)
    shape = f"{a.out_features}x{a.in_features}x{a.tokens}" if a.tokens else a.case
    what = " ".join(part for part in (a.stage, a.variant, a.by, a.cache) if part)
    medians = float(np.median(own)), float(np.median(other))
    return (shape, "A", "B", what, own.size, other.size, *medians, ratio.ratio, ratio.low, ratio.high, verdict)


def _left(name: str, record: BenchRecord, other: dict[tuple[Any, ...], BenchRow]) -> Iterator[tuple[str, str, str]]:
    for row in record.rows:
        if row.state == "failed":
            yield name, _label(row), f"failed: {row.reason}"
        elif row.key not in other:
            yield name, _label(row), "the other has no such row"


def _label(row: BenchRow) -> str:
    shape = f" at {row.out_features} x {row.in_features} x {row.tokens}" if row.tokens else ""
    return " ".join(part for part in (row.stage, row.variant, row.by, row.cache) if part) + shape
