"""What a weight may become. Nothing else knows how a step follows from weights, or a weight from its code."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import DTypeLike, NDArray

from awq_pycuda.errors import InputError
from awq_pycuda.parallel import map_row_blocks, scratch

H = TypeVar("H")
T = TypeVar("T")
Parts = tuple[tuple[slice, NDArray[Any]], ...]


def _side_by_side(of_parts: list[NDArray[Any]]) -> NDArray[Any]:
    """(rows, groups) of the parts as one array."""
    return of_parts[0] if len(of_parts) == 1 else np.concatenate(of_parts, axis=1)


@dataclass(frozen=True)
class Format:
    """Signed integers of 8 bits around zero, with one step per row or per group of a row.

    `group_size`: consecutive input channels that share a step; None for all of a row. A last group that is not full is
    a group like the others. Codes run from -127 to 127: -128 is never used, so that W and -W quantize alike.

    The methods take blocks of whole rows; rows are independent of each other.
    """

    group_size: int | None = None

    def __post_init__(self) -> None:
        if self.group_size is not None and self.group_size < 1:
            raise InputError(f"group_size={self.group_size}: allowed: None (one step per row) or a whole number from 1")

    @property
    def largest(self) -> int:
        """The largest code, which the largest magnitude of a row or group gets."""
        return 127

    @property
    def code_dtype(self) -> np.dtype[np.int8]:
        """What a code is stored in while it is worked on."""
        return np.dtype(np.int8)

    def size(self, in_features: int) -> int:
        """Input channels of a full group; of a row that is smaller, all of it."""
        return in_features if self.group_size is None else min(self.group_size, in_features)

    def groups(self, in_features: int) -> int:
        """Groups of a row, the last one full or not."""
        return -(-in_features // self.size(in_features))

    def parts(self, matrix: NDArray[Any]) -> Parts:
        """Views of a (rows, K) matrix by groups: which groups, and (rows, these groups, channels of one).

        All full groups come first, then the last one where it is not full. What is called in a loop takes them made.
        """
        rows, in_features = matrix.shape
        size = self.size(in_features)
        full = in_features // size
        rest = in_features % size
        found = [(slice(0, full), matrix[:, : full * size].reshape(rows, full, size))] if full else []
        if rest:
            found.append((slice(full, full + 1), matrix[:, full * size :].reshape(rows, 1, rest)))
        return tuple(found)

    def steps(self, magnitudes: Parts) -> NDArray[Any]:
        """Steps `max |W·s| / largest` of every group: parts of (rows, K) magnitudes to (rows, groups), in their dtype.

        A group of zeros gets 1. A group of denormals whose quotient underflows gets the smallest positive number: a
        step of zero would make its codes inf.
        """
        steps = _side_by_side([part.max(axis=2) for _, part in magnitudes])
        nothing = steps == 0
        steps /= steps.dtype.type(self.largest)
        np.maximum(steps, np.finfo(steps.dtype).smallest_subnormal, out=steps)
        steps[nothing] = 1
        return steps

    def round(self, scaled: NDArray[Any], steps: NDArray[Any]) -> None:
        """Turns (rows, K) scaled weights into their codes, `clip(rint(W·s / step))` with ties to even, in place."""
        for groups, part in self.parts(scaled):
            np.divide(part, steps[:, groups, None], out=part)
        np.rint(scaled, out=scaled)
        np.clip(scaled, -self.largest, self.largest, out=scaled)

    def dequantize(
        self, codes: NDArray[Any], steps: NDArray[Any], out: NDArray[Any], column_factor: NDArray[Any] | None = None
    ) -> None:
        """`out = codes · column_factor · step`, rounded in this order.

        Args:
            codes: (rows, K).
            steps: (rows, groups).
            out: (rows, K), in whose dtype the arithmetic is.
            column_factor: (K,), or None for 1.
        """
        if column_factor is None:
            out[...] = codes
        else:
            np.multiply(codes, column_factor, out=out)
        for groups, part in self.parts(out):
            np.multiply(part, steps[:, groups, None], out=part)

    def weighted_errors(
        self, magnitude: NDArray[Any], magnitudes: Parts, work: NDArray[Any], weights: Parts
    ) -> np.float64:
        """`Σ_n Σ_k weights[k] · (rint(U) - U)² · step²` with U = magnitude / step, over scaled weights of (rows, K).

        Signs do not matter: rounding to even is odd. U is at most `largest`, so nothing overflows.

        Args:
            magnitude: overwritten.
            magnitudes: its parts.
            work: overwritten, of the same shape and dtype.
            weights: the parts of (1, K).

        Returns:
            The sum, within a group in the dtype of the magnitudes, else in float64.
        """
        steps = self.steps(magnitudes)
        for groups, part in magnitudes:
            np.divide(part, steps[:, groups, None], out=part)
        np.rint(magnitude, out=work)
        np.subtract(magnitude, work, out=magnitude)
        np.multiply(magnitude, magnitude, out=magnitude)
        pairs = zip(magnitudes, weights, strict=True)
        per_step = _side_by_side([np.einsum("ngk,gk->ng", part, of_group[0]) for (_, part), (_, of_group) in pairs])
        return np.float64(np.sum(per_step * steps.astype(np.float64) ** 2, dtype=np.float64))

    def saturated(self, codes: NDArray[Any]) -> int:
        """How many codes are at either end of the range; each group has at least one, by its step."""
        return int(np.count_nonzero(np.abs(codes) == self.largest))

    def pack(self, codes: NDArray[np.int8]) -> NDArray[np.int8]:
        """(N, K) codes as they are stored: one byte each, so the codes themselves."""
        return codes

    def unpack(self, packed: NDArray[np.int8], in_features: int) -> NDArray[np.int8]:
        """The codes that `pack` has packed: (N, in_features)."""
        return packed.reshape(-1, in_features)


@dataclass(frozen=True)
class Steps(Generic[H]):
    """How finely a matrix is quantized: all that there is to know of it but its codes.

    `steps` and `zero_points` (N, groups) are arrays, or a backend's handles to them. No format has zero points yet, so
    none are taken.
    """

    steps: H
    format: Format
    zero_points: H | None = None

    def __post_init__(self) -> None:
        if self.zero_points is not None:
            raise InputError("zero_points: given; allowed: None (codes of this format lie around zero)")

    @property
    def without_codes(self) -> Steps[H]:
        """The same, whatever codes there are."""
        return Steps(self.steps, self.format, self.zero_points)

    def map(self, change: Callable[[H], T]) -> Steps[T]:
        """The same with every array, or handle, changed."""
        return Steps(change(self.steps), self.format, None if self.zero_points is None else change(self.zero_points))


@dataclass(frozen=True)
class Quantized(Steps[H]):
    """A quantized matrix: its codes (N, K), and what they mean."""

    codes: H = field(kw_only=True)

    def map(self, change: Callable[[H], T]) -> Quantized[T]:
        """See `Steps.map`."""
        return Quantized(**vars(super().map(change)), codes=change(self.codes))


def steps_of(w: NDArray[Any], s: NDArray[Any], form: Format) -> NDArray[Any]:
    """The steps of scaled weights `W·s`.

    Args:
        w: (N, K) weights, float32 or float64.
        s: (K,) AWQ scale per input channel, same dtype.
        form: the format to come.

    Returns:
        (N, groups) in the dtype of `w`.
    """
    steps = np.empty((w.shape[0], form.groups(w.shape[1])), w.dtype)

    def of_block(block: slice) -> None:
        scaled = scratch((block.stop - block.start, w.shape[1]), w.dtype)
        np.multiply(w[block], s, out=scaled)
        np.abs(scaled, out=scaled)
        steps[block] = form.steps(form.parts(scaled))

    map_row_blocks(of_block, w.shape)
    return steps


def quantize(w: NDArray[Any], s: NDArray[Any], into: Quantized[NDArray[Any]]) -> None:
    """Writes the codes of `W·s` for the steps that `into` has; arguments as in `steps_of`."""

    def block_codes(block: slice) -> None:
        scaled = scratch((block.stop - block.start, w.shape[1]), w.dtype)
        np.multiply(w[block], s, out=scaled)
        into.format.round(scaled, into.steps[block])
        into.codes[block] = scaled

    map_row_blocks(block_codes, w.shape)


def dequantize(
    quantized: Quantized[NDArray[Any]],
    column_factor: NDArray[Any] | None = None,
    dtype: DTypeLike = np.float32,
) -> NDArray[Any]:
    """`codes · column_factor · step`: with `1 / s` as the factor the weights, without one `W·s`.

    Args:
        quantized: codes (N, K) and their steps.
        column_factor: (K,), or None for 1.
        dtype: of the result and the arithmetic.
    """
    weights = np.empty(quantized.codes.shape, dtype)

    def block_weights(block: slice) -> None:
        quantized.format.dequantize(quantized.codes[block], quantized.steps[block], weights[block], column_factor)

    map_row_blocks(block_weights, weights.shape)
    return weights
