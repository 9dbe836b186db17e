"""What a sweep says before its first job: how many jobs it plans, how many are complete; and the next command."""

import re
import signal

import pytest
from conftest import TINY_SWEEP, files_under, start

from awq_pycuda import run
from awq_pycuda.sweeps import isolation
from awq_pycuda.sweeps.composition import MAX_JOBS

SWEEP = (*TINY_SWEEP, "study=tiles")


def test_a_sweep_that_goes_on_says_how_many_jobs_are_complete(cli, environment, tmp_path):
    environment(seed_2="raise")
    code, out, _ = cli(*SWEEP, "seed=1,2,3")
    assert code == 1
    assert out.splitlines()[0] == "study outputs/tiles: 3 jobs"
    assert out.splitlines()[-1] == "next: python -m awq_pycuda.analyze outputs/tiles"
    environment()
    assert cli(*SWEEP, "seed=2,3,4,1,5")[1].splitlines()[0] == "study outputs/tiles: 5 jobs, 2 complete already"
    assert cli(*SWEEP, "seed=range(1,6)")[1].splitlines()[0] == "study outputs/tiles: 5 jobs, 5 complete already"
    # Another device's or another file's results are not these jobs'.
    assert cli(*SWEEP, "seed=1,2", "save=full")[1].splitlines()[0] == "study outputs/tiles: 2 jobs"


@pytest.mark.parametrize("launcher", ["joblib", "submitit_local"])
def test_other_launchers_say_it_too(cli, launcher):
    assert cli(*SWEEP, "seed=1,2")[0] == 0
    code, out, _ = cli(*SWEEP, "seed=1,2,3", f"hydra/launcher={launcher}")
    assert code == 0
    assert out.splitlines()[0] == "study outputs/tiles: 3 jobs, 2 complete already"


def test_a_sweep_without_results_names_no_next_command(cli, environment):
    environment(seed_1="raise")
    code, out, _ = cli(*TINY_SWEEP, "seed=1")
    assert code == 1
    assert "next: " not in out


def test_a_large_sweep_says_how_many_jobs_it_plans_and_can_be_stopped(tmp_path):
    process = start(tmp_path / "work", *SWEEP, "seed=range(0,1000000)")
    assert process.stdout.readline() == "planning 1,000,000 jobs\n"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=300)
    assert (process.returncode, out, err) == (130, "", "interrupted before any work\n")
    assert files_under(tmp_path / "work") == []


def test_a_log_is_told_how_the_planning_goes(cli, monkeypatch):
    monkeypatch.setattr(run, "_QUIET_JOBS", 3)
    monkeypatch.setattr(run, "_TELL_SECONDS", 0)
    monkeypatch.setattr(run, "_CHECKED_AT_ONCE", 2)
    code, out, _ = cli(*TINY_SWEEP, "seed=range(0,5)")
    assert code == 0
    lines = out.splitlines()
    assert lines[0] == "planning 5 jobs"
    for line, done in zip(lines[1:4], (2, 4, 5), strict=True):
        assert re.fullmatch(rf"planned {done} of 5 jobs, \d+:\d\d left", line)


def test_a_bad_job_late_in_a_sweep_stops_it_before_the_first(cli, monkeypatch, tmp_path):
    monkeypatch.setattr(run, "_CHECKED_AT_ONCE", 2)
    asked, ask = [], isolation._ask
    monkeypatch.setattr(isolation, "_ask", lambda configs: asked.append(len(configs)) or ask(configs))
    code, _, err = cli(*TINY_SWEEP, "tile=1,2,3,4,33")
    assert code == 2
    assert err.startswith("error: tile=33: ")
    assert asked == [2, 2]
    assert files_under(tmp_path / "work") == []


def test_a_sweep_may_not_be_larger_than_anybody_waits_for(cli):
    assert f"allowed: at most {MAX_JOBS:,}" in cli("-m", f"seed=range(0,{MAX_JOBS + 1})")[2]
