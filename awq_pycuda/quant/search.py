"""The search for the AWQ scale of each input channel over a grid of gammas, on host arrays."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from awq_pycuda.config import Normalization
from awq_pycuda.parallel import map_row_blocks, scratch
from awq_pycuda.quant.conventions import FINITE, Convention, Formula
from awq_pycuda.quant.format import Format
from awq_pycuda.quant.quantized import tensor_scales


@dataclass(frozen=True)
class SearchResult:
    """The whole error curve of one layer, and what it chose.

    `gamma` and `error` are (G,) float64 in the order searched, `s` is (in_features,) in the dtype of the statistics.
    """

    gamma: NDArray[np.float64]
    error: NDArray[np.float64]
    gamma_chosen: float
    error_chosen: float
    error_rtn: float
    s: NDArray[Any]


def candidates(convention: Convention, statistic: NDArray[Any]) -> NDArray[Any]:
    """The scales of every gamma of the grid: `clamp(normalise(max(statistic, floor)^gamma))`.

    Nothing reaches the weights of a dead channel, so its scale only says how much they may widen a row's step. Its
    power is the least one, as the AWQ reference implementation's is (Lin et al., 2023, `auto_scale_block`).

    Args:
        convention: floor, grid, formula, normalization and clamps apply.
        statistic: (K,) what the convention makes scales of, per input channel, float32 or float64; 0 where it is dead.

    Returns:
        (G, K) in the dtype of `statistic`; exactly 1 for gamma 0.
    """
    logarithm = np.log(np.maximum(statistic.astype(np.float64), convention.floor))
    power = FORMULAS[convention.formula](logarithm, convention.grid)
    return np.asarray(NORMALIZATIONS[convention.normalization](power, statistic == 0, convention), statistic.dtype)


def _plain(logarithm: NDArray[np.float64], grid: NDArray[np.float64]) -> NDArray[np.float64]:
    """Logarithms of `statistic^gamma`: (K,) and (G,) to (G, K)."""
    power: NDArray[np.float64] = grid[:, None] * logarithm
    return power


def _by_mean(power: NDArray[np.float64], dead: NDArray[np.bool], convention: Convention) -> NDArray[np.float64]:
    """Divides by the mean over the live channels and clamps; dead ones lie below the clamp.

    Args:
        power: (G, K) logarithms; the largest is taken off first, so that no gamma gives NaN.
        dead: (K,) channels without a signal.
        convention: clamps and grid apply.
    """
    if dead.all():
        return np.ones_like(power)
    live = power[:, ~dead]
    peak = live.max(axis=1, keepdims=True)
    relative = np.exp(live - peak)
    mean = relative.mean(axis=1, keepdims=True)
    scales = np.empty_like(power)
    scales[:, ~dead] = np.clip(relative / mean, *convention.clamp)
    below = np.clip(np.exp(np.log(convention.least_power) - peak) / mean, FINITE[0], convention.clamp[0])
    scales[:, dead] = np.where(convention.grid == 0, 1, below[:, 0])[:, None]
    return scales


def _by_sqrt_max_min(power: NDArray[np.float64], dead: NDArray[np.bool], convention: Convention) -> NDArray[np.float64]:
    """Clamps the powers from below and divides by sqrt(max · min), as the reference does.

    Arguments as in `_by_mean`.
    """
    least = np.log(convention.least_power)
    power[:, dead] = least
    power[convention.grid == 0] = 0
    power = np.maximum(power, least)
    centre = (power.max(axis=1, keepdims=True) + power.min(axis=1, keepdims=True)) / 2
    with np.errstate(over="ignore"):
        scales: NDArray[np.float64] = np.clip(np.exp(power - centre), *FINITE)
    return scales


# What the record's words choose.
FORMULAS: dict[Formula, Callable[[NDArray[np.float64], NDArray[np.float64]], NDArray[np.float64]]] = {"plain": _plain}
NORMALIZATIONS: dict[
    Normalization, Callable[[NDArray[np.float64], NDArray[np.bool], Convention], NDArray[np.float64]]
] = {Normalization.mean: _by_mean, Normalization.sqrt_max_min: _by_sqrt_max_min}


def best(convention: Convention, error: NDArray[np.float64]) -> int:
    """Index of the candidate with the lowest of the (G,) errors; a tie goes to the smaller gamma."""
    return int(np.lexsort((convention.grid, error))[0])


def search_result(convention: Convention, error: NDArray[np.float64], s: NDArray[Any]) -> SearchResult:
    """The whole curve and what it chose: (G,) errors, and the (K,) scales of the best candidate.

    RTN's error is NaN where it was no candidate.
    """
    grid, chosen = convention.grid, best(convention, error)
    rtn = error[grid == 0]
    return SearchResult(
        gamma=grid,
        error=error,
        gamma_chosen=float(grid[chosen]),
        error_chosen=float(error[chosen]),
        error_rtn=float(rtn[0]) if rtn.size else math.nan,
        s=s,
    )


BlockErrors = Callable[[NDArray[Any], NDArray[Any], NDArray[Any], Format, NDArray[Any]], NDArray[np.float64]]


def block_errors(
    w: NDArray[Any], scales: NDArray[Any], weights: NDArray[Any], form: Format, of_tensor: NDArray[Any]
) -> NDArray[np.float64]:
    """`Σ_n Σ_k weights[g, k] · (code - level)² · step²`, of each candidate g, in NumPy; see `Format.weighted_errors`.

    Args:
        w: (rows, K).
        scales: (G, K) in the same dtype.
        weights: (G, K), alike.
        form: the format to come.
        of_tensor: (G,) `Format.tensor_scale`.

    Returns:
        (G,).
    """
    given, scaled, work = scratch((3, *w.shape), w.dtype)
    if form.is_odd:
        np.abs(w, out=given)
    else:
        given = w
    parts = form.parts(scaled)
    errors = np.empty(len(scales))
    for index, s in enumerate(scales):
        np.multiply(given, s, out=scaled)
        of_channel = form.parts(weights[index : index + 1])
        errors[index] = form.weighted_errors(scaled, parts, work, of_channel, of_tensor[index])
    return errors


def diag_errors(
    w: NDArray[Any],
    scales: NDArray[Any],
    sq_mean: NDArray[Any],
    form: Format,
    of_block: BlockErrors = block_errors,
) -> NDArray[np.float64]:
    """Output error of each candidate with the input channels taken as uncorrelated.

    `E = Σ_k sq_mean[k] / s[k]² · Σ_n (Ŵ·s − W·s)²[n, k]`. The inner square is `step² (code − level)²` with the level of
    W·s before it is rounded, which never overflows float32 where W·s does not.

    Args:
        w: (N, K) weights, float32 or float64; the arithmetic inside a row is in this dtype, sums over rows in float64.
        scales: (G, K) candidates in the same dtype.
        sq_mean: (K,) mean of x² per input channel.
        form: the format to come.
        of_block: what computes a block of rows.

    Returns:
        (G,) float64; inf where a candidate overflows.
    """
    importance = sq_mean.astype(np.float64) / scales.astype(np.float64) ** 2
    largest = importance.max(axis=1)
    largest[largest == 0] = 1
    weights = (importance / largest[:, None]).astype(w.dtype)
    with np.errstate(over="ignore", invalid="ignore"):
        of_tensor = tensor_scales(w, scales, form)
        errors = map_row_blocks(lambda block: of_block(w[block], scales, weights, form, of_tensor), w.shape)
        total = np.sum(errors, axis=0) * largest
    return np.where(np.isfinite(total), total, np.inf)


def refuse_overflow(abs_mean: NDArray[Any], sq_mean: NDArray[Any]) -> None:
    """Refuses statistics of activations that overflow, so that no error can be told.

    Raises:
        FloatingPointError: names the first such input channel.
    """
    for statistic in (abs_mean, sq_mean):
        bad = np.flatnonzero(~np.isfinite(statistic))
        if bad.size:
            raise FloatingPointError(
                f"the activations of input channel {bad[0]} overflow float32 when squared; "
                "chains grow with depth, synthetic ones less with inputs.weight_scale=he"
            )
