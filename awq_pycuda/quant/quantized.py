"""A quantized matrix: codes, steps, zero points and their format, which travel as one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import DTypeLike, NDArray

from awq_pycuda.errors import InputError
from awq_pycuda.parallel import map_row_blocks, scratch
from awq_pycuda.quant.format import Format

Array = NDArray[Any]
H = TypeVar("H")
T = TypeVar("T")


@dataclass(frozen=True)
class Steps(Generic[H]):
    """How finely a matrix is quantized: all that there is to know of it but its codes.

    `steps` and `zero_points` (N, groups), and `tensor_scale` (1,), are arrays, or a backend's handles to them; the
    last two are there where the format has them.
    """

    steps: H
    format: Format
    zero_points: H | None = None
    tensor_scale: H | None = None

    def __post_init__(self) -> None:
        for name, wanted in (
            ("zero_points", not self.format.symmetric),
            ("tensor_scale", self.format.has_tensor_scale),
        ):
            if (getattr(self, name) is not None) is not wanted:
                there = "given; allowed: None" if not wanted else "None; allowed: an array"
                raise InputError(f"{name}: {there} (in this format)")

    @property
    def without_codes(self) -> Steps[H]:
        """The same, whatever codes there are."""
        return Steps(self.steps, self.format, self.zero_points, self.tensor_scale)

    @property
    def arrays(self) -> dict[str, H]:
        """Every array of it, by name."""
        return {name: value for name, value in vars(self).items() if name != "format" and value is not None}

    def map(self, change: Callable[[H], T]) -> Steps[T]:
        """The same with every array, or handle, changed."""
        return Steps(format=self.format, **{name: change(array) for name, array in self.arrays.items()})


@dataclass(frozen=True)
class Quantized(Steps[H]):
    """A quantized matrix: its codes (N, K), and what they mean."""

    codes: H = field(kw_only=True)

    def map(self, change: Callable[[H], T]) -> Quantized[T]:
        """See `Steps.map`."""
        return Quantized(format=self.format, **{name: change(array) for name, array in self.arrays.items()})


def column_peaks(w: Array) -> Array:
    """(K,) largest magnitude of each column of (N, K) weights, or of (M, K) activations; NaN where there is one."""
    peaks: Array = np.max(map_row_blocks(lambda block: np.abs(w[block]).max(axis=0), w.shape), axis=0)
    return peaks


def tensor_scales(w: Array, scales: Array, form: Format) -> Array:
    """`Format.tensor_scale` of `W·s` for each of these scales.

    Args:
        w: (N, K) weights, float32 or float64.
        scales: (G, K) AWQ scales, same dtype.
        form: the format to come.

    Returns:
        (G,) in the dtype of `w`.
    """
    if not form.has_tensor_scale:
        return np.ones(len(scales), w.dtype)
    # Rounding keeps the order of numbers: the largest product is that of the largest weight.
    return form.tensor_scale((column_peaks(w) * scales).max(axis=1))


def steps_of(w: Array, s: Array, form: Format) -> Steps[Array]:
    """Steps and zero points of scaled weights `W·s`.

    Args:
        w: (N, K) weights, float32 or float64.
        s: (K,) AWQ scale per input channel, same dtype.
        form: the format to come.

    Returns:
        In the dtype of `w`.
    """
    shape = (w.shape[0], form.groups(w.shape[1]))
    steps = np.empty(shape, w.dtype)
    zeros = None if form.symmetric else np.empty(shape, w.dtype)
    tensor_scale = tensor_scales(w, s[None, :], form)

    def of_block(block: slice) -> None:
        scaled = scratch((block.stop - block.start, w.shape[1]), w.dtype)
        np.multiply(w[block], s, out=scaled)
        if form.is_odd:
            np.abs(scaled, out=scaled)
        steps[block], of_zero = form.fit(form.parts(scaled), tensor_scale[0])
        if zeros is not None:
            zeros[block] = of_zero

    map_row_blocks(of_block, w.shape)
    return Steps(steps, form, zeros, tensor_scale if form.has_tensor_scale else None)


def quantize(w: Array, s: Array, into: Quantized[Array]) -> None:
    """Writes the codes of `W·s` for the steps that `into` has; arguments as in `steps_of`."""

    def block_codes(block: slice) -> None:
        scaled = scratch((block.stop - block.start, w.shape[1]), w.dtype)
        np.multiply(w[block], s, out=scaled)
        into.format.round(scaled, into.steps[block], rows_of(into.zero_points, block))
        into.codes[block] = scaled

    map_row_blocks(block_codes, w.shape)


def rows_of(zeros: Array | None, block: slice) -> Array | None:
    """The zero points of these rows, where there are any."""
    return None if zeros is None else zeros[block]


def dequantize(
    quantized: Quantized[Array],
    column_factor: Array | None = None,
    dtype: DTypeLike = np.float32,
) -> Array:
    """What the codes stand for: with `1 / s` as the factor the weights, without one `W·s`.

    Args:
        quantized: codes (N, K) and their steps.
        column_factor: (K,), or None for 1.
        dtype: of the result and the arithmetic.

    Returns:
        (N, K).
    """
    weights = np.empty(quantized.codes.shape, dtype)

    def block_weights(block: slice) -> None:
        dequantize_rows(quantized, block, weights[block], column_factor)

    map_row_blocks(block_weights, weights.shape)
    return weights


def dequantize_rows(quantized: Quantized[Array], block: slice, out: Array, column_factor: Array | None = None) -> None:
    """`Format.dequantize` of a block of rows, in the arithmetic of `out`, (rows, K)."""
    steps, zeros = quantized.steps[block].astype(out.dtype, copy=False), rows_of(quantized.zero_points, block)
    quantized.format.dequantize(quantized.codes[block], steps, zeros, out, column_factor)
