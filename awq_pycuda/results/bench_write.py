"""Writes a benchmark's file as its schema says, whole or not at all."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from awq_pycuda.results import bench_schema, schema
from awq_pycuda.results.bench_record import BenchRecord
from awq_pycuda.results.filled import fill, write_whole


def write_bench(path: Path, record: BenchRecord) -> None:
    """Writes the file.

    Raises:
        OSError: it cannot be written; no temporary file is left.
        KeyError: the record holds something that the schema does not know.
    """

    def filling(file: h5py.File) -> None:
        found = {
            bench_schema.ROWS: _columns(bench_schema.ROWS, "row", record.rows),
            bench_schema.SAMPLES: _samples(record),
            bench_schema.GOALS: _columns(bench_schema.GOALS, "figure", record.goals),
        }
        for group, values in found.items():
            fill(file.create_group(group), bench_schema, group, values)

    write_whole(path, bench_schema, record.root, filling)


def _columns(group: str, scale: str, records: Sequence[Any]) -> dict[str, Any]:
    values: dict[str, Any] = {scale: np.arange(len(records))}
    for each in bench_schema.TABLE:
        if each.parent == group and not each.is_scale:
            column = [getattr(record, each.name) for record in records]
            values[each.name] = np.array(column, h5py.string_dtype() if each.type == "str" else each.type)
    return values


def _samples(record: BenchRecord) -> dict[str, Any]:
    counts = [row.us.size for row in record.rows]
    values: dict[str, Any] = {
        "sample": np.arange(sum(counts)),
        "of_row": np.repeat(np.arange(len(counts)), counts),
        "us": _joined([row.us for row in record.rows]),
        "late": _joined([row.late for row in record.rows]),
    }
    for name, *_ in schema.TOLD:
        values[name] = _joined([row.conditions.get(name, np.full(row.us.size, np.nan)) for row in record.rows])
    return values


def _joined(parts: list[Any]) -> Any:
    return np.concatenate(parts) if parts else np.empty(0)
