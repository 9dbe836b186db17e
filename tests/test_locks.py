"""The lock files: they hold what the requirement files ask for, fit together, and are hashed throughout."""

import importlib.util
import io
import re
from itertools import combinations
from pathlib import Path
from typing import ClassVar

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
LOCKS = sorted(path.stem for path in (ROOT / "locks").glob("*.txt"))
MACHINES = [
    {"python_version": version, "python_full_version": f"{version}.9", "sys_platform": platform}
    for version in ("3.11", "3.12", "3.13")
    for platform in ("linux", "darwin")
]


@pytest.fixture(scope="module")
def lock():
    spec = importlib.util.spec_from_file_location("lock", ROOT / "tools" / "lock.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def asked(file):
    """The requirements of a file and of those that it names."""
    for line in (ROOT / file).read_text(encoding="utf-8").splitlines():
        line = line.partition("#")[0].strip()
        if line.startswith("-r "):
            yield from asked(line[3:])
        elif line:
            yield Requirement(line)


def entries(name):
    """Each entry of a lock: the requirement, and its hashes."""
    text = (ROOT / "locks" / f"{name}.txt").read_text(encoding="utf-8").replace("\\\n", " ")
    for line in text.splitlines():
        if line and not line.startswith(("#", "--")):
            pin, *hashes = line.split(" --hash=")
            yield Requirement(pin.strip()), [each.strip() for each in hashes]


def pins(name, machine):
    """The versions that a lock gives a machine, by package."""
    found = {}
    for requirement, _ in entries(name):
        if requirement.marker is None or requirement.marker.evaluate(machine):
            (specifier,) = requirement.specifier
            assert canonicalize_name(requirement.name) not in found, requirement
            found[canonicalize_name(requirement.name)] = specifier.version
    return found


@pytest.mark.parametrize("name", LOCKS)
def test_every_entry_is_one_version_with_hashes(name):
    found = list(entries(name))
    assert found
    for requirement, hashes in found:
        assert [each.operator for each in requirement.specifier] == ["=="], requirement
        assert hashes, requirement
        assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", each) for each in hashes), requirement


def test_every_set_has_its_lock(lock):
    assert {*lock.SETS, "torch", "torch-pypi"} == set(LOCKS)
    assert set(lock.SETS.values()) == {path.name for path in ROOT.glob("requirements*.txt")}


@pytest.mark.parametrize("machine", MACHINES, ids=lambda machine: "-".join(machine.values()))
def test_locks_agree_with_the_ranges(lock, machine):
    for name, file in lock.SETS.items():
        given = pins(name, machine) | (pins("torch-pypi", machine) if name in lock.WITH_TORCH else {})
        for requirement in asked(file):
            version = given.get(canonicalize_name(requirement.name))
            assert version is not None, f"locks/{name}.txt lacks {requirement}: make locks"
            assert requirement.specifier.contains(version), (
                f"locks/{name}.txt has {version} of {requirement}: make locks"
            )


@pytest.mark.parametrize("machine", MACHINES, ids=lambda machine: "-".join(machine.values()))
def test_locks_fit_together_in_one_environment(machine):
    for one, other in combinations(LOCKS, 2):
        a, b = (
            {key: version.partition("+")[0] for key, version in pins(name, machine).items()} for name in (one, other)
        )
        assert {key: (a[key], b[key]) for key in a.keys() & b.keys() if a[key] != b[key]} == {}, (one, other)


def test_pytorch_without_cuda_is_what_captures_ask_for():
    ((own, hashes),) = entries("torch")
    (asks,) = (each for each in asked("requirements-capture.txt") if each.name == "torch")
    assert str(own.specifier) == f"{asks.specifier}+cpu"
    assert len(hashes) == 6  # three Pythons on two kinds of machine
    assert not {
        name for name in pins("capture", MACHINES[0]) if name.startswith(("nvidia-", "cuda-", "torch", "triton"))
    }


@pytest.mark.parametrize("name", LOCKS)
def test_the_first_line_says_how_much_it_is(name):
    first = (ROOT / "locks" / f"{name}.txt").read_text(encoding="utf-8").splitlines()[0]
    assert re.fullmatch(r"# [1-9][0-9]* packages?, about [1-9][0-9]* MB", first)


WHEELS = [
    f"torch-9.1.0%2Bcpu-cp3{minor}-cp3{minor}-manylinux_2_28_{machine}.whl#sha256={minor}{len(machine)}{'0' * 61}"
    for minor in (11, 12, 13)
    for machine in ("x86_64", "aarch64")
]
OTHERS = [
    f"torch-9.1.0%2Bcpu-cp314-cp314-manylinux_2_28_x86_64.whl#sha256={'1' * 64}",
    f"torch-9.1.0%2Bcpu-cp311-cp311-win_amd64.whl#sha256={'2' * 64}",
    f"torch-9.0.0%2Bcpu-cp311-cp311-manylinux_2_28_x86_64.whl#sha256={'3' * 64}",
    f"torch-9.1.0-cp311-cp311-macosx_14_0_arm64.whl#sha256={'4' * 64}",
]


@pytest.mark.parametrize("base", ["/whl/cpu/", "https://elsewhere/whl/cpu/", ""])
def test_pytorch_s_own_index_is_read(lock, base, tmp_path, monkeypatch):
    page = "\n".join(f'<a href="{base}{wheel}" data-core-metadata="true">x</a><br/>' for wheel in WHEELS + OTHERS)

    class Answer(io.BytesIO):
        headers: ClassVar = {"Content-Length": "191794682"}

    monkeypatch.setattr(lock.urllib.request, "urlopen", lambda address, timeout: Answer(page.encode()))
    monkeypatch.setattr(lock, "LOCKS", tmp_path)
    assert lock.lock_cpu_torch("9.1.0") == "locks/torch.txt: 1 package, about 192 MB"
    written = (tmp_path / "torch.txt").read_text()
    assert re.findall("sha256:(.*?)(?: |$)", written, re.MULTILINE) == sorted(wheel[-64:] for wheel in WHEELS)
    kept = (ROOT / "locks" / "torch.txt").read_text()
    assert re.sub("sha256:.*", "", written.replace("9.1.0", "2.13.0")) == re.sub("sha256:.*", "", kept)
    with pytest.raises(ValueError, match=r"has 1 files of PyTorch 9\.0\.0 for Linux, not 6"):
        lock.lock_cpu_torch("9.0.0")
