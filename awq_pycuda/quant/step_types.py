"""The number types that steps are stored in, and the element type of FP4: rounding, in whatever floats are given."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from awq_pycuda.choices import StepDtype

Array = NDArray[Any]

# Explicit bits of the mantissa, exponent of the smallest normal number, largest finite number. E4M3 is the variant
# without infinities (OCP 8-bit floating point specification, 1.0).
_FLOATS: dict[StepDtype, tuple[int, int, float]] = {
    StepDtype.fp16: (10, -14, 65504.0),
    StepDtype.bf16: (7, -126, float(np.uint32(0x7F7F0000).view(np.float32))),
    StepDtype.e4m3: (3, -6, 448.0),
}
_E8M0 = (-127, 127)  # exponents that a byte holds (OCP Microscaling Formats specification, 1.0)
# What compressed-tensors takes for a step that comes out as 0: the gap above 1.
_EPSILON = {StepDtype.fp16: 2.0**-10, StepDtype.bf16: 2.0**-7, StepDtype.e4m3: 2.0**-3, StepDtype.fp32: 2.0**-23}
BITS_OF_STEPS = {
    StepDtype.fp32: 32,
    StepDtype.fp16: 16,
    StepDtype.bf16: 16,
    StepDtype.e4m3: 8,
    StepDtype.e8m0: 8,
    StepDtype.e8m0_up: 8,
}
E4M3_LARGEST = _FLOATS[StepDtype.e4m3][2]


def limits(dtype: StepDtype) -> tuple[int, int, float]:
    """Explicit bits of the mantissa, exponent of the smallest normal number, and largest finite number of a type.

    Of E8M0 the exponents of its smallest and largest number; fp32 stands for float32.
    """
    if dtype is StepDtype.fp32:
        single = np.finfo(np.float32)
        return single.nmant, single.minexp, float(single.max)
    return _FLOATS.get(dtype, (0, _E8M0[0], 2.0 ** _E8M0[1]))


def rounded(values: Array, dtype: StepDtype) -> Array:
    """Numbers from 0 on as the nearest of that type, ties to even; what is too large becomes its largest.

    Args:
        values: float32 or float64.
        dtype: fp32 stands for the arithmetic's own type and changes nothing; not one of E8M0.

    Returns:
        A new array in the dtype of `values`, but for fp32 `values` itself.
    """
    if dtype is StepDtype.fp32:
        return values
    mantissa, least, largest = _FLOATS[dtype]
    found: Array = np.minimum(values, values.dtype.type(largest))
    quantum = np.ldexp(values.dtype.type(1), np.maximum(np.frexp(found)[1] - 1, least) - mantissa)
    found /= quantum
    np.rint(found, out=found)
    found *= quantum
    np.minimum(found, values.dtype.type(largest), out=found)
    return found


def power_of_two(peaks: Array, dtype: StepDtype) -> Array:
    """MXFP4's steps: the power of two that the largest magnitude of a group is brought to 4 by, up to under 8.

    What lies above 6 is saturated then (OCP Microscaling Formats, 6.3). `e8m0_up` takes the next power where the
    mantissa is 1.75 or more, which would round to 8: as compressed-tensors does (`generate_mx_scales`).

    Args:
        peaks: from 0 on, float32 or float64.
        dtype: e8m0 or e8m0_up.

    Returns:
        A new array in the dtype of `peaks`; the smallest power where a peak is 0.
    """
    mantissa, exponent = np.frexp(peaks)
    exponent = np.where(peaks == 0, _E8M0[0], exponent - 3)
    if dtype is StepDtype.e8m0_up:
        exponent += mantissa >= 0.875
    found: Array = np.ldexp(peaks.dtype.type(1), np.clip(exponent, *_E8M0))
    return found


def smallest(dtype: StepDtype, of: np.dtype[Any]) -> float:
    """The smallest positive number of the type; `of`: the arithmetic's own, for fp32."""
    if dtype in _FLOATS:
        mantissa, least, _ = _FLOATS[dtype]
        return float(2.0 ** (least - mantissa))
    return float(np.finfo(of).smallest_subnormal) if dtype is StepDtype.fp32 else 2.0 ** _E8M0[0]


def epsilon(dtype: StepDtype) -> float:
    """The gap above 1 in the type; of E8M0 1, its only number there."""
    return _EPSILON.get(dtype, 1.0)


def round_e2m1(levels: Array) -> None:
    """Rounds to twice the numbers of E2M1, 0, 1, 2, 3, 4, 6, 8, 12 and their negatives, in place.

    Ties go to the even mantissa; what is larger becomes 12. Twice, so that they are whole, as codes must be.
    """
    magnitude, kind = np.abs(levels), levels.dtype.type
    quantum = np.where(magnitude < 4, kind(1), np.where(magnitude < 8, kind(2), kind(4)))
    levels /= quantum
    np.rint(levels, out=levels)
    levels *= quantum
    np.clip(levels, -12, 12, out=levels)
