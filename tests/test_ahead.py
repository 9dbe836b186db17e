"""What `run` begins before it has imported the rest of itself."""

import ctypes
import gc
import subprocess
import sys

import pytest

from awq_pycuda import ahead, signals, streams
from awq_pycuda.backends.cuda import early
from awq_pycuda.backends.cuda.toolchain import Toolchain
from awq_pycuda.sweeps import hosts


@pytest.mark.parametrize(
    ("arguments", "begun"),
    [
        (["n=8"], ["GPU"]),
        (["n=8", "backend=cpu"], []),
        (["-m", "n=8"], ["workers on GPUs"]),
        (["n=8,16", "backend=cpu", "--multirun"], ["workers"]),
        (["-m", "n=8", "hydra/launcher=joblib"], []),
        (["--help"], []),
        (["-m", "--cfg", "job"], []),
    ],
)
def test_what_a_command_line_will_need_is_begun(monkeypatch, arguments, begun):
    told = []
    monkeypatch.setattr(signals, "exit_before_work", lambda: None)
    monkeypatch.setattr(streams, "prepare", lambda: None)
    monkeypatch.setattr(gc, "disable", lambda: None)
    monkeypatch.setattr(early, "begin", lambda: told.append("GPU"))
    monkeypatch.setattr(hosts, "start", lambda on_gpu: told.append("workers on GPUs" if on_gpu else "workers"))
    ahead.begin(arguments)
    assert told == begun


def test_what_cannot_be_begun_is_told_by_the_command(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path / "missing"))
    code = "import tempfile; tempfile._candidate_tempdir_list = lambda: ['/missing']; import runpy, sys; "
    code += "sys.argv[1:] = ['-m', 'n=8', 'layers=1', 'backend=cpu', 'seed=1,2', 'study=s']; "
    code += "runpy.run_module('awq_pycuda.run', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "No usable temporary directory" in done.stderr
    assert "ahead.py" not in done.stderr


@pytest.fixture
def driver(monkeypatch):
    """`driver(what)`: a driver whose call of this name fails; returns the names of all that are called."""
    called = []

    def install(broken):
        class Driver:
            def __init__(self, name):
                if broken == name:
                    raise OSError

            def __getattr__(self, name):
                return lambda *_: called.append(name) or int(name == broken)

        monkeypatch.setattr(ctypes, "CDLL", Driver)
        return called

    monkeypatch.setattr(early, "find_toolchain", lambda: Toolchain("nvcc", "13.0", ()))
    early.toolchain.cache_clear()
    yield install
    early.toolchain.cache_clear()
    early._context = early._kit = None


RETAINED = ["cuInit", "cuDeviceGet", "cuDevicePrimaryCtxRetain"]


@pytest.mark.parametrize(
    ("broken", "called"),
    [
        ("nothing", [*RETAINED, "cuDevicePrimaryCtxRelease_v2"]),
        ("cuDevicePrimaryCtxRetain", RETAINED),
        ("cuInit", RETAINED[:1]),
        ("libcuda.so.1", []),
    ],
)
def test_a_context_begun_early_is_given_back_to_who_retained_it_since(driver, broken, called):
    found = driver(broken)
    early.begin()
    assert early.toolchain().nvcc == "nvcc"
    early.hand_over()
    early.hand_over()
    assert found == called
