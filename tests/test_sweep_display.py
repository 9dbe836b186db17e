"""What a sweep shows: its jobs' reports, the table at its end, and what is left where files or processes are gone."""

import errno
import re
import shutil
import signal
import subprocess
import sys
import time
from io import StringIO

import h5py
import pytest
from conftest import TINY_SWEEP
from rich.console import Console

from awq_pycuda.signals import Stopped, stoppable
from awq_pycuda.spread import Spread, error_removed, milliseconds, percent, percent_range
from awq_pycuda.sweeps.messages import Outcome
from awq_pycuda.sweeps.sweep import JobStatus, Reporter, Sweep


def test_the_display_counts_and_a_half_written_report_waits(tmp_path):
    console = Console(file=StringIO(), force_terminal=True, width=100)
    sweep = Sweep(tmp_path, tmp_path / "reports", [f"seed={seed}" for seed in range(5)], console)
    reporter = Reporter(tmp_path / "reports")
    for number, outcome in enumerate((Outcome("complete", seconds=1), Outcome("failed", "why"), Outcome("skipped"))):
        reporter.started(number)
        reporter.ended(number, outcome)
    reporter.started(3)
    with open(tmp_path / "reports" / "other.jsonl", "w") as other:
        other.write('{"job": 4, "sta')
        other.flush()
        assert sweep._poll() == [0, 1]
        with console.capture() as shown:
            console.print(sweep._display())
        assert re.search(r"3/5, 1 done, 1 failed, 1 skipped, 1 running, \d+:\d\d left", shown.get())
        other.write('te": "running"}\n')
    assert sweep._poll() == []
    assert [job.state for job in sweep.jobs] == ["complete", "failed", "skipped", "running", "running"]


def test_a_study_s_folder_that_goes_away_ends_in_the_table(tmp_path):
    reports = tmp_path / "study" / "reports"
    sweep = Sweep(reports.parent, reports, ["seed=0"], Console(file=StringIO()))
    reporter = Reporter(reports)
    reporter.started(0)
    assert sweep._poll() == []
    reports.parent.rename(tmp_path / "away")
    reports.parent.touch()
    sweep.start()
    (job,) = sweep.finish()
    assert (job.state, job.reason) == ("failed", "the process that ran it ended")


def test_a_sweep_goes_on_after_its_folder_was_removed(tmp_path):
    reports = tmp_path / "study" / "reports"
    sweep = Sweep(reports.parent, reports, ["seed=0", "seed=1"], Console(file=StringIO()))
    reporter = Reporter(reports)
    reporter.started(0)
    reporter.ended(0, Outcome("failed", "a reason that makes the line long"))
    assert sweep._poll() == [0]
    shutil.rmtree(reports.parent)
    assert sweep._poll() == []
    reporter.started(1)
    reporter.ended(1, Outcome("complete"))
    assert sweep._poll() == [1]
    assert [job.state for job in sweep.jobs] == ["failed", "complete"]


def test_a_job_that_ran_elsewhere_in_a_study_that_is_gone(tmp_path):
    study = tmp_path / "study"
    sweep = Sweep(study, study / "reports", ["seed=0"], Console(file=StringIO()))
    sweep.jobs[0] = JobStatus("elsewhere", folder=str(study / "0123"))
    study.touch()
    sweep.start()
    (job,) = sweep.finish()
    assert job.state == "failed"
    assert "Not a directory" in job.reason


def test_a_disk_too_full_for_reports_ends_in_one_line_and_the_table(cli, monkeypatch):
    def no_space(self, event):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Reporter, "_append", no_space)
    code, out, err = cli(*TINY_SWEEP, "seed=0,1")
    assert (code, err) == (1, "failed: [Errno 28] No space left on device\n")
    assert "2 jobs: 2 not run" in out


def test_a_launcher_that_waits_for_dead_processes_is_interrupted(tmp_path, monkeypatch):
    """As Slurm's does without accounting: the process that ran the job is gone, and nobody says so."""
    monkeypatch.setattr("awq_pycuda.sweeps.sweep._ABANDONED_SECONDS", 0.5)
    reports = tmp_path / "reports"
    report = "from pathlib import Path; from awq_pycuda.sweeps.sweep import Reporter; import sys, time\n"
    report += "reporter = Reporter(Path(sys.argv[1])); reporter.started(0); print(flush=True); time.sleep(600)"
    process = subprocess.Popen([sys.executable, "-c", report, str(reports)], stdout=subprocess.PIPE)
    process.stdout.readline()
    sweep = Sweep(tmp_path, reports, ["seed=0"], Console(file=StringIO()))
    sweep.start()
    time.sleep(1)
    assert not sweep.abandoned
    with stoppable() as stop:
        process.kill()
        process.communicate()
        with pytest.raises(Stopped):
            time.sleep(60)
    assert stop.number == signal.SIGTERM
    assert sweep.abandoned
    (job,) = sweep.finish()
    assert (job.state, job.reason) == ("failed", "the process that ran it ended")


def test_the_table_has_each_job_s_figures_with_their_spread(cli, tmp_path):
    code, out, err = cli("-m", "backend=cpu", "inputs=outliers", "n=24", "layers=3", "seed=0,1", "timing.repeats=4")
    assert (code, err) == (0, "")
    lines = [line for line in out.splitlines() if re.match(r" \d ", line)]
    assert len(lines) == 2
    for line in lines:
        seed = re.search(r"seed=(\d)", line)[1]
        (path,) = [
            path for path in tmp_path.rglob("results.h5") if f"seed: {seed}\n" in h5py.File(path).attrs["config"]
        ]
        with h5py.File(path) as file:
            passes = Spread.of(file["timings/pipeline_ms"][...])
            layers = [layer["metrics"].attrs for layer in file["layers"].values()]
            removed = Spread.of(error_removed(layer["output_mse"], layer["rtn_output_mse"]) for layer in layers)
        shown = [milliseconds(passes.median), percent(passes.noise, 0), percent(removed.median), percent_range(removed)]
        assert line.split("complete")[1].split()[1:] == " ".join(shown).split()
