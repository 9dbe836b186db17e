"""What times a launch: a clock, a cache that can be emptied, and conditions to tell beside each sample."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

from awq_pycuda.parallel import map_row_blocks

_LARGEST_FLUSH = 256 << 20  # on the host: what a last cache has beyond is most often other processes' share of it
_UNKNOWN_CACHE = 32 << 20
_TIMES_THE_CACHE = 2
_LARGEST_PROBE = 4 << 20
_LINE = 64  # bytes


@dataclass(frozen=True)
class Sample:
    """One launch: microseconds, whether the launch came late, and the device's conditions right after.

    Late is what the device had to wait for: then the time of launching is part of the sample.
    """

    us: float
    late: bool = False
    conditions: Mapping[str, float] = field(default_factory=dict)


class Machine(Protocol):
    """A clock and a cache.

    Attributes:
        cache_bytes: of the last cache before memory.
        flush: how it is emptied, in a few words.
        probe_bytes: of an array that the cache holds easily, and that takes longer to read from memory.
        certainty: share of a time at the ceilings that no honest time is below: ceilings vary.
    """

    cache_bytes: int
    flush: str
    probe_bytes: int
    certainty: float

    def sample(self, launch: Callable[[], object], cold: bool) -> Sample:
        """Times one launch: with the cache emptied, or right after another launch of the same."""


class CpuMachine:
    """The host: its clock, and a flush that reads.

    A flush that writes would leave lines that are yet to be written back, and the launch that is timed next would wait
    for them.
    """

    certainty = 0.7  # clocks rise and fall with what other processes do, and other machines share the memory

    def __init__(self, cache_bytes: int | None = None) -> None:
        self.cache_bytes = cache_bytes or _last_cache() or _UNKNOWN_CACHE
        size = min(_TIMES_THE_CACHE * self.cache_bytes, _LARGEST_FLUSH)
        self._buffer = np.ones((size // _LINE, _LINE // 8))
        self.probe_bytes = min(self.cache_bytes // 8, _LARGEST_PROBE)
        self.flush = f"reads {size >> 20} MB; the last cache has {self.cache_bytes >> 20} MB"

    def empty_cache(self) -> None:
        """Reads a word of every line of a large buffer."""
        map_row_blocks(lambda block: float(self._buffer[block, 0].sum()), self._buffer.shape)

    def sample(self, launch: Callable[[], object], cold: bool) -> Sample:
        """See `Machine.sample`."""
        if cold:
            self.empty_cache()
        else:
            launch()
        begin = time.perf_counter()
        launch()
        return Sample((time.perf_counter() - begin) * 1e6)


def _last_cache() -> int | None:
    """Bytes of the largest cache of the first core, as Linux tells it; None elsewhere."""
    sizes = []
    try:
        for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
            text = path.read_text(encoding="ascii").strip()
            sizes.append(int(text.removesuffix("K")) << 10)
    except (OSError, ValueError):
        return None
    return max(sizes, default=None)
