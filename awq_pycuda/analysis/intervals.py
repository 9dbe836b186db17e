"""How much slower one set of samples is than another, with an interval that holds for few samples too."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

CONFIDENCE = 0.90  # two-sided: 5 % at either end
MIN_SAMPLES = 3  # a side; 3 against 3 just reach that confidence
_EXACT_UP_TO = 1000  # pairs; beyond it the normal approximation of the same ranks is as good
_NORMAL_95 = 1.6448536269514722  # the 95 % point of the standard normal distribution

Samples = NDArray[np.float64]


@dataclass(frozen=True)
class Ratio:
    """B's median over A's, and its interval; `low` and `high` are NaN where the samples are too few for one."""

    ratio: float
    low: float
    high: float


def ratio_of_medians(a: Samples, b: Samples) -> Ratio:
    """`median(b) / median(a)` with a distribution-free 90 % interval.

    The interval is Moses's, from the ranks of all ratios b/a: its ends are the C-th smallest and C-th largest, C from
    the exact distribution of the Mann-Whitney statistic (M. Hollander, D. A. Wolfe, E. Chicken, *Nonparametric
    Statistical Methods*, 3rd ed., section 4.3, applied to the logarithms of the times). It assumes independent samples,
    and that B's distribution is A's times a factor. Where the ratio of medians lies outside, it is widened to hold it.

    Args:
        a: (n,) times of the reference, in ms.
        b: (m,) times to compare, in ms.
    """
    if not (a.size and b.size and a.min() > 0 and b.min() > 0):
        return Ratio(float("nan"), float("nan"), float("nan"))
    ratio = float(np.median(b) / np.median(a))
    if min(a.size, b.size) < MIN_SAMPLES:
        return Ratio(ratio, float("nan"), float("nan"))
    rank = _critical_rank(*sorted((a.size, b.size)))
    with np.errstate(over="ignore"):
        ratios = np.sort(np.divide.outer(b, a), axis=None)
    return Ratio(ratio, min(ratio, float(ratios[rank - 1])), max(ratio, float(ratios[-rank])))


@cache
def _critical_rank(n: int, m: int) -> int:
    """The largest C with P(U < C) ≤ 5 % for Mann-Whitney's U of n and m samples, at least 3 each."""
    if n * m > _EXACT_UP_TO:
        return int(np.floor(n * m / 2 - _NORMAL_95 * np.sqrt(n * m * (n + m + 1) / 12)))
    below = np.cumsum(_mann_whitney(n, m))
    # The slack is for rounding: 3 against 3 has exactly 1/20 at U = 0.
    return int(np.searchsorted(below, (1 - CONFIDENCE) / 2 + 1e-12, side="right"))


@cache
def _mann_whitney(n: int, m: int) -> NDArray[np.float64]:
    """P(U = u) for u from 0 to n·m, by the recursion over whose value is the largest (Mann, Whitney, 1947)."""
    chances = np.zeros(n * m + 1)
    if n == 0 or m == 0:
        chances[0] = 1
        return chances
    chances[m:] += n / (n + m) * _mann_whitney(n - 1, m)
    chances[: n * (m - 1) + 1] += m / (n + m) * _mann_whitney(n, m - 1)
    return chances
