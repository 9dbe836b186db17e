"""What a benchmark leaves, as plain data: the writer stores it, the reader gives it back."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from awq_pycuda.results.conditions import held_down


@dataclass(frozen=True)
class BenchRow:
    """One way to compute something, in one shape and one state of the cache; docs/bench.md tells every field.

    `us` (S,) float64 are the samples, `late` (S,) and the `conditions` (S,) each, by name, what was seen beside them.
    """

    case: str
    stage: str
    variant: str
    by: str
    tokens: int
    out_features: int
    in_features: int
    candidates: int
    group_size: int
    cache: str
    read: float
    written: float
    operations: float
    unit: str
    error: float
    tolerance: float
    state: str
    reason: str
    stopped: str
    noise: float
    limit_us: float
    floor_us: float
    us: NDArray[np.float64]
    late: NDArray[Any]
    conditions: Mapping[str, NDArray[np.float64]]
    passes: int = 1  # as of whatever files of version 1 were written for

    @property
    def key(self) -> tuple[Any, ...]:
        """What makes it the same row in another file."""
        shape = (self.tokens, self.out_features, self.in_features, self.candidates, self.group_size)
        return (self.case, self.stage, self.variant, self.by, *shape, self.cache)

    @property
    def median_us(self) -> float:
        """Of the samples; NaN without any."""
        return float(np.median(self.us)) if self.us.size else math.nan

    @property
    def impossible(self) -> bool:
        """Whether its median is below what its work takes at the least: then it was not measured right."""
        return self.median_us < self.floor_us

    @property
    def of_limit(self) -> float:
        """Its limit as a share of its median, at most 1; NaN where there is no limit, no time or an impossible one.

        The limit counts what is written at the rate of memory. A kernel can end before that has left the cache, and so
        before its limit, but never before its floor.
        """
        if not self.limit_us > 0 or self.impossible:
            return math.nan
        return min(1.0, self.limit_us / self.median_us)

    @property
    def throttled(self) -> NDArray[Any]:
        """Which samples were taken while the device held its clock down; none where nothing tells."""
        return held_down(self.conditions, self.us.size)


# What of a row counts for a goal: its time; its limit as a share of it; a peer's time over it; its error over a peer's;
# the bytes that it reads at a ceiling, as a share of its time.
Quantity = Literal["time", "limit", "speedup", "error", "link"]


@dataclass(frozen=True)
class BenchGoal:
    """A figure that was to be reached; docs/bench.md tells every field. `row` and `peer_row` are -1 for none."""

    what: str
    quantity: Quantity
    bound: float
    peer: str
    row: int
    peer_row: int


@dataclass(frozen=True)
class BenchRecord:
    """Everything that a benchmark's file holds: attributes of the file, its rows in the order printed, and goals.

    `stopped`, which is not stored, is what the user stopped it by.
    """

    root: Mapping[str, str | int | float | bool]
    rows: Sequence[BenchRow]
    goals: Sequence[BenchGoal] = ()
    stopped: KeyboardInterrupt | None = None

    def measured(self, goal: BenchGoal) -> float:
        """The figure of a goal, in microseconds or as a ratio; NaN where it was not measured."""
        if goal.row < 0 or (goal.peer and goal.peer_row < 0):
            return math.nan
        row, peer = self.rows[goal.row], self.rows[goal.peer_row]
        if row.impossible or not row.us.size or (goal.peer and not peer.us.size):
            return math.nan
        match goal.quantity:
            case "time":
                return row.median_us
            case "limit":
                return row.of_limit
            case "speedup":
                return peer.median_us / row.median_us
            case "error":
                return row.error / peer.error
            case "link":
                return float(peer.us.min()) * row.read / peer.read / row.median_us

    def reached(self, goal: BenchGoal) -> bool | None:
        """Whether a goal is reached; None where there is no bound, or nothing was measured."""
        found = self.measured(goal)
        if math.isnan(found) or math.isnan(goal.bound):
            return None
        return found <= goal.bound if goal.quantity in ("time", "error") else found >= goal.bound
