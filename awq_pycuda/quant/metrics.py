"""Figures of merit of a quantized layer that need no second product."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from awq_pycuda.parallel import map_row_blocks
from awq_pycuda.quant.quantized import Quantized, dequantize_rows


def sqnr_db(signal: float, noise: float) -> float:
    """Signal-to-quantization-noise ratio `10·log10(Σy² / Σ(y−ŷ)²)` in dB; inf without noise, NaN without signal."""
    if signal == 0:
        return math.nan
    return 10 * math.log10(signal / noise) if noise > 0 else math.inf


def weight_mse(w: NDArray[Any], quantized: Quantized[NDArray[Any]], s: NDArray[Any]) -> float:
    """Mean of `(Ŵ/s − W)²`, in float64, Ŵ being what the codes stand for.

    Args:
        w: (N, K) weights.
        quantized: of `W·s`.
        s: (K,) scale per input channel.
    """

    def squared_error(block: slice) -> float:
        exact = np.empty(w[block].shape)
        dequantize_rows(quantized, block, exact)
        exact /= s
        exact -= w[block]
        return float(np.vdot(exact, exact))

    return math.fsum(map_row_blocks(squared_error, w.shape)) / w.size


def saturated_fraction(quantized: Quantized[NDArray[Any]]) -> float:
    """Share of the codes at either end of the range (each row or group has at least one, by its step)."""
    codes = quantized.codes
    ends = map_row_blocks(lambda block: quantized.format.saturated(codes[block]), codes.shape)
    return sum(ends) / codes.size
