"""A whole pass as a subject: every stage of a chain of layers, as a run makes it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from awq_pycuda.backends.base import Backend, Layer, Unrecordable
from awq_pycuda.benchmarks.cases import array
from awq_pycuda.benchmarks.oracle import Exact
from awq_pycuda.benchmarks.shapes import Shape
from awq_pycuda.benchmarks.subjects import OURS, Key, Verdict, poison_of, unwritten, verdict
from awq_pycuda.engine.arrays import allocate
from awq_pycuda.engine.stages import CLIPPING, STAGE_NAMES, stages_of
from awq_pycuda.engine.verify import check_layer
from awq_pycuda.kernels.work import Unit, Work
from awq_pycuda.layers.inputs import LayerSpec
from awq_pycuda.quant.conventions import Convention
from awq_pycuda.quant.search import search_result

PASS = "pass"
_LEFT = ("abs_mean", "sq_mean", "error", "s", "inv_s", "steps", "codes", "out")

Array = NDArray[Any]


class PassSubject:
    """A pass of a backend. Its layers are square where there are several: each takes what the one before leaves.

    `unit` and `passes` are those of the product, which does nearly all of a pass's operations.
    """

    def __init__(
        self,
        backend: Backend[Any],
        variant: str,
        shape: Shape,
        convention: Convention,
        layers: int,
        unit: Unit,
        passes: int,
    ) -> None:
        self.key = Key(PASS, PASS, f"{variant}, {layers} layers", OURS, shape)
        self.work, self.unit, self.passes = pass_work(shape, layers), unit, passes
        self._backend, self._convention = backend, convention
        self._count = layers
        self._layers: list[Layer[Any]] = []
        self._repeat: Callable[[], object] | None = None  # once it is known how

    def fill(self, exact: Exact) -> None:
        """See `Subject.fill`: in arrays of their own, since a run's inputs are complete before its first pass."""
        specs = [
            LayerSpec(str(index), exact.shape.tokens, weight, None if index else exact.x)
            for index, weight in enumerate(chain_weights(exact, self._count))
        ]
        self._layers = allocate(self._backend, specs, self._convention).layers
        self._repeat = None

    def poison(self) -> None:
        """See `Subject.poison`."""
        for layer in self._layers:
            for name in _LEFT:
                handle = array(layer, name)
                self._backend.write(handle, poison_of(self._backend.read(handle)))

    def launch(self) -> None:
        """See `Subject.launch`: as a run does, as a whole where it can be recorded."""
        if self._repeat is None:
            try:
                self._repeat = self._backend.record(self._stages).repeat
            except Unrecordable:
                self._repeat = self._stages
        self._repeat()

    def _stages(self) -> None:
        for layer in self._layers:
            for stage in stages_of(self._backend, self._convention):
                stage.call(self._backend, layer, self._convention)

    def judge(self) -> Verdict:
        """See `Subject.judge`: all that was written is, and the last layer is right; but for its curve.

        A stage is right or wrong on any layer alike, and each has a case of its own.
        """
        self._backend.synchronize()
        for index, layer in enumerate(self._layers):
            if reason := unwritten({name: self._backend.read(array(layer, name)) for name in _LEFT}):
                return Verdict(reason=f"layer {index}: {reason}")
        read, last = self._backend.read, self._layers[-1]
        self._backend.dequantize_tiled(last.x, last.quantized, last.inv_s, last.y)
        errors = check_layer(
            self._convention,
            x=read(last.x),
            w=read(last.w),
            bias=None,
            abs_mean=read(last.abs_mean),
            sq_mean=read(last.sq_mean),
            found=search_result(self._convention, read(last.error), read(last.s)),
            quantized=last.quantized.map(read),
            y=read(last.y),
            out=read(last.out),
            curve=False,
        )
        return verdict(errors)


def pass_work(shape: Shape, layers: int) -> Work:
    """What every stage of every layer must do, each for itself, but for relu: a product can do it on the way."""
    each = [shape.work(stage) for stage in STAGE_NAMES if stage not in ("relu", CLIPPING)]
    return Work(*(layers * sum(getattr(work, name) for work in each) for name in ("read", "written", "operations")))


def chain_weights(exact: Exact, layers: int) -> list[Array]:
    """(N, K) of each layer, of a size that keeps activations about as large from layer to layer."""
    bound = np.float32(np.sqrt(6 / exact.shape.in_features))
    return [bound * exact.other(exact.shape, index).w for index in range(layers)]
