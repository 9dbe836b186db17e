"""The layer loop: all stages of all layers, pass after pass, over any backend; it marks every stage's time."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Sequence
from typing import Generic

import numpy as np
from numpy.typing import NDArray

from awq_pycuda.backends.base import Backend, H, Mark
from awq_pycuda.config import Config
from awq_pycuda.engine import evaluation
from awq_pycuda.engine.arrays import Run, allocate
from awq_pycuda.engine.stages import STAGES
from awq_pycuda.engine.verify import refuse_beyond_tolerance
from awq_pycuda.inputs import LayerSpec
from awq_pycuda.quant.conventions import convention_of
from awq_pycuda.results.record import LayerResult, Timings


class Pipeline(Generic[H]):
    """One run over one backend.

    `run` fills `layers` and the timings as it goes, so that a failure leaves what was finished.
    """

    def __init__(self, backend: Backend[H], specs: Sequence[LayerSpec], config: Config) -> None:
        self.backend = backend
        self.specs = list(specs)
        self.config = config
        self.layers: list[LayerResult] = []  # those finished so far, from the first on
        self.handles: Run[H] | None = None  # once there are inputs
        self._convention = convention_of(config)
        self._finished = 0  # layers that a pass has finished
        self._cold_ms = float("nan")
        self._samples: list[tuple[float, NDArray[np.float64], NDArray[np.float64]]] = []

    @property
    def timings(self) -> Timings:
        """Every measured pass so far."""
        shape = (len(self.specs), len(STAGES), len(self._samples))
        gpu, host = np.empty(shape), np.empty(shape)
        for repeat, (_, gpu_ms, host_ms) in enumerate(self._samples):
            gpu[:, :, repeat], host[:, :, repeat] = gpu_ms, host_ms
        whole = np.array([sample[0] for sample in self._samples])
        return Timings(tuple(stage.name for stage in STAGES), gpu, host, whole, self._cold_ms)

    def run(self, on_progress: Callable[[str, int, int], None] = lambda what, done, total: None) -> None:
        """Inputs, the cold pass, warm-up, the measured passes; then results and metrics from what the last pass left.

        Args:
            on_progress: told what is going on, how many steps are done, and of how many.

        Raises:
            VerificationError: with verify=true, a stage is further from the oracle than its tolerance.
            Exception: whatever a stage raised; `layers` and `timings` hold what was finished by then.
        """
        try:
            self._run_passes(on_progress)
        except BaseException as error:
            # The finished layers still get their metrics; where the device no longer answers they go without, and a
            # signal does not wait for them.
            with contextlib.suppress(Exception):
                if not self.layers:
                    self._collect()
                if isinstance(error, Exception):
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
        self.handles = allocate(self.backend, self.specs, self._convention)
        for index in range(total):
            on_progress("cold pass" if index == 0 else "passes", index, total)
            marks = self._pass(self.handles)
            if index == 0:
                self._cold_ms = (time.perf_counter() - begin) * 1e3
                # A later pass that is cut short leaves a layer half of one pass and half of the other.
                self._collect()
            elif index > timing.warmup:
                self._samples.append(self._sample(marks))
        self._collect()

    def _pass(self, run: Run[H]) -> list[list[Mark]]:
        """All layers once; the marks around every stage, (layers, stages + 1)."""
        marks: list[list[Mark]] = []
        for index, (spec, layer) in enumerate(zip(self.specs, run.layers, strict=True)):
            marks.append([self.backend.mark()])
            try:
                for stage in STAGES:
                    stage.call(self.backend, layer, self._convention)
                    marks[-1].append(self.backend.mark())
            except FloatingPointError as error:
                raise FloatingPointError(f"layer {index} ({spec.name}): {error}") from None
            self._finished = max(self._finished, index + 1)
        self.backend.synchronize()
        return marks

    def _sample(self, marks: list[list[Mark]]) -> tuple[float, NDArray[np.float64], NDArray[np.float64]]:
        """Pipeline, GPU and host milliseconds of one pass. The pipeline is timed on the stream where there is one."""
        spans = [list(itertools.pairwise(layer)) for layer in marks]
        gpu = np.array([[self.backend.gpu_ms(*span) for span in layer] for layer in spans])
        host = np.array([[(end.host - start.host) * 1e3 for start, end in layer] for layer in spans])
        first, last = marks[0][0], marks[-1][-1]
        whole = self.backend.gpu_ms(first, last)
        return (whole if np.isfinite(whole) else (last.host - first.host) * 1e3), gpu, host

    def _collect(self) -> None:
        """Results of every finished layer, from the arrays that the last pass left."""
        for index in range(self._finished):
            assert self.handles is not None
            layer = self.handles.layers[index]
            found = evaluation.collect(self.backend, self.specs[index], layer, self._convention, self.config.save)
            self.layers[index : index + 1] = [found]

    def _measure(self) -> None:
        if self.layers:
            assert self.handles is not None
            evaluation.measure(self.backend, self.specs, self.handles, self.layers, self.config.threads)

    def _verify(self, on_progress: Callable[[str, int, int], None]) -> None:
        assert self.handles is not None
        for index, result in enumerate(self.layers):
            on_progress("verify", index, len(self.specs))
            evaluation.verify(self.backend, self.handles.layers[index], result, self._convention)
        for result in self.layers:
            refuse_beyond_tolerance(result.name, result.verify)
