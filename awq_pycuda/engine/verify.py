"""`verify=true`: every stage of a layer against the float64 oracle, given what the stage was given."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from awq_pycuda.config import Normalization, Objective
from awq_pycuda.parallel import map_row_blocks, product_by_blocks
from awq_pycuda.quant.conventions import Convention
from awq_pycuda.quant.format import Format
from awq_pycuda.quant.quantized import Quantized
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


def _as_rows(values: NDArray[Any]) -> NDArray[Any]:
    """The same values in two dimensions."""
    return values if values.ndim == 2 else values.reshape(1, -1)


def relative_error(value: NDArray[Any], exact: NDArray[Any]) -> float:
    """Largest `|value − exact| / |exact|`, with the smallest normal float32 as the least divisor.

    Below it float32 has fewer bits, so there the error is a share of that number. Where exact is 0, `value` must be 0
    too or the error is inf.
    """
    found, wanted = _as_rows(value), _as_rows(exact)

    def of_rows(rows: slice) -> float:
        exactly = wanted[rows].astype(np.float64)
        difference = np.abs(found[rows].astype(np.float64) - exactly)
        error = difference / np.maximum(np.abs(exactly), _SMALLEST_NORMAL)
        return float(np.max(np.where((exactly == 0) & (difference > 0), np.inf, error)))

    return float(np.max(map_row_blocks(of_rows, wanted.shape)))


def frobenius_error(value: NDArray[Any], exact: NDArray[Any]) -> float:
    """`‖value − exact‖ / ‖exact‖`, with every element of `exact` counted as at least the smallest normal float32."""
    found, wanted = _as_rows(value), _as_rows(exact)

    def of_rows(rows: slice) -> tuple[float, float]:
        exactly = wanted[rows].astype(np.float64)
        off = (found[rows] - exactly).ravel()
        size = np.maximum(np.abs(exactly), _SMALLEST_NORMAL).ravel()
        return float(off @ off), float(size @ size)

    error, norm = np.sqrt(np.sum(map_row_blocks(of_rows, wanted.shape), axis=0))
    return float(error / norm)


def _grouped(rows: NDArray[Any], form: Format, beyond: float = 0) -> NDArray[np.float64]:
    """(rows, K) as (rows, groups, channels of one) in float64; what a last group lacks is `beyond`."""
    count, channels = rows.shape
    size, groups = form.size(channels), form.groups(channels)
    found = np.empty((count, groups * size))
    found[:, :channels], found[:, channels:] = rows, beyond
    return found.reshape(count, groups, size)


def _steps_for(largest: NDArray[Any], form: Format) -> NDArray[np.float64]:
    """Steps of groups by their largest magnitudes."""
    return np.where(largest == 0, 1, np.maximum(largest / form.largest, _SMALLEST_STEP))


def exact_means(x: NDArray[Any]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(K,) means of |x| and x² of (M, K) activations."""

    def of_rows(rows: slice) -> NDArray[np.float64]:
        own = np.abs(x[rows].astype(np.float64))
        return np.array([own.sum(axis=0), np.square(own).sum(axis=0)])

    abs_mean, sq_mean = np.sum(map_row_blocks(of_rows, x.shape), axis=0) / len(x)
    return abs_mean, sq_mean


def exact_steps(w: NDArray[Any], s: NDArray[Any], form: Format) -> NDArray[np.float64]:
    """(N, groups) steps of (N, K) weights by (K,) scales."""
    factors = _grouped(s[None, :], form)

    def of_rows(rows: slice) -> NDArray[np.float64]:
        return _steps_for(np.abs(_grouped(w[rows], form) * factors).max(axis=2), form)

    return np.concatenate(map_row_blocks(of_rows, w.shape))


def exact_levels(w: NDArray[Any], s: NDArray[Any], steps: NDArray[Any], form: Format) -> NDArray[np.float64]:
    """(rows, groups, channels of one) what rounding makes the codes of rows of weights from: `W·s / step`."""
    levels = _grouped(w, form)
    levels *= _grouped(s[None, :], form)
    levels /= steps[:, :, None]
    return levels


def dequantized(codes: NDArray[Any], steps: NDArray[Any], inv_s: NDArray[Any], form: Format) -> NDArray[np.float64]:
    """(rows, K) weights of rows of codes with their (rows, groups) steps, by (K,) inverse scales."""
    weights = _grouped(codes, form)
    weights *= steps[:, :, None]
    weights *= _grouped(inv_s[None, :], form)
    return weights.reshape(len(codes), -1)[:, : codes.shape[1]]


def exact_product(x: NDArray[Any], weights: Callable[[slice], NDArray[Any]], out_features: int) -> NDArray[np.float64]:
    """(M, N) product in float64 of (M, K) activations with weights that are made by blocks of rows."""
    found = np.empty((len(x), out_features))
    product_by_blocks(x.astype(np.float64), lambda rows: weights(rows).astype(np.float64, copy=False), found)
    return found


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
        w: (N, K) weights.
        scales: (G, K) candidates in float64.
        sq_mean: (K,) mean of x² in float64.
        form: the format of the run.
        x: (M, K) activations in float64 for the objective `output`; without them it is `diag`.
    """
    factors, importance = _grouped(scales, form, 1), _grouped(sq_mean / scales**2, form)

    def of_rows(rows: slice) -> NDArray[np.float64]:
        weights = _grouped(w[rows], form)
        if x is None:  # of whose rounding the sign does not matter
            np.abs(weights, out=weights)
        space = np.empty((2, *weights.shape))
        return np.array([_squares(weights, space, *each, form, x) for each in zip(factors, importance, strict=True)])

    exact, lowered, raised, units = np.sum(map_row_blocks(of_rows, w.shape), axis=0).T / (1 if x is None else len(w))
    if x is not None:
        exact, lowered, raised = exact / len(x), lowered / len(x), raised / len(x)
    return Curve(np.maximum(0, exact - lowered), exact + raised, np.sqrt(units))


def _squares(
    weights: NDArray[Any],
    space: NDArray[Any],
    s: NDArray[Any],
    importance: NDArray[Any],
    form: Format,
    x: NDArray[Any] | None,
) -> tuple[float, float, float, float]:
    """Of rows of weights and one candidate, sums over rows: the objective's and the unit's squares.

    The objective's are three: as rounded, and by how much ties can lower it, and raise it.

    Args:
        weights: (rows, groups, channels of one); of `diag` their magnitudes.
        space: two arrays of that shape to work in.
        s: (groups, channels of one) scales.
        importance: (groups, channels of one) mean square of the activations by s.
        form: of the run.
        x: (M, K) activations, or None.
    """
    levels, off = space
    np.multiply(weights, s, out=levels)
    largest = levels.max(axis=2) if x is None else np.maximum(levels.max(axis=2), -levels.min(axis=2))
    steps = _steps_for(largest, form)
    levels *= (1 / steps)[:, :, None]
    np.rint(levels, out=off)
    off -= levels
    # Below the smallest normal number float32 has fewer bits. A row of zeros has no step to measure by. Roundings of
    # one size that know nothing of each other make in an output the sum of their squares.
    units = float(np.sum(np.maximum(largest / form.largest, _SMALLEST_NORMAL) ** 2 @ importance.sum(axis=1)))
    if x is None:
        of_groups = np.einsum("rgk,rgk,gk->rg", off, off, importance)
        return float(np.sum(of_groups * steps**2)), 0.0, 0.0, units
    # Of `diag` a tie changes nothing: what rounding takes from a code only changes its sign. In an output it meets the
    # others. Rounded up it can only go down, and down only up.
    rows, groups, within = np.nonzero(np.abs(off) > 0.5 - TOLERANCES["error_curve"])
    change = -np.sign(off[rows, groups, within]) * steps[rows, groups] / s[groups, within]
    off *= steps[:, :, None]
    off /= s
    output = x @ off.reshape(len(off), -1)[:, : x.shape[1]].T
    own = x[:, groups * off.shape[2] + within] * change
    changes = np.sum(own * (2 * output[:, rows] + own), axis=0)
    exact = float(np.vdot(output, output))
    return exact, -float(np.minimum(changes, 0).sum()), float(np.maximum(changes, 0).sum()), units


def _exact_relu(y: NDArray[Any], bias: NDArray[Any] | None) -> NDArray[np.float64]:
    found = y.astype(np.float64)
    if bias is not None:
        found += bias
    return np.maximum(found, 0, out=found)


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
    form, codes, steps = quantized.format, quantized.codes, quantized.steps

    def of_rows(rows: slice) -> tuple[int, int]:
        levels = exact_levels(w[rows], s, steps[rows], form)
        rounded = np.rint(levels)
        near_tie = np.abs(rounded - levels) > 0.5 - TIE_MARGIN
        difference = np.abs(rounded.clip(-form.largest, form.largest) - _grouped(codes[rows], form))
        return int(np.count_nonzero((difference > 0) & ~near_tie)), int(np.count_nonzero(difference > 1))

    off_tie, off_by_more = np.sum(map_row_blocks(of_rows, w.shape), axis=0)
    return int(off_tie), int(off_by_more)


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
    exact = dict(zip(("abs_mean", "sq_mean"), exact_means(x), strict=True))
    form, s = quantized.format, found.s.astype(np.float64)

    def weights(rows: slice) -> NDArray[Any]:
        return dequantized(quantized.codes[rows], quantized.steps[rows], 1 / s, form)

    off_tie, off_by_more = code_errors(quantized, w, found.s)
    worst = {
        "abs_mean": relative_error(abs_mean, exact["abs_mean"]),
        "sq_mean": relative_error(sq_mean, exact["sq_mean"]),
        "s": relative_error(found.s, exact_scales(exact, found.gamma_chosen, convention)),
        "scale_b": relative_error(quantized.steps, exact_steps(w, s, form)),
        "codes_off_tie": float(off_tie),
        "codes_off_by_more_than_1": float(off_by_more),
        "output": frobenius_error(y, exact_product(x, weights, len(w))),
        "relu": frobenius_error(out, _exact_relu(y, bias)),
    }
    if not curve:
        return worst
    given = {"abs_mean": abs_mean.astype(np.float64), "sq_mean": sq_mean.astype(np.float64)}
    scales = np.array([exact_scales(given, gamma, convention) for gamma in found.gamma])
    activations = x.astype(np.float64) if convention.objective is Objective.output else None
    exact_errors = exact_curve(w, scales, given["sq_mean"], form, activations)
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
