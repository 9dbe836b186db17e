"""What every format means, in float64 and by formulas of the oracle's own, and how far a run's codes are from it.

Of a `Format` only the fields are read, and where its groups lie. What is rounded to the numbers of a small type, steps
or zero points, may come out otherwise in float32, on the other side of where the rounding turns: so the functions that
make them take a `side`, -1 or 1 for what float32 may be off by at the most, downwards or upwards.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from awq_pycuda.choices import Divisor, Element, StepDtype, ZeroPoint, ZeroStep
from awq_pycuda.parallel import map_row_blocks
from awq_pycuda.quant.format import Format
from awq_pycuda.quant.quantized import Quantized, Steps

Floats = NDArray[np.float64]

SMALLEST_NORMAL = float(np.finfo(np.float32).smallest_normal)  # below it float32 has fewer bits
TIE_MARGIN = 1e-3  # a code may be either of two where the exact value is this close to the tie between them
_UNSURE = 2.0**-20  # relative, of a step or zero point before it is rounded: some roundings of 2^-24
_OF_A_ZERO = 2.0**-22  # relative to a float zero point, of the levels that it is taken from
_E2M1 = np.array([0.0, 1, 2, 3, 4, 6, 8, 12])  # twice its numbers, as codes have them
_E4M3_LARGEST = 448.0
_POWERS: Floats = 2.0 ** np.arange(-127.0, 128)  # the numbers of E8M0


def grouped(rows: NDArray[Any], form: Format, beyond: float | None = None) -> NDArray[np.float64]:
    """(rows, K) as (rows, groups, channels of one) in float64.

    What a last group lacks is `beyond`, or else like the last channel, which changes neither end of its range.
    """
    count, channels = rows.shape
    size, groups = form.size(channels), form.groups(channels)
    found = np.empty((count, groups * size))
    found[:, :channels] = rows
    found[:, channels:] = rows[:, -1:] if beyond is None else beyond
    return found.reshape(count, groups, size)


def ungrouped(groups: NDArray[Any], channels: int) -> NDArray[Any]:
    """(rows, groups, channels of one) as (rows, K) again."""
    return groups.reshape(len(groups), -1)[:, :channels]


def exact_clipped(w: NDArray[Any], s: NDArray[Any], ratio: NDArray[Any], form: Format) -> Floats:
    """(N, K) scaled weights whose magnitudes are held to the (N, groups) ratios of the largest of their groups."""

    def of_rows(rows: slice) -> Floats:
        scaled = grouped(w[rows].astype(np.float64) * s, form)
        limits = (np.abs(scaled).max(axis=2) * ratio[rows])[:, :, None]
        held: Floats = ungrouped(np.minimum(np.maximum(scaled, -limits), limits), w.shape[1])
        return held

    return np.concatenate(map_row_blocks(of_rows, w.shape))


class _Numbers(NamedTuple):
    """The numbers of a type from 0 on, and where the next one becomes the nearest."""

    values: Floats
    turns: Floats

    def nearest(self, magnitudes: Floats) -> Floats:
        """By distance, and of two as near the one with the even mantissa; the largest for all that lies beyond."""
        found: Floats = self.values[self.turns.searchsorted(magnitudes)]
        return found


def _numbers(values: Floats) -> _Numbers:
    """Of numbers in their order, every other of which has an even mantissa, as their bits count up."""
    turns = (values[:-1] + values[1:]) / 2
    turns[1::2] = np.nextafter(turns[1::2], 0)  # a tie goes up from an odd one
    return _Numbers(values, turns)


_CODES = _numbers(_E2M1)


@cache
def _type(dtype: StepDtype) -> _Numbers:
    """The numbers of fp16, bf16 or E4M3."""
    if dtype is StepDtype.fp16:
        return _numbers(np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float64))
    if dtype is StepDtype.bf16:
        return _numbers((np.arange(0x7F80, dtype=np.uint32) << 16).view(np.float32).astype(np.float64))
    bits = np.arange(127)  # 4 of an exponent and 3 of a mantissa; the last ones are NaN
    exponent, mantissa = np.divmod(bits, 8)
    return _numbers(2.0 ** (np.maximum(exponent, 1) - 7) * ((exponent > 0) + mantissa / 8))


def _nearest(values: Floats, dtype: StepDtype) -> Floats:
    """Numbers of either sign as those of the type; those of fp32 are taken as they are."""
    return values if dtype is StepDtype.fp32 else np.copysign(_type(dtype).nearest(np.abs(values)), values)


def has_float_zeros(form: Format) -> bool:
    """Whether zero points are weights, not codes."""
    return not form.symmetric and form.zero_point is ZeroPoint.float


def _bounds(form: Format) -> tuple[int, int]:
    """The least and the largest code of integers."""
    half = 2 ** (form.bits - 1)
    is_odd = form.symmetric and form.divisor is Divisor.largest
    return (1 - half if is_odd else -half), half - 1


class Extents(NamedTuple):
    """Of groups: the low end of their range, its width, from which steps follow, and the largest magnitude in it."""

    low: Floats
    width: Floats
    size: Floats


def extents(scaled: Floats, form: Format, magnitudes: bool = False) -> Extents:
    """Of (..., channels) scaled weights, or of their magnitudes where the sign does not matter."""
    high = scaled.max(axis=-1)
    if magnitudes:
        return Extents(high, high, high)
    low = scaled.min(axis=-1)
    size = np.maximum(high, -low)
    if form.symmetric:
        return Extents(low, size, size)
    if form.include_zero:
        low, high = np.minimum(low, 0), np.maximum(high, 0)
    return Extents(low, high - low, np.maximum(high, -low))


def tensor_scales_of(w: NDArray[Any], scales: NDArray[Any], form: Format) -> Floats:
    """(G,) what steps of NVFP4 are multiplied by for their type, of (N, K) weights by (G, K) scales; else 1."""
    if form.step_dtype is not StepDtype.e4m3:
        return np.ones(len(scales))
    columns = np.max(map_row_blocks(lambda rows: np.abs(w[rows]).max(axis=0), w.shape), axis=0)
    found = _E4M3_LARGEST * 6 / np.maximum((columns.astype(np.float64) * scales).max(axis=1), SMALLEST_NORMAL)
    return np.where(found <= np.finfo(np.float32).max, found, 1)


def steps_of(of: Extents, form: Format, tensor_scale: float, side: int = 0) -> Floats:
    """The steps of groups."""
    width = of.width
    if side:  # what is of one size in float64 is so in float32
        width = np.where(width == 0, 0, np.maximum(width + side * _UNSURE * of.size, 0))
    used, dtype = np.maximum(width, form.least_range), form.step_dtype
    least = _POWERS[0]
    if dtype in (StepDtype.e8m0, StepDtype.e8m0_up):
        # The largest magnitude comes between 4 and 8 of them, or between 3.5 and 7.
        of_one = 4 if dtype is StepDtype.e8m0 else 3.5
        steps = _POWERS[np.maximum((of_one * _POWERS).searchsorted(used, side="right") - 1, 0)]
    else:
        steps = used * (tensor_scale / _divisor(form))
        if dtype is StepDtype.fp32:
            least = float(np.finfo(np.float32).smallest_subnormal)
            steps[steps <= least / 2] = 0
        else:
            least = float(_type(dtype).values[1])
            steps = _nearest(steps, dtype)
    if form.zero_step is ZeroStep.epsilon:
        steps[steps == 0] = _gap_above_1(dtype)
    else:
        steps = np.maximum(steps, least)
        if form.least_range == 0:
            steps[width == 0] = 1
    steps = np.maximum(steps, form.least_step)
    steps /= tensor_scale
    if form.element is Element.e2m1:  # codes are twice their numbers
        steps /= 2
    return steps


def _divisor(form: Format) -> float:
    if form.element is Element.e2m1:
        return 6
    of_all = float(2**form.bits - 1)
    if not form.symmetric:
        return of_all
    return of_all // 2 if form.divisor is Divisor.largest else of_all / 2


def _gap_above_1(dtype: StepDtype) -> float:
    if dtype is StepDtype.fp32:
        return 2.0**-23
    numbers = _type(dtype).values
    return float(numbers[numbers > 1][0] - 1)


def zeros_of(of: Extents, steps: NDArray[Any], form: Format, side: int = 0) -> Floats | None:
    """The zero points of groups, given their steps; None where the format has none."""
    if form.symmetric:
        return None
    least, largest = _bounds(form)
    if has_float_zeros(form):
        zeros = of.low - least * steps
        zeros += side * _UNSURE * (np.abs(of.low) - least * steps)
        return _nearest(zeros, form.step_dtype)
    below = -of.low / steps  # codes, below 0
    below += side * _UNSURE * (np.abs(below) - least)
    codes: Floats = np.rint(below).clip(0, largest - least) + least
    return codes


def to_levels(scaled: Floats, steps: NDArray[Any], zeros: NDArray[Any] | None, form: Format) -> None:
    """Makes of (..., channels) scaled weights, in place, what is rounded: how many steps they lie from zero.

    From a float zero point, that is. What an integer one adds, before or after it is rounded, is not in it: the error
    is the same, and where either way is as near, both are allowed.
    """
    if zeros is not None and has_float_zeros(form):
        scaled -= zeros[..., None]
    scaled *= 1 / steps[..., None].astype(np.float64)


def rounded(
    levels: Floats, zeros: NDArray[Any] | None, form: Format, out: Floats | None = None, may_clip: bool = True
) -> Floats:
    """The nearest that codes can stand for, in steps; plus an integer zero point it is the code."""
    if form.element is Element.e2m1:
        return np.copysign(_CODES.nearest(np.abs(levels)), levels, out=out)
    found: Floats = np.rint(levels, out=out)
    if may_clip:
        least, largest = (bound - _of_codes(zeros, form) for bound in _bounds(form))
        np.clip(found, least, largest, out=found)
    return found


def _of_codes(zeros: NDArray[Any] | None, form: Format) -> Any:
    """What is taken from codes: (..., 1) integer zero points, else 0."""
    return 0.0 if zeros is None or has_float_zeros(form) else zeros[..., None]


def ends_at_its_largest(form: Format) -> bool:
    """Whether levels that belong to their steps are never beyond the codes."""
    is_odd = form.symmetric and form.divisor is Divisor.largest
    return is_odd and form.element is Element.int and form.step_dtype is StepDtype.fp32


def other_fits(of: Extents, form: Format, tensor_scale: float) -> list[tuple[Floats, Floats | None]]:
    """Steps and zero points, all that float32 may have rounded them to; none where nothing is rounded."""
    is_fp32 = form.step_dtype is StepDtype.fp32
    if is_fp32 and (form.symmetric or has_float_zeros(form)):
        return []
    fits: list[tuple[Floats, Floats | None]] = []
    for side in (0,) if is_fp32 else (-1, 1):
        steps = steps_of(of, form, tensor_scale, side)
        fits += [(steps, zeros_of(of, steps, form, turn)) for turn in ((0,) if form.symmetric else (-1, 1))]
    return fits


def exact_steps(w: NDArray[Any], s: NDArray[Any], form: Format) -> Steps[Floats]:
    """Steps, and what the format has beside them, of (N, K) weights by (K,) scales; zero points for these steps."""
    factors, tensor_scale = grouped(s[None, :], form), float(tensor_scales_of(w, s[None, :], form)[0])

    def of_rows(rows: slice) -> tuple[Floats, Floats | None]:
        found = extents(grouped(w[rows], form) * factors, form)
        steps = steps_of(found, form, tensor_scale)
        return steps, zeros_of(found, steps, form)

    steps, zeros = zip(*map_row_blocks(of_rows, w.shape), strict=True)
    return Steps(
        np.concatenate(steps),
        form,
        None if form.symmetric else np.concatenate(zeros),
        np.array([tensor_scale]) if form.step_dtype is StepDtype.e4m3 else None,
    )


def exact_levels(w: NDArray[Any], s: NDArray[Any], of: Steps[NDArray[Any]], rows: slice) -> Floats:
    """(rows, groups, channels of one) what rounding makes the codes of some rows of weights from; see `to_levels`."""
    levels = grouped(w[rows], of.format)
    levels *= grouped(s[None, :], of.format)
    to_levels(levels, of.steps[rows], _rows(of.zero_points, rows), of.format)
    return levels


def exact_codes(w: NDArray[Any], s: NDArray[Any], of: Steps[NDArray[Any]], rows: slice) -> Floats:
    """(rows, K) codes of some rows of weights."""
    zeros = _rows(of.zero_points, rows)
    codes = rounded(exact_levels(w, s, of, rows), zeros, of.format) + _of_codes(zeros, of.format)
    return np.asarray(ungrouped(codes, w.shape[1]), np.float64)


def _rows(zeros: NDArray[Any] | None, rows: slice) -> NDArray[Any] | None:
    return None if zeros is None else zeros[rows]


def dequantized(quantized: Quantized[NDArray[Any]], inv_s: NDArray[Any], rows: slice) -> Floats:
    """(rows, K) weights that some rows of codes stand for, by (K,) inverse scales."""
    form, zeros = quantized.format, _rows(quantized.zero_points, rows)
    weights = grouped(quantized.codes[rows], form)
    if zeros is not None and not has_float_zeros(form):
        weights -= zeros[:, :, None]
    weights *= quantized.steps[rows][:, :, None]
    if zeros is not None and has_float_zeros(form):
        weights += zeros[:, :, None]
    weights *= grouped(inv_s[None, :], form)
    return ungrouped(weights, len(inv_s))


def step_errors(found: Steps[NDArray[Any]], w: NDArray[Any], s: NDArray[Any]) -> tuple[float, float]:
    """How far steps and zero points are from what float32 may round them to; the worst of each.

    Steps, and what scales those of a matrix together, relatively; zero points, which follow from the steps given, in
    codes or steps.

    Args:
        found: (N, groups) steps and what belongs to them.
        w: (N, K) weights.
        s: (K,) scale per input channel.
    """
    form, s = found.format, s.astype(np.float64)
    factors, tensor_scale = grouped(s[None, :], form), float(tensor_scales_of(w, s[None, :], form)[0])
    # Of the largest magnitude float32's error is its own size: the tolerance is enough.
    sides = (0, 0) if form.symmetric and form.step_dtype is StepDtype.fp32 else (-1, 1)

    def of_rows(rows: slice) -> tuple[float, float]:
        of, steps, zeros = extents(grouped(w[rows], form) * factors, form), found.steps[rows], found.zero_points
        ends = [steps_of(of, form, tensor_scale, side) for side in sides]
        of_steps = float(np.max(_beyond(steps, ends) / np.maximum(np.maximum(*ends), SMALLEST_NORMAL)))
        if zeros is None:
            return of_steps, 0.0
        given = steps.astype(np.float64)
        off = _beyond(zeros[rows], [zeros_of(of, given, form, side) for side in (-1, 1)])
        return of_steps, float(np.max(off / (given if has_float_zeros(form) else 1)))

    of_steps, of_zeros = np.max(map_row_blocks(of_rows, w.shape), axis=0)
    if found.tensor_scale is not None:
        of_steps = np.maximum(of_steps, abs(float(found.tensor_scale[0]) / tensor_scale - 1))
    return float(of_steps), float(of_zeros)


def _beyond(found: NDArray[Any], ends: list[Any]) -> Floats:
    """By how much it is outside of what lies between the two; NaN stays NaN."""
    beyond: Floats = np.maximum(np.maximum(np.minimum(*ends) - found, found - np.maximum(*ends)), 0)
    return beyond


def code_errors(quantized: Quantized[NDArray[Any]], w: NDArray[Any], s: NDArray[Any]) -> tuple[int, int]:
    """Codes that no rounding of `W·s` near the exact one gives, by the steps and zero points that there are.

    Args:
        quantized: (N, K) codes and their (N, groups) steps.
        w: (N, K) weights.
        s: (K,) scale per input channel.

    Returns:
        How many there are, and how many of them are more than one place from the exact code.
    """
    form, channels = quantized.format, w.shape[1]

    def of_rows(rows: slice) -> tuple[int, int]:
        zeros = _rows(quantized.zero_points, rows)
        levels = exact_levels(w, s, quantized, rows)
        codes = grouped(quantized.codes[rows], form)
        codes -= _of_codes(zeros, form)
        exact = rounded(levels, zeros, form)
        row, channel = np.nonzero(ungrouped(exact != codes, channels))
        at = row, channel // form.size(channels)
        level, right, wrong = (ungrouped(each, channels)[row, channel, None] for each in (levels, exact, codes))
        of_group, margin = None if zeros is None else zeros[at], np.full((len(row), 1), TIE_MARGIN)
        if of_group is not None and has_float_zeros(form):
            margin += _OF_A_ZERO * np.abs(of_group / quantized.steps[rows][at])[:, None]
        outside = (wrong < rounded(level - margin, of_group, form)) | (wrong > rounded(level + margin, of_group, form))
        outside |= rounded(wrong, of_group, form) != wrong  # no code at all
        far = np.abs(_places(right, form) - _places(wrong, form)) > 1
        return int(np.count_nonzero(outside)), int(np.count_nonzero(outside & far))

    off_tie, off_by_more = np.sum(map_row_blocks(of_rows, w.shape), axis=0)
    return int(off_tie), int(off_by_more)


def _places(codes: Floats, form: Format) -> Floats:
    """Where codes stand among all of them, from 0."""
    return codes if form.element is Element.int else np.copysign(_E2M1.searchsorted(np.abs(codes)), codes)
