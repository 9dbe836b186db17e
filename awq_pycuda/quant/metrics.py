"""Figures of merit of a quantized layer that need no second product."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from awq_pycuda.parallel import map_row_blocks
from awq_pycuda.quant.quantized import Quantized, dequantize_rows


def sqnr_db(signal: float, noise: float) -> float:
    """Signal-to-quantization-noise ratio `10·log10(Σy² / Σ(y−ŷ)²)` in dB; inf without noise, NaN without signal."""
    if signal == 0:
        return math.nan
    if noise == 0:
        return math.inf
    ratio = signal / noise
    return -math.inf if ratio == 0 else 10 * math.log10(ratio)


@dataclass(frozen=True)
class Lost:
    """What quantization takes from a layer, with its input channels taken as uncorrelated.

    The error of its outputs, summed over them, is `Σ_n Σ_k sq_mean[k] · (Ŵ/s − W)²[n,k]`: the objective `diag`.

    Attributes:
        by_channel: (K,) float64, the part of each input channel.
        by_row: (N,) float64, the part of each output channel; the same sum.
        weight_mse: mean of `(Ŵ/s − W)²`.
        clipped: of the sum, the part of the weights that were clipped.
    """

    by_channel: NDArray[np.float64]
    by_row: NDArray[np.float64]
    weight_mse: float
    clipped: float


def lost(
    w: NDArray[Any],
    quantized: Quantized[NDArray[Any]],
    s: NDArray[Any],
    sq_mean: NDArray[Any],
    held: NDArray[Any] | None = None,
) -> Lost:
    """What quantization takes from a layer, in float64.

    Args:
        w: (N, K) weights.
        quantized: of `W·s`.
        s: (K,) scale per input channel.
        sq_mean: (K,) mean of x² per input channel.
        held: (N, K) scaled weights after they were clipped; None where none was.
    """
    importance = sq_mean.astype(np.float64)
    by_row = np.empty(len(w))

    def of_block(block: slice) -> tuple[NDArray[np.float64], float]:
        off = np.empty(w[block].shape)
        dequantize_rows(quantized, block, off)
        off /= s
        off -= w[block]
        np.multiply(off, off, out=off)
        np.matmul(off, importance, out=by_row[block])
        squares: NDArray[np.float64] = off.sum(axis=0)
        if held is None:
            return squares, 0.0
        off[held[block] == w[block] * s] = 0
        return squares, float(off.sum(axis=0) @ importance)

    found = map_row_blocks(of_block, w.shape)
    squares = np.sum([of_channels for of_channels, _ in found], axis=0)
    clipped = sum(of_clipped for _, of_clipped in found)
    return Lost(squares * importance, by_row, float(squares.sum()) / w.size, clipped)


def saturated_fraction(quantized: Quantized[NDArray[Any]]) -> float:
    """Share of the codes at either end of the range (each row or group has at least one, by its step)."""
    codes = quantized.codes
    ends = map_row_blocks(lambda block: quantized.format.saturated(codes[block]), codes.shape)
    return sum(ends) / codes.size
