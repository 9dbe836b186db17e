"""`make test-gpu` asks for the packages that a run needs and for pytest, nothing else."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ABSENT = ("torch", "transformers", "nbclient", "nbformat", "ipykernel", "playwright", "ray", "submitit", "joblib")
SCRIPT = f"""
import sys
sys.modules |= dict.fromkeys({ABSENT})
import pytest
sys.exit(pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", *sys.argv[1:]]))
"""


def test_the_gpu_s_tests_are_collected_without_what_they_do_not_need():
    command = [sys.executable, "-c", SCRIPT, "-m", "gpu"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    modules = {line.partition("::")[0] for line in done.stdout.splitlines() if "::" in line}
    assert {f"tests/test_{name}.py" for name in ("backends", "gpu", "gpu_sweep", "pipeline")} <= modules
