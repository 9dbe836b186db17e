"""Fresh inputs of a shape, and in float64 what every stage must make of them: the formulas of `engine.verify`."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from awq_pycuda import philox
from awq_pycuda.benchmarks.shapes import Shape
from awq_pycuda.engine.exact_curve import Curve, exact_curve
from awq_pycuda.engine.exact_format import dequantized, exact_codes, exact_steps
from awq_pycuda.engine.exact_scales import exact_scales
from awq_pycuda.engine.verify import exact_product, exact_statistics
from awq_pycuda.parallel import map_row_blocks
from awq_pycuda.quant.conventions import Candidate, Convention
from awq_pycuda.quant.quantized import Quantized, Steps

_GAMMA = 0.5  # of the scales that a stage after the search is given
_LARGER = (10, 100)  # factors of the input channels that are larger
_LARGER_SHARE = 0.01

Array = NDArray[Any]


class Exact:
    """One set of inputs, by the names of a layer's arrays; nothing is made before it is asked for.

    Every stage is given inputs from here, never another stage's outputs, so that each is judged alone; all ways to
    compute it are held against one answer. `seed` is also what `init` draws from.
    """

    def __init__(self, shape: Shape, convention: Convention, seed: int) -> None:
        self.shape, self.convention, self.seed = shape, convention, seed
        self._others: dict[tuple[Shape, int], Exact] = {}

    def given(self, name: str) -> Array:
        """The values of an array that a stage reads, as float32 or codes."""
        value: Array = getattr(self, name)
        return value

    def other(self, shape: Shape, index: int) -> Exact:
        """Inputs of a further layer, the same whenever they are asked for."""
        return self._others.setdefault((shape, index), Exact(shape, self.convention, self.seed + 1000 * (index + 1)))

    def _drawn(self, which: int, rows: int, columns: int) -> Array:
        values = np.empty((rows, columns), np.float32)

        def draw(block: slice) -> None:  # each from a place of its own in the sequence, so that threads share the work
            random = np.random.Generator(np.random.Philox(key=(self.seed, which), counter=(0, block.start, 0, 0)))
            random.random(dtype=np.float32, out=values[block])
            values[block] *= 2
            values[block] -= 1

        map_row_blocks(draw, values.shape)
        return values

    @cached_property
    def x(self) -> Array:
        """(M, K) activations, some channels of which are larger."""
        values = self._drawn(0, self.shape.tokens, self.shape.in_features)
        random = np.random.Generator(np.random.Philox(key=(self.seed, 7)))
        count = max(1, round(_LARGER_SHARE * self.shape.in_features))
        chosen = random.choice(self.shape.in_features, count, replace=False)
        values[:, chosen] *= random.uniform(*_LARGER, count).astype(np.float32)
        return values

    @cached_property
    def w(self) -> Array:
        """(N, K) weights."""
        return self._drawn(1, self.shape.out_features, self.shape.in_features)

    @cached_property
    def y(self) -> Array:
        """(M, N) of either sign, for what follows the product."""
        return self._drawn(2, self.shape.tokens, self.shape.out_features)

    @cached_property
    def reference(self) -> Array:
        """(M, N) that differs a little from `y`."""
        return self.y + np.float32(1 / 64) * self._drawn(3, self.shape.tokens, self.shape.out_features)

    @cached_property
    def statistics(self) -> dict[str, Array]:
        """(K,) each, in float64."""
        return exact_statistics(self.x)

    @property
    def abs_mean(self) -> Array:
        """(K,) float32."""
        return self.statistics["abs_mean"].astype(np.float32)

    @property
    def sq_mean(self) -> Array:
        """(K,) float32."""
        return self.statistics["sq_mean"].astype(np.float32)

    @cached_property
    def s(self) -> Array:
        """(K,) float32."""
        return exact_scales(self.statistics, Candidate(_GAMMA), self.convention).astype(np.float32)

    @property
    def inv_s(self) -> Array:
        """(K,) float32."""
        return 1 / self.s

    @cached_property
    def exact_steps(self) -> Steps[Array]:
        """(N, groups) in float64, and what the format has beside them."""
        return exact_steps(self.w, self.s.astype(np.float64), self.convention.quantizer)

    @cached_property
    def given_steps(self) -> Steps[Array]:
        """The same in float32."""
        return self.exact_steps.map(lambda array: array.astype(np.float32))

    @property
    def steps(self) -> Array:
        """(N, groups) float32."""
        return self.given_steps.steps

    @cached_property
    def codes(self) -> Array:
        """(N, K)."""
        s, dtype = self.s.astype(np.float64), self.convention.quantizer.code_dtype

        def of_rows(rows: slice) -> Array:
            return exact_codes(self.w, s, self.given_steps, rows).astype(dtype)

        return np.concatenate(map_row_blocks(of_rows, self.w.shape))

    @cached_property
    def curve(self) -> Curve:
        """What `exact_curve` gives for the candidates by `diag`."""
        return self._curve(None)

    @cached_property
    def output_curve(self) -> Curve:
        """What `exact_curve` gives for the candidates by `output`."""
        return self._curve(self.x.astype(np.float64))

    def _curve(self, x: Array | None) -> Curve:
        return exact_curve([self.w], self.scales, self.sq_mean.astype(np.float64), self.convention.quantizer, x)

    @cached_property
    def scales(self) -> Array:
        """(G, K) candidates in float64, of the statistics as the search is given them."""
        given = {"abs_mean": self.abs_mean.astype(np.float64), "sq_mean": self.sq_mean.astype(np.float64)}
        return np.array([exact_scales(given, each, self.convention) for each in self.convention.grid.candidates])

    @cached_property
    def product(self) -> Array:
        """(M, N) product with the dequantized weights in float64."""
        return self._product(self.weights)

    @property
    def weights(self) -> Array:
        """(N, K) dequantized weights in float64."""
        quantized, inv_s, values = self.quantized(self.codes), self.inv_s, np.empty(self.w.shape)

        def fill(rows: slice) -> None:
            values[rows] = dequantized(quantized, inv_s, rows)

        map_row_blocks(fill, values.shape)
        return values

    @cached_property
    def exact_product(self) -> Array:
        """(M, N) product with the weights themselves in float64."""
        return self._product(self.w)

    def _product(self, weights: Array) -> Array:
        return exact_product(self.x, lambda rows: weights[rows], len(weights))

    @cached_property
    def sums(self) -> tuple[float, float]:
        """`Σ reference²` and `Σ (reference − y)²` in float64."""
        exact = self.reference.astype(np.float64)
        return float(np.sum(exact**2)), float(np.sum((exact - self.y) ** 2))

    @cached_property
    def drawn(self) -> Array:
        """(N, K) that `init` makes: `2u − 1` of subsequence 1."""
        shape = self.shape.out_features, self.shape.in_features
        uniform = philox.uniform(self.seed, 1, shape[0] * shape[1]).reshape(shape)
        return np.float32(2) * uniform - np.float32(1)

    def quantized(self, codes: Array) -> Quantized[Array]:
        """Codes with the steps that they were made for."""
        return Quantized(codes=codes, format=self.convention.quantizer, **self.given_steps.arrays)
