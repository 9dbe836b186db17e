"""`compute_scale_b`: the quantization step of each row (or group of a row) of the scaled weights, on the host."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from awq_pycuda.parallel import map_row_blocks, scratch
from awq_pycuda.steps import grouped, step_size


def compute_scale_b(
    w: NDArray[Any], s: NDArray[Any], group_size: int | None = None, threads: int | None = None
) -> NDArray[Any]:
    """`max_k |W·s| / 127` over each row, or over each group of `group_size` input channels.

    Args:
        w: (out_features, in_features) weights, float32 or float64.
        s: (in_features,) AWQ scale per input channel, same dtype.
        group_size: divides in_features; None for one step per row.
        threads: host threads; None for all cores.

    Returns:
        (out_features,), or (out_features, in_features / group_size), in the dtype of `w`; 1 for an all-zero row.
    """
    rows, in_features = w.shape
    groups = 1 if group_size is None else in_features // group_size
    scale_b = np.empty((rows, groups), w.dtype)

    def steps(block: slice) -> None:
        scaled = scratch((block.stop - block.start, in_features), w.dtype)
        np.multiply(w[block], s, out=scaled)
        np.abs(scaled, out=scaled)
        scale_b[block] = step_size(grouped(scaled, group_size).max(axis=2))

    map_row_blocks(steps, w.shape, threads)
    return scale_b[:, 0] if group_size is None else scale_b
