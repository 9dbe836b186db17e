"""What a benchmark leaves, as plain data: the writer stores it, the reader gives it back."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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


@dataclass(frozen=True)
class BenchRecord:
    """Everything that a benchmark's file holds: attributes of the file, and its rows in the order printed.

    `stopped`, which is not stored, is what the user stopped it by.
    """

    root: Mapping[str, str | int | float | bool]
    rows: Sequence[BenchRow]
    stopped: KeyboardInterrupt | None = None
