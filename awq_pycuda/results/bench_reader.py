"""A benchmark's file as plain Python values, every one of them checked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np

from awq_pycuda.hdf5 import UnreadableError
from awq_pycuda.results import bench_schema
from awq_pycuda.results.bench_record import BenchGoal, BenchRecord, BenchRow, Quantity
from awq_pycuda.results.opened import File, Scalar, opened


def read_bench(path: Path) -> BenchRecord:
    """Reads the file of one benchmark.

    Raises:
        UnreadableError: whatever is wrong with it, in one line.
    """
    return opened(path, bench_schema, _read)


def _read(file: File, root: Mapping[str, Scalar]) -> BenchRecord:
    file.check(bench_schema.TABLE)
    columns, goals = _columns(file, bench_schema.ROWS), _columns(file, bench_schema.GOALS)
    samples = {
        each.name: file.numbers(each.path)
        for each in bench_schema.TABLE
        if each.parent == bench_schema.SAMPLES and not each.is_scale
    }
    for group, found in (
        (bench_schema.ROWS, columns),
        (bench_schema.SAMPLES, samples),
        (bench_schema.GOALS, goals),
    ):
        if len({len(values) for values in found.values()}) > 1:
            raise UnreadableError(f"{group}: its datasets differ in length")
    of_row = samples.pop("of_row")
    us, late = samples.pop("us"), samples.pop("late")
    rows = []
    for index, values in enumerate(_records(columns)):
        own = of_row == index
        conditions = {name: taken[own] for name, taken in samples.items() if np.isfinite(taken[own]).any()}
        rows.append(BenchRow(**values, us=us[own], late=late[own] != 0, conditions=conditions))
    found_goals = [BenchGoal(**values) for values in _records(goals)]
    for goal in found_goals:
        if goal.quantity not in get_args(Quantity) or max(goal.row, goal.peer_row) >= len(rows):
            raise UnreadableError(f"{bench_schema.GOALS}: {goal.what!r:.60} is of nothing that is there")
    return BenchRecord(root, rows, found_goals)


def _columns(file: File, group: str) -> dict[str, Sequence[Any]]:
    """The datasets of a group that the file has, by name; whole numbers as such."""
    found: dict[str, Sequence[Any]] = {}
    for each in bench_schema.TABLE:
        if each.parent == group and not each.is_scale and each.path in file.found:
            values: Sequence[Any] = file.texts(each.path) if each.type == "str" else [*file.numbers(each.path)]
            found[each.name] = [int(value) for value in values] if each.type == "i8" else values
    return found


def _records(columns: Mapping[str, Sequence[Any]]) -> Iterator[dict[str, Any]]:
    for values in zip(*columns.values(), strict=True):
        yield dict(zip(columns, values, strict=True))
