"""Ctrl-C, SIGTERM and SIGHUP: what was finished is stored, the exit code is 128 + the signal's number, nothing else."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import psutil
import pytest
from conftest import TINY_SWEEP, files_under, found, start
from test_sweep import wait_for

from awq_pycuda import signals, summary
from awq_pycuda.engine import execution
from awq_pycuda.results.status import read_status
from awq_pycuda.signals import STOPPING, Stopped, held, released, stoppable
from awq_pycuda.sweeps import hosts, isolation
from awq_pycuda.sweeps.messages import Job, Outcome, Started
from awq_pycuda.sweeps.sweep import Reporter, reporting_processes

LONG = ("backend=cpu", "n=24", "layers=2", "timing.repeats=100000", "hydra.run.dir=long")


def begun(process):
    """Waits until a single run is at work."""
    assert "backend cpu" in process.stdout.readline()
    time.sleep(0.5)


@pytest.mark.parametrize("number", STOPPING, ids=lambda number: number.name)
def test_a_run_stores_what_it_has_and_says_which_signal(tmp_path, number):
    process = start(tmp_path, *LONG)
    begun(process)
    process.send_signal(number)
    process.send_signal(number)  # as impatient users and systems do
    _, err = process.communicate(timeout=300)
    assert process.returncode == 128 + number
    (line,) = err.splitlines()
    assert line.startswith(f"failed: interrupted by {number.name} (")
    with h5py.File(tmp_path / "long" / "results.h5") as file:
        assert (file.attrs["status"], file.attrs["error"]) == ("failed", f"interrupted by {number.name}")
        assert len(file["layers"]) == 2


@pytest.mark.parametrize("number", STOPPING, ids=lambda number: number.name)
def test_a_sweep_ends_with_its_table(environment, tmp_path, number):
    runs = environment(seed_1="sleep")
    folder = tmp_path / "work"
    process = start(folder, *TINY_SWEEP, "seed=range(0,4)", "study=stopped")
    wait_for(lambda: 1 in runs())
    process.send_signal(number)
    process.send_signal(number)
    out, err = process.communicate(timeout=300)
    assert (process.returncode, err) == (128 + number, "")
    assert "4 jobs: 2 not run, 1 complete, 1 interrupted" in out
    assert found(folder) == {0: ("complete", ""), 1: ("failed", f"interrupted by {number.name}")}


@pytest.mark.parametrize("processes", [1, 2])
def test_a_sweep_of_joblib_s_stores_its_jobs_too(environment, tmp_path, processes):
    runs = environment(seed_1="sleep", seed_2="sleep")
    folder = tmp_path / "work"
    launcher = ("hydra/launcher=joblib", f"hydra.launcher.n_jobs={processes}")
    process = start(folder, *TINY_SWEEP, "seed=1,2,3,4", *launcher)
    wait_for(lambda: sum(runs().values()) == processes)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=300)
    assert (process.returncode, err) == (143, "")
    stored = {1: ("failed", "interrupted by SIGTERM"), 2: ("failed", "interrupted by SIGTERM")}
    assert found(folder) == dict(list(stored.items())[:processes])


def test_a_process_of_joblib_s_between_jobs_does_not_cost_the_others_theirs(environment, tmp_path):
    runs = environment(seed_1="sleep")
    folder = tmp_path / "work"
    process = start(folder, *TINY_SWEEP, "seed=0,1", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2")

    def reporting():
        places = {report.parent for report in folder.rglob("*.jsonl")}
        return sorted(at_work for place in places for at_work in reporting_processes(place).values())

    wait_for(lambda: 1 in runs() and reporting() == [False, True])
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=300)
    assert (process.returncode, err) == (143, "")
    assert found(folder) == {0: ("complete", ""), 1: ("failed", "interrupted by SIGTERM")}


def test_a_process_is_at_work_by_its_last_report(tmp_path):
    reporter = Reporter(tmp_path)
    assert reporting_processes(tmp_path) == {}
    reporter.started(0)
    assert reporting_processes(tmp_path) == {os.getpid(): True}
    reporter.ended(0, Outcome("skipped"))
    assert reporting_processes(tmp_path) == {os.getpid(): False}
    (report,) = tmp_path.glob("*.jsonl")
    with open(report, "a") as file:
        file.write('{"job": 1, "sta')
    assert reporting_processes(tmp_path) == {os.getpid(): True}
    reporter._alive.release()
    assert reporting_processes(tmp_path) == {}


@pytest.mark.parametrize("moment", ["send", "recv"])
def test_a_signal_between_two_messages_of_a_job_s_is_passed_on(environment, compose, monkeypatch, tmp_path, moment):
    environment(seed_0="sleep")
    config = compose("n=24", "layers=2", "timing=once", "backend=cpu")

    class Untimely(hosts.Connection):
        def send(self, request):
            super().send(request)
            if moment == "send":
                signal.raise_signal(signal.SIGTERM)

        def recv(self):
            answer = super().recv()
            if moment == "recv" and isinstance(answer, Started):
                signal.raise_signal(signal.SIGTERM)
            return answer

    monkeypatch.setattr(hosts, "Connection", Untimely)
    with stoppable() as stop:
        outcome = isolation.run_isolated(Job(config, tmp_path, Path("study"), [], ""))
    assert (outcome.state, outcome.stop, stop.number) == ("interrupted", True, signal.SIGTERM)
    assert read_status(outcome.folder) == ("failed", "interrupted by SIGTERM")


def test_a_signal_between_jobs_is_told_to_the_next(monkeypatch):
    monkeypatch.setattr(signals, "_noted", None)
    before = {each: signal.getsignal(each) for each in STOPPING}
    try:
        signals.note_between_jobs()
        assert not signals.came_between_jobs()
        signal.raise_signal(signal.SIGHUP)
        signal.raise_signal(signal.SIGTERM)
        assert signals.came_between_jobs()
        told = []
        with stoppable(told.append, held=True) as stop:
            assert (stop.number, told) == (signal.SIGHUP, [signal.SIGHUP])
        with pytest.raises(Stopped, match="interrupted by SIGHUP"), stoppable():
            pass
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def test_the_innermost_is_told_and_those_around_it_know():
    outer_told, inner_told = [], []
    with stoppable(outer_told.append) as outer:
        with stoppable(inner_told.append, held=True) as inner:
            signal.raise_signal(signal.SIGTERM)
        assert (outer.number, inner.number) == (signal.SIGTERM, signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)  # changes nothing any more
    assert (outer_told, inner_told) == ([], [signal.SIGTERM])
    with held(), released():
        pass  # what came to those that are over is not raised again


def test_a_worker_that_alone_is_told_to_stop_costs_one_job(environment, tmp_path):
    runs = environment(seed_1="sleep")
    process = start(tmp_path / "work", *TINY_SWEEP, "seed=range(0,3)")
    wait_for(lambda: 1 in runs())
    (worker,) = psutil.Process(process.pid).children()
    worker.terminate()
    out, err = process.communicate(timeout=300)
    assert (process.returncode, err) == (1, "")
    assert "3 jobs: 2 complete, 1 interrupted" in out
    assert found(tmp_path / "work")[1] == ("failed", "interrupted by SIGTERM")


@pytest.mark.parametrize("delay", [0.15, 0.4, 0.8])
def test_a_signal_while_the_command_starts_is_one_line(tmp_path, delay):
    process = start(tmp_path / "work", "n=24", "timing.repeats=100000", "backend=cpu")
    wait_for(lambda: signal_is_caught(process.pid))
    time.sleep(delay)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 143
    (line,) = err.splitlines()
    assert line == "interrupted before any work" or line.startswith("failed: interrupted by SIGTERM (")


def signal_is_caught(pid):
    """Whether a process handles SIGTERM, as Linux tells."""
    with open(f"/proc/{pid}/status") as status:
        (caught,) = (int(line.split()[1], 16) for line in status if line.startswith("SigCgt"))
    return bool(caught >> (signal.SIGTERM - 1) & 1)


@pytest.mark.parametrize("ignored", ["INT", "HUP"])
def test_what_is_ignored_from_the_start_stays_so(tmp_path, ignored):
    command = [sys.executable, "-m", "awq_pycuda.run", *LONG]
    shell = ["sh", "-c", f'trap "" {ignored}; exec "$@"', "sh", *command]
    process = subprocess.Popen(shell, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    begun(process)
    process.send_signal(signal.Signals[f"SIG{ignored}"])
    time.sleep(0.3)
    assert process.poll() is None
    process.terminate()
    _, err = process.communicate(timeout=300)
    assert process.returncode == 143
    assert err.startswith("failed: interrupted by SIGTERM (")


@pytest.mark.parametrize("where", ["while storing", "after storing"])
def test_a_run_that_is_done_when_the_signal_comes_is_complete(cli, monkeypatch, tmp_path, where):
    write, summarise = execution.write, summary.print_summary

    def write_and_signal(folder, record):
        signal.raise_signal(signal.SIGTERM)
        return write(folder, record)

    def signal_and_summarise(*arguments):
        signal.raise_signal(signal.SIGTERM)
        summarise(*arguments)

    if where == "while storing":
        monkeypatch.setattr(execution, "write", write_and_signal)
    else:
        monkeypatch.setattr(summary, "print_summary", signal_and_summarise)
    code, out, err = cli("n=8", "layers=1", "backend=cpu")
    assert (code, err) == (143, "")
    (path,) = tmp_path.rglob("results.h5")
    assert read_status(path.parent) == ("complete", "")
    assert "next: " in out


def test_a_signal_before_any_work_leaves_nothing(cli, monkeypatch, tmp_path):
    monkeypatch.setattr(execution, "validate", lambda config: signal.raise_signal(signal.SIGHUP))
    assert cli("n=8") == (129, "", "interrupted before any work\n")
    assert files_under(tmp_path / "work") == []


def test_the_first_signal_is_raised_and_the_handlers_come_back():
    before = [signal.getsignal(each) for each in STOPPING]
    told = []
    with stoppable(told.append) as stop:
        with pytest.raises(Stopped, match="interrupted by SIGTERM"):
            signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGHUP)
        with pytest.raises(Stopped), held(), released():
            pass
        assert (stop.number, told, stop.exit_code(0)) == (signal.SIGTERM, [signal.SIGTERM], 143)
    assert [signal.getsignal(each) for each in STOPPING] == before


def test_a_handler_of_a_launcher_s_is_kept():
    seen = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    try:
        with stoppable() as stop:
            os.kill(os.getpid(), signal.SIGTERM)
        assert (seen, stop.number) == ([signal.SIGTERM], None)
    finally:
        signal.signal(signal.SIGTERM, before)
