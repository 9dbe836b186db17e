"""Where runs read and write: one folder for one run, relative paths, folders that vanish, streams that lack letters."""

import os
import subprocess
import sys

import h5py
import numpy as np
import pytest
from conftest import TINY_SWEEP, files_under, found, start

from awq_pycuda.engine import execution
from awq_pycuda.results.status import read_status
from awq_pycuda.sweeps import hosts

TINY = ("n=8", "layers=1", "backend=cpu", "timing=once")


@pytest.mark.parametrize("failed", [False, True])
def test_a_second_run_into_a_folder_is_refused(cli, tmp_path, failed):
    # Deep chains of uniform weights overflow.
    first = ("n=64", "layers=60" if failed else "layers=1", *TINY[2:])
    assert cli(*first, "hydra.run.dir=same")[0] == int(failed)
    path = tmp_path / "work" / "same" / "results.h5"
    before = path.read_bytes()
    code, out, err = cli(*TINY, "seed=2", "hydra.run.dir=same")
    assert (code, out) == (2, "")
    assert err.startswith("error: hydra.run.dir=")
    assert err.endswith("holds the results.h5 of another run; allowed: a folder without results.h5\n")
    assert path.read_bytes() == before
    path.unlink()
    assert cli(*TINY, "seed=2", "hydra.run.dir=same")[0] == 0


def test_two_runs_at_once_into_a_folder(cli, tmp_path):
    first = start(tmp_path / "work", "backend=cpu", "n=24", "timing.repeats=100000", "hydra.run.dir=same")
    assert "backend cpu" in first.stdout.readline()
    code, _, err = cli(*TINY, "hydra.run.dir=same")
    assert code == 2
    assert "same: another run is at work there; allowed: " in err
    first.kill()
    first.communicate()
    assert cli(*TINY, "hydra.run.dir=same")[0] == 0


def test_other_files_in_the_folder_do_not_matter(cli, tmp_path):
    folder = tmp_path / "work" / "notes"
    folder.mkdir(parents=True)
    (folder / "readme.txt").touch()
    assert cli(*TINY, "hydra.run.dir=notes")[0] == 0
    assert files_under(folder) == ["readme.txt", "results.h5"]


def test_a_worker_from_another_folder_finds_relative_paths(cli, monkeypatch, tmp_path):
    """It is kept from sweep to sweep of one process."""
    hosts.leave()
    monkeypatch.chdir(tmp_path)
    hosts.first().worker(on_gpu=False)
    (tmp_path / "work").mkdir()
    np.savez(tmp_path / "work" / "layers.npz", **{"000.weight": np.ones((5, 4), "f4")})
    code, _, err = cli("-m", "inputs=file", "inputs.path=layers.npz", "n=3", "backend=cpu", "seed=1,2")
    assert (code, err) == (0, "")


@pytest.mark.parametrize("mode", [(), ("-m", "study=s"), ("-m", "study=s", "hydra/launcher=joblib")])
@pytest.mark.parametrize("path", ["layers.npz", "../work/layers.npz"])
def test_a_relative_path_starts_where_the_command_does(cli, tmp_path, mode, path):
    (tmp_path / "work").mkdir()
    np.savez(tmp_path / "work" / "layers.npz", **{"000.weight": np.ones((5, 4), "f4")})
    hashes = set()
    for chdir in ("true", "false"):
        places = ("hydra.run.dir=at/run",) if not mode else (f"hydra.sweep.dir=at/{chdir}",)
        code, _, err = cli(
            *mode, "inputs=file", f"inputs.path={path}", "n=3", "backend=cpu", *places, f"hydra.job.chdir={chdir}"
        )
        assert (code, err) == (0, "")
        for result in tmp_path.rglob("results.h5"):
            assert result.is_relative_to(tmp_path / "work" / "at")
            with h5py.File(result) as file:
                hashes.add((file.attrs["config_hash"], file.attrs["config"].partition("inputs:")[2]))
            result.unlink()
    assert len(hashes) == 1
    assert f"path: {path}" in next(iter(hashes))[1]


def test_a_working_folder_that_is_gone_is_one_line(tmp_path):
    command = f'mkdir gone && cd gone && rmdir ../gone && "{sys.executable}" -m awq_pycuda.run "$@"'
    for mode in ((), ("-m",)):
        done = subprocess.run(
            ["sh", "-c", command, "sh", *mode, *TINY], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 2
        (line,) = done.stderr.splitlines()
        assert line.startswith("error: the working folder: ")
        assert "allowed" in line


@pytest.mark.parametrize("replaced", [False, True])
def test_a_working_folder_that_goes_away_during_a_run(cli, monkeypatch, tmp_path, replaced):
    describe = execution.describe

    def describe_and_remove(*arguments):
        work = tmp_path / "work"
        work.rename(tmp_path / "away")
        if replaced:
            work.touch()
        return describe(*arguments)

    monkeypatch.setattr(execution, "describe", describe_and_remove)
    code, _, err = cli(*TINY, "hydra.run.dir=here")
    monkeypatch.chdir(tmp_path)
    if replaced:
        assert code == 1
        (line,) = err.splitlines()
        assert line.startswith("failed: ")
        assert "results.h5 cannot be written" in line
    else:
        assert (code, err) == (0, "")
        assert read_status(tmp_path / "work" / "here") == ("complete", "")


def test_a_working_folder_that_goes_away_during_a_sweep(environment, tmp_path):
    runs = environment(seed_0="sleep")
    work = tmp_path / "work"
    process = start(work, *TINY_SWEEP, "seed=0,1", "study=s")
    while not runs():
        assert process.poll() is None
    work.rename(tmp_path / "away")
    process.terminate()
    out, err = process.communicate(timeout=300)
    assert process.returncode == 143
    assert "Traceback" not in err
    assert "2 jobs: " in out


def run_in(folder, *arguments, **environment):
    command = [sys.executable, "-m", "awq_pycuda.run", *arguments]
    variables = os.environ | {"PYTHONUTF8": "0", **environment}
    return subprocess.run(command, cwd=folder, env=variables, capture_output=True, check=False)


@pytest.mark.parametrize(
    "environment",
    [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C"}, {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"}],
    ids=["PYTHONIOENCODING", "C", "ascii files"],
)
@pytest.mark.parametrize("mode", [(), ("-m", "seed=1,2", "study=s")], ids=["run", "sweep"])
def test_an_output_that_lacks_a_letter_costs_nothing(tmp_path, environment, mode):
    folder = tmp_path / "Gerät"
    folder.mkdir()
    done = run_in(folder, *mode, *TINY, **environment)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"next: python -m awq_pycuda.analyze " in done.stdout
    assert {status for status, _ in found(folder).values()} == {"complete"}
    if "PYTHONIOENCODING" in environment and not mode:
        assert rb"Ger\xe4t" in done.stdout
    refused = run_in(folder, "n=ü", **environment)
    assert refused.returncode == 2
    assert refused.stderr.startswith(b"error: n=")


def test_the_version_is_the_project_s(cli):
    from awq_pycuda import __version__

    assert cli("--version") == (0, f"awq_pycuda {__version__}\n", "")


@pytest.mark.parametrize("arguments", [(), ("-m", "seed=0,1"), ("--version",), ("seed=-1",)])
def test_a_full_stdout_costs_no_run(tmp_path, arguments):
    """Also where Python keeps what it prints until it ends: as it does without PYTHONUNBUFFERED."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    command = [sys.executable, "-m", "awq_pycuda.run", "backend=cpu", "n=8", "layers=1", "timing=once", *arguments]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == (2 if "seed=-1" in arguments else 0)
    assert len(done.stderr.splitlines()) == done.returncode // 2
