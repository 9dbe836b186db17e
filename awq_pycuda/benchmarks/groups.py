"""Subjects that compute the same: verified on fresh inputs, timed in turn, and looked at once more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from awq_pycuda.benchmarks.machine import Machine
from awq_pycuda.benchmarks.oracle import Exact
from awq_pycuda.benchmarks.subjects import Key, Subject, Verdict
from awq_pycuda.benchmarks.timing import COLD, WARM, Track, interleave
from awq_pycuda.kernels.work import Unit, Work


@dataclass
class Measured:
    """What became of a subject: its verdict, and its samples cold and warm; none where the verdict has a reason.

    The subject itself is not kept: its arrays may fill a device.
    """

    key: Key
    work: Work
    unit: Unit
    passes: int
    verdict: Verdict
    tracks: list[Track] = field(default_factory=list)


def measure_group(
    machine: Machine,
    subjects: Sequence[Subject],
    inputs: Sequence[Exact | None],
    noise: float,
    seconds: float,
    caches: Sequence[str] = (COLD, WARM),
) -> list[Measured]:
    """Verifies each subject, times those that are right, and verifies these again.

    Before: on each of `inputs` in turn, in the same arrays, with poisoned outputs. A subject that leaves elements
    unwritten, or the answer to inputs that are gone, is refused and not timed. After: once more on the inputs that it
    was timed on, with poisoned outputs: one that does nothing where nothing has changed is found out, and has no times.

    Args:
        machine: takes the samples.
        subjects: ways to compute one thing.
        inputs: at least two sets, or None alone where a subject has no inputs.
        noise: see `interleave`, as is `seconds`.
        seconds: for all of them together.
        caches: in which states of the cache to time.
    """
    found = []
    for subject in subjects:
        verdict = Verdict()
        for exact in inputs:
            verdict = _worse(verdict, _verify(subject, exact))
            if verdict.reason is not None:
                break
        found.append(Measured(subject.key, subject.work, subject.unit, subject.passes, verdict))
    right = [pair for pair in zip(subjects, found, strict=True) if pair[1].verdict.reason is None]
    for subject, each in right:
        each.tracks = [Track(subject.launch, cache) for cache in caches]
    interleave(machine, [track for _, each in right for track in each.tracks], noise, seconds)
    for subject, each in right:
        failure = next((track.failure for track in each.tracks if track.failure), None)
        again = Verdict(reason=f"while timed: {failure}") if failure else _verify(subject, None)
        if again.reason is not None and not failure:
            again = replace(again, reason=f"launched again on the same inputs: {again.reason}")
        each.verdict = _worse(each.verdict, again)
        for track in each.tracks:
            track.launch = _ended
        if each.verdict.reason is not None:
            each.tracks = []
    return found


def _ended() -> None:
    """In place of the launch of a subject that may be gone."""


def _verify(subject: Subject, exact: Exact | None) -> Verdict:
    """One launch on these inputs, or those that are there, over poison. Whatever it raises is the reason."""
    try:
        if exact is not None:
            subject.fill(exact)
        subject.poison()
        subject.launch()
        return subject.judge()
    except Exception as error:
        return Verdict(reason=f"{type(error).__name__}: {error}".removesuffix(": "))


def _worse(one: Verdict, other: Verdict) -> Verdict:
    if other.reason is not None or not one.error > other.error:
        return other
    return one
