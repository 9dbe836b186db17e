"""A pass that the device repeats as a whole: it leaves what the stages leave one by one, and tells their times."""

import math
from dataclasses import replace

import numpy as np
import pytest
from conftest import make_backend, same_bits

from awq_pycuda.backends.base import Mark, Recorded, Unrecordable
from awq_pycuda.backends.cpu import CpuBackend
from awq_pycuda.engine.arrays import allocate
from awq_pycuda.engine.pipeline import Pipeline
from awq_pycuda.engine.spec import spec_of
from awq_pycuda.engine.stages import STAGES, stages_of
from awq_pycuda.kernels import table

LEFT = ("abs_mean", "sq_mean", "error", "s", "inv_s", "out")
GPU = pytest.mark.gpu
QUICK = ("n=8", "tokens=4", "layers=2", "inputs=outliers", "timing.warmup=1", "timing.repeats=2")
GAMMAS = f"gammas={[index / 10 for index in range(11)]}"  # as test_device_search: kernels are compiled once


def made(name, **choices):
    return make_backend(name, **({"dequantizeTiled": "blocked"} | choices))


def left(backend, run):
    handles = [getattr(layer, name) for layer in run.layers for name in LEFT]
    handles += [handle for layer in run.layers for handle in layer.quantized.arrays.values()]
    return handles, [backend.read(handle).copy() for handle in handles]


@pytest.mark.parametrize(
    ("name", "search", "stats", "quant"),
    [
        ("host", "diag", "deterministic", ("search.formula=duo",)),
        pytest.param("cuda", "diag", "deterministic", (), marks=GPU),
        pytest.param("cuda", "output", "atomic", (), marks=GPU),
        *(
            pytest.param("cuda", search, "deterministic", quant, marks=GPU)
            for search in ("diag", "output")
            for quant in (
                *(("quant=nvfp4",), ("quant=int4_g128", "quant.symmetric=false")),
                *(("search.formula=both",), ("search.formula=gamma_beta", "quant=int4_g128")),
            )
        ),
    ],
)
def test_a_repetition_leaves_what_the_stages_leave(compose, name, search, stats, quant):
    spec = spec_of(compose(*QUICK, GAMMAS, f"search={search}", f"stats={stats}", *quant))
    with made(name, accum_stats=stats) as backend:
        run = allocate(backend, spec.layers, spec.convention)
        marks = []

        def work():
            marks[:] = [backend.mark()]
            for layer in run.layers:
                for stage in stages_of(backend, spec.convention):
                    stage.call(backend, layer, spec.convention)
                    marks.append(backend.mark())
            return list(marks)

        work()
        handles, by_stages = left(backend, run)
        recorded = backend.record(work)
        for _ in range(2):
            for handle, values in zip(handles, by_stages, strict=True):
                poison = np.full_like(values, np.nan if values.dtype.kind == "f" else 99)
                backend.write(handle, poison)
            recorded.repeat()
            backend.synchronize()
            for values, again in zip(by_stages, left(backend, run)[1], strict=True):
                if stats == "atomic":
                    np.testing.assert_allclose(again, values, rtol=1e-5)
                else:
                    assert same_bits(again, values)
            times = [backend.gpu_ms(recorded.returned[0], mark) for mark in recorded.returned]
            assert times == sorted(times)
            assert all(np.isnan(mark.host) for mark in recorded.returned)


@pytest.mark.gpu
@pytest.mark.parametrize("search", ["diag", "output"])
@pytest.mark.parametrize("matmul", table.variants("dequantizeTiled"))
@pytest.mark.parametrize("sizes", [("n=260", "tokens=200"), ("n=1032", "tokens=130"), ("n=64", "tokens=5000")])
def test_kernels_placed_early_leave_the_same_bits(compose, search, matmul, sizes):
    """With nothing between the kernels; inputs change, so that what is read too early would show."""
    spec = spec_of(compose(*QUICK, *sizes, GAMMAS, f"search={search}"))
    with made("cuda", dequantizeTiled=matmul) as backend:
        run = allocate(backend, spec.layers, spec.convention)

        def work():
            for layer in run.layers:
                for stage in stages_of(backend, spec.convention):
                    stage.call(backend, layer, spec.convention)

        def given(seed):
            for index, layer in enumerate(run.layers):
                backend.init(layer.w, seed, 1 + index, None, None)
            backend.init(run.layers[0].x, seed, 0, None, None)

        expected = []
        for seed in range(2):
            given(seed)
            work()
            expected.append(left(backend, run)[1])
        recorded = backend.record(work)
        for seed in 5 * (0, 1):
            given(seed)
            recorded.repeat()
            for values, again in zip(expected[seed], left(backend, run)[1], strict=True):
                assert same_bits(again, values)


@pytest.mark.gpu
def test_sanitize_a_recorded_pass(compose):
    """Small and ragged; `make sanitize` puts it under compute-sanitizer's four tools."""
    for search in ("diag", "output"):
        spec = spec_of(compose(*QUICK, "n=132", "tokens=130", GAMMAS, f"search={search}"))
        with made("cuda", dequantizeTiled="digits_mma") as backend:
            run = allocate(backend, spec.layers, spec.convention)

            def work(backend=backend, run=run, spec=spec):
                for layer in run.layers:
                    for stage in stages_of(backend, spec.convention):
                        stage.call(backend, layer, spec.convention)

            recorded = backend.record(work)
            for _ in range(2):
                recorded.repeat()
            assert all(np.isfinite(values).all() for values in left(backend, run)[1])


class Repeating(CpuBackend):
    """It counts what it repeats, and its work takes the device a millisecond from mark to mark."""

    repeated = 0
    marked = 0

    def record(self, work):
        def repeat():
            self.repeated += 1
            work()

        return Recorded(work(), repeat)

    def mark(self):
        self.marked += 1
        return Mark(math.nan, self.marked)

    def gpu_ms(self, start, end):
        return float(end.event - start.event)


def timings(backend, compose, *overrides):
    pipeline = Pipeline(backend, spec_of(compose(*QUICK, *overrides)))
    pipeline.run()
    assert len(pipeline.layers) == 2
    return pipeline.timings


def test_passes_are_repeated_as_a_whole_where_they_can_be(compose):
    backend = Repeating()
    found = timings(backend, compose)
    assert backend.repeated == 3
    assert found.launched == "as a whole"
    assert (found.gpu_ms == 1).all()
    assert found.pipeline_ms.tolist() == [2 * (len(STAGES) - 1)] * 2
    assert np.isnan(found.host_ms).all()


@pytest.mark.gpu
def test_on_the_gpu_stages_fill_a_pass(compose):
    with made("cuda") as backend:
        found = timings(backend, compose, "n=256", "verify=true")
    assert found.launched == "as a whole"
    assert np.isnan(found.host_ms).all()
    assert (found.gpu_ms > 0).all()
    np.testing.assert_allclose(found.gpu_ms.sum(axis=(0, 1)), found.pipeline_ms, rtol=1e-3)


@pytest.mark.parametrize(
    ("capability", "words"),
    [
        ((9, 0), "as a whole"),
        ((8, 6), "as a whole, kernel after kernel: to start one early takes compute capability 9.0, not 8.6"),
    ],
)
def test_a_recording_tells_whether_kernels_start_early(capability, words):
    with made("host") as backend:
        backend._gpu.limits = replace(backend.limits, capability=capability)
        assert backend.record(lambda: None).words == words


def test_what_the_host_takes_part_in_is_launched_stage_by_stage(compose):
    with make_backend("host", search_on_host=True) as backend, pytest.raises(Unrecordable, match="search runs on the"):
        backend.record(lambda: None)
    found = timings(CpuBackend(), compose)
    assert found.launched == "stage by stage: stages run on the host"
    assert np.isfinite(found.host_ms).all()


@pytest.mark.gpu
def test_what_the_gpu_cannot_record_is_launched_stage_by_stage(compose, monkeypatch):
    def failing(stream, work, overlapping):
        raise Unrecordable("not today")

    with made("cuda") as backend:
        monkeypatch.setitem(type(backend).record.__globals__, "capture", failing)
        found = timings(backend, compose)
    assert found.launched == "stage by stage: not today"
    assert np.isfinite(found.host_ms).all()


@pytest.mark.gpu
def test_a_stream_takes_work_again_after_a_capture_that_failed():
    """A host that waits for the stream ends its capture."""
    with make_backend("cuda", dequantizeTiled="blocked") as backend:
        values = backend.empty((3, 4))
        backend.init(values, 1, 0, None, None)
        exact = backend.read(values).copy()

        def waiting():
            backend.init(values, 2, 0, None, None)
            if not backend._recording.placing:
                backend.synchronize()

        with pytest.raises(Unrecordable, match="captur"):
            backend.record(waiting)
        backend.init(values, 1, 0, None, None)
        assert same_bits(backend.read(values), exact)
