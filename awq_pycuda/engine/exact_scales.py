"""The scales of every candidate in float64, by formulas of their own: none of the run's is called."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from awq_pycuda.choices import Normalization
from awq_pycuda.parallel import map_row_blocks
from awq_pycuda.quant.conventions import Candidate, Convention
from awq_pycuda.quant.format import Format

WEIGHTS = "weights"  # the name of the weights' statistic among the others


def exact_weight_means(weights: Sequence[NDArray[Any]], form: Format) -> NDArray[np.float64]:
    """(K,) mean over the rows of all (N, K) weights of `|w|` over 1e-6 more than the largest of the row's group."""
    channels = weights[0].shape[1]
    size = form.size(channels)

    def of_rows(w: NDArray[Any], rows: slice) -> NDArray[np.float64]:
        sums = np.empty(channels)
        for start in range(0, channels, size):
            group = np.abs(w[rows, start : start + size].astype(np.float64))
            sums[start : start + size] = (group / (group.max(axis=1)[:, None] + 1e-6)).sum(axis=0)
        return sums

    sums = [each for w in weights for each in map_row_blocks(partial(of_rows, w), w.shape)]
    means: NDArray[np.float64] = np.sum(sums, axis=0) / sum(map(len, weights))
    return means


def exact_scales(statistics: Mapping[str, NDArray[Any]], candidate: Candidate, convention: Convention) -> NDArray[Any]:
    """(K,) scales of one candidate, as docs/mathematics.md has them.

    Args:
        statistics: (K,) each, in float64, by the names that conventions use; where the convention asks for weights
            also `WEIGHTS`.
        candidate: of the grid.
        convention: of the run.
    """
    statistic = statistics[convention.statistic.name]
    dead, by_mean = statistic == 0, convention.normalization is Normalization.mean
    if candidate.is_rtn or (by_mean and dead.all()):
        return np.ones_like(statistic)
    power: NDArray[Any] = np.maximum(statistic, convention.floor) ** candidate.gamma
    if candidate.duo:
        power /= statistics[WEIGHTS] ** (1 - candidate.gamma) + 1e-4
    elif candidate.beta > 0:
        power /= np.maximum(statistics[WEIGHTS], 1e-4) ** candidate.beta
    nothing = dead if candidate.gamma > 0 else np.zeros_like(dead)
    power[nothing] = convention.least_power
    if by_mean:
        power /= power[~dead].mean()
        low, high = convention.clamp
        return np.where(nothing, power.clip(1e-9, low), power.clip(low, high))
    power = power.clip(convention.least_power)
    power /= np.sqrt(power.max()) * np.sqrt(power.min())
    return power.clip(1e-9, 1e9)
