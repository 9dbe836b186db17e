"""The search for scales of a whole language model's layers, one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from awq_pycuda.backends.base import Backend, Layer
from awq_pycuda.benchmarks.cases import array, case_of
from awq_pycuda.benchmarks.oracle import Exact
from awq_pycuda.benchmarks.shapes import Shape
from awq_pycuda.benchmarks.subjects import OURS, Key, Verdict, layer_of, poison_of, unwritten, verdict
from awq_pycuda.kernels.work import Unit, Work
from awq_pycuda.quant.conventions import Convention

RESIDENT, STREAMED = "weights on the device", "weights from the host"

Layers = Sequence[Layer[Any]]


@dataclass(frozen=True)
class Model:
    """The linear layers of a decoder: `layers` (how many, out_features, in_features) in each of `blocks` blocks.

    `tokens` are those that its layers are searched on, `hidden` is the width of its blocks.
    """

    blocks: int
    layers: tuple[tuple[int, int, int], ...]
    hidden: int
    tokens: int

    def shapes(self, candidates: int, group_size: int | None) -> list[Shape]:
        """Of the layers of one block."""
        return [
            Shape(self.tokens, rows, columns, candidates, group_size)
            for count, rows, columns in self.layers
            for _ in range(count)
        ]


# Four projections of the attention; gate, up and down of the MLP (Touvron et al., 2023, LLaMA).
MODELS = {"llama7b": Model(32, ((4, 4096, 4096), (2, 11008, 4096), (1, 4096, 11008)), 4096, 512)}


class ModelSubject:
    """The scales of every layer of a model.

    The weights of one block are there, and each further block is searched on the same ones: they are many times what a
    cache holds, so that no block finds anything of the one before.

    Args:
        backend: what searches.
        layers: of one block, made by `layer_of`.
        name: of the model; it is the case.
        variant: which search of those that a place has.
        stage: one of `SEARCHES`.
        convention: see `convention_for`.
        shape: whose candidates and groups count.
        unit: what does the operations, and how many for each that the search asks for.
        blocks: how many are searched; None: all.
    """

    def __init__(
        self,
        backend: Backend[Any],
        layers: Layers,
        name: str,
        variant: str,
        stage: str,
        convention: Convention,
        shape: Shape,
        unit: tuple[Unit, int],
        blocks: int | None = None,
    ) -> None:
        model = MODELS[name]
        self._blocks = blocks or model.blocks
        self._shapes = model.shapes(shape.candidates, shape.group_size)
        told = variant if blocks is None else f"{variant}, {blocks} of {model.blocks} blocks"
        self.key = Key(name, stage, told, OURS, model_shape(name, shape))
        self.unit, self.passes = unit
        works = [each.work(stage) for each in self._shapes]
        parts = ("read", "written", "operations")
        self.work = Work(*(self._blocks * sum(getattr(work, part) for work in works) for part in parts))
        self._backend, self._layers, self._convention = backend, layers, convention
        self._case = case_of(stage)
        self._last: Exact | None = None

    def fill(self, exact: Exact) -> None:
        """See `Subject.fill`: every layer has inputs of its own, from the seed of these."""
        for index, (layer, shape) in enumerate(zip(self._layers, self._shapes, strict=True)):
            self._last = exact.other(shape, index)
            for name in self._case.given:
                self._backend.write(array(layer, name), self._last.given(name))

    def poison(self) -> None:
        """See `Subject.poison`."""
        for layer in self._layers:
            for name in self._case.left:
                handle = array(layer, name)
                self._backend.write(handle, poison_of(self._backend.read(handle)))

    def launch(self) -> None:
        """See `Subject.launch`."""
        for _ in range(self._blocks):
            for layer in self._layers:
                self._search(layer)

    def _search(self, layer: Layer[Any]) -> None:
        self._case.call(self._backend, layer, self._convention, 0)

    def judge(self) -> Verdict:
        """See `Subject.judge`: all that was written is, and the last layer of a block is right.

        A search is right or wrong on any layer alike, and every shape can be a case of its own.
        """
        assert self._last is not None
        self._backend.synchronize()
        for index, layer in enumerate(self._layers):
            left = {name: self._backend.read(array(layer, name)) for name in self._case.left}
            if reason := unwritten(left):
                return Verdict(reason=f"layer {index} of a block: {reason}")
        return verdict(self._case.judge(self._last, left, None))


def model_shape(name: str, shape: Shape) -> Shape:
    """What a model's search is told by, with the candidates and groups of a shape."""
    model = MODELS[name]
    return replace(shape, tokens=model.tokens, out_features=model.hidden, in_features=model.hidden)


def layers_of(backend: Backend[Any], name: str, shape: Shape, convention: Convention) -> list[Layer[Any]]:
    """The arrays of one block's layers."""
    shapes = MODELS[name].shapes(shape.candidates, shape.group_size)
    return [layer_of(backend, each, convention) for each in shapes]
