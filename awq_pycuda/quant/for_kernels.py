"""What kernels are told of a format: which of them can do it, and the numbers that `Form` in cuda/format.cuh holds."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from awq_pycuda.choices import StepDtype, ZeroOrder, ZeroPoint, ZeroStep
from awq_pycuda.quant.format import Format
from awq_pycuda.quant.step_types import epsilon, limits, smallest

# As format.cuh has them; of zero points 0 is none, of roundings not at all.
_ZEROS = {ZeroOrder.round_first: 1, ZeroOrder.shift_first: 2}
_FLOAT_ZEROS, _TO_FLOAT = 3, 1
_ROUNDINGS = {StepDtype.fp32: 0, StepDtype.e8m0: 2, StepDtype.e8m0_up: 3}


def values(form: Format, in_features: int | None = None) -> dict[str, int]:
    """What decides which kernels can do a format, and what they are compiled for, by the names of their table.

    Args:
        form: the format.
        in_features: of a row; None where rows of any length are meant.
    """
    found = {
        "QMAX": form.largest,
        "ZEROS": int(not form.symmetric),
        "is_plain": int(form.is_plain),
        "float_zeros": int(_zeros(form) == _FLOAT_ZEROS),
        "tensor_scaled": int(form.has_tensor_scale),
    }
    if in_features is not None:
        found["group_size"] = form.size(in_features)
    elif form.group_size is not None:
        found["group_size"] = form.group_size
    return found


def numbers(form: Format) -> NDArray[np.float32]:
    """All of a format but the size of its groups, in the order of the members of `Form`."""
    mantissa, least_exponent, most = limits(form.step_dtype)
    gap = form.zero_step is ZeroStep.epsilon
    return np.array(
        [
            form.least,
            form.largest,
            form.middle,
            form.step_divisor,
            form.is_e2m1,
            _zeros(form),
            form.include_zero,
            _ROUNDINGS.get(form.step_dtype, _TO_FLOAT),
            mantissa,
            least_exponent,
            most,
            epsilon(form.step_dtype) if gap else smallest(form.step_dtype, np.dtype(np.float32)),
            not gap and not form.least_range,
            form.least_range,
            form.least_step,
            form.tensor_scale(np.ones(1, np.float32))[0] if form.has_tensor_scale else 0,
        ],
        np.float32,
    )


def _zeros(form: Format) -> int:
    if form.symmetric:
        return 0
    return _FLOAT_ZEROS if form.zero_point is ZeroPoint.float else _ZEROS[form.zero_order]
