"""The search for the AWQ scale of each input channel over a grid of gammas, on host arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from awq_pycuda.config import Normalization, Objective
from awq_pycuda.parallel import map_row_blocks, scratch
from awq_pycuda.quant.format import Format
from awq_pycuda.results.record import SearchResult

_FLOOR = 1e-8  # smallest abs_mean that counts: a dead channel must not send s to zero
_MEAN_CLAMP = (1 / 8, 8.0)
_REFERENCE_FLOOR = 1e-4  # the AWQ reference clamps the unnormalised scales from below
_FINITE_CLAMP = (1e-9, 1e9)  # keeps W·s, 1/s and the squared rounding errors within float32, whatever gamma


@dataclass(frozen=True)
class Search:
    """What is searched, and for what: `grid` (G,) float64, from `with_rtn`."""

    grid: NDArray[np.float64]
    normalization: Normalization = Normalization.mean
    objective: Objective = Objective.diag

    def candidates(self, abs_mean: NDArray[Any]) -> NDArray[Any]:
        """(G, K) scales, one row per gamma of the grid; see `candidate_scales`."""
        return candidate_scales(abs_mean, self.grid, self.normalization)

    def best(self, error: NDArray[np.float64]) -> int:
        """Index of the candidate with the lowest of the (G,) errors; a tie goes to the smaller gamma."""
        return int(np.lexsort((self.grid, error))[0])

    def result(self, error: NDArray[np.float64], s: NDArray[Any]) -> SearchResult:
        """The whole curve and what it chose: (G,) errors, and the (K,) scales of the best candidate."""
        best = self.best(error)
        return SearchResult(
            gamma=self.grid,
            error=error,
            gamma_chosen=float(self.grid[best]),
            error_chosen=float(error[best]),
            error_rtn=float(error[int(np.flatnonzero(self.grid == 0)[0])]),
            s=s,
        )


def with_rtn(gammas: Sequence[float]) -> NDArray[np.float64]:
    """The grid as (G,) float64, each gamma once, with 0 (plain round-to-nearest) put in front where it is missing."""
    grid = np.array(list(dict.fromkeys(gammas)), np.float64) + 0.0  # which makes 0 of -0
    return grid if (grid == 0).any() else np.concatenate(([0.0], grid))


def candidate_scales(abs_mean: NDArray[Any], gammas: NDArray[np.float64], normalization: Normalization) -> NDArray[Any]:
    """The scales of every gamma: `clamp(normalise(max(abs_mean, 1e-8)^gamma))`.

    `mean` divides by the mean over the channels and clamps to [1/8, 8]; `sqrt_max_min` clamps the powers to at least
    1e-4 and divides by sqrt(max · min), as the AWQ reference implementation does (Lin et al., 2023,
    `auto_scale_block`), and clamps to [1e-9, 1e9]. Both take the largest (or the centre) off in logarithms first,
    so that no gamma gives NaN.

    Args:
        abs_mean: (K,) mean of |x| per input channel, float32 or float64.
        gammas: (G,) exponents, finite and not negative.
        normalization: how the powers of one gamma are brought to a common size.

    Returns:
        (G, K) in the dtype of `abs_mean`; exactly 1 for gamma 0.
    """
    log = np.log(np.maximum(abs_mean.astype(np.float64), _FLOOR))
    power = gammas[:, None] * log
    if normalization is Normalization.mean:
        relative = np.exp(power - power.max(axis=1, keepdims=True))
        scales = np.clip(relative / relative.mean(axis=1, keepdims=True), *_MEAN_CLAMP)
    else:
        power = np.maximum(power, np.log(_REFERENCE_FLOOR))
        centre = (power.max(axis=1, keepdims=True) + power.min(axis=1, keepdims=True)) / 2
        with np.errstate(over="ignore"):
            scales = np.clip(np.exp(power - centre), *_FINITE_CLAMP)
    return np.asarray(scales, abs_mean.dtype)


def diag_errors(
    w: NDArray[Any],
    scales: NDArray[Any],
    sq_mean: NDArray[Any],
    form: Format,
    threads: int | None = None,
) -> NDArray[np.float64]:
    """Output error of each candidate with the input channels taken as uncorrelated.

    `E = Σ_k sq_mean[k] / s[k]² · Σ_n (Ŵ·s − W·s)²[n, k]`. With U = W·s / step the inner square is
    `step² (rint(U) − U)²`, which never overflows float32 where W·s does not.

    Args:
        w: (N, K) weights, float32 or float64; the arithmetic inside a row is in this dtype, sums over rows in float64.
        scales: (G, K) candidates in the same dtype.
        sq_mean: (K,) mean of x² per input channel.
        form: the format to come.
        threads: host threads; the result does not depend on them.

    Returns:
        (G,) float64; inf where a candidate overflows.
    """
    importance = sq_mean.astype(np.float64) / scales.astype(np.float64) ** 2
    largest = importance.max(axis=1)
    largest[largest == 0] = 1
    weighting = (importance / largest[:, None]).astype(w.dtype)

    def block_errors(block: slice) -> NDArray[np.float64]:
        magnitude, scaled, work = scratch((3, block.stop - block.start, w.shape[1]), w.dtype)
        np.abs(w[block], out=magnitude)
        errors = np.empty(len(scales))
        for index, s in enumerate(scales):
            np.multiply(magnitude, s, out=scaled)
            steps = form.steps(scaled)
            form.squared_roundings(scaled, steps, work)
            per_step = form.weighted_sums(scaled, weighting[index])
            errors[index] = np.sum(per_step * steps.astype(np.float64) ** 2, dtype=np.float64)
        return errors

    with np.errstate(over="ignore", invalid="ignore"):
        total = np.sum(map_row_blocks(block_errors, w.shape, threads), axis=0) * largest
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
