"""The search for the AWQ scale of each input channel over a grid of candidates, on host arrays."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from awq_pycuda.choices import Normalization
from awq_pycuda.parallel import map_row_blocks, scratch
from awq_pycuda.quant.conventions import Candidate, Convention, Grid
from awq_pycuda.quant.format import Format
from awq_pycuda.quant.quantized import tensor_scales
from awq_pycuda.quant.tools import FINITE

# What AutoAWQ adds to the largest magnitude of a group, and to the power of the weights that it divides by. Where beta
# is searched the weights count as at least the latter, so that a column of zeros has a scale.
_GROUP_OFFSET, _DUO_OFFSET = 1e-6, 1e-4


@dataclass(frozen=True)
class SearchResult:
    """The whole error curve of one layer, and what it chose.

    `error` is (G,) float64, in the order of the grid, of which `chosen` is an index; `s` is (in_features,) in the dtype
    of the statistics. `unclipped` is (G,) float64, the errors without clipping, where it was searched jointly.
    """

    grid: Grid
    error: NDArray[np.float64]
    chosen: int
    s: NDArray[Any]
    unclipped: NDArray[np.float64] | None = None

    @property
    def gamma(self) -> NDArray[np.float64]:
        """(G,) of every candidate."""
        return self.grid.gamma

    @property
    def candidate(self) -> Candidate:
        """What was chosen."""
        return self.grid.candidates[self.chosen]

    @property
    def gamma_chosen(self) -> float:
        """Of the candidate chosen."""
        return self.candidate.gamma

    @property
    def error_chosen(self) -> float:
        """Of the candidate chosen."""
        return float(self.error[self.chosen])

    @property
    def error_rtn(self) -> float:
        """That of plain round-to-nearest, which clips nothing; NaN where it was no candidate."""
        errors = self.error if self.unclipped is None else self.unclipped
        return math.nan if self.grid.rtn is None else float(errors[self.grid.rtn])


def weight_means(weights: Sequence[NDArray[Any]], form: Format) -> NDArray[np.float64]:
    """(K,) mean of `|w| / (max|w| + 1e-6)`, the maximum that of the weight's group, over the rows of (N, K) weights.

    Layers that share their scales have one mean, over the rows of all.
    """

    def of_block(w: NDArray[Any], block: slice) -> NDArray[np.float64]:
        magnitude = w[block].astype(np.float64)
        np.abs(magnitude, out=magnitude)
        for _, part in form.parts(magnitude):
            part /= part.max(axis=2, keepdims=True) + _GROUP_OFFSET
        total: NDArray[np.float64] = magnitude.sum(axis=0)
        return total

    sums = [each for w in weights for each in map_row_blocks(partial(of_block, w), w.shape)]
    means: NDArray[np.float64] = np.sum(sums, axis=0) / sum(map(len, weights))
    return means


def candidates(
    convention: Convention, statistic: NDArray[Any], of_weights: NDArray[np.float64] | None = None
) -> NDArray[Any]:
    """The scales of every candidate of the grid: `clamp(normalise(power))`, see `Formula` for the power.

    Nothing reaches the weights of a dead channel, so its scale only says how much they may widen a row's step. Its
    power is the least one for every gamma above 0, as the AWQ reference implementation's is (Lin et al., 2023,
    `auto_scale_block`).

    Args:
        convention: floor, grid, formula, normalization and clamps apply.
        statistic: (K,) what the convention makes scales of, per input channel, float32 or float64; 0 where it is dead.
        of_weights: (K,) `weight_means`, where the convention asks for weights.

    Returns:
        (G, K) in the dtype of `statistic`; exactly 1 for RTN.
    """
    grid, dead = convention.grid, statistic == 0
    power = grid.gamma[:, None] * np.log(np.maximum(statistic.astype(np.float64), convention.floor))
    if of_weights is not None:
        power[grid.duo] -= np.log(of_weights ** (1 - grid.gamma[grid.duo, None]) + _DUO_OFFSET)
        by_beta = grid.beta > 0
        power[by_beta] -= grid.beta[by_beta, None] * np.log(np.maximum(of_weights, _DUO_OFFSET))
    least = dead & (grid.gamma[:, None] > 0)
    power[least] = np.log(convention.least_power)
    return np.asarray(NORMALIZATIONS[convention.normalization](power, dead, least, convention), statistic.dtype)


def _by_mean(
    power: NDArray[np.float64], dead: NDArray[np.bool], least: NDArray[np.bool], convention: Convention
) -> NDArray[np.float64]:
    """Divides by the mean over the live channels and clamps; dead ones lie below the clamp.

    Args:
        power: (G, K) logarithms; the largest is taken off first, so that no gamma gives NaN.
        dead: (K,) channels without a signal.
        least: (G, K) those among them that have the least power.
        convention: clamps apply.
    """
    if dead.all():
        return np.ones_like(power)
    live = power[:, ~dead]
    peak = live.max(axis=1, keepdims=True)
    with np.errstate(over="ignore"):  # a dead channel beside others that are as good as dead
        scales = np.exp(power - peak) / np.exp(live - peak).mean(axis=1, keepdims=True)
    low, high = convention.clamp
    found: NDArray[np.float64] = np.where(least, np.clip(scales, FINITE[0], low), np.clip(scales, low, high))
    return found


def _by_sqrt_max_min(
    power: NDArray[np.float64], dead: NDArray[np.bool], least: NDArray[np.bool], convention: Convention
) -> NDArray[np.float64]:
    """Clamps the powers from below and divides by sqrt(max · min), as the reference does.

    Arguments as in `_by_mean`.
    """
    power = np.maximum(power, np.log(convention.least_power))
    centre = (power.max(axis=1, keepdims=True) + power.min(axis=1, keepdims=True)) / 2
    with np.errstate(over="ignore"):
        scales: NDArray[np.float64] = np.clip(np.exp(power - centre), *FINITE)
    return scales


# What the record's word chooses.
NORMALIZATIONS: dict[
    Normalization,
    Callable[[NDArray[np.float64], NDArray[np.bool], NDArray[np.bool], Convention], NDArray[np.float64]],
] = {Normalization.mean: _by_mean, Normalization.sqrt_max_min: _by_sqrt_max_min}


def best(convention: Convention, error: NDArray[np.float64]) -> int:
    """Index of the candidate with the lowest of the (G,) errors, NaN counting as none; of ties see `Ties`."""
    return int(np.lexsort((convention.ranks, error))[0])


def search_result(
    convention: Convention, error: NDArray[np.float64], s: NDArray[Any], unclipped: NDArray[np.float64] | None = None
) -> SearchResult:
    """The whole curve and what it chose: (G,) errors, and the (K,) scales of the best candidate; see `SearchResult`."""
    return SearchResult(convention.grid, error, best(convention, error), s, unclipped)


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
