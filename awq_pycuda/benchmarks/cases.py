"""The stages as cases: how each is called alone, what it is given, what it leaves, and how far off that may be."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from awq_pycuda.backends.base import Backend, Layer
from awq_pycuda.benchmarks.oracle import Exact
from awq_pycuda.choices import Objective
from awq_pycuda.engine.exact_curve import Curve, curve_error
from awq_pycuda.engine.exact_format import code_errors
from awq_pycuda.engine.verify import TOLERANCES, frobenius_error, relative_error
from awq_pycuda.kernels import table
from awq_pycuda.quant.conventions import Convention

Array = NDArray[Any]
Left = Mapping[str, Array]

# Beyond what `verify=true` allows: `init` is exact, the reference product adds up in float32 on the CPU, and sums in
# float64 that are added up in another order differ by as much.
ALLOWED = {
    **TOLERANCES,
    "drawn": 0.0,
    "inv_s": TOLERANCES["s"],
    "reference": 1e-5,
    "sums": table.find("error_sums").tolerance,
}


# The searches by name: by `diag`, as the stage of a run is called, and by `output`.
SEARCHES = DIAG_SEARCH, OUTPUT_SEARCH = "compute_s", "compute_s_output"


@dataclass(frozen=True)
class Case:
    """A stage alone.

    Attributes:
        name: of the stage, as results and the table of kernels have it; the search by the output has one of its own.
        call: runs it on a layer; returns what it returns to the host.
        given: the layer's arrays that it reads.
        left: those that it writes.
        judge: errors of what it left, by the names of `ALLOWED`; the last argument is what it returned.
    """

    name: str
    call: Callable[[Backend[Any], Layer[Any], Convention, int], Any]
    given: tuple[str, ...]
    left: tuple[str, ...]
    judge: Callable[[Exact, Left, Any], dict[str, float]]


def array(layer: Layer[Any], name: str) -> Any:
    """The handle of a layer's array."""
    if name in ("steps", "codes"):
        return getattr(layer.quantized, name)
    return getattr(layer.trial if name == "reference" else layer, name)


def _of_search(curve: Curve, exact: Exact, left: Left) -> dict[str, float]:
    chosen = int(np.argmin(left["error"]))
    return {
        "error_curve": curve_error(left["error"], curve),
        "s": relative_error(left["s"], exact.scales[chosen]),
        "inv_s": relative_error(left["inv_s"], 1 / exact.scales[chosen]),
    }


def _of_statistics(exact: Exact, left: Left, _: Any) -> dict[str, float]:
    return {name: relative_error(values, exact.statistics[name]) for name, values in left.items()}


def _of_codes(exact: Exact, left: Left, _: Any) -> dict[str, float]:
    off_tie, off_by_more = code_errors(exact.quantized(left["codes"]), exact.w, exact.s)
    return {"codes_off_tie": off_tie, "codes_off_by_more_than_1": off_by_more}


CASES = (
    Case(
        "init",
        lambda backend, layer, _, seed: backend.init(layer.w, seed, 1, None, None),
        (),
        ("w",),
        lambda exact, left, _: {"drawn": relative_error(left["w"], exact.drawn)},
    ),
    Case(
        "accum_stats",
        lambda backend, layer, *_: backend.accum_stats(layer.x, layer.abs_mean, layer.sq_mean),
        ("x",),
        ("abs_mean", "sq_mean"),
        _of_statistics,
    ),
    Case(
        "find_abs_max",
        lambda backend, layer, *_: backend.find_abs_max(layer.x, layer.abs_max),
        ("x",),
        ("abs_max",),
        _of_statistics,
    ),
    Case(
        DIAG_SEARCH,
        lambda backend, layer, convention, _: backend.compute_s(layer, convention),
        ("w", "abs_mean", "sq_mean"),
        ("error", "s", "inv_s"),
        lambda exact, left, _: _of_search(exact.curve, exact, left),
    ),
    Case(
        OUTPUT_SEARCH,
        lambda backend, layer, convention, _: backend.compute_s(layer, replace(convention, objective=Objective.output)),
        ("x", "w", "abs_mean", "sq_mean"),
        ("error", "s", "inv_s"),
        lambda exact, left, _: _of_search(exact.output_curve, exact, left),
    ),
    Case(
        "compute_scale_b",
        lambda backend, layer, *_: backend.compute_scale_b(layer.w, layer.s, layer.quantized),
        ("w", "s"),
        ("steps",),
        lambda exact, left, _: {"scale_b": relative_error(left["steps"], exact.exact_steps.steps)},
    ),
    Case(
        "quantize_awq",
        lambda backend, layer, *_: backend.quantize_awq(layer.w, layer.s, layer.quantized),
        ("w", "s", "steps"),
        ("codes",),
        _of_codes,
    ),
    Case(
        "dequantizeTiled",
        lambda backend, layer, *_: backend.dequantize_tiled(layer.x, layer.quantized, layer.inv_s, layer.y),
        ("x", "codes", "steps", "inv_s"),
        ("y",),
        lambda exact, left, _: {"output": frobenius_error(left["y"], exact.product)},
    ),
    Case(
        "relu",
        lambda backend, layer, *_: backend.relu(layer.y, None, layer.out),
        ("y",),
        ("out",),
        lambda exact, left, _: {"relu": frobenius_error(left["out"], np.maximum(exact.y.astype(np.float64), 0))},
    ),
    Case(
        "matmul_reference",
        lambda backend, layer, *_: backend.matmul_reference(layer.x, layer.w, layer.trial.reference),
        ("x", "w"),
        ("reference",),
        lambda exact, left, _: {"reference": frobenius_error(left["reference"], exact.exact_product)},
    ),
    Case(
        "error_sums",
        lambda backend, layer, *_: backend.error_sums(layer.trial.reference, layer.y),
        ("reference", "y"),
        (),
        lambda exact, _, sums: {"sums": relative_error(np.array(sums), np.array(exact.sums))},
    ),
)
# Stages of the table of kernels that are parts of a case: the case that they are in.
WITHIN = {"weight_means": DIAG_SEARCH, "search_diag": DIAG_SEARCH, "search_output": OUTPUT_SEARCH}


def case_of(stage: str) -> Case:
    """The case of this stage."""
    return next(case for case in CASES if case.name == stage)
