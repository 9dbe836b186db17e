"""Figures of merit of a quantized layer that need no second product."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from awq_pycuda.parallel import map_row_blocks
from awq_pycuda.steps import QMAX


def sqnr_db(signal: float, noise: float) -> float:
    """Signal-to-quantization-noise ratio `10·log10(Σy² / Σ(y−ŷ)²)` in dB; inf without noise, NaN without signal."""
    if signal == 0:
        return math.nan
    return 10 * math.log10(signal / noise) if noise > 0 else math.inf


def weight_mse(
    w: NDArray[Any], wq: NDArray[np.int8], s: NDArray[Any], scale_b: NDArray[Any], threads: int | None = None
) -> float:
    """Mean of `(Wq·scale_b/s − W)²`, in float64.

    Args:
        w: (N, K) weights.
        wq: (N, K) codes.
        s: (K,) scale per input channel.
        scale_b: (N,) or (N, groups) steps.
        threads: host threads; None for all cores.
    """
    steps = scale_b.reshape(w.shape[0], -1).astype(np.float64)

    def squared_error(block: slice) -> float:
        exact = wq[block].astype(np.float64)
        groups = exact.reshape(exact.shape[0], steps.shape[1], -1)
        groups *= steps[block][:, :, None]
        exact /= s
        exact -= w[block]
        return float(np.vdot(exact, exact))

    return math.fsum(map_row_blocks(squared_error, w.shape, threads)) / w.size


def saturated_fraction(wq: NDArray[np.int8], threads: int | None = None) -> float:
    """Share of the codes at either end of the range, |Wq| = 127 (each row or group has at least one, by its step)."""

    def ends(block: slice) -> int:
        return int(np.count_nonzero(np.abs(wq[block]) == QMAX))

    return sum(map_row_blocks(ends, wq.shape, threads)) / wq.size
