"""What is made of the last pass, off its clock: results, metrics, the check against the oracle."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from awq_pycuda.backends.base import Backend, H, Held, Layer
from awq_pycuda.choices import Statistic
from awq_pycuda.engine.arrays import HeldOut, Run
from awq_pycuda.engine.verify import check_layer
from awq_pycuda.layers.inputs import LayerSpec
from awq_pycuda.quant import metrics
from awq_pycuda.quant.clipping import Clipped
from awq_pycuda.quant.conventions import Convention
from awq_pycuda.quant.search import SearchResult, refuse_overflow, search_result
from awq_pycuda.results.record import LayerResult


def collect(
    backend: Backend[H],
    spec: LayerSpec,
    layer: Layer[H],
    convention: Convention,
    keeps_codes: bool,
    shares_s_with: tuple[int, ...] = (),
) -> LayerResult:
    """The host's own copies of what a pass left of a layer; of its codes only where they are asked for.

    Raises:
        FloatingPointError: the activations overflow: a search on the device goes on with what it finds.
    """

    def own(handle: H) -> NDArray[Any]:
        return backend.read(handle).copy()

    abs_mean, sq_mean = own(layer.abs_mean), own(layer.sq_mean)
    refuse_overflow(abs_mean, sq_mean)
    kept = layer.quantized if keeps_codes else layer.quantized.without_codes
    held = layer.held
    return LayerResult(
        name=spec.name,
        tokens=spec.tokens,
        abs_mean=abs_mean,
        sq_mean=sq_mean,
        abs_max=own(layer.abs_max) if convention.statistic is Statistic.abs_max else None,
        search=found_by(backend, layer, convention),
        objective=convention.objective.name,
        quantized=kept.map(own),
        clipped=None if held is None else _clipped(backend, held, convention),
        shares_s_with=shares_s_with,
    )


def found_by(backend: Backend[H], layer: Layer[H], convention: Convention) -> SearchResult:
    """The host's own copy of what the search left of a layer."""
    unclipped = None if layer.unclipped is None else backend.read(layer.unclipped).copy()
    return search_result(convention, backend.read(layer.error).copy(), backend.read(layer.s).copy(), unclipped)


def _clipped(backend: Backend[H], held: Held[H], convention: Convention) -> Clipped:
    assert convention.clip is not None
    ratio, error, chosen = (backend.read(handle).copy() for handle in (held.ratio, held.error, held.error_chosen))
    return Clipped(convention.clip.ratios, ratio, error, float(chosen[0]))


def measure(backend: Backend[H], specs: Sequence[LayerSpec], run: Run[H], results: Sequence[LayerResult]) -> None:
    """Gives every result its metrics; the layers' own arrays stay as the pass left them.

    The product without relu is made again: a pass may not have written it, and its place is shared.

    Raises:
        FloatingPointError: the output of a layer overflows.
    """
    chain: H | None = None
    for index, result in enumerate(results):
        spec, layer, trial = specs[index], run.layers[index], run.layers[index].trial
        backend.dequantize_tiled(layer.x, layer.quantized, layer.inv_s, layer.y)
        backend.matmul_reference(layer.x, layer.w, trial.reference)
        signal, noise = backend.error_sums(trial.reference, layer.y)
        if not np.isfinite(signal + noise):
            raise FloatingPointError(f"layer {spec.name}: the output overflows float32")
        quantized = layer.quantized.map(backend.read)
        held = None if layer.held is None else backend.read(layer.held.weights)
        result.lost = metrics.lost(backend.read(layer.w), quantized, result.search.s, result.sq_mean, held)
        saturated = metrics.saturated_fraction(quantized)
        unclipped = None if layer.held is None else _of_trial(backend, layer, result.search.s)
        ones = np.ones_like(result.search.s)
        rtn = _of_trial(backend, layer, ones)
        held_out = run.held_out[index]
        result.metrics = {
            "output_mse": noise / layer.outputs,
            "output_sqnr_db": metrics.sqnr_db(signal, noise),
            "weight_mse": result.lost.weight_mse,
            "saturated_fraction": saturated,
            "rtn_output_mse": rtn / layer.outputs,
            "rtn_output_sqnr_db": metrics.sqnr_db(signal, rtn),
        }
        if unclipped is not None:
            result.metrics["unclipped_output_mse"] = unclipped / layer.outputs
            result.metrics["unclipped_output_sqnr_db"] = metrics.sqnr_db(signal, unclipped)
        if held_out is not None:
            result.metrics |= _on_held_out(backend, layer, held_out, spec.held_out_tokens * spec.out_features)
        # The all-fp32 chain: where a layer brings its own activations it starts anew.
        exact, output = trial.reference, run.chain_outputs[index]
        if output is not None and chain is not None:
            exact = output
            backend.matmul_reference(chain, layer.w, exact)
        result.metrics["propagated_output_mse"] = backend.error_sums(exact, layer.y)[1] / layer.outputs
        chain = run.chain_activations[index]
        if chain is not None:
            backend.relu(exact, layer.bias, chain)


def _on_held_out(backend: Backend[H], layer: Layer[H], held_out: HeldOut[H], outputs: int) -> dict[str, float]:
    """The errors on held-out tokens, of the layer's codes and of those of RTN, which its trial holds.

    Where the next layer takes its tokens from this one, they come through its codes, as in the pass.
    """
    found = {}
    backend.matmul_reference(held_out.x, layer.w, held_out.reference)
    for of, quantized, inv_s in (
        ("held_out_rtn_", layer.trial.quantized, layer.trial.inv_s),
        ("held_out_", layer.quantized, layer.inv_s),
    ):
        backend.dequantize_tiled(held_out.x, quantized, inv_s, held_out.y)
        signal, noise = backend.error_sums(held_out.reference, held_out.y)
        found[f"{of}output_mse"] = noise / outputs
        found[f"{of}output_sqnr_db"] = metrics.sqnr_db(signal, noise)
    if held_out.out is not None:
        backend.relu(held_out.y, layer.bias, held_out.out)
    return found


def _of_trial(backend: Backend[H], layer: Layer[H], s: NDArray[Any]) -> float:
    """Σ of squared errors of the layer quantized with these (K,) scales, unclipped, which its trial then holds."""
    backend.write(layer.trial.s, s)
    backend.write(layer.trial.inv_s, 1 / s)
    _, noise = backend.trial_sums(layer)
    return noise


def verify(backend: Backend[H], run: Run[H], index: int, result: LayerResult, convention: Convention) -> None:
    """Compares layer `index` of the last pass with the oracle; `result.verify` gets the worst error of each stage.

    A curve that layers share is the first one's to check.
    """
    read, layer = backend.read, run.layers[index]
    members = sorted({index, *result.shares_s_with})
    backend.dequantize_tiled(layer.x, layer.quantized, layer.inv_s, layer.y)
    result.verify = check_layer(
        convention,
        x=read(layer.x),
        w=read(layer.w),
        searched=[read(run.layers[member].w) for member in members],
        clips=[run.layers[member].held is not None for member in members],
        curve=layer.leads,
        held=None if layer.held is None else (read(layer.held.weights), read(layer.held.ratio)),
        bias=None if layer.bias is None else read(layer.bias),
        abs_mean=result.abs_mean,
        sq_mean=result.sq_mean,
        abs_max=result.abs_max,
        found=result.search,
        quantized=layer.quantized.map(read),
        y=read(layer.y),
        out=read(layer.out),
    )
