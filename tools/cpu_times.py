"""Prints the table of CPU times of docs/measured.md: each run three times, in rounds: a busy moment hits all."""

from __future__ import annotations

import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import h5py
import numpy as np

ROUNDS = 3
ADDED = {
    "": "nothing (n=1024, 3 layers, 5 gammas)",
    "quant=group128": "",
    "gamma_grid=awq20": "",
    "search=output": "",
    "search=output gamma_grid=awq20 timing.repeats=5": "",
    "n=4096 timing.repeats=3": "",
    "inputs=file inputs.path=layers.h5": "(MiniLM, 36 layers)",
}


def pipeline_ms(added: str) -> float:
    """Median over the passes of one run, a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["awq_pycuda.run", "backend=cpu", "timing=precise", *shlex.split(added), f"hydra.run.dir={folder}"]
        subprocess.run([sys.executable, "-m", *command], check=True, stdout=subprocess.DEVNULL)
        with h5py.File(Path(folder) / "results.h5") as run:
            return float(np.median(run["timings/pipeline_ms"]))


def main() -> None:
    """The command."""
    rounds = [{added: pipeline_ms(added) for added in ADDED} for _ in range(ROUNDS)]
    print("| added | pipeline: median of the passes, lowest to highest of 3 calls |\n|---|---|")
    for added, note in ADDED.items():
        times = sorted(one[added] for one in rounds)
        low, high = (f"{value:,.0f}" if value >= 200 else f"{value:.1f}" for value in (times[0], times[-1]))
        print(f"| {' '.join(part for part in (added and f'`{added}`', note) if part)} | {low} to {high} ms |")


if __name__ == "__main__":
    main()
