"""The stages as one would write them in PyTorch, and a pass made of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from awq_pycuda.benchmarks.ceilings import CeilingSubject
from awq_pycuda.benchmarks.oracle import Exact
from awq_pycuda.benchmarks.streams import on_stream
from awq_pycuda.benchmarks.subjects import Subject, Verdict
from awq_pycuda.engine.verify import exact_product, frobenius_error
from awq_pycuda.kernels.work import Unit, Work
from awq_pycuda.quant.conventions import Convention

Tensor = Any
Tensors = dict[str, Tensor]
_FP16_TOLERANCE = 1e-2
# By device and unit: side and type of the products that are taken for its rate.
_SIDES: dict[str, dict[Unit, tuple[int, Any]]] = {
    "cuda": {"fp16 matrix": (8192, torch.float16), "int8 matrix": (8192, torch.int8)},
    "cpu": {"fp32": (1024, torch.float32), "fp64": (512, torch.float64)},
}


def stage_function(stage: str, convention: Convention) -> Callable[..., Tensors] | None:
    """What a stage does, of the arrays that it is given; None where PyTorch has nothing like it."""
    form, gammas = convention.quantizer, [float(gamma) for gamma in convention.grid.gamma]
    low, high = convention.clamp

    def by_group(values: Tensor) -> Tensor:
        return values.unflatten(1, (-1, form.size(values.shape[1])))

    def steps_of(scaled: Tensor) -> Tensor:
        return by_group(scaled).abs().amax(2) / form.largest

    def rounded(scaled: Tensor, steps: Tensor) -> Tensor:
        return (by_group(scaled) / steps[:, :, None]).round()

    def accum_stats(x: Tensor) -> Tensors:
        return {"abs_mean": x.abs().mean(0), "sq_mean": x.square().mean(0)}

    def find_abs_max(x: Tensor) -> Tensors:
        return {"abs_max": x.abs().amax(0)}

    def compute_s(w: Tensor, abs_mean: Tensor, sq_mean: Tensor, x: Tensor | None = None) -> Tensors:
        errors, candidates = [], []
        for gamma in gammas:
            s = abs_mean.clamp_min(convention.floor) ** gamma
            s = (s / s.mean()).clamp(low, high) if gamma else torch.ones_like(abs_mean)
            scaled = w * s
            steps = steps_of(scaled)
            off = (rounded(scaled, steps) * steps[:, :, None]).flatten(1) - scaled
            if x is None:
                errors.append((off.square().sum(0) * sq_mean / s.square()).sum())
            else:
                errors.append((x @ (off / s).T).square().mean())
            candidates.append(s)
        error = torch.stack(errors)
        s = torch.stack(candidates).index_select(0, error.argmin(0, keepdim=True))[0]  # without a word to the host
        return {"error": error.double(), "s": s, "inv_s": 1 / s}

    def compute_scale_b(w: Tensor, s: Tensor) -> Tensors:
        return {"steps": steps_of(w * s)}

    def quantize_awq(w: Tensor, s: Tensor, steps: Tensor) -> Tensors:
        codes = rounded(w * s, steps).flatten(1).clamp(-form.largest, form.largest)
        return {"codes": codes.to(torch.int8)}

    def product(x: Tensor, codes: Tensor, steps: Tensor, inv_s: Tensor) -> Tensors:
        weights = (by_group(codes.float() * inv_s) * steps[:, :, None]).flatten(1)
        return {"y": x @ weights.T}

    def relu(y: Tensor) -> Tensors:
        return {"out": y.clamp_min(0)}

    def matmul_reference(x: Tensor, w: Tensor) -> Tensors:
        return {"reference": (x.double() @ w.double().T).float()}

    def error_sums(reference: Tensor, y: Tensor) -> Tensors:
        exact = reference.double()
        return {"sums": torch.stack([exact.square().sum(), (exact - y.double()).square().sum()])}

    own: dict[str, Callable[..., Tensors]] = {
        "accum_stats": accum_stats,
        "find_abs_max": find_abs_max,
        "compute_s": compute_s,
        "compute_s_output": compute_s,
        "compute_scale_b": compute_scale_b,
        "quantize_awq": quantize_awq,
        "dequantizeTiled": product,
        "relu": relu,
        "matmul_reference": matmul_reference,
        "error_sums": error_sums,
    }
    return own.get(stage)


def pass_function(convention: Convention) -> Callable[..., Tensors]:
    """A pass over a chain of layers, whose weights come as `w0`, `w1` and so on."""
    names = ("accum_stats", "compute_s", "compute_scale_b", "quantize_awq", "dequantizeTiled", "relu")
    stages = {name: stage_function(name, convention) for name in names}

    def whole(x: Tensor, **weights: Tensor) -> Tensors:
        for w in weights.values():
            found = {"x": x, "w": w}
            for name in names:
                stage = stages[name]
                assert stage is not None
                found |= stage(**{key: found[key] for key in _GIVEN[name]})
            x = found["out"]
        return {"out": x}

    return whole


_GIVEN = {
    "accum_stats": ("x",),
    "compute_s": ("w", "abs_mean", "sq_mean"),
    "compute_scale_b": ("w", "s"),
    "quantize_awq": ("w", "s", "steps"),
    "dequantizeTiled": ("x", "codes", "steps", "inv_s"),
    "relu": ("y",),
}


def ceilings(device: str, stream: int | None) -> list[Subject]:
    """The rates of large products by the library behind PyTorch: of halves and int8 by cuBLAS, or by the CPU's own."""
    return [_ceiling(unit, device, stream) for unit in _SIDES[device]]


def _ceiling(unit: Unit, device: str, stream: int | None) -> Subject:
    side, dtype = _SIDES[device][unit]
    random = torch.Generator(device).manual_seed(1)
    x, w = (torch.rand((side, side), device=device, generator=random) - 0.5 for _ in range(2))
    if dtype is torch.int8:
        x, w = 254 * x, 254 * w
    x, w = x.to(dtype), w.to(dtype)
    multiply = torch._int_mm if dtype is torch.int8 else torch.mm
    left: list[Tensor] = []

    def launch() -> None:
        with torch.inference_mode(), on_stream(stream):
            left[:] = [multiply(x, w.T)]

    def check() -> str | None:
        launch()
        return None if bool(left[0].float().isfinite().all()) else "leaves a wrong result"

    return CeilingSubject(
        unit, "cuBLAS" if device == "cuda" else "torch", Work(0, 0, 2 * side**3), unit, launch, check, "torch"
    )


@dataclass(frozen=True)
class Product:
    """A product of two matrices alone: bytes of an element that goes in, and of one that comes out."""

    bytes: int
    bytes_out: int
    unit: Unit
    given: Callable[[Exact], dict[str, Any]]
    function: Callable[..., Tensors]
    judge: Callable[[Exact, dict[str, Any]], Verdict]


def _floats(dtype: Any) -> Callable[[Exact], dict[str, Any]]:
    return lambda exact: {"x": exact.x.astype(dtype), "w": exact.weights.astype(dtype)}


def _whole(exact: Exact) -> dict[str, Any]:
    return {"x": np.rint(exact.x).clip(-127, 127).astype(np.int8), "w": exact.codes}


def _judged(tolerance: float) -> Callable[[Exact, dict[str, Any]], Verdict]:
    def judge(exact: Exact, left: dict[str, Any]) -> Verdict:
        error = frobenius_error(left["y"], exact.product)
        return Verdict(error, tolerance, None if error <= tolerance else f"output is off by {error:.3g}")

    return judge


def _exactly(exact: Exact, left: dict[str, Any]) -> Verdict:
    given = _whole(exact)
    wanted = exact_product(given["x"], lambda rows: given["w"][rows], len(given["w"]))
    off = float(np.count_nonzero(left["y"] != wanted))
    return Verdict(off, 0, f"{off:.0f} sums are wrong" if off else None)


PRODUCTS = {
    "fp32": Product(4, 4, "fp32", _floats(np.float32), lambda x, w: {"y": x @ w.T}, _judged(1e-5)),
    "fp16": Product(2, 2, "fp16 matrix", _floats(np.float16), lambda x, w: {"y": x @ w.T}, _judged(_FP16_TOLERANCE)),
    "int8": Product(1, 4, "int8 matrix", _whole, lambda x, w: {"y": torch._int_mm(x, w.T)}, _exactly),
}
