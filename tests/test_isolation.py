"""Which process gets which GPU, without a GPU; and how a worker goes."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from awq_pycuda.signals import STOPPING
from awq_pycuda.sweeps import isolation, worker
from awq_pycuda.sweeps.study import Job

CHOOSE = """
import sys
from awq_pycuda.sweeps import isolation
print(isolation._host._choose_gpu(), flush=True)
sys.stdin.read()
"""


@pytest.fixture
def choose(tmp_path, monkeypatch):
    """`choose()`: another process's choice among two GPUs, which it keeps until the test ends."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,GPU-1")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    processes = []

    def run():
        process = subprocess.Popen(
            [sys.executable, "-c", CHOOSE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        processes.append(process)
        return process.stdout.readline().strip()

    yield run
    for process in processes:
        process.communicate()


def test_every_process_gets_a_gpu_of_its_own(choose):
    host = isolation._Host()
    assert host._choose_gpu() == "0"
    host.close()
    assert host._choose_gpu() == "0"
    assert choose() == "GPU-1"
    assert choose() in ("0", "GPU-1")


def test_a_process_that_runs_no_jobs_leaves_its_gpu_to_others(choose, monkeypatch):
    host = isolation._Host()
    monkeypatch.setattr(isolation, "_host", host)
    assert host._choose_gpu() == "0"
    isolation.close_worker()
    assert {choose(), choose()} == {"0", "GPU-1"}


@pytest.fixture
def two_gpus(choose):
    """This process's hosts, where there are two GPUs."""
    isolation.close_worker()
    yield lambda: [host.reserved() for host in (isolation._host, *isolation._more)]
    isolation.close_worker()


def test_a_sweep_uses_every_gpu_that_nobody_else_has_chosen(two_gpus, choose):
    isolation.use_every_gpu()
    assert two_gpus() == ["0", "GPU-1"]
    isolation.use_every_gpu()
    assert two_gpus() == ["0", "GPU-1"]
    isolation.use_one_worker()
    assert two_gpus() == ["0"]
    assert choose() == "GPU-1"
    isolation.use_every_gpu()
    assert two_gpus() == ["0"]


def test_jobs_go_to_every_worker_that_is_free(two_gpus, compose, tmp_path):
    """The configs ask for the CPU, so that there need be no GPU."""
    isolation.use_every_gpu()
    configs = [compose("n=8", "layers=1", "timing=once", "backend=cpu", f"seed={seed}") for seed in range(5)]
    *fine, refused = isolation.checked([*configs, compose("n=99999999", "backend=cpu")])
    assert [answer.refusal for answer in fine] == [None] * 5
    assert refused.refusal.startswith("n=99999999: ")
    told = []
    isolation.run_all(
        (Job(config, tmp_path, Path("study"), [], "") for config in configs),
        lambda number: told.append(f"started {number}"),
        lambda number, outcome: told.append(f"{outcome.state} {number}"),
    )
    assert told[:2] == ["started 0", "started 1"]
    assert sorted(told) == sorted([f"{word} {number}" for word in ("started", "complete") for number in range(5)])
    for count, line in enumerate(told):  # never more than two at work, and no third before one has ended
        begun = sum(each.startswith("started") for each in told[: count + 1])
        assert begun - (count + 1 - begun) in (0, 1, 2), line
    assert len(list(tmp_path.glob("study/*/results.h5"))) == 5


@pytest.mark.parametrize(("given", "seen"), [("", []), ("-1", []), ("2", ["2"]), ("1,0", ["1", "0"])])
def test_the_environment_says_which_gpus_are_seen(monkeypatch, given, seen):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    assert isolation.visible_gpus() == seen


END = """
from awq_pycuda.sweeps import isolation
isolation._host._worker = isolation.Worker({})
print(isolation._host._worker._process.pid, flush=True)
input()
"""


def test_ctrl_c_while_the_worker_ends_is_no_traceback():
    process = subprocess.Popen(
        [sys.executable, "-c", END], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    worker = psutil.Process(int(process.stdout.readline()))
    worker.suspend()  # so that its end is still awaited when the interrupt comes
    process.stdin.write("\n")
    process.stdin.flush()
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    worker.resume()
    assert process.communicate(timeout=60) == ("", "")
    assert process.returncode == 0


@pytest.mark.parametrize("blocked", [(), STOPPING])
def test_a_job_leaves_the_mask_of_signals_as_it_was(blocked):
    """Of a worker they are blocked between jobs; where a job runs in a process of others they need not be."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
    try:
        with worker._unblocked_interrupts():
            assert not {*STOPPING} & signal.pthread_sigmask(signal.SIG_BLOCK, ())
        assert {*STOPPING} & signal.pthread_sigmask(signal.SIG_BLOCK, ()) == {*blocked}
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
