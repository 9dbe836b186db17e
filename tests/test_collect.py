"""Files to tables: what is in them, how runs are named, and that no file can stop it."""

import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
from result_files import TABLES, edited, make_many, make_run, real, vary

from awq_pycuda.analysis.collect import by_gamma, channels, collect, column_of
from awq_pycuda.analysis.find import run_names
from awq_pycuda.backends.cpu import CpuBackend
from awq_pycuda.errors import InputError, RunFailed

ROOT = Path(__file__).resolve().parent.parent


def test_a_sweep_gives_a_row_per_run_and_per_layer(tmp_path):
    make_many(tmp_path, 20)
    found = collect([tmp_path])
    assert found.left_out == []
    assert sorted(found.runs["run"]) == [f"{index:03d}" for index in range(20)]
    assert len(found.layers) == 20 * 3
    assert found.layers["path"].nunique() == 20
    assert found.swept == ["n", "tile", "seed"]
    order = found.runs[["n", "tile", "seed"]].to_numpy().tolist()
    assert order == sorted(order)


def test_runs_are_in_the_order_of_the_swept_values_then_of_their_paths(real, tmp_path):
    values = [{"threads": threads, "gammas": gammas} for gammas in ([0, 9], [0, 0.5, 1]) for threads in (None, 2, 10)]
    for name, config in zip("fedcba", values, strict=True):
        vary(real, tmp_path / name / "10", config)
        vary(real, tmp_path / name / "9", config)
    runs = collect([tmp_path]).runs["run"]
    assert list(runs) == [f"{name}/{index}" for name in "fedcba" for index in (9, 10)]


def test_the_tables_hold_what_the_file_holds(real):
    found = collect([real])
    (run,) = found.runs.itertuples()
    with h5py.File(real) as file:
        assert (run.status, run.error, run.backend, run.config_hash) == (
            "complete",
            "",
            "cpu",
            file.attrs["config_hash"],
        )
        assert run.pipeline_ms == np.median(file["timings/pipeline_ms"])
        assert run.cold_ms == file["timings/cold_ms"][()]
        assert (run.layers_finished, run.gamma_grid_size, run.clock) == (3, 3, "host")
        assert run.launched == file["timings/launched"].asstr()[()] == "stage by stage: stages run on the host"
        stages = file["timings/stage"].asstr()[:]
        host = file["timings/host_ms"][()]
        for index, row in found.layers.iterrows():
            layer = file[f"layers/{index:03d}"]
            for name, value in (*layer.attrs.items(), *layer["search"].attrs.items(), *layer["metrics"].attrs.items()):
                assert row[name] == value, name
            for stage, samples in zip(stages, host[index], strict=True):
                assert row[f"ms.{stage}"] == np.median(samples)
            curve = found.curves[found.curves["layer"] == index]
            assert curve["gamma"].tolist() == layer["search/gamma"][:].tolist() == [0, 0.5, 0.25]
            assert curve["error"].tolist() == layer["search/error"][:].tolist()
            assert curve["error_by_max"].tolist() == layer["search/error_by_max"][:].tolist()
            assert curve["error_relative"].iloc[0] == 1
            assert curve["gamma"][curve["chosen"]].tolist() == [layer["search"].attrs["gamma_chosen"]]
        assert found.passes["pipeline_ms"].tolist() == file["timings/pipeline_ms"][:].tolist()
    assert set(found.timings["clock"]) == {"host"}
    assert len(found.timings) == host.size
    for row in found.timings.sample(20, random_state=0).itertuples():
        assert row.ms == host[row.layer, stages.tolist().index(row.stage), row.repeat]


def test_of_candidates_with_one_gamma_figures_show_the_best(tmp_path):
    more = ("n=32", "layers=2", "inputs=outliers", "convention=llm_compressor", "search.formula=both")
    make_run(tmp_path / "both", *more)
    make_run(tmp_path / "two", *more[:3], "search.formula=gamma_beta", "gammas=[0.5]", "search.betas=[0,1]")
    found = collect([tmp_path])
    both = found.curves[(found.curves["run"] == "both") & (found.curves["layer"] == 1)]
    assert both["duo"].tolist() == [False, True] * 10
    assert both["beta"].isna().all()
    two = found.curves[(found.curves["run"] == "two") & (found.curves["layer"] == 0)]
    assert two[["gamma", "beta"]].to_numpy().tolist() == [[0, 0], [0.5, 0], [0.5, 1]]  # RTN stands in front
    shown = by_gamma(found.curves)
    assert len(shown) == 2 * (10 + 2)
    assert shown["chosen"].sum() == found.curves["chosen"].sum() == 4
    best = found.curves.groupby(["run", "layer", "gamma"])["error"].min()
    pd.testing.assert_series_equal(shown.set_index(["run", "layer", "gamma"])["error"].sort_index(), best)
    for row in found.layers.itertuples():
        curve = found.curves[(found.curves["run"] == row.run) & (found.curves["layer"] == row.layer)]
        assert curve["chosen"].to_numpy().nonzero()[0].tolist() == [row.chosen]
        assert curve["error"].iloc[row.chosen] == row.error_chosen == curve["error"].min()
        assert curve["error"].iloc[0] == row.error_rtn


def test_where_there_is_a_gpu_stage_times_are_the_stream_s(real, tmp_path):
    def on_gpu(file):
        file["timings/gpu_ms"][...] = np.arange(file["timings/gpu_ms"].size).reshape(file["timings/gpu_ms"].shape)

    found = collect([edited(real, tmp_path, on_gpu)])
    assert found.runs["clock"].tolist() == ["gpu"]
    assert found.layers["ms.accum_stats"].tolist() == [1, 19, 37]
    assert found.timings["clock"].value_counts().to_dict() == {"gpu": 54, "host": 54}


def test_derived_figures(real, tmp_path):
    def metrics(file):
        values = file["layers/000/metrics"].attrs
        values["output_mse"], values["output_sqnr_db"], values["rtn_output_mse"] = 0.5, 20.0, 2.0
        values["propagated_output_mse"] = 5.0
        values = file["layers/001/metrics"].attrs  # AWQ without any error: the signal's power is known from RTN's
        values["output_mse"], values["output_sqnr_db"] = 0.0, math.inf
        values["rtn_output_mse"], values["rtn_output_sqnr_db"], values["propagated_output_mse"] = 1.0, 10.0, 0.1
        values = file["layers/002/metrics"].attrs  # nothing to remove, nothing to tell
        values["output_mse"] = values["rtn_output_mse"] = 0.0
        values["output_sqnr_db"] = values["rtn_output_sqnr_db"] = math.inf

    layers = collect([edited(real, tmp_path, metrics)]).layers
    assert layers["error_removed"].tolist()[:2] == [0.75, 1.0]
    assert layers["propagated_sqnr_db"].tolist()[:2] == pytest.approx([10.0, 20.0])
    assert layers.loc[2, ["error_removed", "propagated_sqnr_db"]].isna().all()

    def no_error(file):
        file["layers/000/metrics"].attrs["propagated_output_mse"] = 0.0

    assert collect([edited(real, tmp_path, no_error)]).layers["propagated_sqnr_db"][0] == math.inf


def test_a_failed_run_is_a_run_with_its_reason(tmp_path, monkeypatch):
    calls = iter(range(100))
    quantize = CpuBackend.quantize_awq

    def failing(self, *arguments):
        if next(calls) == fails_at:
            raise RuntimeError("planted\n\tin the test")
        quantize(self, *arguments)

    monkeypatch.setattr(CpuBackend, "quantize_awq", failing)
    for fails_at in (0, 2):
        calls = iter(range(100))
        with pytest.raises(RunFailed):
            make_run(tmp_path / str(fails_at))
    found = collect([tmp_path])
    assert found.left_out == []
    assert found.runs["status"].tolist() == ["failed", "failed"]
    assert found.runs["error"].tolist() == ["RuntimeError: planted\n\tin the test"] * 2
    assert found.runs["layers_finished"].tolist() == [0, 2]
    assert found.runs[["pipeline_ms", "cold_ms"]].isna().all(axis=None)
    assert found.layers["run"].tolist() == ["2", "2"]
    assert found.timings.empty
    assert found.passes.empty
    assert found.swept == []


@pytest.mark.parametrize("table", TABLES)
def test_without_results_the_tables_have_their_columns(real, table):
    empty, full = getattr(collect([]), table), getattr(collect([real]), table)
    constant = [name for name in full.columns if name in empty.columns]
    assert constant[0] == "run"
    if table in ("curves", "timings", "passes"):
        assert constant == list(full.columns)


def test_config_columns(real, tmp_path):
    vary(real, tmp_path / "0", {"tokens": 16, "threads": None, "seed": 2**64 - 1, "path": "x", "study": "tiles"})
    vary(
        real,
        tmp_path / "1",
        {"tokens": 32, "threads": 2, "seed": 0, "tile": "wide", "gammas": [0.1 * i for i in range(20)]},
    )
    found = collect([tmp_path])
    first, second = found.runs.iloc[0], found.runs.iloc[1]
    assert found.runs["config.tokens"].tolist() == [16, 32]
    assert first["config.path"] == "x"
    assert first["study"] == "tiles"
    assert second["study"].startswith("sweeps/")
    assert (first["backend"], first["backend_asked"]) == ("cpu", "cpu")
    assert found.runs["seed"].tolist() == [2**64 - 1, 0]
    assert pd.isna(first["threads"])
    assert second["threads"] == 2
    assert found.runs["tile"].tolist() == ["16", "wide"]
    assert (first["gammas"], first["gamma_grid_size"]) == ("0.5,0.25", 3)
    assert (second["gammas"], second["gamma_grid_size"]) == ("0,0.1,0.2,…,1.9", 20)
    assert found.swept == ["config.tokens", "tile", "gammas", "threads", "seed"]
    assert {"config.tokens", "tokens", "tile"} <= set(found.layers.columns)


@pytest.mark.parametrize(
    ("key", "column"),
    [
        ("tile", "tile"),
        ("backend", "backend_asked"),
        ("tokens", "config.tokens"),
        ("ms.relu", "config.ms.relu"),
        ("gamma", "config.gamma"),
    ],
)
def test_a_config_key_never_takes_another_column_s_name(key, column):
    assert column_of(key) == column


def test_only_complete_runs_that_have_a_key_tell_whether_it_is_swept(real, tmp_path):
    vary(real, tmp_path / "0")
    vary(real, tmp_path / "1", {"inputs.kind": "synthetic", "inputs.channels": ...})
    vary(real, tmp_path / "2", {"tile": 8}, status="failed", error="RuntimeError: no")
    assert collect([tmp_path]).swept == ["inputs.kind"]
    vary(real, tmp_path / "3", {"inputs.channels": 0.5})
    assert collect([tmp_path]).swept == ["inputs.kind", "inputs.channels"]


HASH = "0123456789abcdef" * 2


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["o/2/results.h5", "o/10/results.h5"], ["2", "10"]),
        (["a/0/results.h5", "b/0/results.h5", "b/1/results.h5"], ["a/0", "b/0", "1"]),
        ([f"s/{HASH}/results.h5"], ["01234567"]),
        ([f"s/{HASH}/results.h5", f"s/{HASH[::-1]}/results.h5"], ["01234567", "fedcba98"]),
        (["a/one.h5", "a/two.h5"], ["one", "two"]),
        (["a/v1.0", "a/v1.1"], ["v1.0", "v1.1"]),
        (["a/results.h5", "b/a.h5"], ["{parent}/a", "b/a"]),
    ],
)
def test_run_names_are_short_and_unique(tmp_path, paths, names):
    found = run_names([tmp_path / path for path in paths])
    assert found == [name.format(parent=tmp_path.name) for name in names]
    assert run_names([tmp_path / path for path in reversed(paths)]) == found[::-1]


def test_runs_whose_names_cannot_be_shortened_have_their_path():
    paths = [Path("/a/b/results.h5"), Path("/a/b.h5"), Path(f"/c/{HASH}/results.h5"), Path(f"/c/{HASH}0/results.h5")]
    assert run_names(paths) == [str(path) for path in paths]


def test_what_a_search_of_folders_finds(real, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("2", "10", ".sweep/0", "tree/a", "tree/b"):
        vary(real, tmp_path / name)
    shutil.copy(real, "2/.results.h5.123.tmp")
    shutil.copy(real, "2/.hidden.h5")
    shutil.copy(real, "named.hdf5")
    shutil.copy(real, "bare")
    os.symlink("..", "tree/loop")
    os.symlink("a/results.h5", "tree/same.h5")
    found = collect([Path(), Path("2"), Path("10/results.h5"), Path("tree"), Path("bare")])
    assert found.runs["path"].tolist() == [
        "2/results.h5",
        "10/results.h5",
        "bare",
        "named.hdf5",
        "tree/a/results.h5",
        "tree/b/results.h5",
    ]
    assert found.left_out == []
    assert collect([Path(".sweep")]).runs["path"].tolist() == [".sweep/0/results.h5"]


def test_what_is_no_file_is_named(real, tmp_path):
    vary(real, tmp_path / "good")
    (tmp_path / "results.h5").mkdir()
    os.mkfifo(tmp_path / "pipe.h5")
    os.symlink("gone", tmp_path / "broken.h5")
    os.symlink("self.h5", tmp_path / "self.h5")
    os.symlink("/proc/self/mem", tmp_path / "unreadable.h5")
    shutil.copy(real, os.fsencode(tmp_path) + b"/\xff.h5")
    (tmp_path / "empty").mkdir()
    found = collect([tmp_path, tmp_path / "empty", tmp_path / "missing"])
    assert found.runs["run"].tolist() == ["good"]
    reasons = {os.fsencode(left_out.path.name): left_out.reason for left_out in found.left_out}
    assert reasons == {
        b"results.h5": "a folder, not a file",
        b"pipe.h5": "no regular file",
        b"broken.h5": "No such file or directory",
        b"self.h5": "Too many levels of symbolic links",
        b"unreadable.h5": "Input/output error",
        b"\xff.h5": "its path is not UTF-8, so that no table can name it",
        b"empty": "no file that ends in .h5 or .hdf5 in this folder",
        b"missing": "No such file or directory",
    }


def test_folders_that_may_not_be_looked_into_are_named(real, tmp_path, monkeypatch):
    """Root may look everywhere, so the refusal is planted."""
    vary(real, tmp_path / "good")
    (tmp_path / "locked").mkdir()
    scandir = os.scandir

    def refusing(path):
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    found = collect([tmp_path])
    assert found.runs["run"].tolist() == ["good"]
    assert [(each.path.name, each.reason) for each in found.left_out] == [("locked", "Permission denied")]


def test_additions_of_a_later_minor_version_change_nothing(real, tmp_path):
    def add(file):
        file.attrs["added"] = [1, 2, 3]
        file.attrs["nothing"] = h5py.Empty("f4")
        file.attrs["reference"] = file["layers"].ref
        file["layers/extra"] = 1.0
        file.create_group("layers/summary")
        file.create_group("more/of/it")
        file["layers/000/metrics"].attrs["ssim"] = 0.5
        file["layers/000/metrics"].attrs["name"] = 7
        file["layers/000/metrics"].attrs["tile"] = 8
        file["layers/000/metrics"].attrs["histogram"] = [1, 2]

    before, after = collect([real]), collect([edited(real, tmp_path, add)])
    assert after.left_out == []
    assert set(after.layers.columns) - set(before.layers.columns) == {"ssim", "metrics.name", "metrics.tile"}
    assert after.layers["ssim"].tolist()[0] == 0.5
    same = [name for name in before.layers.columns if name not in ("run", "path")]
    pd.testing.assert_frame_equal(before.layers[same], after.layers[same])


def test_channels(real, tmp_path):
    table = channels(real, 1)
    with h5py.File(real) as file:
        for name in ("stats/abs_mean", "stats/sq_mean", "scales/s"):
            assert table[name.split("/")[1]].tolist() == file["layers/001"][name][:].tolist()
    assert table["rms"].tolist() == np.sqrt(table["sq_mean"]).tolist()
    assert table["channel"].tolist() == list(range(32))
    assert table["channel"][table["salient"]].tolist() == [int(table["abs_mean"].argmax())]
    wide = make_run(tmp_path, "n=300", "layers=1")
    assert channels(wide, 0)["salient"].sum() == 3


@pytest.mark.parametrize("layer", [3, 1000, -1])
def test_channels_of_a_layer_that_is_not_there(real, layer):
    with pytest.raises(InputError, match=f"allowed: a result file that has layer {layer}"):
        channels(real, layer)


def test_channels_of_what_is_no_result(tmp_path):
    with pytest.raises(InputError, match="No such file"):
        channels(tmp_path / "gone.h5", 0)


def imported(code):
    script = f"import sys\n{code}\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(done.stdout.split())


def test_a_run_imports_nothing_of_the_analysis():
    libraries = {"pandas", "pyarrow", "xarray", "matplotlib", "plotly", "jinja2", "itables"}
    assert "awq_pycuda" in (modules := imported("import awq_pycuda.run, awq_pycuda.results.status"))
    assert not libraries & modules


def test_the_analysis_imports_neither_hydra_nor_pycuda():
    parts = ", ".join(f"awq_pycuda.analysis.{path.stem}" for path in (ROOT / "awq_pycuda/analysis").glob("[!_]*.py"))
    modules = imported(f"import awq_pycuda.analyze, {parts}")
    assert {"pandas", "matplotlib"} <= modules
    assert not {"hydra", "pycuda", "cuda"} & modules
