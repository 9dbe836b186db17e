"""What is made of the last pass, off its clock: results, metrics, the check against the oracle."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
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


def measure(
    backend: Backend[H],
    specs: Sequence[LayerSpec],
    run: Run[H],
    results: Sequence[LayerResult],
    by_max: Convention | None = None,
) -> None:
    """Gives every result its metrics; the layers' own arrays stay as the pass left them, but for `abs_max`.

    The product without relu is made again: a pass may not have written it, and its place is shared.

    Args:
        backend: where the run is at work.
        specs: of its layers.
        run: its handles.
        results: of the layers that are finished, from the first on.
        by_max: how the baseline of max|x| chooses scales; None without it.

    Raises:
        FloatingPointError: the output of a layer overflows.
    """
    chain: H | None = None
    for index, result in enumerate(results):
        spec, layer, trial = specs[index], run.layers[index], run.layers[index].trial
        if by_max is not None:  # first of all: where layers share scales it uses the reference for each of them
            if layer.leads:
                result.by_max, result.abs_max = _search_by_max(backend, layer, by_max)
            else:
                leader = results[min(result.shares_s_with)]
                result.by_max, result.abs_max = leader.by_max, leader.abs_max
        signal, noise = backend.product_sums(layer)
        if not np.isfinite(signal + noise):
            raise FloatingPointError(f"layer {spec.name}: the output overflows float32")
        quantized = layer.quantized.map(backend.read)
        held = None if layer.held is None else backend.read(layer.held.weights)
        result.lost = metrics.lost(backend.read(layer.w), quantized, result.search.s, result.sq_mean, held)
        result.metrics = {
            **_errors("", signal, noise, layer.outputs),
            "weight_mse": result.lost.weight_mse,
            "saturated_fraction": metrics.saturated_fraction(quantized),
        }
        trials = {"rtn_": np.ones_like(result.search.s)}
        if layer.held is not None:
            trials["unclipped_"] = result.search.s
        if result.by_max is not None:
            trials["max_"] = result.by_max.s
        held_out = run.held_out[index]
        for of, s in trials.items():
            backend.write(trial.s, s)
            backend.write(trial.inv_s, 1 / s)
            result.metrics |= _errors(of, signal, backend.trial_sums(layer)[1], layer.outputs)
            if held_out is not None and of != "unclipped_":
                result.metrics |= _on_held_out(backend, of, layer.tried, held_out, known=of != "rtn_")
        if held_out is not None:
            # Where the next layer takes its tokens from this one, they come through its codes, as in the pass.
            result.metrics |= _on_held_out(backend, "", layer, held_out, known=True)
            if held_out.out is not None:
                backend.relu(held_out.y, layer.bias, held_out.out)
        # The all-fp32 chain: where a layer brings its own activations it starts anew.
        exact, output = trial.reference, run.chain_outputs[index]
        propagated = noise
        if output is not None and chain is not None:
            exact = output
            backend.matmul_reference(chain, layer.w, exact)
            _, propagated = backend.error_sums(exact, layer.y)
        result.metrics["propagated_output_mse"] = propagated / layer.outputs
        chain = run.chain_activations[index]
        if chain is not None:
            backend.relu(exact, layer.bias, chain)


def _errors(of: str, signal: float, noise: float, outputs: int) -> dict[str, float]:
    return {f"{of}output_mse": noise / outputs, f"{of}output_sqnr_db": metrics.sqnr_db(signal, noise)}


def _on_held_out(backend: Backend[H], of: str, layer: Layer[H], held_out: HeldOut[H], known: bool) -> dict[str, float]:
    """The errors of a layer on held-out tokens, whose product then is in its place; for `known` see `product_sums`."""
    trial = replace(layer.trial, y=held_out.y, reference=held_out.reference)
    tokens = replace(layer, x=held_out.x, y=held_out.y, trial=trial, outputs=held_out.outputs, parts=held_out.parts)
    return _errors(f"held_out_{of}", *backend.product_sums(tokens, known), held_out.outputs)


def _search_by_max(
    backend: Backend[H], layer: Layer[H], convention: Convention
) -> tuple[SearchResult, NDArray[np.float32]]:
    """What this convention, whose statistic is max|x|, chooses for a layer, and those that it leads; and (K,) max|x|.

    It uses the layer's trial.
    """
    trial = layer.trial
    backend.find_abs_max(layer.x, layer.abs_max)
    # Without a place for errors that are not clipped nothing is clipped in a joint search either.
    own = replace(layer, error=trial.error, s=trial.s, inv_s=trial.inv_s, unclipped=None)
    backend.compute_s(own, convention)
    error, s, abs_max = (backend.read(handle).copy() for handle in (trial.error, trial.s, layer.abs_max))
    return search_result(convention, error, s), abs_max


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
