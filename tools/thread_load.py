"""What host threads bring on an idle and on a busy machine: the times of whole runs on the CPU.

    tools/thread_load.py --busy 0 2 4 --threads 1 null -- n=512 search=output

Every row is a number of busy processes beside the run. The variants take turns, so that a drift of the machine falls on
all of them alike.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np


@contextmanager
def busy(count: int) -> Iterator[None]:
    """Keeps so many processes computing."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def run(threads: str, overrides: list[str]) -> list[float]:
    """The times of a run's passes in ms."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "awq_pycuda.run", "backend=cpu", *overrides]
        command += [f"threads={threads}", f"hydra.run.dir={folder}"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        with h5py.File(Path(folder) / "results.h5") as file:
            return [float(value) for value in file["timings/pipeline_ms"][()]]


def main() -> None:
    """Prints a row per load: median and quartiles of the pass, by threads."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--busy", type=int, nargs="+", default=[0, 2 * (os.cpu_count() or 1)], help="busy processes")
    parser.add_argument("--threads", nargs="+", default=["1", "null"], help="values of the key threads")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each")
    parser.add_argument("overrides", nargs="*", help="of the config")
    given = parser.parse_args()
    cores, load = os.cpu_count(), os.getloadavg()[0]
    print(f"{cores} cores, load before {load:.1f}, pass of {' '.join(given.overrides) or 'the default run'} in ms")
    for count in given.busy:
        times: dict[str, list[float]] = {threads: [] for threads in given.threads}
        with busy(count):
            for _ in range(given.rounds):
                for threads, samples in times.items():
                    samples += run(threads, given.overrides)
        for threads, samples in times.items():
            low, middle, high = np.percentile(samples, (25, 50, 75))
            print(f"{count:3} busy, threads={threads:5} {middle:9.1f}  ({low:.1f} to {high:.1f})", flush=True)


if __name__ == "__main__":
    main()
