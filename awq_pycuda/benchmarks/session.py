"""A whole benchmark: ceilings, every group of subjects in turn, ceilings again, and the rows that come of it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from awq_pycuda import provenance
from awq_pycuda.benchmarks.cases import SEARCHES
from awq_pycuda.benchmarks.ceilings import CASE as CEILING
from awq_pycuda.benchmarks.ceilings import measured
from awq_pycuda.benchmarks.groups import Measured, measure_group
from awq_pycuda.benchmarks.limits import Ceilings, floor_us, limit_us
from awq_pycuda.benchmarks.machine import Machine
from awq_pycuda.benchmarks.models import MODELS
from awq_pycuda.benchmarks.oracle import Exact
from awq_pycuda.benchmarks.passes import PassSubject
from awq_pycuda.benchmarks.peers import Peers
from awq_pycuda.benchmarks.places import KERNELS, Place
from awq_pycuda.benchmarks.shapes import Shape
from awq_pycuda.benchmarks.subjects import Subject, spec_for
from awq_pycuda.benchmarks.timing import COLD, WARM, Track
from awq_pycuda.engine.arrays import kept_bytes
from awq_pycuda.kernels.work import Work
from awq_pycuda.quant.conventions import Convention
from awq_pycuda.quant.format import Format
from awq_pycuda.results.bench_record import BenchRecord, BenchRow

LEAST_EFFECT = 1.1  # of the flush: without it the probe takes as long cold as warm
_CEILING_SECONDS = 0.3

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Attributes:
        cases: of `kernels`, `pass` and the names of `MODELS`.
        stages: of the kernels.
        shapes: of the layers.
        layers: of a pass.
        seed: of the inputs.
        noise: see `interleave`; `seconds` for each group.
        variants: of the stages that have them, these alone; without any, all.
    """

    cases: tuple[str, ...]
    stages: tuple[str, ...]
    shapes: tuple[Shape, ...]
    layers: int
    seed: int
    noise: float
    seconds: float
    variants: tuple[str, ...] = ()

    @property
    def models(self) -> tuple[str, ...]:
        """The models among the cases."""
        return tuple(case for case in self.cases if case in MODELS)


def convention_for(shape: Shape) -> Convention:
    """The default convention with as many candidates, evenly from 0 to 1, and groups as the shape has."""
    gammas = tuple(float(gamma) for gamma in np.linspace(0, 1, shape.candidates))
    return Convention(gammas=gammas, quantizer=Format(shape.group_size))


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
    per_shape = len(plan.stages) * (KERNELS in plan.cases) + ("pass" in plan.cases)
    steps = 2 + len(plan.shapes) * per_shape + len(plan.models) * len(set(SEARCHES) & set(plan.stages))
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
            for shape in plan.shapes:
                for group in _groups(place, peers, plan, shape, tell):
                    found += _measure_subjects(place, group, plan, shape)
            for name in plan.models:
                for group in _model_groups(place, plan, name, tell):
                    # No cache holds a block: there is nothing to be warm.
                    found += _measure_subjects(place, group, plan, plan.shapes[0], (COLD,))
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
    root = {
        "created": provenance.created(),
        **provenance.made_by(place.backend),
        "options": json.dumps(_plain(plan)),
        "flush": place.machine.flush,
        "flush_effect": effect,
        "absent": json.dumps([*place.absent, *peers.absent]),
    }
    if error is not None:
        root["error"] = f"{type(error).__name__}: {error}"
    return BenchRecord(root, rows, error if isinstance(error, KeyboardInterrupt) else None)


def layer_bytes(plan: Plan) -> int:
    """What the arrays of a place take at the most; a pass has layers of its own for each set of inputs."""
    layers = 1 + 2 * plan.layers * ("pass" in plan.cases)
    of_shapes = [layers * _kept_bytes(shape) for shape in plan.shapes]
    return max(*of_shapes, *(sum(map(_kept_bytes, _block(plan, name))) for name in plan.models), 0)


def _kept_bytes(shape: Shape) -> int:
    return kept_bytes([spec_for(shape)], convention_for(shape))


def _block(plan: Plan, name: str) -> list[Shape]:
    return MODELS[name].shapes(plan.shapes[0].candidates, plan.shapes[0].group_size)


def host_bytes(plan: Plan) -> int:
    """What the largest shape takes on the host besides: two sets of inputs, and in float64 what must come of them."""
    found = []
    of_models = [shape for name in plan.models for shape in _block(plan, name)]
    for shape in (*plan.shapes, *of_models):
        inputs, outputs = shape.tokens * shape.in_features, shape.tokens * shape.out_features
        weights = shape.out_features * shape.in_features
        found.append(2 * (12 * inputs + 5 * weights + 24 * outputs) + 24 * weights + 16 * outputs)
    copies = sum(4 * shape.out_features * shape.in_features for shape in of_models)  # that are streamed from
    return max(found) + copies


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
    place: Place, peers: Peers, plan: Plan, shape: Shape, tell: Callable[[str], None]
) -> Iterator[list[Subject]]:
    convention = convention_for(shape)
    if KERNELS in plan.cases:
        with place.kernels(shape, convention, plan.stages) as by_stage:
            for stage, subjects in by_stage.items():
                tell(f"{stage}, {shape}")
                yield [*_wanted(subjects, plan), *peers.kernels(stage, shape, convention)]
    if "pass" in plan.cases:
        tell(f"pass, {shape}")
        with place.backends() as backends:
            own = [
                PassSubject(backend, variant, shape, convention, plan.layers) for variant, backend in backends.items()
            ]
            yield [*_wanted(own, plan), *peers.passes(shape, convention, plan.layers)]


def _model_groups(place: Place, plan: Plan, name: str, tell: Callable[[str], None]) -> Iterator[list[Subject]]:
    shape = plan.shapes[0]
    with place.models(name, shape, convention_for(shape), plan.stages) as by_stage:
        for stage, subjects in by_stage.items():
            tell(f"{stage}, {name}")
            yield _wanted(subjects, plan)


def _wanted(subjects: Sequence[Subject], plan: Plan) -> list[Subject]:
    """Those of the variants that were asked for; all, where none of them is among these."""
    return [each for each in subjects if each.key.variant.partition(",")[0] in plan.variants] or [*subjects]


def _measure_subjects(
    place: Place, subjects: Sequence[Subject], plan: Plan, shape: Shape, caches: Sequence[str] = (COLD, WARM)
) -> list[Measured]:
    inputs = [Exact(shape, convention_for(shape), plan.seed + which) for which in range(2)]
    return measure_group(place.machine, subjects, inputs, plan.noise, plan.seconds, caches)


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


def _plain(plan: Plan) -> dict[str, Any]:
    return {**vars(plan), "shapes": [vars(shape) for shape in plan.shapes]}
