"""Sweeps through a real Slurm. `make test-slurm` starts one on this machine (tools/slurm_node.sh) and runs these."""

import json
import subprocess
import sys
import time
import uuid
from pathlib import Path

import h5py
import pytest

pytestmark = pytest.mark.slurm

SMALL = ("backend=cpu", "n=32", "timing=once")
LIMIT_S = 120  # far beyond what any wait here takes; ends a test whose job was lost


@pytest.fixture
def sweep(tmp_path):
    """`sweep("layers=1,2")`: starts the sweep in a process of its own; what it leaves in the queue is cancelled."""
    name = f"awq-{uuid.uuid4().hex[:8]}"
    started = []

    def start(*overrides: str) -> subprocess.Popen:
        settings = [f"hydra.launcher.{setting}" for setting in (f"name={name}", "mem_gb=1", "timeout_min=5")]
        command = [sys.executable, "-m", "awq_pycuda.run", "-m", "hydra/launcher=submitit_slurm", *settings]
        process = subprocess.Popen(
            [*command, *SMALL, *overrides],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        process.job_name = name
        started.append(process)
        return process

    yield start
    subprocess.run(["scancel", f"--name={name}"], check=True)
    for process in started:
        process.kill()
        process.communicate()


def queue(process: subprocess.Popen) -> list[str]:
    """The ids of the sweep's jobs that are in Slurm's queue."""
    command = ["squeue", f"--name={process.job_name}", "--noheader", "--array", "--format=%i"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()


def wait_until(condition) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.2)


def statuses(folder: Path, key: str) -> dict[str, str]:
    """Of every result file below: the job's override of the key, and how the job ended."""
    found = {}
    for path in folder.rglob("results.h5"):
        with h5py.File(path) as file:
            (override,) = (text for text in json.loads(file.attrs["overrides"]) if text.startswith(f"{key}="))
            found[override] = file.attrs["status"]
    return found


def test_a_job_that_fails_leaves_the_others_their_results(sweep, tmp_path):
    # The activations of a deep chain of uniform weights overflow.
    process = sweep("layers=1,60,2")
    out, err = process.communicate(timeout=LIMIT_S)
    assert (process.returncode, err) == (1, "")
    assert "3 jobs: 2 complete, 1 failed" in out
    assert "FloatingPointError" in out
    assert statuses(tmp_path, "layers") == {"layers=1": "complete", "layers=60": "failed", "layers=2": "complete"}


def test_a_job_that_is_cancelled_leaves_the_others_their_results(sweep, tmp_path):
    # The first job would take minutes, and the launcher waits for the jobs in order. (Needs a node with two cores.)
    process = sweep("layers=20", "timing.repeats=100000,1,2")
    wait_until(lambda: len(statuses(tmp_path, "timing.repeats")) == 2 and len(queue(process)) == 1)
    (job,) = queue(process)
    subprocess.run(["scancel", job], check=True)
    out, err = process.communicate(timeout=LIMIT_S)
    assert (process.returncode, err) == (1, "")
    assert "3 jobs: 2 complete, 1 interrupted" in out
    assert "interrupted by SIGTERM" in out
    wait_until(lambda: queue(process) == [])  # Slurm still completes the cancelled one for a moment
    assert statuses(tmp_path, "timing.repeats") == {
        "timing.repeats=100000": "failed",
        "timing.repeats=1": "complete",
        "timing.repeats=2": "complete",
    }
