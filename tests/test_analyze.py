"""The command: what it writes and prints, how it refuses, and the comparison that guards a CI."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
from conftest import files_under
from result_files import editing, make_many, make_run, vary

from awq_pycuda import analyze
from awq_pycuda.analysis import figures, report
from awq_pycuda.analysis.collect import collect, column_of
from awq_pycuda.analysis.derived import COMPARED
from awq_pycuda.options import describe
from awq_pycuda.results import schema

ROOT = Path(__file__).resolve().parent.parent
TABLES = ("runs", "layers", "curves", "timings", "passes")
BASELINE = ("max_output_mse", "max_output_sqnr_db")  # which every run has by default
ALWAYS = [name for name, figure in COMPARED.items() if figure.presence != "optional" or name in BASELINE]


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("real"), "timing.repeats=5")


@pytest.fixture
def command(tmp_path, monkeypatch, capfd):
    """`command("PATH", "out=x")`: runs it in a fresh folder; returns exit code, stdout, stderr."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)

    def call(*arguments):
        capfd.readouterr()
        code = analyze.main([str(argument) for argument in arguments])
        captured = capfd.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def quick(monkeypatch):
    """Without the pictures, which have tests of their own."""
    monkeypatch.setattr(figures, "write_figures", lambda collection, folder: ([], []))
    monkeypatch.setattr(report, "write_report", lambda collection, path, failures: path.write_text("report"))


def slowed(real, folder, factor, config=None):
    """A run with steady times: 1 ms a stage and pass, times the factor."""
    path = vary(real, folder, config)
    with editing(path) as file:
        for name in ("host_ms", "pipeline_ms"):
            shape = file["timings"][name].shape
            file["timings"][name][...] = factor * (1 + np.arange(np.prod(shape)).reshape(shape) % shape[-1] / 1000)
    return path


def test_it_writes_tables_figures_and_a_report(real, command, tmp_path):
    make_many(tmp_path / "sweep", 6)
    vary(real, tmp_path / "odd/failed", status="failed", error="RuntimeError: two\nlines")
    (tmp_path / "odd/damaged.h5").write_bytes(real.read_bytes()[:5000])
    code, out, err = command(tmp_path / "sweep", tmp_path / "odd")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[:2] == [
        "7 runs: 6 complete, 1 failed; 1 left out",
        "failed failed: RuntimeError: two lines",
    ]
    assert lines[2].startswith(f"left out {tmp_path}/odd/damaged.h5: damaged HDF5 file: ")
    assert lines[3].startswith("Runs (pipeline: median of passes")
    assert [line.split()[:2] for line in lines[6:12]] == [
        [f"n={n}", f"tile={tile}"] for n, tile in ((16, 8), (16, 16), (32, 8), (48, 8), (64, 8), (80, 8))
    ]
    assert lines[12:] == [
        "tables report: runs, layers, curves, timings, passes as Parquet and CSV",
        f"figures report/figures: {len(files_under(Path('report/figures')))} files, PNG and SVG",
        "report report/report.html",
        f"next: python -m webbrowser {Path('report/report.html').resolve().as_uri()}",
    ]
    assert "\x1b" not in out
    written = files_under(Path("report"))
    assert {f"{name}.{suffix}" for name in TABLES for suffix in ("parquet", "csv")} <= set(written)
    assert {Path(name).suffix for name in written if name.startswith("figures/")} == {".png", ".svg"}
    assert Path("report/report.html").stat().st_size > 1e6


def test_tables_come_back_as_they_were(real, command, quick, tmp_path):
    vary(real, tmp_path / "0", {"tile": None, "threads": None, "seed": 2**64 - 1})
    vary(real, tmp_path / "1", {"tile": 8, "seed": 1}, status="failed", error='quotes " and, commas')
    assert command(tmp_path, "out=made/of/several")[0] == 0
    found = collect([tmp_path])
    for name in TABLES:
        table = getattr(found, name)
        pd.testing.assert_frame_equal(pd.read_parquet(f"made/of/several/{name}.parquet"), table)
        text = pd.read_csv(f"made/of/several/{name}.csv", dtype=str)  # pandas before 3.1 would round what it parses
        assert list(text.columns) == list(table.columns)
        for column in table.select_dtypes("number"):
            expected = table[column].to_numpy(dtype=float, na_value=np.nan)
            assert np.array_equal([float(value) for value in text[column]], expected, equal_nan=True), column


def test_existing_files_are_replaced_and_others_kept(real, command, quick):
    Path("report").mkdir()
    Path("report/runs.csv").write_text("old")
    Path("report/notes.txt").write_text("mine")
    assert command(real)[0] == 0
    assert "config_hash" in Path("report/runs.csv").read_text()
    assert Path("report/notes.txt").read_text() == "mine"


def test_a_folder_named_like_an_option_is_a_path(real, command, quick):
    for name in ("n=8", "tile=16,n=8"):
        vary(real, Path(name))
    code, out, _ = command("n=8", "tile=16,n=8")
    assert (code, out.splitlines()[0]) == (0, "2 runs: 2 complete, 0 failed; 0 left out")


def test_names_that_are_no_text_or_look_like_markup(real, command, quick, tmp_path):
    vary(real, tmp_path / "[bold]good[/bold]")
    damaged = os.fsencode(tmp_path) + b"/\xff[red].h5"
    Path(os.fsdecode(damaged)).touch()
    for arguments in ([tmp_path], ["compare", tmp_path, tmp_path, "out=made"]):
        code, out, _ = command(*arguments)
        assert code == 0
        assert "\\udcff[red].h5: its path is not UTF-8" in out
    assert len(pd.read_parquet("made/compare_not_compared.parquet")) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "PATH: no value; allowed: result files and folders"),
        (["out=x"], "PATH: no value; allowed: result files and folders"),
        (["gone"], "gone: no such file or folder; allowed: result files and folders"),
        ([""], "'': no such file or folder; allowed: result files and folders"),
        (["GOOD", "output=x"], "output=x: no such key, file or folder (did you mean out?); allowed: out"),
        (["GOOD", "fail_on=slower"], "fail_on=slower: no such key, file or folder; allowed: out"),
        (["GOOD", "out=file"], "out=file: is no folder; allowed: a folder that can be written to"),
        (["GOOD", "out="], "out=: is missing; allowed: a folder that can be written to"),
        (["GOOD", "out=/proc/nowhere"], "out=/proc/nowhere: "),
        (["GOOD", "out=file/below"], "out=file/below: Not a directory; allowed: a folder that can be written to"),
        (["file"], "file: no result that can be read; left out: file (not an HDF5 file)"),
        (["empty"], "empty: no result that can be read; left out: empty (no file that ends in .h5 or .hdf5 in this"),
        (["many"], "many: no result that can be read; left out: many/0.h5 (empty file), many/1.h5 (empty file), many/"),
        (["compare", "GOOD"], "compare: 1 paths; allowed: two, A and B"),
        (["compare", "GOOD", "GOOD", "GOOD"], "compare: 3 paths; allowed: two, A and B"),
        (["compare", "GOOD", "file"], "file: no result that can be read"),
        (["compare", "GOOD", "gone"], "gone: no such file or folder"),
        (
            ["compare", "GOOD", "GOOD", "fail_on=faster"],
            "fail_on=faster: 'faster' is none; allowed: slower, worse, or both",
        ),
        (["compare", "GOOD", "GOOD", "fail_on="], "fail_on=: is missing; allowed: slower, worse, or both"),
        (
            ["compare", "GOOD", "GOOD", "tolerance=5%"],
            "tolerance=5%: is no number; allowed: a number from 0 to below 1",
        ),
        (
            ["compare", "GOOD", "GOOD", "tolerance=1"],
            "tolerance=1: is out of range; allowed: a number from 0 to below 1",
        ),
        (
            ["compare", "GOOD", "GOOD", "metric_tolerance=nan"],
            "metric_tolerance=nan: is no number; allowed: a number from 0",
        ),
        (["compare", "GOOD", "GOOD", "ignore=nothing"], "ignore=nothing: no such config key; allowed: backend, "),
        (["compare", "GOOD", "GOOD", "limit=2"], "limit=2: no such key, file or folder; allowed: fail_on, tolerance"),
    ],
)
def test_bad_input_is_one_line_with_nothing_written(real, command, arguments, message):
    Path("file").write_text("text")
    Path("empty").mkdir()
    Path("many").mkdir()
    for index in range(7):
        Path(f"many/{index}.h5").touch()
    before = files_under(Path())
    code, out, err = command(*(real if argument == "GOOD" else argument for argument in arguments))
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {message}")
    assert len(err.splitlines()) == 1
    assert files_under(Path()) == before


def test_many_left_out_files_are_counted(command):
    for index in range(7):
        Path(f"{index}.h5").touch()
    assert command(".")[2].endswith("4.h5 (empty file) and 2 more\n")


def test_a_full_disk_is_one_line(real, command, quick, monkeypatch):
    def no_space(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(analyze, "_write_table", no_space)
    code, out, err = command(real)
    assert (code, out, err) == (1, "", "failed: [Errno 28] No space left on device\n")


def test_help(command):
    for flag in ("--help", "-h"):
        code, out, err = command(flag)
        assert (code, err) == (0, "")
        assert "analyze compare A B" in out
        assert describe(analyze.AnalyzeOptions) in out
        assert describe(analyze.CompareOptions) in out


def test_compare_prints_every_row_of_a_few_configs(real, command, tmp_path):
    slowed(real, tmp_path / "a", 1)
    path = slowed(real, tmp_path / "b", 2)
    with editing(path) as file:
        file["layers/002/metrics"].attrs["rtn_output_mse"] = 0.0
    code, out, err = command("compare", tmp_path / "a", tmp_path / "b")
    assert (code, err) == (0, "")
    lines = [line.split() for line in out.splitlines()]
    with h5py.File(real) as file:
        (device,) = {row.device_name for row in collect([real]).runs.itertuples()}
        assert out.startswith(f"A {tmp_path}/a: 1 complete, cpu on {device}")
        assert " ".join(lines[4]) == "all pipeline 1.002 2.004 2.000 1.996 to 2.004 5, 5 slower"
        assert ["times:", "7", "slower"] in lines
        old = file["layers/002/metrics"].attrs["rtn_output_mse"]
    assert f"all 002 rtn_output_mse {old:.6g} 0 {-old:+.3g} better".split() in lines
    assert ["metrics:", str(3 * len(ALWAYS) - 1), "same,", "1", "better"] in lines
    assert files_under(Path()) == []


@pytest.mark.parametrize(
    ("fail_on", "factor", "mse", "code", "found"),
    [
        ("slower", 2, 0.0, 1, "7 slower"),
        ("slower", 0.5, 9e9, 0, ""),
        ("worse", 2, 0.0, 0, ""),
        ("worse", 0.5, 9e9, 1, "1 worse"),
        ("slower,worse", 2, 9e9, 1, "7 slower, 1 worse"),
        ("slower,worse", 1, None, 0, ""),
    ],
)
def test_fail_on_guards_a_ci(real, command, tmp_path, fail_on, factor, mse, code, found):
    slowed(real, tmp_path / "a", 1)
    path = slowed(real, tmp_path / "b", factor)
    if mse is not None:
        with editing(path) as file:
            file["layers/002/metrics"].attrs["rtn_output_mse"] = mse
    actual, out, _ = command("compare", tmp_path / "a", tmp_path / "b", f"fail_on={fail_on}")
    assert actual == code
    assert (f"fail_on={fail_on}: {found}" in out.splitlines()) == bool(found)
    assert command("compare", tmp_path / "a", tmp_path / "b")[0] == 0


def test_a_run_that_fails_in_b_alone_fails_the_guard(real, command, tmp_path):
    for name in ("a/0", "b/0"):
        vary(real, tmp_path / name)
    vary(real, tmp_path / "a/1", {"tile": 8})
    vary(real, tmp_path / "b/1", {"tile": 8}, status="failed", error="RuntimeError: no")
    code, out, _ = command("compare", tmp_path / "a", tmp_path / "b", "fail_on=slower")
    assert code == 1
    assert "not compared: B 1: failed: RuntimeError: no" in out.splitlines()
    assert "fail_on=slower: 1 failed in B alone" in out.splitlines()
    assert command("compare", tmp_path / "a", tmp_path / "b")[0] == 0


def test_compare_writes_all_where_it_prints_a_part(real, command, tmp_path):
    for seed in range(8):
        slowed(real, tmp_path / f"a/{seed}", 1, {"seed": seed})
        slowed(real, tmp_path / f"b/{seed}", 2 + seed if seed < 7 else 1, {"seed": seed})
    vary(real, tmp_path / "b/tile", {"tile": 8})
    code, out, _ = command("compare", tmp_path / "a", tmp_path / "b", "out=made")
    assert code == 0
    assert "times: 49 slower, 7 same; 9 more rows are not shown (out=FOLDER writes all)" in out.splitlines()
    assert "not compared: B tile: no complete run of A has its config" in out.splitlines()
    printed = [line.split()[0] for line in out.splitlines() if line.startswith(" seed=")]
    assert printed == [f"seed={seed}" for seed in (6, 5, 4, 3, 2) for _ in range(7)] + ["seed=1"] * 5
    times = pd.read_parquet("made/compare_times.parquet")
    assert times["verdict"].value_counts().to_dict() == {"slower": 49, "same": 7}
    assert len(pd.read_csv("made/compare_metrics.csv")) == 8 * 3 * len(ALWAYS)
    assert len(pd.read_csv("made/compare_not_compared.csv")) == 1


def test_keys_in_which_the_rest_never_agrees_are_named(real, command, tmp_path):
    for name, tile in (("a", 4), ("b", 8)):
        vary(real, tmp_path / name / "common")
        vary(real, tmp_path / name / "other", {"tile": tile})
    hint = "The runs without a counterpart never agree in tile; ignore=tile sets that aside."
    assert hint in command("compare", tmp_path / "a", tmp_path / "b")[1].splitlines()
    vary(real, tmp_path / "a/other", {"tile": 8})
    assert hint not in command("compare", tmp_path / "a", tmp_path / "b")[1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal(real, command, monkeypatch, number):
    monkeypatch.setattr(analyze, "_collect", lambda *_: signal.raise_signal(number))
    assert command(real) == (128 + number, "", f"interrupted by {number.name}\n")


def test_as_a_command(real, tmp_path):
    """In a process of its own, from another folder, with a reader that goes away."""
    arguments = [sys.executable, "-m", "awq_pycuda.analyze", "compare", str(real), str(real), "fail_on=slower,worse"]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "times: 7 same" in done.stdout
    with open("/dev/full", "w") as full:
        kept = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
        done = subprocess.run(arguments, stdout=full, stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=kept)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1, done.stderr


DOCS = (ROOT / "docs" / "analysis.md").read_text(encoding="utf-8")


def test_the_documentation_names_every_column(real, command):
    found = collect([real])
    known = set(re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", DOCS, flags=re.DOTALL)))
    config = {column_of(key) for key in json.loads(found.runs["config"][0])}
    metrics = {entry.name for entry in schema.metrics()}  # the documentation names the page that has them
    for name in TABLES:
        assert set(getattr(found, name).columns) - config - metrics - known == set(), name
    command("compare", real, real, "out=made")
    for path in Path("made").glob("*.csv"):
        assert {path.stem, *pd.read_csv(path).columns} - known == set()


def test_the_documentation_s_python_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make_run(Path("outputs/5"))
    make_run(Path("outputs/20"), "gamma_grid=awq20")
    (code,) = re.findall(r"```python\n(.*?)```", DOCS, re.DOTALL)
    exec(code, {})
    assert "gamma_grid_size" in capsys.readouterr().out
