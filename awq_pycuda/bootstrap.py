"""Intervals over the windows of a text: how much a mean would differ on other windows of the same kind."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 10_000
CONFIDENCE = 0.95  # two-sided: 2.5 % at either end

Array = NDArray[np.float64]


class Bootstrap:
    """Resamples of the windows, drawn once: what is compared on them is compared on the same ones, pair by pair.

    A resample takes as many windows as there are, with repetition; a mean over it counts each window by its tokens.
    Sums run window by window, so that no number of threads changes a digit.
    """

    def __init__(self, tokens: Any, seed: int = 0, resamples: int = RESAMPLES) -> None:
        """Draws the resamples.

        Args:
            tokens: (W,) tokens of each window, in the windows' order.
            seed: of the draws; the same one and as many windows give the same resamples.
            resamples: how many.
        """
        self.tokens = np.asarray(tokens, np.float64)
        windows = self.tokens.size
        drawn = np.random.default_rng(seed).multinomial(windows, np.full(windows, 1 / windows), size=resamples)
        taken = drawn * self.tokens
        self._shares = taken / taken.sum(axis=1, keepdims=True)  # (resamples, W); tokens are whole, so the sum is exact

    def mean(self, values: Any) -> Array:
        """The mean over all tokens, (...), of the windows' means `values`, (..., W), without a sum's roundings."""
        weighted = np.asarray(values, np.float64) * self.tokens
        sums = [math.fsum(row) for row in weighted.reshape(-1, self.tokens.size)]
        return np.reshape(np.array(sums) / math.fsum(self.tokens), weighted.shape[:-1])

    def interval(self, values: Any, of: Callable[[Array], Array] | None = None) -> tuple[Array, Array]:
        """The 95 % interval of `mean`, from the resamples' own means (percentile bootstrap).

        Args:
            values: (..., W), the windows' means.
            of: what of a mean the interval is of, such as `np.exp` of a mean loss; a function of arrays.

        Returns:
            The lower and the upper ends, (...). NaN where there is a single window: nothing tells how much it varies.
        """
        given = np.asarray(values, np.float64)
        rows = given.reshape(-1, self.tokens.size)
        ends = np.full((2, len(rows)), np.nan)
        if self.tokens.size > 1:
            share = (1 - CONFIDENCE) / 2
            for row, windows in enumerate(rows):
                means = np.zeros(len(self._shares))
                for window, value in enumerate(windows):
                    means += self._shares[:, window] * value
                ends[:, row] = np.quantile(means if of is None else of(means), (share, 1 - share))
        low, high = ends.reshape(2, *given.shape[:-1])
        return low, high
