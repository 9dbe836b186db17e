"""Machines whose times are made up, so that what a benchmark makes of them can be told beforehand."""

from awq_pycuda.benchmarks import ceilings, machine, session
from awq_pycuda.benchmarks.machine import Sample
from awq_pycuda.benchmarks.plan import Plan, parts_of
from awq_pycuda.benchmarks.shapes import Shape
from awq_pycuda.kernels.work import WORK


def small(monkeypatch):
    """Ceilings and a flush of a few megabytes."""
    monkeypatch.setattr(ceilings, "_BYTES", 1 << 22)
    monkeypatch.setattr(ceilings, "_SIDE", {"fp32": 256, "fp64": 256})
    monkeypatch.setattr(machine, "_LARGEST_FLUSH", 1 << 24)
    monkeypatch.setattr(session, "_CEILING_SECONDS", 1e-3)


def plan(cases=("kernels",), stages=tuple(WORK), shapes=None, layers=1, variants=()):
    """A plan for a layer of 40 x 24 with 32 tokens."""
    own = (Shape(32, 24, 24) if "pass" in cases else Shape(32, 40, 24, 3),)
    return Plan(parts_of(cases, shapes or own, stages, variants), layers, seed=3, noise=0.5, seconds=1e-3)


class FakeMachine:
    """Moves 1,000 bytes a microsecond cold, ten times as many warm, and does 1,000 operations in one.

    Args:
        flushes: whether a flush has an effect.
        persisting: a stage whose data stay in the cache.
        faster: stages by the factor on their times.
    """

    cache_bytes = 1 << 20
    flush = "is made up"
    certainty = 0.95
    probe_bytes = 1 << 10

    def __init__(self, flushes=True, persisting=None, faster=None):
        self.flushes, self.persisting, self.faster = flushes, persisting, faster or {}
        self.launches = 0

    def sample(self, launch, cold):
        launch()
        self.launches += 1
        subject = getattr(launch, "__self__", None)
        if not hasattr(subject, "work"):
            return Sample(10.0 if cold and self.flushes else 1.0)
        work, stage = subject.work, subject.key.stage
        from_memory = cold and self.flushes and stage != self.persisting
        us = max((work.read + work.written) / (1e3 if from_memory else 1e4), work.operations / 1e3)
        return Sample(1.2 * us * self.faster.get(stage, 1))
