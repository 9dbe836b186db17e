"""What a benchmark prints: the ceilings, a table for each shape, and what must be known to read it."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from awq_pycuda.benchmarks.ceilings import CASE
from awq_pycuda.benchmarks.goal_table import HEADINGS, cells, rate, rate_unit
from awq_pycuda.benchmarks.models import MODELS
from awq_pycuda.benchmarks.subjects import OURS
from awq_pycuda.benchmarks.timing import COLD, WARM
from awq_pycuda.console import print_line, table_style
from awq_pycuda.names import listed
from awq_pycuda.results.bench_record import BenchRecord, BenchRow
from awq_pycuda.spread import percent

_HEADINGS = ("us\ncold", "us\nwarm", "noise", "{}FLOP/s", "{}B/s", "of its\nlimit")
_PREFIXES = {"cpu": ("G", 1e3)}  # by backend: the prefix of units, and what a microsecond is counted by; else tera
_TERA = ("T", 1e6)


def print_record(console: Console, record: BenchRecord) -> None:
    """The ceilings, then ours by shape with the ratio to each peer, then whatever qualifies these figures."""
    scale = _PREFIXES.get(str(record.root["backend"]), _TERA)
    for row in record.rows:
        if row.case == CASE and row.us.size:
            print_line(console, _ceiling(row, *scale))
    print_line(console, f"cold: the flush {record.root['flush']}")
    rows = [row for row in record.rows if row.case != CASE]
    shapes = dict.fromkeys(_shape(row) for row in rows)
    for shape in shapes:
        of_shape = [row for row in rows if _shape(row) == shape]
        print_line(console, f"{_title(of_shape[0])} (peers: their time over ours, {COLD})")
        console.print(_table(console, of_shape, *scale))
    if record.goals:
        print_line(console, f"goals, {COLD}")
        table = Table(*HEADINGS, box=table_style(console))
        for texts in cells(record):
            table.add_row(*map(escape, texts))
        console.print(table)
    for line in remarks(record):
        print_line(console, line)


def ours_failed(record: BenchRecord) -> bool:
    """Whether anything of ours is wrong, or was measured as it cannot be, or not all could be measured."""
    return "error" in record.root or any(
        row.by == OURS and (row.state == "failed" or row.impossible) for row in record.rows
    )


def remarks(record: BenchRecord) -> list[str]:
    """What failed, what cannot be, what was not certain, and what is absent; a line each."""
    lines = [f"STOPPED: {record.root['error']}"] if "error" in record.root else []
    for row in record.rows:
        if row.state == "failed":
            lines.append(f"FAILED {_name(row)}: {row.reason}; not timed")
        elif row.impossible:
            lines.append(
                f"IMPOSSIBLE {_name(row)}, {row.cache}: {row.median_us:.2f} us, but its work takes at least "
                f"{row.floor_us:.2f} us; not a time of all of its work"
            )
    if throttled := [row for row in record.rows if row.throttled.any()]:
        names = listed([f"{_name(row)}, {row.cache} ({row.throttled.mean():.0%})" for row in throttled], 6)
        lines.append(f"samples with the clock held down: {names}")
    unsure = [row for row in record.rows if row.stopped == "time"]
    if unsure:
        worst = max(row.noise for row in unsure)
        lines.append(
            f"stopped by the time limit before they were certain: {len(unsure)} rows, noise up to {percent(worst)}"
        )
    late = list(dict.fromkeys(_name(row) for row in record.rows if row.us.size and row.late.mean() > 0.5))
    if late:
        lines.append(f"with the time of launching, or of the host: {listed(late, 6)}")
    return lines + [f"absent: {line}" for line in json.loads(str(record.root["absent"]))]


def _ceiling(row: BenchRow, prefix: str, factor: float) -> str:
    return f"ceiling {row.stage}: {rate(row) / factor:.3g} {prefix}{rate_unit(row)}, {row.variant}"


def _shape(row: BenchRow) -> tuple[object, ...]:
    return (row.case, row.tokens, row.out_features, row.in_features, row.candidates, row.group_size)


def _title(row: BenchRow) -> str:
    grouped = f", groups of {row.group_size}" if row.group_size else ""
    if row.case in MODELS:
        of_layers = " and ".join(f"{count} of {rows} x {columns}" for count, rows, columns in MODELS[row.case].layers)
        return f"{row.case}: blocks of {of_layers}, {row.tokens} tokens, {row.candidates} candidates{grouped}"
    return (
        f"{row.case}: {row.out_features} x {row.in_features}, {row.tokens} tokens, {row.candidates} candidates{grouped}"
    )


def _name(row: BenchRow) -> str:
    parts = (row.stage, row.variant, "" if row.by == OURS else row.by)
    name = " ".join(part for part in parts if part)
    if row.case == CASE:
        return f"ceiling {name}"
    if row.case in MODELS:
        return f"{name} of {row.case}"
    return f"{name} at {row.out_features} x {row.in_features} x {row.tokens}"


def _table(console: Console, rows: Sequence[BenchRow], prefix: str, factor: float) -> Table:
    peers = list(dict.fromkeys(row.by for row in rows if row.by != OURS))
    table = Table(box=table_style(console))
    for heading in ("stage", "variant"):
        table.add_column(heading, overflow="fold", vertical="bottom")
    for heading in (*_HEADINGS, *(peer.replace(" ", "\n", 1) for peer in peers)):
        table.add_column(heading.format(prefix), justify="right", no_wrap=True)
    for stage, variant in dict.fromkeys((row.stage, row.variant) for row in rows if row.by == OURS):
        own = {row.cache: row for row in rows if (row.stage, row.variant, row.by) == (stage, variant, OURS)}
        others = [
            next((row for row in rows if (row.stage, row.by, row.cache) == (stage, peer, COLD)), None) for peer in peers
        ]
        table.add_row(
            escape(stage), escape(variant), *_cells(own, factor), *(_ratio(own.get(COLD), row) for row in others)
        )
    return table


def _cells(own: dict[str, BenchRow], factor: float) -> list[str]:
    cold, warm = own.get(COLD), own.get(WARM)
    shown = cold or warm
    assert shown is not None
    us = shown.median_us
    moved = shown.read + shown.written
    return [
        *(_microseconds(row) for row in (cold, warm)),
        percent(shown.noise),
        _number(shown.operations / us / factor),
        _number(moved / us / factor),
        "impossible" if shown.impossible else percent(shown.of_limit),
    ]


def _microseconds(row: BenchRow | None) -> str:
    if row is None:
        return "-"
    return (
        "failed"
        if row.state == "failed"
        else f"{row.median_us:.2f}"
        if row.median_us < 1000
        else f"{row.median_us:.0f}"
    )


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3g}"


def _ratio(own: BenchRow | None, peer: BenchRow | None) -> str:
    if own is None or peer is None:
        return "-"
    if peer.state == "failed":
        return "failed"
    ratio = peer.median_us / own.median_us
    return "-" if math.isnan(ratio) else f"{ratio:.2f}"
