"""What a benchmark measures: a part for each case and shape, and the memory that they take."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from awq_pycuda.benchmarks.cases import SEARCHES
from awq_pycuda.benchmarks.models import MODELS
from awq_pycuda.benchmarks.passes import PASS
from awq_pycuda.benchmarks.places import KERNELS
from awq_pycuda.benchmarks.shapes import Shape
from awq_pycuda.benchmarks.subjects import spec_for
from awq_pycuda.engine.arrays import kept_bytes
from awq_pycuda.quant.conventions import Convention
from awq_pycuda.quant.format import Format


@dataclass(frozen=True)
class Part:
    """A case on one shape.

    Attributes:
        case: `KERNELS`, `PASS` or one of `MODELS`.
        shape: of the layer; of a model its candidates and groups count.
        stages: of the kernels, or of a model's searches.
        variants: of stages that have variants of these names, these alone; without any, all.
        default: of each stage and of a pass only what a run takes by default.
        peers: who of the peers, as rows name them; None: all that are there.
    """

    case: str
    shape: Shape
    stages: tuple[str, ...] = ()
    variants: tuple[str, ...] = ()
    default: bool = False
    peers: tuple[str, ...] | None = None

    @property
    def groups(self) -> int:
        """How many groups of subjects it has."""
        return len(self.stages) if self.case == KERNELS else 1 if self.case == PASS else len(self.searches)

    @property
    def searches(self) -> list[str]:
        """The searches among the stages."""
        return [stage for stage in SEARCHES if stage in self.stages]

    @property
    def layers(self) -> list[Shape]:
        """Of the layers that lie in memory together; one of a pass, whatever its length."""
        if self.case in MODELS:
            return MODELS[self.case].shapes(self.shape.candidates, self.shape.group_size)
        return [self.shape]


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Attributes:
        parts: one after the other.
        layers: of a pass.
        seed: of the inputs.
        noise: see `interleave`; `seconds` for each group.
    """

    parts: tuple[Part, ...]
    layers: int
    seed: int
    noise: float
    seconds: float


def parts_of(
    cases: tuple[str, ...], shapes: tuple[Shape, ...], stages: tuple[str, ...], variants: tuple[str, ...] = ()
) -> tuple[Part, ...]:
    """Every case on every shape; of a model the first shape's candidates and groups."""
    of_layers = [
        Part(case, shape, stages if case == KERNELS else (), variants)
        for shape in shapes
        for case in (KERNELS, PASS)
        if case in cases
    ]
    of_models = [Part(case, shapes[0], stages, variants) for case in cases if case in MODELS]
    return (*of_layers, *of_models)


def convention_for(shape: Shape) -> Convention:
    """The default convention with as many candidates, evenly from 0 to 1, and groups as the shape has."""
    gammas = tuple(float(gamma) for gamma in np.linspace(0, 1, shape.candidates))
    return Convention(gammas=gammas, quantizer=Format(shape.group_size))


def layer_bytes(plan: Plan) -> int:
    """What the arrays of a place take at the most; a pass has layers of its own for each set of inputs."""
    return max(
        (2 * plan.layers if part.case == PASS else 1) * sum(map(_kept_bytes, part.layers)) for part in plan.parts
    )


def _kept_bytes(shape: Shape) -> int:
    return kept_bytes([spec_for(shape)], convention_for(shape))


def host_bytes(plan: Plan) -> int:
    """What the largest part takes on the host besides: two sets of inputs, and in float64 what must come of them."""
    return max(map(_host_bytes, plan.parts))


def _host_bytes(part: Part) -> int:
    found, inputs_of_all = [], 0
    for shape in part.layers:
        inputs, outputs = shape.tokens * shape.in_features, shape.tokens * shape.out_features
        weights = shape.out_features * shape.in_features
        inputs_of_all += 4 * (inputs + weights)
        found.append(2 * (5 * weights + 24 * outputs) + 8 * inputs + 16 * weights + 16 * outputs)
    copies = sum(4 * shape.out_features * shape.in_features for shape in part.layers)  # that a model is streamed from
    return max(found) + 2 * inputs_of_all + (copies if part.case in MODELS else 0)
