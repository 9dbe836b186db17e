"""One figure of many values: what `run`, sweeps, tables, the page and pictures mean by a run's figure and its spread.

| figure | of a layer | of a run | its spread |
|---|---|---|---|
| error removed | 1 - (AWQ's output MSE / RTN's); none where RTN leaves no error | median over the layers | quartiles |
| SQNR | 10·log10(Σy² / Σ(y-ŷ)²) in dB; none where y is all 0 | median over the layers | quartiles |
| time | of a stage: median over the measured passes | of the whole pass, or of a stage summed over the layers in each \
pass: median over the passes | interquartile range (IQR), or noise: IQR / median |

Runs that differ in nothing but the seed are replicates: their median, with the range from the lowest to the highest.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from awq_pycuda.names import listed

QUARTILES = (0.25, 0.5, 0.75)


@dataclass(frozen=True)
class Spread:
    """Lower quartile, median and upper quartile of `count` values; all NaN where there are none."""

    low: float
    median: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Of the values that are there: NaN stands for none. Infinite ones count as what they are."""
        ordered = sorted(value for value in map(float, values) if not math.isnan(value))
        low, median, high = (_quantile(ordered, share) for share in QUARTILES)
        return cls(low, median, high, len(ordered))

    @property
    def noise(self) -> float:
        """The interquartile range as a share of the median; NaN with less than two values."""
        if self.count < 2 or not self.median > 0:
            return math.nan
        return (self.high - self.low) / self.median


def median_interval(values: Iterable[float]) -> tuple[float, float, float]:
    """A median with its distribution-free 95 % interval, from the order statistics: lower end, median, upper end.

    The ends are the r-th smallest and r-th largest value, r the largest rank with P(B < r) ≤ 2.5 % for B binomial with
    n and 1/2. With less than 6 values no two of them are that sure, and both ends are NaN.
    """
    ordered = sorted(values)
    count, below, rank = len(ordered), 0.0, 0
    while rank < count and (below := below + math.comb(count, rank) / 2**count) <= 0.025:
        rank += 1
    median = _quantile(ordered, 0.5)
    return (ordered[rank - 1], median, ordered[-rank]) if rank else (math.nan, median, math.nan)


def _quantile(ordered: list[float], share: float) -> float:
    """By linear interpolation, as NumPy and pandas do it, but between two infinite values, too."""
    if not ordered:
        return math.nan
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    low, high = ordered[below], ordered[min(below + 1, len(ordered) - 1)]
    return low if low == high else low + (high - low) * (place - below)


def error_removed(output_mse: float, rtn_output_mse: float) -> float:
    """The share of RTN's output error that AWQ removes from a layer; NaN where there is none to remove."""
    return 1 - output_mse / rtn_output_mse if rtn_output_mse > 0 else math.nan


def removed_by(metrics: Mapping[str, float], kind: str = "") -> float:
    """`error_removed` from a layer with these metrics; NaN, too, where it has not both of this kind (`held_out_`)."""
    return error_removed(*(metrics.get(f"{kind}{name}", math.nan) for name in ("output_mse", "rtn_output_mse")))


def no_signal(names: Sequence[str]) -> str:
    """The line about layers whose output is all 0."""
    many = "s" if len(names) > 1 else ""
    return f"no signal reaches layer{many} {listed(names)}: the exact output is all 0, so there is no SQNR"


def percent(share: float, digits: int = 1) -> str:
    """`16.8 %`; `-` where there is no number."""
    return "-" if math.isnan(share) else f"{100 * share:.{digits}f} %"


def percent_range(spread: Spread) -> str:
    """The quartiles, such as `9.1 to 24.0 %`."""
    return "-" if math.isnan(spread.low) else f"{100 * spread.low:.1f} to {percent(spread.high)}"


def milliseconds(value: float) -> str:
    """`0.123`, `2.42`, `364.0`: what a reader can tell apart, without unit; `-` where there is no number."""
    if not math.isfinite(value):
        return "-"
    return f"{value:.3f}" if value < 1 else f"{value:.2f}" if value < 100 else f"{value:.1f}"


def milliseconds_range(spread: Spread) -> str:
    """The quartiles, such as `2.40 to 2.50`; `-` with less than two values."""
    return "-" if spread.count < 2 else f"{milliseconds(spread.low)} to {milliseconds(spread.high)}"
