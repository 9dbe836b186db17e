import shutil
import subprocess
import sys
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
SOURCES = (
    "pyproject.toml",
    "README.md",
    "LICENSE",
    "requirements-cpu.txt",
    "awq_pycuda",
    "conf",
    "cuda",
    "experiments",
)


def files_under(folder: Path) -> set[str]:
    files = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {str(path) for path in files if "__pycache__" not in path.parts}


def requirements(file: str) -> set[Requirement]:
    lines = [line.partition("#")[0].strip() for line in (ROOT / file).read_text().splitlines()]
    return {Requirement(line) for line in lines if line and not line.startswith("-r ")}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    pytest.importorskip("setuptools", minversion="77")
    # Built from a copy: setuptools leaves build/ and an egg-info beside the sources.
    copy = tmp_path_factory.mktemp("sources")
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, copy / name)
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", out, copy]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (path,) = out.glob("awq_pycuda-*.whl")
    with zipfile.ZipFile(path) as archive:
        yield archive


def test_wheel_holds_the_package_its_configs_and_its_kernels(wheel):
    expected = {f"awq_pycuda/{name}" for name in files_under(ROOT / "awq_pycuda")}
    expected |= {f"awq_pycuda/{folder}/{name}" for folder in ("conf", "cuda") for name in files_under(ROOT / folder)}
    expected |= {f"awq_pycuda/experiments/{path.name}" for path in (ROOT / "experiments").glob("*.yaml")}
    assert {name for name in wheel.namelist() if ".dist-info/" not in name} == expected


def test_wheel_asks_for_what_requirements_cpu_lists(wheel):
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = Parser().parsestr(wheel.read(name).decode())
    asked = {Requirement(line) for line in metadata.get_all("Requires-Dist")}
    assert {requirement for requirement in asked if requirement.marker is None} == requirements("requirements-cpu.txt")


@pytest.mark.parametrize(
    ("extra", "file"),
    [
        ("cuda", "requirements.txt"),
        ("capture", "requirements-capture.txt"),
        ("cluster", "requirements-cluster.txt"),
    ],
)
def test_extras_are_the_requirement_files(extra, file):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {Requirement(line) for line in project["optional-dependencies"][extra]} == requirements(file)
