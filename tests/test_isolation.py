"""Which process gets which GPU, without a GPU; and how a worker goes."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from awq_pycuda.errors import InputError
from awq_pycuda.signals import STOPPING
from awq_pycuda.sweeps import hosts, isolation, worker
from awq_pycuda.sweeps.messages import Job

CHOOSE = """
import sys
from awq_pycuda.sweeps import hosts
print(hosts.first()._choose_gpu(), flush=True)
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
    host = hosts.Host()
    assert host._choose_gpu() == "0"
    host.close()
    assert host._choose_gpu() == "0"
    assert choose() == "GPU-1"
    assert choose() in ("0", "GPU-1")


def test_a_process_that_runs_no_jobs_leaves_its_gpu_to_others(choose, monkeypatch):
    host = hosts.Host()
    monkeypatch.setattr(hosts, "_first", host)
    assert host._choose_gpu() == "0"
    hosts.leave()
    assert {choose(), choose()} == {"0", "GPU-1"}


def answered(*batches):
    return [answer for _, answers in isolation.checked(batches) for answer in answers]


@pytest.fixture
def two_gpus(choose):
    """This process's hosts, where there are two GPUs."""
    hosts.leave()
    yield lambda: [host.reserved() for host in hosts.every()]
    hosts.leave()


def test_a_sweep_uses_every_gpu_that_nobody_else_has_chosen(two_gpus, choose):
    hosts.use_every_gpu()
    assert two_gpus() == ["0", "GPU-1"]
    hosts.use_every_gpu()
    assert two_gpus() == ["0", "GPU-1"]
    hosts.use_one_worker()
    assert two_gpus() == ["0"]
    assert choose() == "GPU-1"
    hosts.use_every_gpu()
    assert two_gpus() == ["0"]


def test_a_worker_that_was_asked_for_nothing_is_ended_at_once(two_gpus):
    hosts.start(on_gpu=True)
    assert two_gpus() == ["0", "GPU-1"]
    processes = [host._worker._process for host in hosts.every()]
    hosts.leave()
    assert [process.returncode for process in processes] == [-signal.SIGKILL] * 2


class Library:
    """NVML of so many GPUs, or a CUDA driver: what a call gives, by its name."""

    def __init__(self, answers):
        self.answers = answers

    def __getattr__(self, name):
        def call(*arguments):
            code, *values = self.answers.get(name, [0])
            for argument, value in zip(arguments[-len(values) :], values, strict=False):
                argument._obj.value = value
            return code

        return call


DRIVER = {"cuDeviceGetCount": [0, 7]}


@pytest.mark.parametrize(
    ("nvml", "counted"),
    [
        ({"nvmlDeviceGetCount_v2": [0, 2], "nvmlDeviceGetMigMode": [3]}, 2),
        ({"nvmlDeviceGetCount_v2": [0, 2], "nvmlDeviceGetMigMode": [0, 0, 0]}, 2),
        ({"nvmlDeviceGetCount_v2": [0, 2], "nvmlDeviceGetMigMode": [0, 1, 1]}, 7),
        ({"nvmlDeviceGetCount_v2": [0, 2], "nvmlDeviceGetHandleByIndex_v2": [4]}, 7),
        ({"nvmlInit_v2": [9]}, 7),
        (None, 7),
    ],
)
def test_nvml_counts_the_gpus_unless_they_are_divided(monkeypatch, nvml, counted):
    def load(name):
        if name == "libcuda.so.1":
            return Library(DRIVER)
        if nvml is None:
            raise OSError
        return Library(nvml)

    monkeypatch.setattr("ctypes.CDLL", load)
    assert hosts._count_gpus.__wrapped__() == counted


def test_what_is_wrong_with_a_job_is_told_before_what_is_wrong_with_planning_the_next(compose):
    def batches():
        yield [compose("n=99999999", "backend=cpu")]
        raise InputError("planning")

    told = isolation.checked(batches())
    ((_, (answer,)),) = [next(told)]
    assert answer.refusal.startswith("n=99999999: ")
    with pytest.raises(InputError, match="planning"):
        next(told)


def test_jobs_go_to_every_worker_that_is_free(two_gpus, compose, tmp_path):
    """The configs ask for the CPU, so that there need be no GPU."""
    hosts.use_every_gpu()
    configs = [compose("n=8", "layers=1", "timing=once", "backend=cpu", f"seed={seed}") for seed in range(5)]
    *fine, refused = answered([*configs, compose("n=99999999", "backend=cpu")])
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
    assert hosts.visible_gpus() == seen


END = """
from awq_pycuda.sweeps import hosts
hosts.first()._worker = hosts.Worker(False, {})
hosts.first()._worker.send(None)
print(hosts.first()._worker._process.pid, flush=True)
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
