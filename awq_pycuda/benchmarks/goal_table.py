"""The goals of a benchmark as cells: what, how much was asked for, how much was found, and whether that is reached."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator

from awq_pycuda.benchmarks.ceilings import CASE as CEILING
from awq_pycuda.results.bench_record import BenchGoal, BenchRecord, BenchRow
from awq_pycuda.spread import percent

HEADINGS = ("figure", "goal", "measured", "reached")
_UNITS = ((1e6, "s"), (1e3, "ms"), (1.0, "us"))


def cells(record: BenchRecord) -> Iterator[tuple[str, str, str, str]]:
    """A row for each goal, by `HEADINGS`."""
    for goal in record.goals:
        reached = record.reached(goal)
        yield goal.what, _asked(goal), _found(record, goal), "-" if reached is None else "yes" if reached else "no"


def conditions(record: BenchRecord) -> str:
    """Where all of it was measured: the device, its clock while samples were taken, and versions; one line."""
    clocks = [clock for row in record.rows for clock in row.conditions.get("sm_clock", ()) if math.isfinite(clock)]
    ends = dict.fromkeys(f"{end(clocks):,.0f}" for end in (min, max) if clocks)
    clock = [f"{' to '.join(ends)} MHz"] if ends else []
    device, versions = (json.loads(str(record.root[name])) for name in ("device", "versions"))
    libraries = [f"{name} {versions[name]}" for name in ("nvcc", "torch") if name in versions]
    commit = str(record.root["git_commit"])[:8]
    return ", ".join([str(device["name"]), *clock, *libraries, *([f"commit {commit}"] if commit else [])])


def ceilings(record: BenchRecord) -> str:
    """The highest of each kind, in one line."""
    best: dict[str, BenchRow] = {}
    for row in record.rows:
        if row.case == CEILING and row.us.size and (row.stage not in best or rate(row) > rate(best[row.stage])):
            best[row.stage] = row
    found = []
    for stage, row in best.items():
        prefix, value = ("T", rate(row) / 1e6) if rate(row) >= 1e6 else ("G", rate(row) / 1e3)
        found.append(f"{stage} {value:{'.3g' if value < 1e3 else ',.0f'}} {prefix}{rate_unit(row)}")
    return ", ".join(found)


def rate(row: BenchRow) -> float:
    """What a ceiling's shortest sample did in a microsecond: operations, or bytes where it does none."""
    return (row.operations or row.read + row.written) / float(row.us.min())


def rate_unit(row: BenchRow) -> str:
    """What the rate of a ceiling counts, by the second."""
    return "B/s" if not row.operations else "OP/s" if row.stage.startswith("int") else "FLOP/s"


def _asked(goal: BenchGoal) -> str:
    if math.isnan(goal.bound):
        return "-"
    match goal.quantity:
        case "time":
            return f"at most {_time(goal.bound)}"
        case "limit":
            return f"at least {goal.bound:.0%} of its limit"
        case "speedup":
            return f"at least {goal.bound:g} times as fast as {goal.peer}"
        case "error":
            return f"error at most {goal.bound:g} times that of {goal.peer}"
        case "link":
            return f"at least {goal.bound:.0%} of the {goal.peer}"


def _found(record: BenchRecord, goal: BenchGoal) -> str:
    found = record.measured(goal)
    if math.isnan(found):
        reason = record.rows[goal.row].reason if goal.row >= 0 else ""
        return f"not measured{f': {reason}' if reason else ''}"
    row, peer = record.rows[goal.row], record.rows[goal.peer_row]
    match goal.quantity:
        case "time":
            return _time(found)
        case "limit":
            return f"{percent(found)} ({_time(row.median_us)})"
        case "speedup":
            return f"{found:.3g} times ({_time(row.median_us)}, {_time(peer.median_us)})"
        case "error":
            return f"{found:.2g} times ({row.error:.2g}, {peer.error:.2g})"
        case "link":
            return f"{percent(found)} of the {goal.peer}"


def _time(us: float) -> str:
    factor, unit = next((pair for pair in _UNITS if us >= pair[0]), _UNITS[-1])
    return f"{us / factor:.3g} {unit}"
