"""`python -m awq_pycuda`, and the commands that an installed package has."""

import importlib
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import awq_pycuda
from awq_pycuda import __main__ as main

ROOT = Path(__file__).resolve().parent.parent


def test_it_lists_every_command_in_one_line_each(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "awq_pycuda"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    listed = [line.split()[2] for line in done.stdout.splitlines() if line.startswith("  python -m ")]
    commands = ("run", "capture", "analyze", "evaluate", "bench")
    assert list(dict.fromkeys(listed)) == [f"awq_pycuda.{name}" for name in commands]
    assert max(map(len, done.stdout.splitlines())) <= 100


def test_every_module_that_is_a_command_is_listed_and_has_its_script():
    modules = (ROOT / "awq_pycuda").glob("*.py")
    commands = {path.stem for path in modules if '\nif __name__ == "__main__":' in path.read_text()}
    commands -= {"__main__", "worker"}
    assert commands == {command.split()[0] for command in main.COMMANDS}
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert set(scripts) == {"awq-pycuda", *(f"awq-pycuda-{name}" for name in commands)}
    for target in scripts.values():
        module, _, function = target.partition(":")
        assert callable(getattr(importlib.import_module(module), function))


@pytest.mark.parametrize(
    ("arguments", "code", "out", "err"),
    [
        (["--version"], 0, f"awq_pycuda {awq_pycuda.__version__}\n", ""),
        (["--help"], 0, main.usage(), ""),
        (["run", "tile=8"], 2, "", "error: run tile=8: is no option; allowed: --help, --version, or python -m awq_pyc"),
        (["--verbose"], 2, "", "error: --verbose: is no option; allowed: "),
    ],
)
def test_answers(arguments, code, out, err, capsys):
    assert main.main(arguments) == code
    printed = capsys.readouterr()
    assert printed.out == out
    assert printed.err.startswith(err)
    assert len(printed.err.splitlines()) == bool(err)
