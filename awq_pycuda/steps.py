"""The symmetric int8 grid that every stage shares: its largest level and the step of a row or group."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

QMAX = 127  # symmetric: -128 is never used, so that W and -W quantize alike


def step_size(amax: NDArray[Any]) -> NDArray[Any]:
    """Quantization step `amax / 127` of rows or groups whose largest magnitude is `amax`, in its dtype and shape.

    A row of zeros gets 1. A row of denormals whose quotient underflows gets the smallest positive number: a step of
    zero would make its codes inf.
    """
    step: NDArray[Any] = amax / amax.dtype.type(QMAX)
    np.maximum(step, np.finfo(amax.dtype).smallest_subnormal, out=step)
    step[amax == 0] = 1
    return step


def grouped(matrix: NDArray[Any], group_size: int | None) -> NDArray[Any]:
    """A (rows, K) matrix seen as (rows, groups, group_size); one group of K where `group_size` is None."""
    rows, in_features = matrix.shape
    size = in_features if group_size is None else group_size
    return matrix.reshape(rows, in_features // size, size)
