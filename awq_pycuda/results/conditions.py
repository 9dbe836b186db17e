"""What the conditions beside a sample mean."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Of NVML's reasons for a clock below the highest: power cap, hardware slowdown, heat (two kinds), power brake.
_HELD_DOWN = 0x4 | 0x8 | 0x20 | 0x40 | 0x80


def held_down(conditions: Mapping[str, NDArray[Any]], size: int) -> NDArray[np.bool]:
    """(size,): which samples were taken while the device held its clock down; none where nothing tells."""
    reasons = conditions.get("throttle_reasons", np.zeros(size))
    return np.asarray((np.nan_to_num(reasons).astype(np.int64) & _HELD_DOWN) != 0)
