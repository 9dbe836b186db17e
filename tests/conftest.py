"""Fixtures that several test modules share, and the GPU receipt."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import h5py
import hydra
import numpy as np
import pytest
from host_cuda.backend import host_backend
from host_cuda.build import not_run
from host_cuda.driver import open_gpu as open_host

from awq_pycuda import provenance, run
from awq_pycuda.backends.base import Backend
from awq_pycuda.backends.choose import settle_variants
from awq_pycuda.backends.cpu import CpuBackend
from awq_pycuda.config import Config
from awq_pycuda.kernels import table
from awq_pycuda.paths import resource_dir
from awq_pycuda.quant.format import Format
from awq_pycuda.sweeps import composition, hosts

ROOT = Path(__file__).parent.parent
TINY_SWEEP = ("-m", "n=24", "layers=2", "timing=once", "backend=cpu")
PLANT = Path(__file__).with_name("plant")
# tests/test_compiled.py fails where there is no Numba.
COMPILED = ["compiled"] if importlib.util.find_spec("numba") else []
BACKENDS = ["cpu", *COMPILED, pytest.param("cuda", marks=pytest.mark.gpu)]
STAGE_BACKENDS = ["host", *BACKENDS]  # host: the kernels, compiled for the CPU

_worst: dict[str, float] = {}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--receipt", type=Path, help="write what the GPU tests ran on and their worst errors to this file")


def pytest_report_header() -> str:
    left_out = not_run(resource_dir("cuda"))
    return "kernels not run on the CPU: " + (", ".join(f"{file} ({why})" for file, why in left_out.items()) or "none")


def may_hold_gpu_tests(module: Path) -> bool:
    """By its text, without importing it."""
    return bool(
        re.search(r"mark\.gpu|BACKENDS|\(.*\bbackend\b.*\):$", module.read_text(encoding="utf-8"), re.MULTILINE)
    )


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With `-m gpu` only modules with such tests are imported: a machine with a GPU needs no PyTorch, no notebook."""
    chosen = config.getoption("markexpr") != "gpu" or not collection_path.name.startswith("test_")
    return None if chosen or may_hold_gpu_tests(collection_path) else True


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What `-m gpu` leaves out holds no such test: seen in every run of all tests."""
    missed = {item.path.name for item in items if item.get_closest_marker("gpu") and not may_hold_gpu_tests(item.path)}
    if missed:
        raise pytest.UsageError(
            f"{', '.join(sorted(missed))}: marked gpu in a way that may_hold_gpu_tests does not see"
        )


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Only a run in which every GPU test passed leaves a receipt."""
    path = session.config.getoption("--receipt")
    if path is None:
        return
    if exitstatus != 0 or session.testsfailed:
        print(f"\nno receipt: {session.testsfailed} of {session.testscollected} tests failed")
        return
    from awq_pycuda.backends.cuda.backend import CudaBackend

    backend = CudaBackend({"TILE": 16}, {})
    receipt = {
        "kernels": kernel_digests(),
        "device": backend.device(),
        "versions": provenance.versions() | backend.versions(),
        "created": provenance.created(),
        "tests_passed": session.testscollected,
        "worst_errors": {name: float(f"{error:.3g}") for name, error in sorted(_worst.items())},
    }
    path.write_text(json.dumps(receipt, indent=2) + "\n", encoding="utf-8")


def kernel_digests() -> dict[str, str]:
    """SHA-256 of every file under cuda/, by name, and of what the table of kernels gives the compiler beside them."""
    contents = {path.name: path.read_bytes() for path in sorted(resource_dir("cuda").iterdir())}
    contents["constants"] = "\n".join(table.constants()).encode()
    return {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}


@pytest.fixture
def worst() -> Callable[[str, float, float], None]:
    """`worst(name, error, tolerance)`: asserts the error (NaN fails) and keeps the largest for the receipt."""

    def check(name: str, error: float, tolerance: float) -> None:
        assert error <= tolerance, f"{name}: {error:.3g} is beyond {tolerance:.3g}"
        _worst[name] = max(_worst.get(name, 0.0), float(error))

    return check


def make_backend(
    name: str, tile: int = 16, form: Format | None = None, search_on_host: bool = False, **choices: str
) -> Backend:
    """A backend, not entered; tile and the variants by stage are those of kernels and mean nothing to NumPy."""
    if name == "cpu":
        return CpuBackend()
    if name == "compiled":
        from awq_pycuda.backends.compiled import CompiledCpuBackend

        return CompiledCpuBackend()
    open_gpu = open_host
    if name == "cuda":
        from awq_pycuda.backends.cuda.device import open_gpu
    left = {stage: variant for stage, variant in choices.items() if variant == table.AUTO}
    choices |= settle_variants(left, tile, form or Format(), open_gpu().limits)[0]
    if name == "host":
        return host_backend({"TILE": tile}, choices, search_on_host=search_on_host)
    from awq_pycuda.backends.cuda.backend import CudaBackend

    backend = CudaBackend({"TILE": tile}, choices, search_on_host)
    for stage, variant in choices.items():
        found = table.find(stage, variant)
        obstacle = found.obstacle(found.defaults() | {"TILE": tile}, backend.limits)
        if obstacle is not None:
            pytest.skip(f"{stage} ({variant}) {obstacle}")
    return backend


@pytest.fixture(params=STAGE_BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    with make_backend(request.param) as entered:
        yield entered


@pytest.fixture
def compose() -> Iterator[Callable[..., Config]]:
    """`compose("n=8", "layers=2")`: the config that a command line gives, checked."""
    composition.register_schemas()
    with hydra.initialize_config_dir(str(resource_dir("conf")), version_base="1.3"):
        yield lambda *overrides: composition.to_config(hydra.compose("config", list(overrides)))


@pytest.fixture(scope="session", autouse=True)
def commands_can_be_interrupted():
    """A shell's background job ignores SIGINT, `nohup` SIGHUP, and what they start would, too."""
    python_s = {
        signal.SIGINT: signal.default_int_handler,
        signal.SIGTERM: signal.SIG_DFL,
        signal.SIGHUP: signal.SIG_DFL,
    }
    before = {number: signal.signal(number, handler) for number, handler in python_s.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session", autouse=True)
def package_found_from_any_folder():
    """Commands that tests start elsewhere find the package, which need not be installed."""
    given = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join((str(ROOT), *given)))
        yield


@pytest.fixture
def cli(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """`cli("tile=8")`: runs the command in a fresh folder; returns exit code, stdout, stderr."""

    def call(*arguments: str) -> tuple[int, str, str]:
        folder = tmp_path / "work"
        folder.mkdir(exist_ok=True)
        monkeypatch.chdir(folder)
        monkeypatch.setattr("sys.argv", ["awq_pycuda.run", *arguments])
        try:
            code = run.main()
        except SystemExit as stop:
            code = stop.code
        captured = capfd.readouterr()
        return code, captured.out, captured.err

    return call


def files_under(folder: Path) -> list[str]:
    """Every file and folder below, by relative path."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two arrays hold the same bytes in the same shape and type."""
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()


@pytest.fixture
def environment(tmp_path, monkeypatch):
    """`environment(seed="raise", ...)`: plants trouble in the workers to come; returns who reads which jobs ran."""
    runs = tmp_path / "runs"
    runs.touch()
    packages = os.environ["PYTHONPATH"]

    def plant(**trouble):
        hosts.leave()
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(PLANT), packages)))
        monkeypatch.setenv("PLANT", json.dumps({seed.removeprefix("seed_"): what for seed, what in trouble.items()}))
        monkeypatch.setenv("RUNS", str(runs))
        return lambda: Counter(int(line) for line in runs.read_text().split())

    yield plant
    hosts.leave()


def found(folder):
    """Status and error of every result file below, by the seed of its run."""
    by_seed = {}
    for path in folder.rglob("results.h5"):
        with h5py.File(path) as file:
            seed = int(re.search(r"^seed: (\d+)$", file.attrs["config"], re.MULTILINE)[1])
            by_seed[seed] = (file.attrs["status"], file.attrs.get("error", ""))
    return by_seed


def start(folder, *arguments):
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "awq_pycuda.run", *arguments]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
