"""A whole benchmark: ceilings, every group of subjects in turn, ceilings again, and the rows that come of it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace

import numpy as np

from awq_pycuda import provenance
from awq_pycuda.benchmarks.ceilings import CASE as CEILING
from awq_pycuda.benchmarks.ceilings import measured
from awq_pycuda.benchmarks.groups import Measured, measure_group
from awq_pycuda.benchmarks.limits import Ceilings, floor_us, limit_us
from awq_pycuda.benchmarks.machine import Machine
from awq_pycuda.benchmarks.models import MODELS
from awq_pycuda.benchmarks.oracle import Exact
from awq_pycuda.benchmarks.passes import PASS, PassSubject
from awq_pycuda.benchmarks.peers import Peers
from awq_pycuda.benchmarks.places import KERNELS, Place
from awq_pycuda.benchmarks.plan import Part, Plan, convention_for
from awq_pycuda.benchmarks.subjects import Subject
from awq_pycuda.benchmarks.timing import COLD, WARM, Track
from awq_pycuda.kernels.work import Work
from awq_pycuda.results.bench_record import BenchRecord, BenchRow

LEAST_EFFECT = 1.1  # of the flush: without it the probe takes as long cold as warm
_CEILING_SECONDS = 0.3

Progress = Callable[[str, int, int], None]


def measure(
    place: Place,
    peers: Peers,
    plan: Plan,
    on_progress: Progress = lambda *_: None,
    interruptible: AbstractContextManager[None] = nullcontext(),  # noqa: B008  # a nullcontext has no state
) -> BenchRecord:
    """Measures all of a plan on an entered place.

    Ceilings are measured before and after everything else, and the best of both counts: a limit that a busy moment has
    lowered would make honest times impossible. Where a fault or a signal keeps it from going on, the record holds what
    there is, and the error.

    Args:
        place: entered.
        peers: on the same machine.
        plan: what to measure.
        on_progress: told what is going on, how many steps are done, and of how many.
        interruptible: held while it measures.
    """
    steps = 2 + sum(part.groups for part in plan.parts)
    step = iter(range(steps))

    def tell(what: str) -> None:
        on_progress(what, next(step), steps)

    before: list[Measured] = []
    found: list[Measured] = []
    after: list[Measured] = []
    effect = math.nan
    error: Exception | KeyboardInterrupt | None = None
    try:
        with interruptible:
            tell("ceilings")
            peers.use_stream(place.stream)
            subjects = [*place.ceilings(), *peers.ceilings()]
            effect = flush_effect(place)
            before = _measure_ceilings(place, subjects)
            for part in plan.parts:
                inputs = [Exact(part.shape, convention_for(part.shape), plan.seed + which) for which in range(2)]
                # No cache holds a block of a model: there is nothing to be warm.
                caches = (COLD,) if part.case in MODELS else (COLD, WARM)
                for group in _groups(place, peers, part, plan.layers, tell):
                    found += measure_group(place.machine, group, inputs, plan.noise, plan.seconds, caches)
            tell("ceilings")
            after = _measure_ceilings(place, subjects)
    except (Exception, KeyboardInterrupt) as caught:  # a fault of a GPU leaves nothing that works
        error = caught
    for one, other in zip(before, after, strict=False):
        for track, again in zip(one.tracks, other.tracks, strict=False):
            track.samples += again.samples
    limits = ceilings_of(before)
    rows = [row for each in (*before, *found) for row in _rows(each, limits, place.machine)]
    if effect < LEAST_EFFECT:
        place.absent.append(
            f"cold times: the flush has no effect (an array is read in {effect:.2f} of its time without)"
        )
        rows = [row for row in rows if row.cache != COLD or row.case in (CEILING, *MODELS)]
    made_by = provenance.made_by(place.backend)
    root = {
        "created": provenance.created(),
        **made_by,
        "versions": json.dumps(json.loads(str(made_by["versions"])) | peers.versions()),
        "options": json.dumps(asdict(plan)),
        "flush": place.machine.flush,
        "flush_effect": effect,
        "absent": json.dumps([*place.absent, *peers.absent]),
    }
    if error is not None:
        root["error"] = f"{type(error).__name__}: {error}"
    return BenchRecord(root, rows, stopped=error if isinstance(error, KeyboardInterrupt) else None)


def flush_effect(place: Place) -> float:
    """How much longer reading a small array takes with the cache emptied than right after it was read."""
    read = place.reader(place.machine.probe_bytes)
    cold, warm = (np.median([place.machine.sample(read, cold=cold).us for _ in range(9)]) for cold in (True, False))
    return float(cold / warm) if warm > 0 else math.inf


def ceilings_of(found: Sequence[Measured]) -> Ceilings:
    """The limits that the shortest samples of ceilings mean."""
    rates = []
    for each in found:
        times = [sample.us for track in each.tracks for sample in track.samples]
        if times:
            rates.append((each.key.stage, each.work, each.unit, min(times)))
    return measured(rates)


def _measure_ceilings(place: Place, subjects: Sequence[Subject]) -> list[Measured]:
    return measure_group(place.machine, subjects, [None], 0.01, _CEILING_SECONDS * len(subjects), [COLD])


def _groups(
    place: Place, peers: Peers, part: Part, layers: int, tell: Callable[[str], None]
) -> Iterator[list[Subject]]:
    """The subjects of a part that compute the same, in turn."""
    shape, convention = part.shape, convention_for(part.shape)
    if part.case == KERNELS:
        with place.kernels(shape, convention, part.stages) as by_stage:
            for stage, subjects in by_stage.items():
                tell(f"{stage}, {shape}")
                others = peers.kernels(stage, shape, convention)
                yield [*_own(subjects, part, place.preferred(stage)), *_beside(others, part)]
    elif part.case == PASS:
        tell(f"pass, {shape}")
        with place.backends() as backends:
            own = [
                PassSubject(backend, variant, shape, convention, layers, *place.product_unit(variant))
                for variant, backend in backends.items()
            ]
            others = peers.passes(shape, convention, layers)
            yield [*_own(own, part, place.preferred("dequantizeTiled")), *_beside(others, part)]
    else:
        with place.models(part.case, shape, convention, part.stages) as by_stage:
            for stage, subjects in by_stage.items():
                tell(f"{stage}, {part.case}")
                yield _own(subjects, part, ())


def _own(subjects: Sequence[Subject], part: Part, preferred: Sequence[str]) -> list[Subject]:
    """Those of the variants that a part asks for; all, where none of them is among these."""
    named = {subject.key.variant.partition(",")[0]: subject for subject in subjects}
    wanted = [name for name in preferred if name in named][:1] if part.default else part.variants
    return [named[name] for name in named if name in wanted] or [*subjects]


def _beside(peers: Sequence[Subject], part: Part) -> list[Subject]:
    return [peer for peer in peers if part.peers is None or peer.key.by in part.peers]


def _rows(each: Measured, limits: Ceilings, machine: Machine) -> Iterator[BenchRow]:
    key, work, cache_bytes = each.key, each.work, machine.cache_bytes
    done = replace(work, operations=each.passes * work.operations)
    tracks: list[Track | None] = [*each.tracks] or [None]
    for track in tracks:
        cold = track is None or track.cache == COLD
        samples = [] if track is None else track.samples
        names = dict.fromkeys(name for sample in samples for name in sample.conditions)
        yield BenchRow(
            case=key.case,
            stage=key.stage,
            variant=key.variant,
            by=key.by,
            tokens=key.shape.tokens,
            out_features=key.shape.out_features,
            in_features=key.shape.in_features,
            candidates=key.shape.candidates,
            group_size=key.shape.group_size or 0,
            cache=WARM if not cold else COLD,
            read=float(work.read),
            written=float(work.written),
            operations=float(work.operations),
            unit=each.unit,
            error=each.verdict.error,
            tolerance=each.verdict.tolerance,
            state="timed" if each.verdict.reason is None else "failed",
            reason=each.verdict.reason or "",
            stopped="" if track is None else track.stopped,
            noise=math.nan if track is None else track.noise,
            passes=each.passes,
            limit_us=limit_us(done if cold else _warm(done, cache_bytes), each.unit, limits),
            floor_us=machine.certainty * floor_us(done, each.unit, limits, cache_bytes, cold),
            us=np.array([sample.us for sample in samples]),
            late=np.array([sample.late for sample in samples], bool),
            conditions={
                name: np.array([sample.conditions.get(name, math.nan) for sample in samples]) for name in names
            },
        )


def _warm(work: Work, cache_bytes: int) -> Work:
    """What is left of it where the cache holds what it can: that costs nothing, since the rate of no cache is known."""
    moved = work.read + work.written
    share = max(0.0, 1 - cache_bytes / moved) if moved else 0.0
    return replace(work, read=share * work.read, written=share * work.written)
