"""Sweeps on GPUs: faults stay in their worker, the parent has no context, and no two jobs share a GPU at one time."""

import itertools
import json
import subprocess
import sys

import h5py
import pytest
from conftest import found, start

pytestmark = pytest.mark.gpu

SIZED = ("-m", "layers=4", "timing=once", "backend=cuda")
SWEEP = (*SIZED, "n=64")


def test_a_faulting_kernel_costs_its_own_job_only(cli, environment, tmp_path):
    trouble = {"seed_7": "fault", "seed_20": "raise", "seed_33": "raise", "seed_41": "SIGKILL", "seed_59": "SIGSEGV"}
    runs = environment(**trouble)
    code, out, err = cli(*SWEEP, "seed=range(0,60)", "study=faults")
    assert (code, err) == (1, "")
    assert "60 jobs: 55 complete, 5 failed" in out
    by_seed = found(tmp_path / "work")
    failed = {seed: error for seed, (status, error) in by_seed.items() if status == "failed"}
    assert sorted(failed) == [7, 20, 33, 41, 59]
    assert "illegal" in failed[7]
    assert "SIGKILL" in failed[41]
    assert "SIGSEGV" in failed[59]
    assert len(by_seed) == 60
    assert set(runs().values()) == {1}
    for path in tmp_path.rglob("results.h5"):
        with h5py.File(path) as file:
            if "illegal" in file.attrs.get("error", ""):
                assert list(file["layers"])[:2] == ["000", "001"]

    environment()
    code, out, _ = cli(*SWEEP, "seed=range(0,60)", "study=faults")
    assert code == 0
    assert "60 jobs: 5 complete, 55 skipped" in out


PARENT = """
import sys
from awq_pycuda import run
code = run.main()
print("pycuda" in sys.modules, "cuda.bindings.driver" in sys.modules)
sys.exit(code)
"""


def test_the_parent_of_a_sweep_never_touches_cuda(environment, tmp_path):
    environment()
    command = [sys.executable, "-c", PARENT, *SWEEP, "seed=0,1", "study=parent"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "False False"


def test_jobs_on_one_gpu_never_overlap(environment, monkeypatch, tmp_path):
    """Two processes: on one GPU they take turns, on two or more each has one of its own."""
    environment()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)  # as what counts them below does not look at it
    monkeypatch.setenv("SPANS", str(tmp_path / "spans"))
    sweep = (*SIZED, "n=512", "seed=range(0,12)", "study=spans", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
    process = start(tmp_path / "work", *sweep)
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert "12 jobs: 12 complete" in out
    spans = [json.loads(line) for line in (tmp_path / "spans").read_text().splitlines()]
    assert len(spans) == 12
    by_gpu = {gpu: sorted(span[1:] for span in spans if span[0] == gpu) for gpu, *_ in spans}
    for jobs in by_gpu.values():
        in_order = sorted(jobs, key=lambda job: job[1])
        assert all(first[2] <= second[1] for first, second in itertools.pairwise(in_order))
    visible = len(subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True).stdout.splitlines())
    if visible > 1:
        assert len(by_gpu) == 2
        assert all(len({process for process, *_ in jobs}) == 1 for jobs in by_gpu.values())
