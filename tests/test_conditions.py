"""What a GPU told beside the passes reaches whoever reads their times."""

from pathlib import Path

import numpy as np
import pytest
from result_files import make_run, real, told, vary

from awq_pycuda import analyze
from awq_pycuda.analysis import report
from awq_pycuda.analysis.collect import collect
from awq_pycuda.backends.cpu import CpuBackend
from awq_pycuda.results.conditions import held_down

POWER_CAP, GPU_IDLE = 0x4, 0x1


@pytest.fixture
def folder(real, tmp_path):
    """Three runs of a sweep: one that nothing was told of, a steady one, and one held down in some of its passes."""
    vary(real, tmp_path / "0", {"tile": 8})
    steady, slowed = (vary(real, tmp_path / str(index), {"tile": tile}) for index, tile in ((1, 16), (2, 32)))
    passes = collect([steady]).passes["repeat"].size
    told(steady, throttle_reasons=[GPU_IDLE] * passes, sm_clock=[1980.0] * passes)
    told(slowed, throttle_reasons=[POWER_CAP] + [0] * (passes - 1), temperature=[80.0] * passes)
    return tmp_path


def test_reasons_that_hold_the_clock_down_are_those_of_heat_and_power():
    reasons = np.array([0, GPU_IDLE, 2, POWER_CAP, 8, 0x10, 0x20, 0x40, 0x80, 0x100, 5, np.nan])
    held = held_down({"throttle_reasons": reasons}, reasons.size)
    assert reasons[held].tolist() == [4, 8, 0x20, 0x40, 0x80, 5]
    assert held_down({}, 3).tolist() == [False] * 3


def test_the_tables_have_the_conditions_of_each_pass(folder):
    found = collect([folder])
    passes = found.passes["repeat"].nunique()
    runs = found.runs.set_index("tile")
    assert np.isnan(runs["held_down"][8])
    assert runs["held_down"][16] == 0
    assert runs["held_down"][32] == 1 / passes
    by_run = found.passes.set_index("run")
    slowed = by_run.loc[runs["run"][32]]
    assert slowed["held_down"].tolist() == [True] + [False] * (passes - 1)
    assert slowed["temperature"].tolist() == [80] * passes
    assert slowed["sm_clock"].isna().all()
    assert by_run.loc[runs["run"][16], "sm_clock"].tolist() == [1980] * passes
    assert not by_run.loc[runs["run"][8], "held_down"].any()


def test_the_analysis_names_runs_that_were_held_down(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("awq_pycuda.analysis.figures.write_figures", lambda *_: ([], []))
    share = round(100 / collect([folder]).passes["repeat"].nunique())
    assert analyze.main([str(folder), f"out={tmp_path / 'report'}"]) == 0
    assert (
        f"passes with the clock held down, so slower than the device: tile=32 ({share} %)\n" in capsys.readouterr().out
    )
    page = Path(tmp_path / "report/report.html").read_text(encoding="utf-8")
    assert "share of the passes measured while the device held its clock down" in page


def test_the_report_of_steady_runs_has_no_such_column(folder, tmp_path):
    report.write_report(collect([folder / "0", folder / "1"]), tmp_path / "report.html", [])
    assert "held its clock down" not in (tmp_path / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(("reasons", "count"), [([0.0, 4.0, 0x40], 2), ([0.0, 1.0, 0.0], 0)])
def test_a_run_says_when_its_clock_was_held_down(reasons, count, capsys, tmp_path, monkeypatch):
    later = iter(reasons)
    monkeypatch.setattr(CpuBackend, "conditions", lambda _: {"throttle_reasons": next(later)})
    make_run(tmp_path, "layers=1", "timing.warmup=0", "timing.repeats=3")
    line = f"in {count} of 3 passes the GPU held its clock down, by heat or its power's limit\n"
    assert (line in capsys.readouterr().out) == bool(count)
