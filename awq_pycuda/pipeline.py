"""The layer loop: it alone wires the stages together, over any backend, and marks every stage's time."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic

import numpy as np
from numpy.typing import NDArray

from awq_pycuda import metrics
from awq_pycuda.backends.base import Backend, H, Mark
from awq_pycuda.config import Config, Objective, Save
from awq_pycuda.inputs import LayerSpec, Uniform
from awq_pycuda.parallel import working_elements
from awq_pycuda.results.record import STAGES, LayerResult, Timings
from awq_pycuda.scale_b import compute_scale_b
from awq_pycuda.search import compute_s, diag_errors, with_rtn
from awq_pycuda.verify import check_layer, refuse_beyond_tolerance


@dataclass
class _Layer(Generic[H]):
    """A layer's arrays, allocated once and written by every pass."""

    x: H
    w: H
    bias: H | None
    abs_mean: H
    sq_mean: H
    s: H
    inv_s: H
    scale_b: H
    wq: H
    y: H
    out: H


def required_bytes(specs: Sequence[LayerSpec], config: Config) -> tuple[int, int]:
    """Memory that a run of these layers takes at its peak, in bytes; arithmetic only.

    Returns:
        What the backend allocates, metrics included; and what the host takes besides that.
    """
    arrays = host = 0
    scratch: dict[tuple[str, int, int], int] = {}
    making = checking = working = 0
    candidates = len(with_rtn(config.gammas))
    for spec in specs:
        m, n, k = spec.tokens, spec.out_features, spec.in_features
        groups = 1 if config.quant.group_size is None else k // config.quant.group_size
        arrays += 5 * n * k + 8 * m * n + 16 * k + 4 * n * groups + 4 * n  # W, Wq; Y, relu(Y); vectors; steps; bias
        own = 0 if spec.activations is None else 4 * m * k
        arrays += own
        scratch["codes", n, k] = n * k
        scratch["outputs", m, n] = 4 * 4 * m * n  # reference, trial output, chain output and activations
        # The CPU backend's dequantized weights, or the inputs while they are made: one layer at a time.
        making = max(making, 4 * n * k, own)
        # Every thread's block: what the search keeps of W and makes per step, and on the CPU the float64 of X's and Y's
        # sums. Every candidate's scales, and what the search makes of them in float64.
        block = working_elements((n, k), config.threads)
        sums = max(16 * working_elements((m, n), config.threads), 12 * working_elements((m, k), config.threads))
        working = max(working, 12 * block + 28 * block * groups // k + sums + 44 * k * candidates)
        # verify: the oracle's copies in float64, one layer at a time.
        checking = max(checking, 8 * (m * k + 6 * n * k + 4 * m * n))
        if config.save is Save.full:
            host += 3 * n * k  # the copy, the file's image in memory, and the bytes taken from it
    return arrays + sum(scratch.values()) + making, host + working + (checking if config.verify else 0)


class Pipeline(Generic[H]):
    """One run over one backend.

    `run` fills `layers` and the timings as it goes, so that a failure leaves what was finished.
    """

    def __init__(self, backend: Backend[H], specs: Sequence[LayerSpec], config: Config) -> None:
        self.backend = backend
        self.specs = list(specs)
        self.config = config
        self.cold_ms = float("nan")
        self._results: list[LayerResult | None] = [None] * len(self.specs)
        self._arrays: list[_Layer[H]] = []
        self._scratch: dict[tuple[str, tuple[int, ...]], H] = {}
        self._samples: list[tuple[float, NDArray[np.float64], NDArray[np.float64]]] = []

    @property
    def layers(self) -> list[LayerResult]:
        """The layers finished so far, from the first on."""
        return [result for result in self._results if result is not None]

    @property
    def timings(self) -> Timings:
        """Every measured pass so far."""
        shape = (len(self.specs), len(STAGES), len(self._samples))
        gpu, host = np.empty(shape), np.empty(shape)
        for repeat, (_, gpu_ms, host_ms) in enumerate(self._samples):
            gpu[:, :, repeat], host[:, :, repeat] = gpu_ms, host_ms
        return Timings(gpu, host, np.array([sample[0] for sample in self._samples]), self.cold_ms)

    def run(self, on_progress: Callable[[str, int, int], None] = lambda what, done, total: None) -> None:
        """Inputs, the cold pass, warm-up, the measured passes, then metrics from the last pass's results.

        Args:
            on_progress: told what is going on, how many steps are done, and of how many.

        Raises:
            VerificationError: with verify=true, a stage is further from the oracle than its tolerance.
            Exception: whatever a stage raised; `layers` and `timings` hold what was finished by then.
        """
        try:
            self._run_passes(on_progress)
        except Exception:
            # The finished layers still get their metrics; where the device no longer answers they go without.
            with contextlib.suppress(Exception):
                self._measure()
            raise
        on_progress("metrics", 0, 1)
        self._measure()
        if self.config.verify:
            self._verify(on_progress)
        on_progress("metrics", 1, 1)

    def _run_passes(self, on_progress: Callable[[str, int, int], None]) -> None:
        timing = self.config.timing
        total = 1 + timing.warmup + timing.repeats
        on_progress("inputs", 0, total)
        begin = time.perf_counter()
        self._arrays = self._make_inputs()
        for index in range(total):
            on_progress("cold pass" if index == 0 else "passes", index, total)
            marks = self._pass()
            if index == 0:
                self.cold_ms = (time.perf_counter() - begin) * 1e3
            elif index > timing.warmup:
                self._samples.append(self._sample(marks))

    def _make_inputs(self) -> list[_Layer[H]]:
        layers: list[_Layer[H]] = []
        for spec in self.specs:
            m, n, k = spec.tokens, spec.out_features, spec.in_features
            size = self.config.quant.group_size
            empty, empty_together = self.backend.empty, self.backend.empty_together
            abs_mean, sq_mean = empty_together((k,), (k,))
            s, inv_s, scale_b = empty_together((k,), (k,), (n,) if size is None else (n, k // size))
            layers.append(
                _Layer(
                    x=layers[-1].out if spec.activations is None else self._source(spec.activations),
                    w=self._source(spec.weight),
                    bias=None if spec.bias is None else self._source(spec.bias),
                    abs_mean=abs_mean,
                    sq_mean=sq_mean,
                    s=s,
                    inv_s=inv_s,
                    scale_b=scale_b,
                    wq=empty((n, k), np.int8),
                    y=empty((m, n)),
                    out=empty((m, n)),
                )
            )
        return layers

    def _source(self, source: Uniform | NDArray[np.float32]) -> H:
        handle = self.backend.empty(source.shape)
        if isinstance(source, Uniform):
            self.backend.init(handle, source.seed, source.subsequence, source.row_gain(), source.col_gain())
        else:
            self.backend.write(handle, source)
        self.backend.freeze(handle)
        return handle

    def _pass(self) -> list[list[Mark]]:
        """All layers once; the marks around every stage, (layers, stages + 1)."""
        marks = []
        for index, (spec, layer) in enumerate(zip(self.specs, self._arrays, strict=True)):
            marks.append(self._run_layer(index, spec, layer))
        self.backend.synchronize()
        return marks

    def _run_layer(self, index: int, spec: LayerSpec, layer: _Layer[H]) -> list[Mark]:
        backend, config = self.backend, self.config
        marks = [backend.mark()]
        backend.accum_stats(layer.x, layer.abs_mean, layer.sq_mean)
        marks.append(backend.mark())
        abs_mean, sq_mean = backend.read(layer.abs_mean).copy(), backend.read(layer.sq_mean).copy()
        try:
            objective = self._objective(spec, layer, sq_mean)
            search = compute_s(abs_mean, sq_mean, config.gammas, config.search.normalization, objective)
        except FloatingPointError as error:
            raise FloatingPointError(f"layer {index} ({spec.name}): {error}") from None
        self._write_s(layer, search.s)
        marks.append(backend.mark())
        scale_b = compute_scale_b(backend.read(layer.w), search.s, config.quant.group_size, config.threads)
        backend.write(layer.scale_b, scale_b)
        marks.append(backend.mark())
        backend.quantize_awq(layer.w, layer.s, layer.scale_b, layer.wq)
        marks.append(backend.mark())
        backend.dequantize_tiled(layer.x, layer.wq, layer.inv_s, layer.scale_b, layer.y)
        marks.append(backend.mark())
        backend.relu(layer.y, layer.bias, layer.out)
        marks.append(backend.mark())
        self._results[index] = LayerResult(
            spec.name, spec.tokens, abs_mean, sq_mean, search, config.search.objective.name, scale_b
        )
        return marks

    def _write_s(self, layer: _Layer[H], s: NDArray[Any]) -> None:
        self.backend.write(layer.s, s)
        self.backend.write(layer.inv_s, 1 / s)

    def _objective(
        self, spec: LayerSpec, layer: _Layer[H], sq_mean: NDArray[Any]
    ) -> Callable[[NDArray[Any]], NDArray[np.float64]]:
        backend, group_size, threads = self.backend, self.config.quant.group_size, self.config.threads
        if self.config.search.objective is Objective.diag:
            return lambda scales: diag_errors(backend.read(layer.w), scales, sq_mean, group_size, threads)

        def output_errors(scales: NDArray[Any]) -> NDArray[np.float64]:
            reference = self._buffer("reference", (spec.tokens, spec.out_features))
            backend.matmul_reference(layer.x, layer.w, reference)
            with np.errstate(over="ignore", invalid="ignore"):  # a candidate that overflows has an error of inf
                errors = [self._trial_noise(spec, layer, s, reference) for s in scales]
            mean = np.array(errors) / (spec.tokens * spec.out_features)
            return np.where(np.isfinite(mean), mean, np.inf)

        return output_errors

    def _trial_noise(self, spec: LayerSpec, layer: _Layer[H], s: NDArray[Any], reference: H) -> float:
        """Σ (reference − Y)² of the layer quantized with `s`; codes and output go to arrays of the trial's own."""
        backend = self.backend
        wq = self._buffer("trial_codes", (spec.out_features, spec.in_features), np.int8)
        y = self._buffer("trial_output", (spec.tokens, spec.out_features))
        scale_b = compute_scale_b(backend.read(layer.w), s, self.config.quant.group_size, self.config.threads)
        self._write_s(layer, s)
        backend.write(layer.scale_b, scale_b)
        backend.quantize_awq(layer.w, layer.s, layer.scale_b, wq)
        backend.dequantize_tiled(layer.x, wq, layer.inv_s, layer.scale_b, y)
        return backend.error_sums(reference, y)[1]

    def _buffer(self, purpose: str, shape: tuple[int, int], dtype: type[np.int8] | None = None) -> H:
        key = (purpose, shape)
        if key not in self._scratch:
            self._scratch[key] = self.backend.empty(shape, dtype)
        return self._scratch[key]

    def _sample(self, marks: list[list[Mark]]) -> tuple[float, NDArray[np.float64], NDArray[np.float64]]:
        """Pipeline, GPU and host milliseconds of one pass. The pipeline is timed on the stream where there is one."""
        spans = [list(itertools.pairwise(layer)) for layer in marks]
        gpu = np.array([[self.backend.gpu_ms(*span) for span in layer] for layer in spans])
        host = np.array([[(end.host - start.host) * 1e3 for start, end in layer] for layer in spans])
        first, last = marks[0][0], marks[-1][-1]
        whole = self.backend.gpu_ms(first, last)
        return (whole if np.isfinite(whole) else (last.host - first.host) * 1e3), gpu, host

    def _measure(self) -> None:
        """Metrics of every finished layer, from the arrays that the last pass left; nothing of it is timed."""
        backend = self.backend
        chain: H | None = None
        for result, spec, layer in zip(self.layers, self.specs, self._arrays, strict=False):
            shape = (spec.tokens, spec.out_features)
            reference = self._buffer("reference", shape)
            backend.matmul_reference(layer.x, layer.w, reference)
            signal, noise = backend.error_sums(reference, layer.y)
            if not np.isfinite(signal + noise):
                raise FloatingPointError(f"layer {spec.name}: the output overflows float32")
            codes = backend.read(layer.wq)
            threads = self.config.threads
            figures = {
                "output_mse": noise / (shape[0] * shape[1]),
                "output_sqnr_db": metrics.sqnr_db(signal, noise),
                "weight_mse": metrics.weight_mse(
                    backend.read(layer.w), codes, result.search.s, result.scale_b, threads
                ),
                "saturated_fraction": metrics.saturated_fraction(codes, threads),
            }
            if self.config.save is Save.full:
                result.wq = codes.copy()

            rtn = self._trial_noise(spec, layer, np.ones_like(result.search.s), reference)
            figures["rtn_output_mse"] = rtn / (shape[0] * shape[1])
            figures["rtn_output_sqnr_db"] = metrics.sqnr_db(signal, rtn)

            # The all-fp32 chain: where a layer brings its own activations it starts anew.
            exact = reference
            if spec.activations is None and chain is not None:
                exact = self._buffer("chain_output", shape)
                backend.matmul_reference(chain, layer.w, exact)
            figures["propagated_output_mse"] = backend.error_sums(exact, layer.y)[1] / (shape[0] * shape[1])
            chain = self._buffer("chain_activations", shape)
            backend.relu(exact, layer.bias, chain)
            result.metrics = figures

    def _verify(self, on_progress: Callable[[str, int, int], None]) -> None:
        for index, (result, layer) in enumerate(zip(self.layers, self._arrays, strict=True)):
            on_progress("verify", index, len(self.specs))
            read = self.backend.read
            result.verify = check_layer(
                self.config,
                x=read(layer.x),
                w=read(layer.w),
                bias=None if layer.bias is None else read(layer.bias),
                abs_mean=result.abs_mean,
                sq_mean=result.sq_mean,
                search=result.search,
                scale_b=result.scale_b,
                wq=read(layer.wq),
                y=read(layer.y),
                out=read(layer.out),
            )
        for result in self.layers:
            refuse_beyond_tolerance(result.name, result.verify)
