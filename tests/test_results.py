"""results.h5: the layout, other readers, and that no reader ever sees half a file."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import h5py
import numpy as np
import pytest
import xarray as xr
from omegaconf import OmegaConf

from awq_pycuda.backends.cpu import CpuBackend
from awq_pycuda.engine import verify as verify_module
from awq_pycuda.engine.stages import NO_TIMINGS
from awq_pycuda.quant.conventions import Candidate, Grid
from awq_pycuda.quant.format import Format
from awq_pycuda.quant.quantized import Quantized, Steps
from awq_pycuda.quant.search import SearchResult
from awq_pycuda.results import schema
from awq_pycuda.results.record import LayerResult, RunRecord, Timings
from awq_pycuda.results.status import read_status, status_attributes
from awq_pycuda.results.write import write

STAGES = ["accum_stats", "compute_s", "compute_scale_b", "quantize_awq", "dequantizeTiled", "relu"]


def result_path(out: str) -> str:
    (line,) = [line for line in out.splitlines() if line.startswith("results ")]
    return line.removeprefix("results ")


@pytest.fixture
def result(cli):
    code, out, err = cli("n=24", "tokens=10", "layers=2", "save=full", "verify=true", "backend=cpu", "gammas=[0.5,1]")
    assert code == 0, err
    return result_path(out)


def test_root_attributes(result):
    with h5py.File(result) as file:
        attrs = dict(file.attrs)
    assert attrs["schema"] == "awq_pycuda"
    assert attrs["schema_version"] == schema.VERSION
    assert attrs["status"] == "complete"
    assert "error" not in attrs
    assert attrs["created"].endswith("+00:00")
    config = OmegaConf.create(attrs["config"])
    assert (config.n, config.tokens, config.layers, config.inputs.kind) == (24, 10, 2, "synthetic")
    assert "${" not in attrs["config"]
    assert json.loads(attrs["overrides"])[0] == "n=24"
    assert len(attrs["config_hash"]) == len(attrs["kernels_sha256"]) == 64
    assert attrs["backend"] == "cpu"
    assert json.loads(attrs["device"])["threads"] >= 1
    assert {"python", "numpy", "h5py", "hydra-core"} <= set(json.loads(attrs["versions"]))
    assert attrs["git_dirty"] in (True, False)


EXPECTED = {
    "stats/abs_mean": ("f4", (24,), ["in_features"]),
    "stats/sq_mean": ("f4", (24,), ["in_features"]),
    "stats/abs_max": ("f4", (24,), ["in_features"]),
    "search/gamma": ("f8", (3,), ["gamma"]),
    "search/error": ("f8", (3,), ["gamma"]),
    "search/error_by_max": ("f8", (3,), ["gamma"]),
    "scales/s": ("f4", (24,), ["in_features"]),
    "scales/scale_b": ("f4", (24,), ["out_features"]),
    "weights/Wq": ("i1", (24, 24), ["out_features", "in_features"]),
}
TIMINGS = {
    "gpu_ms": ((2, len(STAGES), 3), ["layer", "stage", "repeat"]),
    "host_ms": ((2, len(STAGES), 3), ["layer", "stage", "repeat"]),
    "pipeline_ms": ((3,), ["repeat"]),
    "cold_ms": ((), []),
}


def test_datasets_have_the_contract_s_types_shapes_and_dimensions(result):
    with h5py.File(result) as file:
        assert list(file["layers"]) == ["000", "001"]
        for layer in file["layers"].values():
            for name, (dtype, shape, dimensions) in EXPECTED.items():
                dataset = layer[name]
                assert (dataset.dtype, dataset.shape) == (np.dtype(dtype), shape), name
                names = (
                    [name.split("/")[1]] if dataset.is_scale else [dim[0].name.split("/")[-1] for dim in dataset.dims]
                )
                assert names == dimensions
            of_search = {"gamma_chosen", "error_chosen", "error_rtn", "objective", "chosen", "chosen_by_max"}
            assert of_search == set(layer["search"].attrs)
            always = {entry.name for entry in schema.metrics() if entry.presence == "complete"}
            assert set(layer["metrics"].attrs) == always | {"max_output_mse", "max_output_sqnr_db"}
            assert layer["search/gamma"][0] == 0
        for name, (shape, dimensions) in TIMINGS.items():
            dataset = file["timings"][name]
            assert (dataset.dtype, dataset.shape) == (np.dtype("f8"), shape)
            assert [dim[0].name.split("/")[-1] for dim in dataset.dims] == dimensions
        assert file["timings/stage"].asstr()[:].tolist() == STAGES
        assert np.isnan(file["timings/gpu_ms"][:]).all()
        missing = []
        file.visititems(
            lambda name, node: (
                missing.append(name)
                if isinstance(node, h5py.Dataset) and not {"units", "description"} <= set(node.attrs)
                else None
            )
        )
        assert missing == []


def test_every_value_stands_where_it_belongs(tmp_path):
    draw = np.random.default_rng(0).random
    grid = Grid([Candidate(0.0), Candidate(0.25, duo=True)])
    search = SearchResult(grid, np.array([0.75, 0.5]), 1, draw(3).astype("f4"))
    of_betas = replace(search, grid=Grid([Candidate(0.0, 0.0), Candidate(0.25, 0.5)]))
    stats = {name: draw(3).astype("f4") for name in ("abs_mean", "sq_mean")}
    wq = np.arange(12, dtype=np.int8).reshape(4, 3)
    of_row = Quantized(draw((4, 1)).astype("f4"), Format(), codes=wq)
    layer = LayerResult("a", 5, **stats, search=search, objective="diag", quantized=of_row)
    layer.metrics["output_mse"] = 2.0
    grouped = Steps(draw((4, 2)).astype("f4"), Format(2))
    layers = [layer, replace(layer, quantized=grouped, search=of_betas)]
    told = {"sm_clock": draw(2), "throttle_reasons": np.array([0.0, 4.0])}
    timings = Timings(tuple(STAGES), draw((1, len(STAGES), 2)), draw((1, len(STAGES), 2)), draw(2), 7.0, told)
    with h5py.File(write(tmp_path, RunRecord({"status": "complete"}, layers, timings))) as file:
        group = file["layers/000"]
        assert dict(group.attrs) == {"name": "a", "tokens": 5, "in_features": 3, "out_features": 4}
        chosen = {"chosen": 1, "gamma_chosen": 0.25, "error_chosen": 0.5, "error_rtn": 0.75, "objective": "diag"}
        assert dict(group["search"].attrs) == chosen
        assert dict(group["metrics"].attrs) == layer.metrics
        assert group["search/duo"][()].tolist() == [0, 1]
        assert file["layers/001/search/beta"][()].tolist() == [0, 0.5]
        assert "beta" not in group["search"]
        assert "duo" not in file["layers/001/search"]
        stored = {"search/gamma": search.gamma, "search/error": search.error, "scales/s": search.s, "weights/Wq": wq}
        stored |= {
            "stats/abs_mean": layer.abs_mean,
            "stats/sq_mean": layer.sq_mean,
            "scales/scale_b": of_row.steps[:, 0],
        }
        for name, values in stored.items():
            assert np.array_equal(group[name][()], values), name
        assert np.array_equal(file["layers/001/scales/scale_b"][()], grouped.steps)
        assert file["layers/001/group"][()].tolist() == [0, 1]
        assert "weights" not in file["layers/001"]
        for name in ("gpu_ms", "host_ms", "pipeline_ms", "cold_ms"):
            assert np.array_equal(file["timings"][name][()], getattr(timings, name)), name
        assert file["timings/conditions"].keys() == told.keys()
        for name, values in told.items():
            assert np.array_equal(file["timings/conditions"][name][()], values), name
            assert file["timings/conditions"][name].dims[0].keys() == ["repeat"]


def test_xarray_reads_it_without_this_package(result):
    with xr.open_datatree(result, engine="h5netcdf") as tree:
        assert tree.attrs["status"] == "complete"
        stats = tree["layers/000/stats"]
        assert stats["abs_mean"].dims == ("in_features",)
        assert tree["timings"]["gpu_ms"].dims == ("layer", "stage", "repeat")
        assert tree["timings"]["host_ms"].sel(stage="compute_s").shape == (2, 3)
        assert not any("phony" in str(dim) for node in tree.subtree for dim in node.dims)


def test_grouped_steps_have_a_group_dimension(cli):
    code, out, _ = cli("n=24", "layers=1", "quant.group_size=8", "backend=cpu")
    assert code == 0
    with xr.open_datatree(result_path(out), engine="h5netcdf") as tree:
        assert tree["layers/000/scales"]["scale_b"].dims == ("out_features", "group")
        assert tree["layers/000/scales"]["scale_b"].shape == (24, 3)
        assert "weights" not in tree["layers/000"].children


@pytest.mark.parametrize("fails_in_pass", [0, 2])
def test_a_failure_in_layer_2_leaves_layers_0_and_1(cli, monkeypatch, tmp_path, fails_in_pass):
    calls = iter(range(1_000))
    quantize = CpuBackend.quantize_awq

    def failing(self, *arguments):
        if next(calls) == 4 * fails_in_pass + 2:
            raise RuntimeError("planted in layer 2")
        quantize(self, *arguments)

    monkeypatch.setattr(CpuBackend, "quantize_awq", failing)
    code, _, err = cli("n=16", "layers=4", "backend=cpu", "timing.warmup=0")
    assert code == 1
    assert err.startswith("failed: RuntimeError: planted in layer 2")
    assert "Traceback" not in err
    (path,) = tmp_path.rglob("results.h5")
    with xr.open_datatree(path, engine="h5netcdf") as tree:
        assert tree.attrs["status"] == "failed"
        assert tree.attrs["error"] == "RuntimeError: planted in layer 2"
        # A later pass fails with every layer's results of the first pass at hand.
        assert list(tree["layers"].children) == (["000", "001"] if fails_in_pass == 0 else ["000", "001", "002", "003"])
        assert tree["layers/001/metrics"].attrs["output_sqnr_db"] > 20
        assert tree["layers/001/search"].attrs["objective"] == "diag"
        assert tree["timings"]["gpu_ms"].shape == (4, len(STAGES), max(0, fails_in_pass - 1))


def test_a_verification_failure_is_a_failed_run_with_its_errors(cli, monkeypatch, tmp_path):
    monkeypatch.setitem(verify_module.TOLERANCES, "output", 1e-12)
    code, _, err = cli("n=16", "layers=1", "backend=cpu", "verify=true")
    assert code == 1
    assert "layer 000 is beyond the oracle's tolerance: output" in err
    (path,) = tmp_path.rglob("results.h5")
    with h5py.File(path) as file:
        assert file.attrs["status"] == "failed"
        assert 1e-12 < file["layers/000/verify"].attrs["output"] < 1e-5


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_is_stored_too(cli, monkeypatch, tmp_path, number):
    monkeypatch.setattr(CpuBackend, "relu", lambda *_: signal.raise_signal(number))
    assert cli("n=16", "layers=2", "backend=cpu")[0] == 128 + number
    (path,) = tmp_path.rglob("results.h5")
    with h5py.File(path) as file:
        assert (file.attrs["status"], file.attrs["error"]) == ("failed", f"interrupted by {number.name}")


def test_a_full_disk_is_one_line_and_leaves_no_file(monkeypatch, tmp_path, cli):
    def no_space(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    code, _, err = cli("n=8", "layers=1", "backend=cpu")
    assert code == 1
    assert err.startswith("failed: ")
    assert "No space left on device" in err
    assert len(err.splitlines()) == 1
    assert not list(tmp_path.rglob("*results*"))


@pytest.mark.parametrize("delay", [0.0, 0.1, 0.3, 0.6])
def test_kill_9_leaves_no_file_under_the_final_name_or_a_whole_one(tmp_path, delay):
    command = [sys.executable, "-m", "awq_pycuda.run", "n=256", "timing.repeats=20", "backend=cpu", "save=full"]
    process = subprocess.Popen([*command, "hydra.run.dir=run"], cwd=tmp_path, stdout=subprocess.DEVNULL)
    while not (tmp_path / "run").is_dir():  # the checks are done and the work begins
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    process.wait()
    for path in tmp_path.rglob("results.h5"):
        with h5py.File(path) as file:
            assert file.attrs["status"] == "complete"


def test_killed_while_writing_leaves_no_file_under_the_final_name(tmp_path):
    """The moment that matters, hit every time: the process dies when all is written but not yet renamed."""
    script = (
        "import os, signal, sys\n"
        "from awq_pycuda import run\n"
        "os.fsync = lambda handle: os.kill(os.getpid(), signal.SIGKILL)\n"
        "sys.argv = ['run', 'n=16', 'layers=1', 'backend=cpu']\n"
        "run.main()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=False)
    assert done.returncode == -signal.SIGKILL
    assert list(tmp_path.rglob(".results.h5.*.tmp"))
    assert not list(tmp_path.rglob("results.h5"))


@pytest.mark.parametrize(("name", "other"), [("NAME", "other"), ("VERSION", 99), ("VERSION", 0)])
def test_a_file_of_another_schema_has_no_status(monkeypatch, tmp_path, name, other):
    """Written as a whole by another program or version: nothing else of it is wrong."""
    record = RunRecord(status_attributes(None), [], NO_TIMINGS)
    with monkeypatch.context() as patch:
        patch.setattr(schema, name, other)
        write(tmp_path, record)
    assert read_status(tmp_path) is None
    write(tmp_path, record)
    assert read_status(tmp_path) == ("complete", "")


def test_status_is_complete_failed_with_its_reason_or_none(tmp_path):
    assert read_status(tmp_path) is None
    write(tmp_path, RunRecord(status_attributes("OSError: x"), [], NO_TIMINGS))
    assert read_status(tmp_path) == ("failed", "OSError: x")
    path = tmp_path / schema.FILE_NAME
    path.write_bytes(path.read_bytes()[:700])
    assert read_status(tmp_path) is None


def test_what_killed_runs_left_is_removed_by_the_next_into_that_folder(cli, tmp_path):
    left = tmp_path / "work/run/.results.h5.4711.tmp"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"half")
    code, _, err = cli("n=8", "layers=1", "backend=cpu", f"hydra.run.dir={left.parent}")
    assert (code, err) == (0, "")
    assert not left.exists()
    assert (left.parent / "results.h5").exists()
