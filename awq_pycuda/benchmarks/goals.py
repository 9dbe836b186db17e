"""The figures that this project set out to reach on one GPU, as data: where each is measured, and by what."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from awq_pycuda.benchmarks.cases import DIAG_SEARCH, OUTPUT_SEARCH
from awq_pycuda.benchmarks.ceilings import CASE as CEILING
from awq_pycuda.benchmarks.ceilings import LINK
from awq_pycuda.benchmarks.models import MODELS, RESIDENT, STREAMED, model_shape
from awq_pycuda.benchmarks.passes import PASS
from awq_pycuda.benchmarks.places import KERNELS
from awq_pycuda.benchmarks.plan import Part
from awq_pycuda.benchmarks.shapes import Shape
from awq_pycuda.benchmarks.subjects import OURS
from awq_pycuda.benchmarks.timing import COLD
from awq_pycuda.kernels.work import WORK
from awq_pycuda.results.bench_record import BenchGoal, BenchRow, Quantity

LAYERS = 3  # of a pass
_TOKENS = 512  # that layers are searched on
_SGEMM, _COMPILED = "cuBLAS fp32", "torch compiled"
_TITLES = {
    DIAG_SEARCH: "search by diag",
    OUTPUT_SEARCH: "search by output",
    "accum_stats": "statistics",
    "quantize_awq": "codes",
    "init": "inputs",
    "dequantizeTiled": "product",
    PASS: f"pass of {LAYERS} layers by diag",
}


@dataclass(frozen=True)
class Goal:
    """A figure of what a run takes by default, its cache emptied before.

    Attributes:
        case: as rows have it, as are `stage` and `shape`.
        quantity: what of it counts.
        bound: the most microseconds, or times a peer's error, that it may be; the least share, or times as fast as a
            peer, that it must be; NaN: it is told, and no goal.
        beside: by whom, or which ceiling, the row is that it is held against.
        variant: of the stage, where the case measures several.
    """

    case: str
    stage: str
    shape: Shape
    quantity: Quantity
    bound: float = math.nan
    beside: str = ""
    variant: str = ""

    def __str__(self) -> str:
        shape, searched = self.shape, self.stage in (DIAG_SEARCH, OUTPUT_SEARCH, PASS)
        by_tokens = self.stage in (OUTPUT_SEARCH, "dequantizeTiled", PASS)
        rows = shape.tokens if self.stage == "accum_stats" else shape.out_features
        parts = [
            _TITLES[self.stage],
            self.case if self.case in MODELS else f"{rows} x {shape.in_features}",
            f"{shape.tokens} tokens" if by_tokens else "",
            f"{shape.candidates} candidates" if searched else "",
            f"groups of {shape.group_size}" if shape.group_size else "",
            self.variant,
        ]
        return ", ".join(part for part in parts if part)


def _square(side: int, candidates: int = 20, group_size: int | None = None, tokens: int = _TOKENS) -> Shape:
    return Shape(tokens, side, side, candidates, group_size)


def _search(stage: str, side: int, candidates: int, us: float) -> Iterator[Goal]:
    """Of rows, and of groups of 128, which must be as fast."""
    for group_size in (None, 128):
        yield Goal(KERNELS, stage, _square(side, candidates, group_size), "time", us)


def _of_square(side: int) -> Iterator[Goal]:
    shape = _square(side, tokens=side)
    for stage, share in (("accum_stats", 0.85), ("quantize_awq", 0.88), ("init", 0.80)):
        yield Goal(KERNELS, stage, shape, "limit", share)
    yield Goal(KERNELS, "dequantizeTiled", shape, "speedup", 5, _SGEMM)
    yield Goal(KERNELS, "dequantizeTiled", shape, "error", 2, _SGEMM)


def _pass(side: int, us: float) -> Iterator[Goal]:
    shape = _square(side, 5, tokens=side)
    yield Goal(PASS, PASS, shape, "time", us)
    yield Goal(PASS, PASS, shape, "speedup", 5, _COMPILED)


def _model(name: str, stage: str, us: float) -> Iterator[Goal]:
    shape = model_shape(name, Shape(0, 0, 0, 20))
    yield Goal(name, stage, shape, "time", us, variant=RESIDENT)
    yield Goal(name, stage, shape, "time", variant=STREAMED)
    if stage == DIAG_SEARCH:
        yield Goal(name, stage, shape, "link", beside=LINK, variant=STREAMED)


GOALS = (
    *_pass(1024, 300),
    *_pass(4096, 2200),
    *_model("llama7b", DIAG_SEARCH, 60e3),
    *_model("llama7b", OUTPUT_SEARCH, 1.5e6),
    *_search(DIAG_SEARCH, 8192, 20, 450),
    *_search(DIAG_SEARCH, 8192, 64, 1300),
    *_search(DIAG_SEARCH, 4096, 20, 125),
    *_search(DIAG_SEARCH, 1024, 5, 20),
    *_search(OUTPUT_SEARCH, 8192, 20, 5000),
    *_search(OUTPUT_SEARCH, 4096, 20, 1400),
    *_search(OUTPUT_SEARCH, 1024, 20, 400),
    *_of_square(4096),
    *_of_square(8192),
)


def parts_for(goals: Sequence[Goal]) -> tuple[Part, ...]:
    """What must be measured for these goals: every case and shape once, with the stages and peers that they name."""
    found = []
    for case, shape in dict.fromkeys((goal.case, goal.shape) for goal in goals):
        own = [goal for goal in goals if (goal.case, goal.shape) == (case, shape)]
        stages = tuple(stage for stage in WORK if any(goal.stage == stage for goal in own))
        peers = tuple(dict.fromkeys(goal.beside for goal in own if goal.beside))
        found.append(Part(case, shape, stages, default=case not in MODELS, peers=peers))
    return tuple(found)


def reached(goals: Sequence[Goal], rows: Sequence[BenchRow]) -> list[BenchGoal]:
    """The goals with the rows that they were measured in."""
    return [
        BenchGoal(
            str(goal),
            goal.quantity,
            goal.bound,
            goal.beside,
            _row(rows, goal, OURS),
            -1
            if not goal.beside
            else _ceiling(rows, goal.beside)
            if goal.quantity == "link"
            else _row(rows, goal, goal.beside),
        )
        for goal in goals
    ]


def _row(rows: Sequence[BenchRow], goal: Goal, by: str) -> int:
    """Which of the rows has a goal's figure of this code; -1: none."""
    shape = goal.shape
    sizes = (shape.tokens, shape.out_features, shape.in_features, shape.candidates, shape.group_size or 0)
    for index, row in enumerate(rows):
        own = (row.tokens, row.out_features, row.in_features, row.candidates, row.group_size)
        named = (row.case, row.stage, row.by, row.cache) == (goal.case, goal.stage, by, COLD)
        if named and own == sizes and goal.variant in ("", row.variant):
            return index
    return -1


def _ceiling(rows: Sequence[BenchRow], name: str) -> int:
    return next((index for index, row in enumerate(rows) if (row.case, row.stage) == (CEILING, name)), -1)
