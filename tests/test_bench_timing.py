"""How a benchmark times: in turn, until it is sure or the time is up; and the limits that it holds times to."""

import math

import pytest

from awq_pycuda.benchmarks.ceilings import measured
from awq_pycuda.benchmarks.limits import Ceilings, floor_us, limit_us
from awq_pycuda.benchmarks.machine import CpuMachine, Sample
from awq_pycuda.benchmarks.timing import LEAST_ROUNDS, MOST_ROUNDS, Track, interleave
from awq_pycuda.kernels.work import Work
from awq_pycuda.spread import median_interval


class Scripted:
    """A machine whose samples are those of a function of the launch; it keeps the order of its calls."""

    cache_bytes, flush, certainty = 0, "", 1.0

    def __init__(self, us):
        self.us, self.calls = us, []

    def sample(self, launch, cold):
        self.calls.append((launch, cold))
        return Sample(self.us(launch, len(self.calls)))


@pytest.mark.parametrize(
    ("count", "ends"), [(5, (math.nan, math.nan)), (6, (1, 6)), (9, (2, 8)), (20, (6, 15)), (100, (40, 61))]
)
def test_the_interval_of_a_median_is_that_of_the_tables(count, ends):
    low, median, high = median_interval(range(count, 0, -1))
    assert (low, high) == pytest.approx(ends, nan_ok=True)
    assert median == (count + 1) / 2


def test_each_round_begins_with_another_and_all_have_as_many():
    machine = Scripted(lambda launch, _: 5.0)
    tracks = [Track(name, cache) for name in "ab" for cache in ("cold", "warm")]
    interleave(machine, tracks, noise=0.1, seconds=60)
    del machine.calls[:8]  # which do not count
    assert machine.calls[:4] == [("a", True), ("a", False), ("b", True), ("b", False)]
    assert machine.calls[4:8] == [("a", False), ("b", True), ("b", False), ("a", True)]
    assert [len(track.samples) for track in tracks] == [LEAST_ROUNDS] * 4
    assert {track.stopped for track in tracks} == {"noise"}


def test_it_goes_on_until_the_noisy_one_is_certain():
    machine = Scripted(lambda launch, call: 5.0 if launch == "calm" else 5.0 + call % 7)
    tracks = [Track("calm", "warm"), Track("noisy", "warm")]
    interleave(machine, tracks, noise=0.15, seconds=60)
    assert LEAST_ROUNDS < len(tracks[0].samples) == len(tracks[1].samples) < MOST_ROUNDS
    assert [track.stopped for track in tracks] == ["noise", "noise"]


def test_the_time_limit_ends_it_and_says_who_was_not_certain():
    machine = Scripted(lambda launch, call: 5.0 if launch == "calm" else 5.0 * (1 + call % 3))
    tracks, seconds = [Track("calm", "warm"), Track("noisy", "warm")], iter(range(1000))
    interleave(machine, tracks, noise=0.01, seconds=20, now=lambda: next(seconds))
    assert len(tracks[0].samples) == LEAST_ROUNDS + 20
    assert [track.stopped for track in tracks] == ["noise", "time"]


def test_one_that_fails_stops_and_the_others_go_on():
    def us(launch, call):
        if launch == "bad" and call > 10:
            raise RuntimeError("gone")
        return 5.0

    tracks = [Track("bad", "warm"), Track("good", "warm")]
    interleave(Scripted(us), tracks, noise=0.1, seconds=60)
    assert tracks[0].failure == "RuntimeError: gone"
    assert len(tracks[1].samples) == LEAST_ROUNDS


def test_a_warm_sample_follows_a_launch_and_a_cold_one_a_flush(monkeypatch):
    machine, seen = CpuMachine(1 << 16), []
    monkeypatch.setattr(machine, "empty_cache", lambda: seen.append("flush"))
    machine.sample(lambda: seen.append("launch"), cold=True)
    machine.sample(lambda: seen.append("launch"), cold=False)
    assert seen == ["flush", "launch", "launch", "launch"]
    assert machine.flush.startswith("reads ")


CEILINGS = Ceilings(read=2e9, write=1e9, copy=1.5e9, units={"fp32": 1e12})


@pytest.mark.parametrize(
    ("work", "us"),
    [
        (Work(2000, 0, 0), 1.0),
        (Work(0, 1000, 0), 1.0),
        (Work(1500, 1500, 0), 2.0),
        (Work(3500, 1500, 0), 3.0),
        (Work(1500, 2500, 0), 3.0),
        (Work(2000, 0, 5e6), 5.0),
    ],
)
def test_the_limit_is_the_longer_of_bytes_and_operations(work, us):
    assert limit_us(work, "fp32", CEILINGS) == pytest.approx(us)


def test_what_was_not_measured_is_no_limit():
    assert limit_us(Work(2000, 0, 1e9), "int8 matrix", CEILINGS) == pytest.approx(1.0)
    assert limit_us(Work(2000, 0, 1e6), "fp32", Ceilings()) == 0


@pytest.mark.parametrize(
    ("work", "cold", "us"),
    [
        (Work(4000, 1000, 0), True, 2.0),  # what is written may still lie in the cache
        (Work(4000, 3000, 0), True, 2.0),
        (Work(4000, 6000, 0), True, 5.0),
        (Work(4000, 1000, 0), False, 1.5),  # and so may what is read
        (Work(500, 500, 3e6), False, 3.0),
    ],
)
def test_the_floor_is_below_every_honest_time(work, cold, us):
    assert floor_us(work, "fp32", CEILINGS, 1000, cold) == pytest.approx(us)


def test_ceilings_are_the_best_of_each_kind():
    moved, done = Work(1000, 1000, 0), Work(0, 0, 4e6)
    found = measured([("copy", moved, "fp32", 2.0), ("copy", moved, "fp32", 1.0), ("fp32", done, "fp32", 4.0)])
    assert found.copy == pytest.approx(2e9)
    assert found.units == {"fp32": pytest.approx(1e12)}
    assert math.isnan(found.read)
