"""`verify=true`: every stage of a layer against the float64 oracle, given what the stage was given."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from awq_pycuda.choices import Objective
from awq_pycuda.engine.exact_curve import CURVE_TOLERANCE, curve_error, exact_curve
from awq_pycuda.engine.exact_format import SMALLEST_NORMAL, code_errors, dequantized, exact_clipped, step_errors
from awq_pycuda.engine.exact_joint import exact_joint_curve
from awq_pycuda.engine.exact_scales import WEIGHTS, exact_scales, exact_weight_means
from awq_pycuda.parallel import map_row_blocks, product_by_blocks
from awq_pycuda.quant.conventions import Convention
from awq_pycuda.quant.quantized import Quantized
from awq_pycuda.quant.search import SearchResult

# The worst error that each stage may show: relative, but for counts of codes; the error curve (`curve_error`) and zero
# points (`step_errors`), which only some formats have, in quantization steps; `clipped` is of weights.
TOLERANCES: dict[str, float] = {
    "abs_mean": 1e-5,
    "sq_mean": 1e-5,
    "abs_max": 0,
    "error_curve": CURVE_TOLERANCE,
    "s": 1e-5,
    "clipped": 1e-6,
    "scale_b": 1e-5,
    "zero_points": 1e-5,
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
        error = difference / np.maximum(np.abs(exactly), SMALLEST_NORMAL)
        return float(np.max(np.where((exactly == 0) & (difference > 0), np.inf, error)))

    return float(np.max(map_row_blocks(of_rows, wanted.shape)))


def frobenius_error(value: NDArray[Any], exact: NDArray[Any]) -> float:
    """`‖value − exact‖ / ‖exact‖`, with every element of `exact` counted as at least the smallest normal float32."""
    found, wanted = _as_rows(value), _as_rows(exact)

    def of_rows(rows: slice) -> tuple[float, float]:
        exactly = wanted[rows].astype(np.float64)
        off = (found[rows] - exactly).ravel()
        size = np.maximum(np.abs(exactly), SMALLEST_NORMAL).ravel()
        return float(off @ off), float(size @ size)

    error, norm = np.sqrt(np.sum(map_row_blocks(of_rows, wanted.shape), axis=0))
    return float(error / norm)


def exact_statistics(x: NDArray[Any]) -> dict[str, NDArray[np.float64]]:
    """Of (M, K) activations (K,) means of |x| and x² and the largest |x|, by the names that results have for them."""

    def of_rows(rows: slice) -> NDArray[np.float64]:
        own = np.abs(x[rows].astype(np.float64))
        return np.array([own.sum(axis=0), np.square(own).sum(axis=0), own.max(axis=0)])

    found = np.array(map_row_blocks(of_rows, x.shape))
    abs_mean, sq_mean, _ = found.sum(axis=0) / len(x)
    return {"abs_mean": abs_mean, "sq_mean": sq_mean, "abs_max": found[:, 2].max(axis=0)}


def exact_product(x: NDArray[Any], weights: Callable[[slice], NDArray[Any]], out_features: int) -> NDArray[np.float64]:
    """(M, N) product in float64 of (M, K) activations with weights that are made by blocks of rows."""
    found = np.empty((len(x), out_features))
    product_by_blocks(x.astype(np.float64), lambda rows: weights(rows).astype(np.float64, copy=False), found)
    return found


def _exact_relu(y: NDArray[Any], bias: NDArray[Any] | None) -> NDArray[np.float64]:
    found = y.astype(np.float64)
    if bias is not None:
        found += bias
    return np.maximum(found, 0, out=found)


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
    searched: Sequence[NDArray[Any]] = (),
    clips: Sequence[bool] = (),
    held: tuple[NDArray[Any], NDArray[Any]] | None = None,
    abs_max: NDArray[Any] | None = None,
) -> dict[str, float]:
    """Worst error of each stage of one layer, by the names of `TOLERANCES`; of zero points where the format has any.

    The formulas are the oracle's own, in plain float64: none of the run's is called.

    Args:
        convention: of the run.
        x: (M, K) activations.
        w: (N, K) weights.
        bias: (N,) or None.
        abs_mean: (K,) from the run.
        sq_mean: (K,) from the run.
        found: from the run.
        quantized: (N, K) codes from the run, with (N, groups) steps and zero points.
        y: (M, N) product from the run.
        out: (M, N) relu of the product and bias, from the run.
        curve: whether the error curve is checked, too, which takes as long for each candidate as all others together.
        searched: (rows, K) weights of every layer that has these scales; empty for `w` alone.
        clips: of each of these layers whether it is clipped, where that is searched jointly.
        held: where weights are clipped, (N, K) scaled ones after it, and (N, groups) ratios, from the run.
        abs_max: (K,) from the run; None where it has none.
    """
    exact = exact_statistics(x)
    given = {"abs_mean": abs_mean, "sq_mean": sq_mean} | ({} if abs_max is None else {"abs_max": abs_max})
    searched = searched or [w]
    of_weights = {WEIGHTS: exact_weight_means(searched, quantized.format)} if convention.asks_weights else {}
    form, inv_s = quantized.format, 1 / found.s.astype(np.float64)
    fitted = (w, found.s) if held is None else (held[0], np.ones_like(found.s))
    of_steps, of_zeros = step_errors(quantized, *fitted)
    off_tie, off_by_more = code_errors(quantized, *fitted)

    def weights(rows: slice) -> NDArray[Any]:
        return dequantized(quantized, inv_s, rows)

    worst = {
        **{name: relative_error(values, exact[name]) for name, values in given.items()},
        "s": relative_error(found.s, exact_scales(exact | of_weights, found.candidate, convention)),
        "scale_b": of_steps,
        "codes_off_tie": float(off_tie),
        "codes_off_by_more_than_1": float(off_by_more),
        "output": frobenius_error(y, exact_product(x, weights, len(w))),
        "relu": frobenius_error(out, _exact_relu(y, bias)),
    }
    if not form.symmetric:
        worst["zero_points"] = of_zeros
    if held is not None:
        worst["clipped"] = relative_error(held[0], exact_clipped(w, found.s, held[1], form))
    if not curve:
        return worst
    exactly = {name: values.astype(np.float64) for name, values in given.items()}
    scales = np.array([exact_scales(exactly | of_weights, each, convention) for each in found.grid.candidates])
    activations = x.astype(np.float64) if convention.objective is Objective.output else None
    exact_errors = exact_curve(searched, scales, exactly["sq_mean"], form, activations)
    if found.unclipped is None:
        return worst | {"error_curve": curve_error(found.error, exact_errors)}
    assert convention.clip is not None
    layers = list(zip(searched, clips or [True], strict=True))
    joint = exact_joint_curve(layers, scales, exactly["sq_mean"], form, x, convention.clip, convention.objective)
    both = curve_error(found.unclipped, exact_errors), curve_error(found.error, joint)
    return worst | {"error_curve": float(np.max(both))}


def refuse_beyond_tolerance(layer: str, worst: Mapping[str, float]) -> None:
    """Raises a `VerificationError` that names every stage of the layer whose error is beyond its tolerance, or NaN."""
    beyond = [
        f"{stage} {error:.3g} (allowed {TOLERANCES[stage]:g})"
        for stage, error in worst.items()
        if not error <= TOLERANCES[stage]
    ]
    if beyond:
        raise VerificationError(f"layer {layer} is beyond the oracle's tolerance: " + ", ".join(beyond))
