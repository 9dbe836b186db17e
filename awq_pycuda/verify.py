"""`verify=true`: every stage of a layer against the float64 oracle, given what the stage was given."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from awq_pycuda.backends.cpu import CpuBackend
from awq_pycuda.config import Config, Objective
from awq_pycuda.scale_b import compute_scale_b
from awq_pycuda.search import SearchResult, candidate_scales, diag_errors
from awq_pycuda.steps import QMAX, grouped

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


def curve_error(
    error: NDArray[np.float64],
    w: NDArray[Any],
    scales: NDArray[Any],
    sq_mean: NDArray[Any],
    group_size: int | None = None,
    threads: int | None = None,
) -> float:
    """How far a curve of the objective `diag` is from the exact one, in quantization steps; the worst of its points.

    The objective is a sum of squares, `Σ a·r²` with `a = sq_mean/s² · scale_b²` and r what rounding takes from a code.
    By the triangle inequality `|√error − √exact| / √Σa` is at most the largest error of any r. A relative error has no
    such bound: in a layer of few channels almost nothing may be left to round.

    Args:
        error: (G,) from the run.
        w: (N, K) weights in float64.
        scales: (G, K) candidates in float64.
        sq_mean: (K,) mean of x² in float64.
        group_size: as in `diag_errors`.
        threads: host threads; None for all cores.
    """
    exact = diag_errors(w, scales, sq_mean, group_size, threads)
    units = np.empty(len(scales))
    for index, s in enumerate(scales):
        # Below the smallest normal number float32 has fewer bits. A row of zeros has no step to measure by.
        steps = np.maximum(grouped(np.abs(w * s), group_size).max(axis=2) / QMAX, _SMALLEST_NORMAL)
        importance = grouped((sq_mean / s**2)[None, :], group_size)[0].sum(axis=1)
        units[index] = np.sqrt(np.sum(steps**2 @ importance))
    return float(np.max(np.abs(np.sqrt(error) - np.sqrt(exact)) / np.maximum(units, np.finfo(np.float64).tiny)))


def code_errors(wq: NDArray[np.int8], w: NDArray[Any], s: NDArray[Any], scale_b: NDArray[Any]) -> tuple[int, int]:
    """Codes that differ from `clip(rint(W·s / scale_b))` in float64: (away from a tie, by more than 1 anywhere).

    Args:
        wq: (N, K) int8 codes.
        w: (N, K) weights.
        s: (K,) scale per input channel.
        scale_b: (N,) or (N, groups) steps.
    """
    scaled = w.astype(np.float64) * s
    steps = scale_b.astype(np.float64).reshape(w.shape[0], -1)
    levels = grouped(scaled, scaled.shape[1] // steps.shape[1])
    levels /= steps[:, :, None]
    difference = np.abs(np.clip(np.rint(scaled), -QMAX, QMAX) - wq)
    near_tie = np.abs(np.abs(scaled - np.rint(scaled)) - 0.5) < TIE_MARGIN
    return int(np.count_nonzero((difference > 0) & ~near_tie)), int(np.count_nonzero(difference > 1))


def check_layer(
    config: Config,
    *,
    x: NDArray[Any],
    w: NDArray[Any],
    bias: NDArray[Any] | None,
    abs_mean: NDArray[Any],
    sq_mean: NDArray[Any],
    search: SearchResult,
    scale_b: NDArray[Any],
    wq: NDArray[np.int8],
    y: NDArray[Any],
    out: NDArray[Any],
) -> dict[str, float]:
    """Worst error of each stage of one layer, by the names of `TOLERANCES`.

    Args:
        config: of the run; its grid, normalization, objective and group size apply.
        x: (M, K) activations.
        w: (N, K) weights.
        bias: (N,) or None.
        abs_mean: (K,) from the run.
        sq_mean: (K,) from the run.
        search: from the run.
        scale_b: (N,) or (N, groups) from the run.
        wq: (N, K) codes from the run.
        y: (M, N) product from the run.
        out: (M, N) relu of the product and bias, from the run.
    """
    oracle = CpuBackend(np.float64, config.threads)
    exact_x, exact_w = x.astype(np.float64), w.astype(np.float64)
    exact_abs, exact_sq = oracle.empty(abs_mean.shape), oracle.empty(sq_mean.shape)
    oracle.accum_stats(exact_x, exact_abs, exact_sq)
    chosen = np.array([search.gamma_chosen])
    exact_s = candidate_scales(exact_abs, chosen, config.search.normalization)[0]
    exact_y = oracle.empty(y.shape)
    exact_steps = scale_b.astype(np.float64)
    oracle.dequantize_tiled(exact_x, wq, 1 / search.s.astype(np.float64), exact_steps, exact_y)
    exact_out = np.maximum(y.astype(np.float64) + (0 if bias is None else bias), 0)
    off_tie, off_by_more = code_errors(wq, w, search.s, scale_b)
    group_size = config.quant.group_size
    worst = {
        "abs_mean": relative_error(abs_mean, exact_abs),
        "sq_mean": relative_error(sq_mean, exact_sq),
        "s": relative_error(search.s, exact_s),
        "scale_b": relative_error(
            scale_b, compute_scale_b(exact_w, search.s.astype(np.float64), group_size, config.threads)
        ),
        "codes_off_tie": float(off_tie),
        "codes_off_by_more_than_1": float(off_by_more),
        "output": frobenius_error(y, exact_y),
        "relu": frobenius_error(out, exact_out),
    }
    if config.search.objective is Objective.diag:
        scales = candidate_scales(abs_mean.astype(np.float64), search.gamma, config.search.normalization)
        worst["error_curve"] = curve_error(
            search.error, exact_w, scales, sq_mean.astype(np.float64), group_size, config.threads
        )
    return worst


def refuse_beyond_tolerance(layer: str, worst: Mapping[str, float]) -> None:
    """Raises a `VerificationError` that names every stage of the layer whose error is beyond its tolerance, or NaN."""
    beyond = [
        f"{stage} {error:.3g} (allowed {TOLERANCES[stage]:g})"
        for stage, error in worst.items()
        if not error <= TOLERANCES[stage]
    ]
    if beyond:
        raise VerificationError(f"layer {layer} is beyond the oracle's tolerance: " + ", ".join(beyond))
