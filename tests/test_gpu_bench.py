"""What of a benchmark only a GPU can show: its clock, its flush, its ceilings and its conditions."""

import itertools
import json
import time

import numpy as np
import pytest
from test_pipeline import Kept

from awq_pycuda import analyze, bench
from awq_pycuda.benchmarks import goals, models
from awq_pycuda.benchmarks.cases import SEARCHES
from awq_pycuda.benchmarks.goals import Goal
from awq_pycuda.benchmarks.shapes import Shape
from awq_pycuda.kernels import bench_table, table
from awq_pycuda.kernels.work import WORK
from awq_pycuda.results.bench_reader import read_bench

pytestmark = pytest.mark.gpu


@pytest.fixture
def place():
    from awq_pycuda.benchmarks.cuda_place import CudaPlace

    with CudaPlace(16) as entered:
        yield entered


def median(place, launch, cold):
    return np.median([place.machine.sample(launch, cold).us for _ in range(15)])


def test_the_clock_tells_how_long_a_kernel_was_busy(place):
    (spin,) = (each for each in place._meter.variants if each.stage == "spin")
    for microseconds in (50, 500):
        launch = place._meter.call(spin, 1000 * microseconds)
        for cold in (True, False):
            assert microseconds - 2 < median(place, launch, cold) < microseconds + 20
    samples = [place.machine.sample(launch, cold=True) for _ in range(15)]
    assert not np.mean([sample.late for sample in samples]) > 0.5
    assert all(sample.conditions["sm_clock"] > 0 for sample in samples if sample.conditions)


def test_the_flush_empties_the_cache(place):
    read = place.reader(place.machine.probe_bytes)
    assert median(place, read, cold=True) > 1.1 * median(place, read, cold=False)


def test_what_waits_for_the_device_is_late(place):
    launch = place.reader(1 << 20)

    def waits():
        launch()
        place._meter.stream.synchronize()

    assert all(place.machine.sample(waits, cold=True).late for _ in range(5))


def test_what_is_done_on_the_host_is_in_the_time(place):
    def sleeps():
        time.sleep(2e-3)
        place._meter.stream.synchronize()

    for cold in (True, False):
        samples = [place.machine.sample(sleeps, cold) for _ in range(6)]
        assert all(sample.late and sample.us > 2000 for sample in samples[2:])


def test_every_ceiling_is_right_and_measured(place):
    found = {(subject.key.stage, subject.key.variant): subject for subject in place.ceilings()}
    limits = place._gpu.limits
    expected = {(each.stage, each.name) for each in bench_table.VARIANTS if each.obstacle({}, limits) is None}
    assert found.keys() == expected - {("spin", "globaltimer")} | {("link", "from pinned memory")}
    for subject in found.values():
        assert subject.judge().reason is None
        assert median(place, subject.launch, cold=True) > 0


def test_sanitize_ceilings(place):
    for subject in place.ceilings():
        if subject.key.stage in ("read", "write", "copy"):
            assert subject.judge().reason is None


def test_a_benchmark_of_every_kernel(tmp_path, capsys):
    path = tmp_path / "one.h5"
    keys = ["backend=cuda", "shapes=256,384x128x160", "seconds=0.01", "peers=none", f"out={path}"]
    assert bench.main(keys) == 0, capsys.readouterr().out
    record = read_bench(path)
    rows = [row for row in record.rows if row.case == "kernels"]
    assert {row.stage for row in rows} == set(WORK)
    timed = {(row.stage, row.variant) for row in rows}
    absent = " ".join(json.loads(record.root["absent"]))
    for variant in table.VARIANTS:
        if variant.stage in WORK:
            assert (variant.stage, variant.name) in timed or f"{variant.stage} {variant.name}" in absent
    assert all(row.state == "timed" and row.error <= row.tolerance for row in rows)
    assert all((row.conditions["temperature"] > 0).all() for row in rows if row.conditions)
    assert analyze.main(["compare", str(path), str(path), "fail_on=slower"]) == 0


def test_a_pass_is_timed(tmp_path):
    path = tmp_path / "one.h5"
    keys = ["backend=cuda", "shapes=256", "seconds=0.01", "peers=none", "case=pass", f"out={path}"]
    assert bench.main(keys) == 0
    rows = [row for row in read_bench(path).rows if row.case == "pass"]
    assert {row.cache for row in rows} == {"cold", "warm"}
    assert all(row.state == "timed" for row in rows)


def test_a_model_is_searched_with_its_weights_on_the_device_and_streamed(tmp_path, monkeypatch):
    monkeypatch.setitem(models.MODELS, "llama7b", models.Model(3, ((2, 160, 96), (1, 96, 160)), 96, 40))
    path = tmp_path / "one.h5"
    keys = ["backend=cuda", "case=llama7b", "points=3", "seconds=0.01", "peers=none", f"out={path}"]
    assert bench.main(keys) == 0
    rows = [row for row in read_bench(path).rows if row.case == "llama7b"]
    assert all(row.state == "timed" and row.error <= row.tolerance for row in rows)
    variants = {"weights on the device", "weights from the host"}
    assert {(row.stage, row.variant) for row in rows} == set(itertools.product(SEARCHES, variants))


def test_goals_are_measured_by_what_a_run_takes_by_default(tmp_path, monkeypatch, place):
    monkeypatch.setitem(models.MODELS, "llama7b", models.Model(2, ((1, 96, 96),), 96, 40))
    shape, model = Shape(160, 96, 128, 3), Shape(40, 96, 96, 3)
    wanted = [
        *(Goal("kernels", stage, shape, "time", 1e6) for stage in (*SEARCHES, "accum_stats", "quantize_awq", "init")),
        Goal("kernels", "dequantizeTiled", shape, "time", 1e6),
        Goal("kernels", "dequantizeTiled", shape, "speedup", 5, "cuBLAS fp32"),
        Goal("pass", "pass", Shape(96, 96, 96, 3), "time", 1e6),
        *(Goal("llama7b", stage, model, "time", 1e6, variant=models.RESIDENT) for stage in SEARCHES),
        Goal("llama7b", "compute_s", model, "link", 0, "link", models.STREAMED),
    ]
    monkeypatch.setattr(goals, "GOALS", wanted)
    path = tmp_path / "one.h5"
    assert bench.main(["backend=cuda", "case=goals", "seconds=0.01", "peers=none", f"out={path}"]) == 0
    record = read_bench(path)
    asked = [goal.quantity == "speedup" for goal in record.goals]
    assert [record.reached(goal) for goal in record.goals] == [None if of_peer else True for of_peer in asked]
    variants = {(row.case, row.stage): row.variant for row in record.rows}
    default = place.preferred("dequantizeTiled")
    assert variants["kernels", "dequantizeTiled"] in default
    assert variants["pass", "pass"] == f"{variants['kernels', 'dequantizeTiled']}, 3 layers"
    assert variants["kernels", "compute_s"] == "device"


def test_a_run_holds_what_the_gpu_told(compose, place):
    told = place.machine.sample(place.reader(1 << 20), cold=True).conditions
    kept = Kept("cuda", compose("n=64", "layers=1", "timing.repeats=2"))
    assert kept.timings.conditions.keys() == told.keys()
    assert all(values.shape == (2,) and np.isfinite(values).all() for values in kept.timings.conditions.values())


def test_a_pass_is_held_before_the_rate_of_its_product(place):
    for name, unit, passes in (("digits", "int8 matrix", 3), ("blocked", "fp32", 1), ("search on the host", "fp32", 1)):
        assert place.product_unit(name) == (unit, passes)
