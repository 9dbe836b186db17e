"""One figure, one definition: a run's summary, the printed table, the CSV tables, tiles, the page and its figures."""

import json
import re

import h5py
import numpy as np
import pandas as pd
import pytest
from result_files import make_run

from awq_pycuda.analysis.collect import collect
from awq_pycuda.analysis.compare import compare
from awq_pycuda.analysis.figures_quality import error_removed_against
from awq_pycuda.analysis.selection import best_run
from awq_pycuda.analyze import main
from awq_pycuda.engine.execution import execute


@pytest.fixture
def analyzed(capsys, tmp_path):
    """`analyzed(folder)`: what analyze printed, its table of runs, the page's text and data."""

    def call(folder):
        capsys.readouterr()
        assert main([str(folder), f"out={tmp_path / 'out'}"]) == 0
        page = (tmp_path / "out/report.html").read_text(encoding="utf-8")
        data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])
        return capsys.readouterr().out, pd.read_csv(tmp_path / "out/runs.csv"), page, data

    return call


def cells(page):
    """The page's table of runs: head by head, the first run's texts."""
    table = re.search(r'<table id="runs".*?<thead>(.*?)</thead>.*?<tbody>\s*<tr(.*?)</tr>', page, re.DOTALL)
    head, body = table.groups()
    return dict(zip(re.findall(r">([^<]+)</th>", head), re.findall(r"<td[^>]*>([^<]*)</td>", body), strict=True))


@pytest.mark.parametrize("layers", [1, 4, 5])
def test_every_place_says_the_same_of_a_run(tmp_path, capsys, analyzed, layers):
    path = make_run(tmp_path / "runs/5", f"layers={layers}", "timing.repeats=6")
    summary = capsys.readouterr().out
    with h5py.File(path) as file:
        metrics = [layer["metrics"].attrs for layer in file["layers"].values()]
        removed = np.array([1 - layer["output_mse"] / layer["rtn_output_mse"] for layer in metrics])
        awq, rtn, by_max = ([layer[f"{kind}output_sqnr_db"] for layer in metrics] for kind in ("", "rtn_", "max_"))
        passes, stages = file["timings/pipeline_ms"][...], file["timings/host_ms"][...].sum(axis=0)
    low, median, high = np.quantile(removed, [0.25, 0.5, 0.75])
    printed, table, page, data = analyzed(tmp_path / "runs")
    share, quartiles = f"{100 * median:.1f} %", f"{100 * low:.1f} to {100 * high:.1f} %"
    (row,) = [line for line in printed.splitlines() if line.startswith(" 5 ")]
    noise = f"{100 * np.subtract(*np.quantile(passes, [0.75, 0.25])) / np.median(passes):.0f} %"
    decibels = [f"{np.median(values):.2f}" for values in (rtn, by_max, awq)]
    assert row.split()[1:5] == [str(layers), *decibels]
    assert f"{share} {quartiles}" in " ".join(row.split())
    assert row.split()[-2:] == noise.split()
    if layers > 1:
        assert f"error removed {share} (median of {layers} layers, quartiles {quartiles})" in summary
    assert table["error_removed_median"][0] == pytest.approx(median, rel=1e-12)
    assert table[["error_removed_q25", "error_removed_q75"]].to_numpy()[0] == pytest.approx([low, high], rel=1e-9)
    assert table["output_sqnr_db_median"][0] == pytest.approx(np.median(awq))
    assert f"<dt>error removed</dt><dd>{share}<small>" in page
    shown = cells(page)
    assert [shown[head] for head in ("error removed", "quartiles", "RTN dB", "max dB", "AWQ dB", "noise")] == [
        *(share, quartiles, *decibels, noise)
    ]
    figures = data["figures"]
    parts = [figures["removed"][part][0] for part in ("low", "median", "high")]
    assert parts == pytest.approx([low, median, high], rel=1e-4, abs=1e-6)
    assert figures["rtn"]["median"][0] == pytest.approx(np.median(rtn), rel=1e-4)
    time_ms = re.search(r"pipeline (\S+) ms \(median of 6, IQR (\S+) to (\S+)\)", summary).groups()
    assert f"<dt>pipeline</dt><dd>{time_ms[0]} ms<small>" in page
    assert f"IQR {time_ms[1]} to {time_ms[2]}" in page
    assert shown["pipeline ms"] == time_ms[0]
    for stage, (name, sums) in enumerate(data["sums"].items()):
        assert [sums[part][0] for part in ("low", "median", "high")] == pytest.approx(
            np.quantile(stages[stage], [0.25, 0.5, 0.75]), rel=1e-3
        ), name


def test_tile_and_picture_take_runs_by_their_median(tmp_path, analyzed):
    for grid in ("rtn", "awq20"):
        for seed in range(3):
            make_run(tmp_path / f"runs/{grid}{seed}", f"gamma_grid={grid}", f"seed={seed}", "layers=5")
    _, table, page, _ = analyzed(tmp_path / "runs")
    medians = table["error_removed_median"]
    of = f"median of 6 runs, {100 * medians.min():.1f} to {100 * medians.max():.1f} %"
    assert f"<dd>{100 * medians.median():.1f} %<small>{of}" in page
    ((_, draw),) = error_removed_against(collect([tmp_path / "runs"]))
    drawn = draw().axes[0].lines[0].get_ydata()
    assert drawn == pytest.approx(table.groupby("gamma_grid_size")["error_removed_median"].median().tolist())


@pytest.fixture
def dead(tmp_path, compose):
    """`dead(name, *silent)`: a run of three layers, those at `silent` without input."""

    def run(name, *silent):
        rng = np.random.default_rng(0)
        with h5py.File(tmp_path / f"{name}.h5", "w") as file:
            for index in range(3):
                group = file.create_group(f"layers/{index:03d}")
                group.attrs["name"] = f"expert.{index}"
                group["weight"] = rng.standard_normal((16, 12)).astype("f4")
                rows = rng.standard_normal((8, 12)) * rng.uniform(0.1, 10, 12)
                group["activations"] = (rows * (index not in silent)).astype("f4")
        given = ["backend=cpu", "inputs=file", f"inputs.path={tmp_path / name}.h5", "layers=null", "tokens=null"]
        config = compose(*given)
        return execute(config, tmp_path / "runs" / name, given, f"study: dead\ninputs: {{path: {name}}}\nn: 8\n")

    return run


def test_a_layer_without_signal_is_never_the_best(dead, analyzed, tmp_path):
    dead("alive")
    dead("one", 1)
    dead("all", 0, 1, 2)
    printed, table, page, data = analyzed(tmp_path / "runs")
    line = "no signal reaches layers expert.0, expert.1, expert.2: the exact output is all 0, so there is no SQNR"
    for text in (printed, page):
        assert f"{line} (in 2 of 3 runs)" in text
    found = collect([tmp_path / "runs"])
    silent = found.layers[found.layers["output_sqnr_db"].isna()]
    assert len(silent) == 4
    assert silent[["rtn_output_sqnr_db", "error_removed", "propagated_sqnr_db"]].isna().all(axis=None)
    assert best_run(found) != "all"
    by_run = table.set_index("run")
    assert by_run.loc["all", ["error_removed_median", "output_sqnr_db_median"]].isna().all()
    others = found.layers[(found.layers["run"] == "one") & (found.layers["name"] != "expert.1")]
    assert by_run.loc["one", "error_removed_median"] == pytest.approx(others["error_removed"].median())
    (row,) = [text for text in printed.splitlines() if " inputs.path=all" in text]
    assert row.split()[1:6] == ["3", "-", "-", "-", "-"]
    place = data["runs"].index("all")
    assert data["figures"]["awq"]["median"][place] is None
    assert sum(data["layers"]["silent"]) == 4
    assert data["curves"]  # the search of a layer without signal has an error of 0 by RTN's 0: no ratio, no failure
    assert "left out" not in printed.replace("0 left out", "")


def test_a_layer_that_lost_its_signal_is_not_better(dead):
    alive, silent = (collect([dead(name, *which).parent]) for name, which in (("a", ()), ("b", (1,))))
    for one, other in ((alive, silent), (silent, alive)):
        metrics = compare(one, other, ignore=["inputs.path"]).metrics
        mine = metrics[(metrics["name"] == "expert.1") & metrics["metric"].str.endswith("sqnr_db")]
        assert set(mine["verdict"]) == {"unclear"}
    same = compare(silent, silent).metrics
    assert set(same["verdict"]) == {"same"}
