"""A benchmark's file as plain Python values, every one of them checked."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from awq_pycuda.hdf5 import UnreadableError
from awq_pycuda.results import bench_schema
from awq_pycuda.results.bench_record import BenchRecord, BenchRow
from awq_pycuda.results.opened import File, Scalar, opened


def read_bench(path: Path) -> BenchRecord:
    """Reads the file of one benchmark.

    Raises:
        UnreadableError: whatever is wrong with it, in one line.
    """
    return opened(path, bench_schema, _read)


def _read(file: File, root: Mapping[str, Scalar]) -> BenchRecord:
    file.check(bench_schema.TABLE)
    of_rows = [
        each
        for each in bench_schema.TABLE
        if each.parent == bench_schema.ROWS and not each.is_scale and each.path in file.found
    ]
    columns = {each.name: file.texts(each.path) if each.type == "str" else file.numbers(each.path) for each in of_rows}
    samples = {
        each.name: file.numbers(each.path)
        for each in bench_schema.TABLE
        if each.parent == bench_schema.SAMPLES and not each.is_scale
    }
    for group, found in ((bench_schema.ROWS, columns), (bench_schema.SAMPLES, samples)):
        if len({len(values) for values in found.values()}) > 1:
            raise UnreadableError(f"{group}: its datasets differ in length")
    of_row = samples.pop("of_row")
    us, late = samples.pop("us"), samples.pop("late")
    rows = []
    for index in range(len(columns["case"])):
        own = of_row == index
        values: dict[str, Any] = {
            each.name: int(columns[each.name][index]) if each.type == "i8" else columns[each.name][index]
            for each in of_rows
        }
        conditions = {name: taken[own] for name, taken in samples.items() if np.isfinite(taken[own]).any()}
        rows.append(BenchRow(**values, us=us[own], late=late[own] != 0, conditions=conditions))
    return BenchRecord(root, rows)
