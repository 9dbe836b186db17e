"""`verify=true`: every stage of a layer against the float64 oracle, given what the stage was given."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from awq_pycuda.config import Normalization, Objective
from awq_pycuda.quant.conventions import Convention
from awq_pycuda.quant.format import Format, Quantized
from awq_pycuda.quant.search import SearchResult

_SMALLEST_STEP = float(np.finfo(np.float32).smallest_subnormal)
_SMALLEST_NORMAL = float(np.finfo(np.float32).smallest_normal)
TIE_MARGIN = 1e-3  # a code may differ by one where the exact value is this close to a rounding tie

# The worst error that each stage may show: relative, but for counts of codes, and for the error curve in quantization
# steps (`curve_error`). There a code before its rounding, at most 127, has six roundings of 2^-24 behind it: 4.6e-5.
TOLERANCES: dict[str, float] = {
    "abs_mean": 1e-5,
    "sq_mean": 1e-5,
    "error_curve": 5e-5,
    "s": 1e-5,
    "scale_b": 1e-5,
    "codes_off_tie": 0,
    "codes_off_by_more_than_1": 0,
    "output": 1e-5,
    "relu": 1e-6,
}


class VerificationError(RuntimeError):
    """A stage is further from the float64 oracle than its tolerance."""


def relative_error(value: NDArray[Any], exact: NDArray[Any]) -> float:
    """Largest `|value − exact| / |exact|`, with the smallest normal float32 as the least divisor.

    Below it float32 has fewer bits, so there the error is a share of that number. Where exact is 0, `value` must be 0
    too or the error is inf.
    """
    exact = exact.astype(np.float64)
    difference = np.abs(value.astype(np.float64) - exact)
    error = difference / np.maximum(np.abs(exact), _SMALLEST_NORMAL)
    return float(np.max(np.where((exact == 0) & (difference > 0), np.inf, error)))


def frobenius_error(value: NDArray[Any], exact: NDArray[Any]) -> float:
    """`‖value − exact‖ / ‖exact‖`, with every element of `exact` counted as at least the smallest normal float32."""
    norm = float(np.linalg.norm(np.maximum(np.abs(exact), _SMALLEST_NORMAL)))
    return float(np.linalg.norm(value.astype(np.float64) - exact)) / norm


def _largest(scaled: NDArray[Any], form: Format) -> NDArray[Any]:
    """(N, groups) largest magnitudes of (N, K) scaled weights."""
    starts = np.arange(0, scaled.shape[1], form.size(scaled.shape[1]))
    largest: NDArray[Any] = np.maximum.reduceat(np.abs(scaled), starts, axis=1)
    return largest


def exact_steps(scaled: NDArray[Any], form: Format) -> NDArray[Any]:
    """(N, groups) steps of (N, K) scaled weights."""
    largest = _largest(scaled, form)
    steps: NDArray[Any] = np.where(largest == 0, 1, np.maximum(largest / form.largest, _SMALLEST_STEP))
    return steps


def over_channels(steps: NDArray[Any], in_features: int, form: Format) -> NDArray[Any]:
    """(N, groups) steps as (N, K): each channel's own."""
    return np.repeat(steps.astype(np.float64), form.size(in_features), axis=1)[:, :in_features]


def _plain(statistic: NDArray[Any], gamma: float) -> NDArray[Any]:
    power: NDArray[Any] = statistic**gamma
    return power


_FORMULAS = {"plain": _plain}


def exact_scales(statistics: Mapping[str, NDArray[Any]], gamma: float, convention: Convention) -> NDArray[Any]:
    """(K,) scales of one gamma, as docs/mathematics.md has them.

    Args:
        statistics: (K,) each, in float64, by the names that conventions use.
        gamma: of the grid.
        convention: of the run.
    """
    statistic = statistics[convention.statistic]
    if gamma == 0 or not statistic.any():
        return np.ones_like(statistic)
    dead, least = statistic == 0, convention.least_power
    power = _FORMULAS[convention.formula](np.maximum(statistic, convention.floor), gamma)
    power[dead] = least
    if convention.normalization is Normalization.mean:
        power /= power[~dead].mean()
        low, high = convention.clamp
        return np.where(dead, power.clip(1e-9, low), power.clip(low, high))
    power = power.clip(least)
    power /= np.sqrt(power.max()) * np.sqrt(power.min())
    return power.clip(1e-9, 1e9)


class Curve(NamedTuple):
    """An error curve in float64, (G,) each.

    Attributes:
        low: the objective of each candidate, at the least: codes at rounding ties may go either way.
        high: the same, at the most.
        units: the square root of what it would be were each rounding a whole step.
    """

    low: NDArray[np.float64]
    high: NDArray[np.float64]
    units: NDArray[np.float64]


def exact_curve(
    w: NDArray[Any], scales: NDArray[Any], sq_mean: NDArray[Any], form: Format, x: NDArray[Any] | None = None
) -> Curve:
    """The objective of each candidate, as far as rounding ties leave it open, and what it is measured by.

    Args:
        w: (N, K) weights in float64.
        scales: (G, K) candidates in float64.
        sq_mean: (K,) mean of x² in float64.
        form: the format of the run.
        x: (M, K) activations in float64 for the objective `output`; without them it is `diag`.
    """
    low, high, units = [], [], []
    for s in scales:
        scaled, importance = w * s, sq_mean / s**2
        steps = over_channels(exact_steps(scaled, form), w.shape[1], form)
        levels = scaled / steps
        off = np.rint(levels) * steps - scaled
        if x is None:
            exact = float(np.sum(off**2 @ importance))
            changes = np.zeros(1)
        else:
            output = x @ (off / s).T
            exact = float(np.mean(output**2))
            changes = _changes_at_ties(x, output, levels, steps / s)
        low.append(max(0.0, exact + np.minimum(changes, 0).sum()))
        high.append(exact + np.maximum(changes, 0).sum())
        # Below the smallest normal number float32 has fewer bits. A row of zeros has no step to measure by.
        unit = over_channels(np.maximum(_largest(scaled, form) / form.largest, _SMALLEST_NORMAL), w.shape[1], form)
        # Roundings of one size that know nothing of each other make in an output the sum of their squares.
        units.append(np.sqrt(np.sum(unit**2 @ importance) / (1 if x is None else len(w))))
    return Curve(np.array(low), np.array(high), np.array(units))


def _changes_at_ties(
    x: NDArray[Any], output: NDArray[Any], levels: NDArray[Any], steps: NDArray[Any]
) -> NDArray[np.float64]:
    """By how much each code at a rounding tie changes the mean square of an output if it is rounded the other way.

    Of `diag` that is nothing: what rounding takes from a code only changes its sign. In an output it meets the others.

    Args:
        x: (M, K) activations.
        output: (M, N) what rounding makes of the output.
        levels: (N, K) codes before rounding.
        steps: (N, K) what one code is worth, of the weights themselves.
    """
    below = levels - np.floor(levels)
    rows, channels = np.nonzero(np.abs(below - 0.5) < TOLERANCES["error_curve"])
    # Rounded up it can only go down, and down only up.
    change = np.where(np.rint(levels[rows, channels]) > levels[rows, channels], -1, 1) * steps[rows, channels]
    own = x[:, channels] * change
    found: NDArray[np.float64] = np.sum(own * (2 * output[:, rows] + own), axis=0) / output.size
    return found


def curve_error(error: NDArray[np.float64], curve: Curve) -> float:
    """How far a curve is from the exact one, in quantization steps; the worst of its points.

    The objective `diag` is a sum of squares, `Σ a·r²` with `a = sq_mean/s² · step²` and r what rounding takes from a
    code. By the triangle inequality `|√error − √exact| / √Σa` is at most the largest error of any r. A relative error
    has no such bound: in a layer of few channels almost nothing may be left to round. Of the objective `output` it is
    the same with r of either sign in each sum, and a code at a rounding tie may go either way.

    Args:
        error: (G,) from the run.
        curve: from `exact_curve`.
    """
    found = np.sqrt(error)
    # NaN stays NaN.
    off = np.maximum(np.maximum(np.sqrt(curve.low) - found, found - np.sqrt(curve.high)), 0)
    return float(np.max(off / np.maximum(curve.units, np.finfo(np.float64).tiny)))


def code_errors(quantized: Quantized[NDArray[Any]], w: NDArray[Any], s: NDArray[Any]) -> tuple[int, int]:
    """Codes that differ from `clip(rint(W·s / step))` in float64: (away from a tie, by more than 1 anywhere).

    Args:
        quantized: (N, K) codes and their (N, groups) steps.
        w: (N, K) weights.
        s: (K,) scale per input channel.
    """
    largest = quantized.format.largest
    levels = w.astype(np.float64) * s / over_channels(quantized.steps, w.shape[1], quantized.format)
    difference = np.abs(np.clip(np.rint(levels), -largest, largest) - quantized.codes)
    near_tie = np.abs(np.abs(levels - np.rint(levels)) - 0.5) < TIE_MARGIN
    return int(np.count_nonzero((difference > 0) & ~near_tie)), int(np.count_nonzero(difference > 1))


def check_layer(
    convention: Convention,
    *,
    x: NDArray[Any],
    w: NDArray[Any],
    bias: NDArray[Any] | None,
    abs_mean: NDArray[Any],
    sq_mean: NDArray[Any],
    found: SearchResult,
    quantized: Quantized[NDArray[Any]],
    y: NDArray[Any],
    out: NDArray[Any],
    curve: bool = True,
) -> dict[str, float]:
    """Worst error of each stage of one layer, by the names of `TOLERANCES`.

    The formulas are this module's own, in plain float64: none of the run's is called.

    Args:
        convention: of the run.
        x: (M, K) activations.
        w: (N, K) weights.
        bias: (N,) or None.
        abs_mean: (K,) from the run.
        sq_mean: (K,) from the run.
        found: from the run.
        quantized: (N, K) codes and (N, groups) steps from the run.
        y: (M, N) product from the run.
        out: (M, N) relu of the product and bias, from the run.
        curve: whether the error curve is checked, too, which takes as long for each candidate as all others together.
    """
    exact_x, exact_w = x.astype(np.float64), w.astype(np.float64)
    exact = {"abs_mean": np.abs(exact_x).mean(axis=0), "sq_mean": np.square(exact_x).mean(axis=0)}
    form, s = quantized.format, found.s.astype(np.float64)
    weights = quantized.codes * over_channels(quantized.steps, w.shape[1], form) / s
    off_tie, off_by_more = code_errors(quantized, w, found.s)
    worst = {
        "abs_mean": relative_error(abs_mean, exact["abs_mean"]),
        "sq_mean": relative_error(sq_mean, exact["sq_mean"]),
        "s": relative_error(found.s, exact_scales(exact, found.gamma_chosen, convention)),
        "scale_b": relative_error(quantized.steps, exact_steps(exact_w * s, form)),
        "codes_off_tie": float(off_tie),
        "codes_off_by_more_than_1": float(off_by_more),
        "output": frobenius_error(y, exact_x @ weights.T),
        "relu": frobenius_error(out, np.maximum(y.astype(np.float64) + (0 if bias is None else bias), 0)),
    }
    if not curve:
        return worst
    given = {"abs_mean": abs_mean.astype(np.float64), "sq_mean": sq_mean.astype(np.float64)}
    scales = np.array([exact_scales(given, gamma, convention) for gamma in found.gamma])
    activations = exact_x if convention.objective is Objective.output else None
    exact_errors = exact_curve(exact_w, scales, given["sq_mean"], form, activations)
    return worst | {"error_curve": curve_error(found.error, exact_errors)}


def refuse_beyond_tolerance(layer: str, worst: Mapping[str, float]) -> None:
    """Raises a `VerificationError` that names every stage of the layer whose error is beyond its tolerance, or NaN."""
    beyond = [
        f"{stage} {error:.3g} (allowed {TOLERANCES[stage]:g})"
        for stage, error in worst.items()
        if not error <= TOLERANCES[stage]
    ]
    if beyond:
        raise VerificationError(f"layer {layer} is beyond the oracle's tolerance: " + ", ".join(beyond))
