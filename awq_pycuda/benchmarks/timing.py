"""Times of several subjects in turn, round by round, until they are certain enough or the time is up.

Why not `cuda-bench` (nvbench's Python package), which does much of it: it empties the L2 cache by writing. Written
lines are yet to go back to memory, and the kernel that is timed next pays for their way: the same product took 27.9 us
after a flush that reads and 32.2 after one that writes, cuBLAS's 49.3 and 59.0 (H100, 8192 x 8192, one token). Here the
flush reads.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from awq_pycuda.benchmarks.machine import Machine, Sample
from awq_pycuda.spread import median_interval

LEAST_ROUNDS = 9  # so that the interval of the median lies within the samples, none of them its end
MOST_ROUNDS = 400
_FIRST = 2  # samples of each that do not count: its data come to where it works, the machine learns how it launches
COLD, WARM = "cold", "warm"


@dataclass
class Track:
    """One subject's samples in one state of the cache, and why they ended; `failure`: what a launch raised."""

    launch: Callable[[], object]
    cache: str
    samples: list[Sample] = field(default_factory=list)
    stopped: str = ""
    failure: str | None = None

    @property
    def noise(self) -> float:
        """Half of the median's 95 % interval as a share of the median; NaN with too few samples."""
        times = [sample.us for sample in self.samples]
        low, median, high = median_interval(times)
        return (high - low) / 2 / median if median > 0 else math.nan


def interleave(
    machine: Machine,
    tracks: Sequence[Track],
    noise: float,
    seconds: float,
    now: Callable[[], float] = time.perf_counter,
) -> None:
    """Samples all tracks in turn, the first of a round being another in each, so that drift meets all alike.

    It ends when every track's noise is at most `noise`, or after `seconds`, whichever is first, but not before
    `LEAST_ROUNDS` rounds. Each track is told which it was.

    Args:
        machine: takes the samples.
        tracks: what to sample; their samples are added to.
        noise: share of the median, see `Track.noise`.
        seconds: of the host's clock, for all of them together.
        now: the clock.
    """
    for track in [track for track in tracks for _ in range(_FIRST)]:
        if track.failure is None:
            _sample(machine, track)
            track.samples.clear()
    begin = now()
    for done in range(MOST_ROUNDS):
        if done >= LEAST_ROUNDS:
            certain = all(track.noise <= noise for track in tracks if track.failure is None)
            if certain or now() - begin > seconds:
                break
        for index in range(len(tracks)):
            track = tracks[(done + index) % len(tracks)]
            if track.failure is None:
                _sample(machine, track)
    for track in tracks:
        track.stopped = "noise" if track.noise <= noise else "time"


def _sample(machine: Machine, track: Track) -> None:
    try:
        track.samples.append(machine.sample(track.launch, track.cache == COLD))
    except Exception as error:
        track.failure = f"{type(error).__name__}: {error}".removesuffix(": ")
