"""What a machine can do at most, measured, and how long a subject's work takes at the least by that."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from awq_pycuda.kernels.work import Unit, Work


@dataclass(frozen=True)
class Ceilings:
    """Bytes per second that are read, written, or read and written at once (both counted); operations per second.

    NaN, or a unit that is missing, where nothing was measured: then that is no limit.
    """

    read: float = math.nan
    write: float = math.nan
    copy: float = math.nan
    units: Mapping[Unit, float] = field(default_factory=dict)


def limit_us(work: Work, unit: Unit, ceilings: Ceilings) -> float:
    """Microseconds at the ceilings: the longer of moving the bytes and doing the operations.

    What is read beside as much that is written goes at the rate of a copy, the rest at its own.
    """
    both = min(work.read, work.written)
    parts = ((2 * both, ceilings.copy), (work.read - both, ceilings.read), (work.written - both, ceilings.write))
    return max(sum(_us(*part) for part in parts), _operations_us(work, unit, ceilings))


def floor_us(work: Work, unit: Unit, ceilings: Ceilings, cache_bytes: int, cold: bool) -> float:
    """Microseconds that nothing can go below, so that less is an error of the measurement.

    What is written need not have reached memory when a kernel ends, as far as the cache holds it, and of a warm cache
    neither need what is read come from there.
    """
    written = max(0, work.written - cache_bytes)
    read = work.read if cold else max(0, work.read - cache_bytes)
    fastest = max(ceilings.read, ceilings.copy) if not math.isnan(ceilings.copy) else ceilings.read
    return max(_us(read, fastest), _us(written, ceilings.write), _operations_us(work, unit, ceilings))


def _operations_us(work: Work, unit: Unit, ceilings: Ceilings) -> float:
    return _us(work.operations, ceilings.units.get(unit, math.nan))


def _us(amount: float, rate: float) -> float:
    return 0.0 if math.isnan(rate) or not amount else 1e6 * amount / rate
