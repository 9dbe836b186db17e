"""What is timed: one way to compute something on one machine, which can be verified, poisoned and launched."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from awq_pycuda.backends.base import Backend, Layer
from awq_pycuda.benchmarks.cases import ALLOWED, Case, array
from awq_pycuda.benchmarks.oracle import Exact
from awq_pycuda.benchmarks.shapes import Shape
from awq_pycuda.engine.arrays import as_layer, layer_arrays
from awq_pycuda.kernels.work import Unit, Work
from awq_pycuda.layers.inputs import LayerSpec
from awq_pycuda.quant.conventions import Convention

OURS = "awq_pycuda"
_SENTINEL = -128  # no format of 8 bits uses it

Array = NDArray[Any]


@dataclass(frozen=True)
class Key:
    """What a row is about: `by` is whose code it is, `variant` which of a stage's."""

    case: str
    stage: str
    variant: str
    by: str
    shape: Shape


@dataclass(frozen=True)
class Verdict:
    """How far off an answer is, what was allowed, and why it is refused (None: it is not).

    Both are NaN where nothing was compared.
    """

    error: float = float("nan")
    tolerance: float = float("nan")
    reason: str | None = None


class Subject(Protocol):
    """One way to compute something.

    Attributes:
        key: what it is.
        work: what it must do at the least, as far as is known.
        unit: what does its operations.
        passes: how many operations of that unit each of them takes.
    """

    key: Key
    work: Work
    unit: Unit
    passes: int

    def fill(self, exact: Exact) -> None:
        """Puts these inputs where `launch` reads them."""

    def poison(self) -> None:
        """Puts values that no answer holds where `launch` writes."""

    def launch(self) -> object:
        """Computes once; it may return before it is done."""

    def judge(self) -> Verdict:
        """Compares what the last launch left with the inputs' exact answer, once it is done."""


class StageSubject:
    """A stage of a backend, by one of its variants, on the arrays of one layer."""

    def __init__(
        self,
        backend: Backend[Any],
        layer: Layer[Any],
        convention: Convention,
        case: Case,
        key: Key,
        unit: Unit,
        passes: int = 1,
    ) -> None:
        self.key, self.work, self.unit, self.passes = key, key.shape.work(key.stage), unit, passes
        self._backend, self._layer, self._convention, self._case = backend, layer, convention, case
        self._exact: Exact | None = None
        self._returned: Any = None

    def fill(self, exact: Exact) -> None:
        """See `Subject.fill`."""
        for name in self._case.given:
            self._backend.write(array(self._layer, name), exact.given(name))
        self._exact = exact

    def poison(self) -> None:
        """See `Subject.poison`: NaN, or a code that no format has."""
        self._returned = None
        for name in self._case.left:
            handle = array(self._layer, name)
            self._backend.write(handle, poison_of(self._backend.read(handle)))

    def launch(self) -> None:
        """See `Subject.launch`."""
        assert self._exact is not None
        self._returned = self._case.call(self._backend, self._layer, self._convention, self._exact.seed)

    def judge(self) -> Verdict:
        """See `Subject.judge`."""
        assert self._exact is not None
        self._backend.synchronize()
        left = {name: self._backend.read(array(self._layer, name)) for name in self._case.left}
        if reason := unwritten(left):
            return Verdict(reason=reason)
        return verdict(self._case.judge(self._exact, left, self._returned))


def poison_of(values: Array) -> Array:
    """Values that no answer holds, in shape and type of these."""
    poison = np.nan if values.dtype.kind == "f" else _SENTINEL
    return np.broadcast_to(np.asarray(poison, values.dtype), values.shape)


def unwritten(left: Mapping[str, Array]) -> str | None:
    """Which elements still hold poison, in one line; None where none does. A NaN that was written is told alike."""
    for name, values in left.items():
        bad = ~np.isfinite(values) if values.dtype.kind == "f" else values == _SENTINEL
        if count := np.count_nonzero(bad):
            first = tuple(int(index) for index in np.unravel_index(int(np.argmax(bad)), bad.shape))
            return f"{name}: {count} of {values.size} elements unwritten or not finite, the first at {first}"
    return None


def verdict(errors: Mapping[str, float], slack: float = 1.0) -> Verdict:
    """The worst of these errors by its share of what is allowed; beyond `slack` times that, or NaN, it is refused."""
    worst = max(errors, key=lambda name: _share(errors[name], slack * ALLOWED[name]))
    error, tolerance = float(errors[worst]), float(slack * ALLOWED[worst])
    if error <= tolerance:
        return Verdict(error, tolerance)
    return Verdict(error, tolerance, f"{worst} is off by {error:.3g}, allowed {tolerance:g}")


def _share(error: float, tolerance: float) -> float:
    if not error <= tolerance:
        return float("inf")
    return error / tolerance if tolerance else 0.0


def spec_for(shape: Shape) -> LayerSpec:
    """A layer of this shape that is never filled from its plan."""
    weight, activations = (
        np.broadcast_to(np.float32(0), (rows, shape.in_features)) for rows in (shape.out_features, shape.tokens)
    )
    return LayerSpec("", shape.tokens, weight, activations)


def layer_of(backend: Backend[Any], shape: Shape, convention: Convention) -> Layer[Any]:
    """A layer's arrays, none of them filled or frozen."""
    arrays = layer_arrays([spec_for(shape)], 0, convention)
    made = {name: backend.empty(each.shape, each.dtype) for name, each in arrays.items()}
    return as_layer(made, convention.quantizer, shape.tokens * shape.out_features)
