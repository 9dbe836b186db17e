"""The layer loop: all stages of all layers, pass after pass, over any backend; it marks every stage's time."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator
from typing import Generic, NamedTuple

import numpy as np
from numpy.typing import NDArray

from awq_pycuda.backends.base import Backend, H, Layer, Mark, Unrecordable
from awq_pycuda.engine import evaluation
from awq_pycuda.engine.arrays import Run, allocate, sharing
from awq_pycuda.engine.spec import RunSpec
from awq_pycuda.engine.stages import stages_of
from awq_pycuda.engine.verify import refuse_beyond_tolerance
from awq_pycuda.results.record import LayerResult, Timings


class Step(NamedTuple):
    """A call of a stage in a pass: for a layer, or for one of its parts; layer and stage by their places."""

    layer: int
    stage: int
    rows: slice | None


class Pipeline(Generic[H]):
    """One run over one backend.

    `run` fills `layers` and the timings as it goes, so that a failure leaves what was finished.
    """

    def __init__(self, backend: Backend[H], spec: RunSpec) -> None:
        self.backend = backend
        self.spec = spec
        self._stages = stages_of(backend, spec.convention)
        self.layers: list[LayerResult] = []  # those finished so far, from the first on
        self.handles: Run[H] | None = None  # once there are inputs
        self._cold_ms = float("nan")
        self._launched = ""
        self._samples: list[tuple[float, NDArray[np.float64], NDArray[np.float64]]] = []
        self._conditions: list[dict[str, float]] = []

    @property
    def timings(self) -> Timings:
        """Every measured pass so far."""
        shape = (len(self.spec.layers), len(self._stages), len(self._samples))
        gpu, host = np.empty(shape), np.empty(shape)
        for repeat, (_, gpu_ms, host_ms) in enumerate(self._samples):
            gpu[:, :, repeat], host[:, :, repeat] = gpu_ms, host_ms
        whole = np.array([sample[0] for sample in self._samples])
        told = dict.fromkeys(name for each in self._conditions for name in each)
        conditions = {name: np.array([each.get(name, np.nan) for each in self._conditions]) for name in told}
        names = tuple(stage.name for stage in self._stages)
        return Timings(names, gpu, host, whole, self._cold_ms, conditions, self._launched)

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
            if isinstance(error, Exception):
                with contextlib.suppress(Exception):
                    self._measure()
            raise
        on_progress("metrics", 0, 1)
        self._measure()
        if self.spec.verify:
            self._verify(on_progress)
        on_progress("metrics", 1, 1)

    def _run_passes(self, on_progress: Callable[[str, int, int], None]) -> None:
        timing = self.spec.timing
        total = 1 + timing.warmup + timing.repeats
        on_progress("inputs", 0, total)
        begin = time.perf_counter()
        self.handles = allocate(self.backend, self.spec.layers, self.spec.convention)
        for index in range(total):
            on_progress("cold pass" if index == 0 else "passes", index, total)
            if index == 0:
                self._cold_pass(self.handles)
                self._cold_ms = (time.perf_counter() - begin) * 1e3
                one_pass = self._repeatable(self.handles)
                continue
            marks = one_pass()
            self.backend.synchronize()
            if index > timing.warmup:
                self._samples.append(self._sample(marks))
                self._conditions.append(self.backend.conditions())
        for index, layer in enumerate(self.handles.layers):
            self._collect(index, layer)

    def _cold_pass(self, run: Run[H]) -> None:
        """The first pass, of which only the whole is timed: it collects each layer at once.

        A fault of the device takes all that is on it, and a later pass that is cut short leaves layers that are half of
        one pass and half of another.
        """
        for index, layer in enumerate(run.layers):
            for step in self._steps(index, layer):
                self._call(step, layer)
            self._collect(index, layer)
        self.backend.synchronize()

    def _repeatable(self, run: Run[H]) -> Callable[[], list[Mark]]:
        """What makes one more pass: the device on its own where it can, else stage by stage from here."""
        try:
            recorded = self.backend.record(lambda: self._pass(run))
        except Unrecordable as reason:
            self._launched = f"stage by stage: {reason}"
            return lambda: self._pass(run)
        self._launched = recorded.words

        def repeat() -> list[Mark]:
            recorded.repeat()
            return recorded.returned

        return repeat

    def _pass(self, run: Run[H]) -> list[Mark]:
        """All layers once; the marks before the first step and after each."""
        marks = [self.backend.mark()]
        for index, layer in enumerate(run.layers):
            for step in self._steps(index, layer):
                self._call(step, layer)
                marks.append(self.backend.mark())
        return marks

    def _steps(self, index: int, layer: Layer[H]) -> Iterator[Step]:
        """The calls of a layer's stages in a pass: those by parts go together, part after part."""
        for by_parts, group in itertools.groupby(enumerate(self._stages), lambda each: each[1].by_parts):
            numbers = [number for number, _ in group]
            for rows in layer.parts if by_parts and layer.parts is not None else (None,):
                for number in numbers:
                    yield Step(index, number, rows)

    def _call(self, step: Step, layer: Layer[H]) -> None:
        with self._naming(step.layer):
            given = layer if step.rows is None else self.backend.part(layer, step.rows)
            self._stages[step.stage].call(self.backend, given, self.spec.convention)

    @contextlib.contextmanager
    def _naming(self, index: int) -> Iterator[None]:
        """Says in which layer something overflowed."""
        try:
            yield
        except FloatingPointError as error:
            raise FloatingPointError(f"layer {index} ({self.spec.layers[index].name}): {error}") from None

    def _sample(self, marks: list[Mark]) -> tuple[float, NDArray[np.float64], NDArray[np.float64]]:
        """Pipeline, GPU and host milliseconds of one pass. The pipeline is timed on the stream where there is one."""
        assert self.handles is not None
        steps = [step for index, layer in enumerate(self.handles.layers) for step in self._steps(index, layer)]
        gpu, host = np.zeros((2, len(self.spec.layers), len(self._stages)))
        for step, (start, end) in zip(steps, itertools.pairwise(marks), strict=True):
            gpu[step.layer, step.stage] += self.backend.gpu_ms(start, end)
            host[step.layer, step.stage] += (end.host - start.host) * 1e3
        first, last = marks[0], marks[-1]
        whole = self.backend.gpu_ms(first, last)
        return (whole if np.isfinite(whole) else (last.host - first.host) * 1e3), gpu, host

    def _collect(self, index: int, layer: Layer[H]) -> None:
        """The result of a layer, from the arrays that the last pass left."""
        spec = self.spec
        with self._naming(index):
            others = tuple(each for each in sharing(spec.layers, index, spec.convention) if each != index)
            found = evaluation.collect(
                self.backend, spec.layers[index], layer, spec.convention, spec.keeps_codes, others
            )
        self.layers[index : index + 1] = [found]

    def _measure(self) -> None:
        if self.layers:
            assert self.handles is not None
            evaluation.measure(self.backend, self.spec.layers, self.handles, self.layers, self.spec.by_max)

    def _verify(self, on_progress: Callable[[str, int, int], None]) -> None:
        assert self.handles is not None
        for index, result in enumerate(self.layers):
            on_progress("verify", index, len(self.spec.layers))
            evaluation.verify(self.backend, self.handles, index, result, self.spec.convention)
        for result in self.layers:
            refuse_beyond_tolerance(result.name, result.verify)
