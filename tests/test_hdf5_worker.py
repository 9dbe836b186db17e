"""Reading in processes of their own: a library that loops, crashes or eats memory costs one file, not the analysis."""

import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT
from result_files import make_run
from version_1 import write_version_1

from awq_pycuda import hdf5_worker
from awq_pycuda.results.files import read_files
from awq_pycuda.results.reader import ResultFile


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("real"))


@pytest.fixture
def fresh(monkeypatch):
    """Workers of the test's own, ended with it."""
    monkeypatch.setattr(hdf5_worker, "_idle", [])
    yield
    hdf5_worker._end_idle()


def test_a_script_that_asks_is_not_run_again(real, tmp_path):
    """Workers of multiprocessing import the caller's script, and a notebook's user has no reason to guard it."""
    script = tmp_path / "script.py"
    script.write_text(
        "from pathlib import Path; from awq_pycuda.results.files import read_files; print('begin', flush=True)\n"
        f"print(*map(type, read_files([Path({str(real)!r})])))"
    )
    done = subprocess.run(
        [sys.executable, script],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=60,
    )
    assert (done.stdout, done.stderr) == ("begin\n<class 'awq_pycuda.results.reader.ResultFile'>\n", "")


def test_outcomes_come_in_the_order_of_the_files(real, tmp_path):
    paths = []
    for index in range(250):
        paths.append(tmp_path / f"{index}.h5")
        paths[-1].write_bytes(b"text" if index % 3 == 0 else real.read_bytes())
    outcomes = read_files(paths)
    for index, (path, outcome) in enumerate(zip(paths, outcomes, strict=True)):
        assert outcome == "not an HDF5 file" if index % 3 == 0 else outcome.path == path
    assert read_files([]) == []


def test_relative_paths_are_those_of_this_process(real, monkeypatch):
    read_files([real])  # a worker is there, with the working folder of before
    monkeypatch.chdir(real.parent)
    assert isinstance(read_files([Path(real.name)])[0], ResultFile)


def test_zeros_in_the_strings_do_not_hang_it(real, tmp_path, monkeypatch, fresh):
    """What a power cut leaves: the first page alone. HDF5 2.0 loops for ever on it."""
    monkeypatch.setattr(hdf5_worker, "CPU_SECONDS", 1)
    whole = write_version_1(tmp_path).read_bytes()
    torn = tmp_path / "torn.h5"
    torn.write_bytes(whole[:4096] + bytes(len(whole) - 4096))
    before, outcome, after = read_files([real, torn, real])
    assert isinstance(before, ResultFile)
    assert isinstance(after, ResultFile)
    assert outcome.startswith("damaged HDF5 file: ")


@pytest.mark.parametrize("asked", ["status.read_status(path.parent)", "status.complete_on(path)"])
def test_zeros_in_the_strings_do_not_hang_a_sweep_that_asks_for_a_status(tmp_path, asked):
    path = write_version_1(tmp_path)
    code = "from pathlib import Path; from awq_pycuda import hdf5_worker; from awq_pycuda.results import status; "
    code += f"path = Path({str(path)!r}); hdf5_worker.CPU_SECONDS = 1; print({asked})"

    def answer():
        command = [sys.executable, "-c", code]  # where it hangs, not this process
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60, cwd=ROOT).stdout

    assert answer().startswith("('c")
    damaged = bytearray(path.read_bytes())
    begin = damaged.find(b"GCOL") + 200
    damaged[begin : begin + 1024] = bytes(1024)
    path.write_bytes(damaged)
    assert answer() == "None\n"


def test_strings_that_claim_gigabytes_do_not_take_them(tmp_path, monkeypatch, fresh):
    """A string is stored as its length and the address of its heap; HDF5 allocates the length before it looks there."""
    monkeypatch.setattr(hdf5_worker, "CPU_SECONDS", 60)  # filling 4 GiB takes seconds, and shall not be what ends it
    damaged = bytearray(write_version_1(tmp_path).read_bytes())
    heap = damaged.find(b"GCOL")
    reference = damaged.find(heap.to_bytes(8, "little"))
    damaged[reference - 4 : reference] = b"\xff" * 4
    path = tmp_path / "claims.h5"
    path.write_bytes(damaged)
    most = max(3 * 2**20, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)  # KiB; other tests had children too
    (outcome,) = read_files([path])
    hdf5_worker._end_idle()
    assert outcome.startswith("damaged HDF5 file: ")
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss <= most


def test_a_worker_that_dies_is_replaced_and_its_file_named(real, fresh):
    read_files([real])
    (victim,) = hdf5_worker._idle
    os.kill(victim.process.pid, signal.SIGSTOP)

    def kill():
        time.sleep(0.2)
        os.kill(victim.process.pid, signal.SIGKILL)

    threading.Thread(target=kill).start()
    outcomes = read_files([real] * 30)
    assert outcomes[0] == "damaged HDF5 file: the HDF5 library crashed on it (SIGKILL)"
    assert all(isinstance(outcome, ResultFile) for outcome in outcomes[1:])


def test_an_idle_worker_that_died_costs_no_file(real, fresh):
    read_files([real])
    hdf5_worker._idle[0].process.kill()
    hdf5_worker._idle[0].process.wait()
    assert isinstance(read_files([real])[0], ResultFile)


@pytest.mark.parametrize(
    ("code", "why"),
    [
        (-signal.SIGXCPU, "the HDF5 library found no end of it"),
        (-signal.SIGSEGV, "the HDF5 library crashed on it (SIGSEGV)"),
        (3, "the HDF5 library crashed on it (exit code 3)"),
    ],
)
def test_reasons(code, why):
    assert hdf5_worker._why_it_ended(SimpleNamespace(end=lambda: code, ready=True)) == f"damaged HDF5 file: {why}"


def test_a_worker_that_cannot_start_is_no_fault_of_the_files(real, monkeypatch, fresh):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(OSError, match="ended at its start with exit code 1"):
        read_files([real])
    # The same where it has ended before it is sent anything.
    init = hdf5_worker._Worker.__init__
    monkeypatch.setattr(hdf5_worker._Worker, "__init__", lambda self: (init(self), self.process.wait())[0])
    with pytest.raises(OSError, match="ended at its start with exit code 1"):
        read_files([real])


def test_an_idle_worker_that_ends_as_it_is_taken_is_replaced(real, monkeypatch, fresh):
    read_files([real])
    (idle,) = hdf5_worker._idle
    idle.process.kill()
    idle.process.wait()
    monkeypatch.setattr(idle.process, "poll", lambda: None)
    assert isinstance(read_files([real])[0], ResultFile)


def test_an_interrupt_ends_the_workers(real, monkeypatch, fresh):
    started = []
    init = hdf5_worker._Worker.__init__

    def remember(self):
        init(self)
        started.append(self)

    def interrupt(connections):
        raise KeyboardInterrupt

    monkeypatch.setattr(hdf5_worker._Worker, "__init__", remember)
    monkeypatch.setattr(hdf5_worker, "wait", interrupt)
    with pytest.raises(KeyboardInterrupt):
        read_files([real])
    assert [each.process.returncode for each in started] == [-signal.SIGKILL]
