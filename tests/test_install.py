"""What `make` installs, in which words, and what it does where PyTorch's own index cannot be reached."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Stands for the environment's Python: says what pip would, and fails for the lock named in FAIL.
PYTHON = """\
#!/bin/sh
echo "Collecting something"
echo "  Downloading something-1.0.whl (1.0 MB)"
echo "$*" >> calls
case "$*" in *"$FAIL") echo 'ERROR: No matching distribution found' >&2; exit 1;; esac
"""


@pytest.fixture
def checkout(tmp_path):
    """A checkout with the environment set up as far as the packages of a run."""
    for name in ("tools", "locks"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "awq_pycuda").mkdir()
    (tmp_path / "awq_pycuda/__init__.py").touch()
    python = tmp_path / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(PYTHON)
    python.chmod(0o755)
    for stamp in ("venv", "cpu"):
        (tmp_path / f".venv/.stamp-{stamp}").touch()
    return tmp_path


def call(folder, *command, fail="nothing"):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    done = subprocess.run(
        command, cwd=folder, env=environment | {"FAIL": fail}, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout.splitlines(), done.stderr


def installed(folder):
    return [line.rpartition("/")[2] for line in (folder / "calls").read_text().splitlines()]


def head(lock):
    return (ROOT / "locks" / lock).read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")


def test_a_step_says_its_size_first_and_a_log_gets_a_line_per_file(checkout):
    code, out, _ = call(checkout, "tools/install.sh", ".venv/bin/python", "locks/run.txt", "what a run needs")
    assert code == 0
    assert out == [f"installing what a run needs: {head('run.txt')}", "  Downloading something-1.0.whl (1.0 MB)"]
    assert "--require-hashes" in (checkout / "calls").read_text()


def test_pip_s_failure_is_the_step_s(checkout):
    code, _, err = call(checkout, "make", ".venv/.stamp-dev", fail="dev.txt")
    assert code != 0
    assert "No matching distribution" in err
    assert not (checkout / ".venv/.stamp-dev").exists()


def test_pytorch_comes_without_cuda(checkout):
    code, out, _ = call(checkout, "make", ".venv/.stamp-capture")
    assert code == 0
    assert installed(checkout) == ["torch.txt", "capture.txt"]
    assert f"installing PyTorch without CUDA: {head('torch.txt')}" in out


def test_of_the_model_and_the_text_nothing_else_is_installed(checkout):
    code, out, _ = call(checkout, "make", ".venv/.stamp-truth")
    assert code == 0
    assert installed(checkout) == ["torch.txt", "capture.txt", "truth.txt"]
    assert f"installing a language model and a text: {head('truth.txt')}" in out
    *_, last = (checkout / "calls").read_text().splitlines()
    assert "--no-deps" in last


def test_truth_installs_first_and_names_recipes_that_come_along(checkout):
    code, out, _ = call(checkout, "make", "-n", "truth", "PYTHON=python3")
    assert code == 0
    assert set(re.findall(r"recipes=(\w+)", "\n".join(out))) == {"truth"}
    assert (ROOT / "conf" / "recipes" / "truth.yaml").is_file()
    tools = re.findall(r"tools/\w+\.py", "\n".join(out))
    assert tools
    assert all((ROOT / tool).is_file() for tool in tools)
    _, out, _ = call(checkout, "make", "-n", "truth")
    order = [line for line in out if "locks/truth.txt" in line or "awq_pycuda.evaluate" in line]
    assert "locks/truth.txt" in order[0]


def test_where_its_index_is_out_of_reach_the_other_build_is_told_with_its_size(checkout):
    code, out, _ = call(checkout, "make", ".venv/.stamp-torch", fail="locks/torch.txt")
    assert code == 0
    assert installed(checkout) == ["torch.txt", "torch-pypi.txt"]
    assert f"installing PyTorch as PyPI has it (with CUDA on Linux): {head('torch-pypi.txt')}" in out


def test_what_is_done_costs_nothing_the_next_time(checkout):
    assert call(checkout, "make", ".venv/.stamp-dev")[0] == 0
    assert call(checkout, "make", ".venv/.stamp-dev")[0] == 0
    assert installed(checkout) == ["dev.txt"]
    # By the stamp, not by a clock that may be set back meanwhile.
    newer = (checkout / ".venv/.stamp-dev").stat().st_mtime + 1
    os.utime(checkout / "locks/dev.txt", (newer, newer))
    assert call(checkout, "make", ".venv/.stamp-dev")[0] == 0
    assert installed(checkout) == ["dev.txt", "dev.txt"]
