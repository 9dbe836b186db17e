"""What a weight may become. Nothing else knows how a step follows from weights, or a weight from its code."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from awq_pycuda.choices import Divisor, Element, StepDtype, ZeroOrder, ZeroPoint, ZeroStep
from awq_pycuda.errors import InputError
from awq_pycuda.quant import packing
from awq_pycuda.quant.step_types import (
    BITS_OF_STEPS,
    E4M3_LARGEST,
    epsilon,
    power_of_two,
    round_e2m1,
    rounded,
    smallest,
)

Array = NDArray[Any]
Parts = tuple[tuple[slice, Array], ...]

BITS = range(2, 9)
_E2M1_LARGEST = 6  # of the numbers themselves
_POWERS = (StepDtype.e8m0, StepDtype.e8m0_up)


def _side_by_side(of_parts: list[Array]) -> Array:
    """(rows, groups) of the parts as one array."""
    return of_parts[0] if len(of_parts) == 1 else np.concatenate(of_parts, axis=1)


@dataclass(frozen=True)
class Format:
    """Codes of a few bits, and a step for each row or group of a row, with a zero point or without.

    The default, int8 with a step per row, uses the codes from -127 to 127, so that W and -W quantize alike.

    The methods take blocks of whole rows, which are independent of each other but for `tensor_scale`. Codes are int8:
    of integers with 8 bits and zero points they are less 128, and so for fewer bits; of FP4 twice the numbers.

    Raises an InputError where values do not go together: name, value and what is allowed.

    Attributes:
        group_size: consecutive input channels that share a step; None for all of a row. A last group that is not full
            is a group like the others.
        bits: of a code.
        element: `int`, or `e2m1` for the eight magnitudes of FP4.
        symmetric: whether codes lie around 0; without, a group has a zero point, and its range is that of its weights.
        divisor: of the largest magnitude, for the step of symmetric integers: `largest` is 2^(bits-1) - 1, whose
            negative is then the least code; `half_range` is (2^bits - 1) / 2, with one code more below 0 than above.
        zero_point: `integer`, a code; or `float`, the weight that the code in the middle stands for.
        include_zero: whether the range of an asymmetric group is widened to include 0.
        zero_order: of integer zero points. `round_first`: they are added to a rounded quotient, `shift_first`: before
            it is rounded, which sends ties the other way where the zero point is odd.
        step_dtype: what steps, and float zero points, are rounded to. With `e4m3` (NVFP4) the steps of a matrix are
            scaled together by a float32, so that they use its range; `e8m0` and `e8m0_up` are powers of two (MXFP4).
        least_range: the least largest magnitude, or width of the range, of a group.
        least_step: the least step.
        zero_step: the step of a group of zeros: `one`, or the `epsilon` of its type, which what underflows gets, too.
    """

    group_size: int | None = None
    bits: int = 8
    element: Element = Element.int
    symmetric: bool = True
    divisor: Divisor = Divisor.largest
    zero_point: ZeroPoint = ZeroPoint.integer
    include_zero: bool = True
    zero_order: ZeroOrder = ZeroOrder.round_first
    step_dtype: StepDtype = StepDtype.fp32
    least_range: float = 0.0
    least_step: float = 0.0
    zero_step: ZeroStep = ZeroStep.one

    def __post_init__(self) -> None:
        def refuse(name: str, allowed: str) -> InputError:
            value = getattr(self, name)
            return InputError(f"{name}={getattr(value, 'name', value)}: allowed: {allowed}")

        if self.group_size is not None and self.group_size < 1:
            raise refuse("group_size", "None (one step per row) or a whole number from 1")
        if self.bits not in BITS:
            raise refuse("bits", f"a whole number from {BITS[0]} to {BITS[-1]}")
        for name in ("least_range", "least_step"):
            if not 0 <= getattr(self, name) < math.inf:
                raise refuse(name, "a finite number from 0")
        if self.is_e2m1:
            if self.bits != 4:
                raise refuse("bits", "4 (element=e2m1)")
            if not self.symmetric:
                raise refuse("symmetric", "True (element=e2m1 has no zero points)")
        elif self.step_dtype not in (StepDtype.fp32, StepDtype.fp16, StepDtype.bf16):
            raise refuse("step_dtype", "fp32, fp16, bf16 (element=int)")

    @property
    def is_e2m1(self) -> bool:
        """Whether its numbers are those of FP4."""
        return self.element is Element.e2m1

    @property
    def codes(self) -> int:
        """How many there are in so many bits."""
        return 1 << self.bits

    @property
    def middle(self) -> int:
        """How many codes of so many bits are below 0."""
        return self.codes // 2

    @property
    def largest(self) -> int:
        """The largest code."""
        return 2 * _E2M1_LARGEST if self.is_e2m1 else self.middle - 1

    @property
    def least(self) -> int:
        """The least code."""
        return -self.largest if self.is_odd else -self.middle

    @property
    def is_odd(self) -> bool:
        """Whether -W has the negative codes of W, so that magnitudes alone tell steps and errors."""
        return self.symmetric and (self.is_e2m1 or self.divisor is Divisor.largest)

    @property
    def is_plain(self) -> bool:
        """Whether `largest` and `size` say all: a step is the largest magnitude over the largest code, in float32."""
        return self == Format(self.group_size, self.bits)

    @property
    def has_tensor_scale(self) -> bool:
        """Whether the steps of a matrix are scaled together."""
        return self.step_dtype is StepDtype.e4m3

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

    def stored_bits(self, out_features: int, in_features: int) -> int:
        """Bits that a matrix takes: codes, steps and zero points in their types, and what scales all of its steps.

        Integer zero points have the bits of a code, float ones those of a step. AWQ's scale per input channel is not
        counted: it belongs into what makes the layer's input.
        """
        of_step = BITS_OF_STEPS[self.step_dtype]
        of_zero = self.bits if self.zero_point is ZeroPoint.integer else of_step
        of_group = of_step + (0 if self.symmetric else of_zero)
        of_matrix = BITS_OF_STEPS[StepDtype.fp32] if self.has_tensor_scale else 0
        return out_features * (in_features * self.bits + self.groups(in_features) * of_group) + of_matrix

    def parts(self, matrix: Array) -> Parts:
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

    def tensor_scale(self, peak: Array) -> Array:
        """What steps are multiplied by before they are rounded, and divided by after it; 1 where nothing is scaled.

        The largest step becomes the largest number of E4M3 (compressed-tensors, `generate_gparam`).

        Args:
            peak: the largest magnitude of all scaled weights, of any shape.

        Returns:
            In the shape and dtype of `peak`.
        """
        if not self.has_tensor_scale:
            return np.ones_like(peak)
        with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
            scale = peak.dtype.type(E4M3_LARGEST * _E2M1_LARGEST) / np.maximum(peak, np.finfo(peak.dtype).tiny)
        found: Array = np.where(np.isfinite(scale) & (scale > 0), scale, peak.dtype.type(1))
        return found

    def fit(self, scaled: Parts, tensor_scale: float | np.floating[Any] = 1.0) -> tuple[Array, Array | None]:
        """Steps and zero points of every group, in the dtype of the weights.

        Args:
            scaled: the parts of (rows, K) scaled weights; where `is_odd`, of their magnitudes.
            tensor_scale: of the matrix that the rows are of.

        Returns:
            (rows, groups) steps and, without `symmetric`, (rows, groups) zero points: codes, or float weights.
        """
        high = _side_by_side([part.max(axis=2) for _, part in scaled])
        if self.is_odd:
            return self._steps(high, tensor_scale), None
        low = _side_by_side([part.min(axis=2) for _, part in scaled])
        if self.symmetric:
            return self._steps(np.maximum(high, -low), tensor_scale), None
        if self.include_zero:
            np.minimum(low, 0, out=low)
            np.maximum(high, 0, out=high)
        steps = self._steps(high - low, tensor_scale)
        if self.zero_point is ZeroPoint.float:
            zeros = low + steps * steps.dtype.type(self.middle)
            sign = np.where(zeros < 0, zeros.dtype.type(-1), zeros.dtype.type(1))
            return steps, rounded(np.abs(zeros), self.step_dtype) * sign
        if self.zero_order is ZeroOrder.shift_first:
            return steps, np.rint(np.clip(self.least - low / steps, self.least, self.largest))
        return steps, np.clip(-np.rint(low / steps), 0, self.largest - self.least) + low.dtype.type(self.least)

    def _steps(self, ranges: Array, tensor_scale: float | np.floating[Any]) -> Array:
        """Steps of (rows, groups) largest magnitudes, or of the widths of ranges, which are overwritten.

        Of zeros it is 1. What underflows gets the smallest positive number: a step of zero would make codes inf.
        """
        nothing = ranges == 0
        kind = ranges.dtype.type
        np.maximum(ranges, kind(self.least_range), out=ranges)
        if self.step_dtype in _POWERS:
            steps = power_of_two(ranges, self.step_dtype)
        else:
            ranges /= kind(self.step_divisor)
            if self.has_tensor_scale:
                ranges *= kind(tensor_scale)
            steps = rounded(ranges, self.step_dtype)
        if self.zero_step is ZeroStep.epsilon:
            steps[steps == 0] = epsilon(self.step_dtype)
        else:
            np.maximum(steps, kind(smallest(self.step_dtype, steps.dtype)), out=steps)
            if not self.least_range:
                steps[nothing] = 1
        np.maximum(steps, kind(self.least_step), out=steps)
        if self.has_tensor_scale:
            steps /= kind(tensor_scale)
        if self.is_e2m1:
            steps /= 2
        return steps

    @property
    def step_divisor(self) -> float:
        """What the range of a group is divided by for the step of its numbers."""
        if self.is_e2m1:
            return _E2M1_LARGEST
        if not self.symmetric:
            return self.codes - 1
        return self.largest if self.divisor is Divisor.largest else (self.codes - 1) / 2

    def round(self, scaled: Array, steps: Array, zeros: Array | None = None) -> None:
        """Turns (rows, K) scaled weights into their codes, ties to even, in place.

        Args:
            scaled: float32 or float64.
            steps: (rows, groups).
            zeros: (rows, groups), or None where the format has none.
        """
        self._to_levels(scaled, steps, zeros)
        self._to_codes(scaled, zeros)

    def _to_levels(self, scaled: Array, steps: Array, zeros: Array | None) -> None:
        """Scaled weights as codes that are not rounded, in place; what is added to a rounded one is missing."""
        offset = None
        if zeros is not None and self.zero_point is ZeroPoint.float:
            offset = zeros - steps * steps.dtype.type(self.middle)
        for groups, part in self.parts(scaled):
            if offset is not None:
                np.subtract(part, offset[:, groups, None], out=part)
            np.divide(part, steps[:, groups, None], out=part)
            if zeros is not None and self._shifts_first:
                np.add(part, zeros[:, groups, None], out=part)

    def _to_codes(self, levels: Array, zeros: Array | None) -> None:
        """Rounds levels to codes within the range, in place."""
        if self.is_e2m1:
            round_e2m1(levels)
            return
        np.rint(levels, out=levels)
        self._shift(levels, zeros, 1)
        np.clip(levels, self.least, self.largest, out=levels)

    def _shift(self, levels: Array, zeros: Array | None, sign: int) -> None:
        """Adds what lies between a rounded level and its code, times `sign`, in place."""
        if zeros is None or self._shifts_first:
            return
        if self.zero_point is ZeroPoint.float:
            levels += sign * self.least
            return
        for groups, part in self.parts(levels):
            part += sign * zeros[:, groups, None]

    @property
    def _never_clips(self) -> bool:
        """Whether a level that belongs to its step is rounded to a code and no more needs to be done."""
        return self.is_odd and not self.is_e2m1 and self.step_dtype is StepDtype.fp32

    @property
    def _shifts_first(self) -> bool:
        return self.zero_point is ZeroPoint.integer and self.zero_order is ZeroOrder.shift_first

    def dequantize(
        self, codes: Array, steps: Array, zeros: Array | None, out: Array, column_factor: Array | None = None
    ) -> None:
        """`out = (codes - zero) · column_factor · step`, rounded in this order; see `zero_point` for float ones.

        Args:
            codes: (rows, K).
            steps: (rows, groups).
            zeros: (rows, groups), or None.
            out: (rows, K), in whose dtype the arithmetic is.
            column_factor: (K,), or None for 1.
        """
        out[...] = codes
        is_float = zeros is not None and self.zero_point is ZeroPoint.float
        parts = self.parts(out)
        if zeros is not None and not is_float:
            for groups, part in parts:
                part -= zeros[:, groups, None]
        if column_factor is not None and not is_float:
            out *= column_factor
        for groups, part in parts:
            part *= steps[:, groups, None]
            if zeros is not None and is_float:
                part += zeros[:, groups, None]
        if column_factor is not None and is_float:
            out *= column_factor

    def weighted_errors(
        self,
        scaled: Array,
        parts: Parts,
        work: Array,
        weights: Parts,
        tensor_scale: float | np.floating[Any] = 1.0,
    ) -> np.float64:
        """`Σ_n Σ_k weights[k] · (level - code)² · step²`, over scaled weights of (rows, K); a level is not rounded.

        Args:
            scaled: overwritten; where `is_odd`, magnitudes.
            parts: its parts.
            work: overwritten, of the same shape and dtype.
            weights: the parts of (1, K).
            tensor_scale: see `fit`.

        Returns:
            The sum, within a group in the dtype of the weights, else in float64.
        """
        steps, zeros = self.fit(parts, tensor_scale)
        self._to_levels(scaled, steps, zeros)
        if self._never_clips:
            np.rint(scaled, out=work)
        else:
            work[...] = scaled
            self._to_codes(work, zeros)
            self._shift(work, zeros, -1)
        np.subtract(scaled, work, out=scaled)
        np.multiply(scaled, scaled, out=scaled)
        pairs = zip(parts, weights, strict=True)
        per_step = _side_by_side([np.einsum("ngk,gk->ng", part, of_group[0]) for (_, part), (_, of_group) in pairs])
        return np.float64(np.sum(per_step * steps.astype(np.float64) ** 2, dtype=np.float64))

    def saturated(self, codes: Array) -> int:
        """How many codes are at either end of the range."""
        return int(np.count_nonzero((codes == self.largest) | (codes == self.least)))

    def pack(self, codes: NDArray[np.int8]) -> NDArray[Any]:
        """(N, K) codes as they are stored: of 8 bits the codes themselves, else (N, bytes); see `packing`.

        Integers are stored less the least of their bits, -2^(bits-1); FP4 by sign, exponent and mantissa.
        """
        if self.bits == 8:
            return codes
        if self.is_e2m1:
            return packing.pack(packing.e2m1_nibbles(codes), self.bits)
        return packing.pack((codes.astype(np.int16) + self.middle).astype(np.uint8), self.bits)

    def unpack(self, packed: NDArray[Any], in_features: int) -> NDArray[np.int8]:
        """The codes that `pack` has packed: (N, in_features)."""
        if self.bits == 8:
            return packed.reshape(-1, in_features)
        numbers = packing.unpack(packed, self.bits, in_features)
        if self.is_e2m1:
            return packing.e2m1_codes(numbers)
        codes: NDArray[np.int8] = (numbers.astype(np.int16) - self.middle).astype(np.int8)
        return codes
