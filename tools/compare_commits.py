"""Runs the same configs on two states of the project and says which numbers of their result files differ.

    python tools/compare_commits.py BASE                 BASE, any commit, against the working tree
    python tools/compare_commits.py BASE COMMIT          two commits
    python tools/compare_commits.py BASE --backend cuda  a dozen of the configs, on a GPU

Every dataset and attribute below /layers is compared bit for bit; of /timings the stages and shapes, not the
conditions under which they were taken. Exit code 1 where anything differs. Needs no more than the run itself; the
commits are checked out into a temporary folder.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import h5py
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
PROCESSES = 2
COMMON = ("timing.warmup=0", "timing.repeats=1", "save=full", "verify=true")
RAGGED = ("inputs=file", "inputs.path=layers.npz")

CONFIGS: tuple[tuple[str, ...], ...] = (
    ("n=64",),
    ("n=1", "tokens=1"),
    ("n=7", "tokens=5", "layers=4"),
    ("n=33", "tokens=65", "tile=8"),
    ("n=128", "tokens=3", "seed=7"),
    ("n=100", "layers=2", "gamma_grid=awq20"),
    ("n=64", "gammas=[0.3,0.7]"),
    ("n=64", "gammas=[1,0,0.5]", "seed=3"),
    ("n=64", "gammas=[0]"),
    ("n=64", "gammas=[10]"),
    ("n=64", "quant.group_size=16"),
    ("n=64", "quant.group_size=1"),
    ("n=64", "quant.group_size=64"),
    ("n=96", "quant.group_size=32", "search=output"),
    ("n=64", "search=output"),
    ("n=33", "tokens=10", "search=output", "gamma_grid=awq20"),
    ("n=64", "search.normalization=sqrt_max_min"),
    ("n=64", "search.normalization=sqrt_max_min", "search=output", "quant.group_size=8"),
    ("n=64", "inputs.weight_scale=he", "layers=6"),
    ("n=65", "inputs.weight_scale=he", "layers=3", "search=output"),
    ("n=128", "inputs=outliers", "layers=3"),
    ("n=128", "inputs=outliers", "inputs.channels=0.1", "gamma_grid=awq20"),
    ("n=128", "inputs=outliers", "search=output"),
    ("n=128", "inputs=outliers", "quant.group_size=32"),
    ("n=120", "inputs=outliers", "quant.group_size=8", "search=output", "search.normalization=sqrt_max_min"),
    ("n=77", "inputs=outliers", "inputs.factor_min=0.5", "inputs.factor_max=0.5", "layers=2"),
    ("n=300", "tokens=40", "inputs=outliers", "threads=1"),
    ("n=300", "tokens=40", "inputs=outliers", "threads=3"),
    ("n=513", "layers=1"),
    ("n=700", "tokens=130", "layers=1", "search=output"),
    ("n=1024", "layers=2"),
    ("n=1024", "tokens=64", "inputs=outliers", "layers=2", "quant.group_size=128", "gamma_grid=awq20"),
    ("n=64", "tile=1"),
    ("n=70", "tile=32", "matmul=blocked"),
    ("n=70", "tile=7", "matmul=blocked", "quant.group_size=10"),
    ("n=70", "stats=atomic"),
    RAGGED,
    (*RAGGED, "search=output"),
    (*RAGGED, "layers=1", "tokens=4"),
    (*RAGGED, "quant.group_size=3"),
    (*RAGGED, "quant.group_size=3", "search=output", "search.normalization=sqrt_max_min", "gamma_grid=awq20"),
    (*RAGGED, "layers=2", "matmul=blocked", "tile=32"),
)
# stats=atomic adds up in an order of its own on a GPU.
ON_GPU = tuple(config for config in CONFIGS if "stats=atomic" not in config)[::3]


def write_layers(path: Path) -> None:
    """A layer file of ragged shapes, with biases, dead channels, an all-zero row and layers of both kinds of inputs."""
    draw = np.random.default_rng(0)
    arrays: dict[str, Any] = {}
    for index, (tokens, out_features, in_features) in enumerate([(19, 33, 21), (19, 45, 33), (7, 10, 6)]):
        weight = draw.standard_normal((out_features, in_features))
        weight[3] = 0
        arrays[f"{index:03d}.weight"] = weight.astype(np.float32)
        arrays[f"{index:03d}.bias"] = draw.standard_normal(out_features).astype(np.float32)
        if index != 1:
            activations = draw.standard_normal((tokens, in_features)) * draw.lognormal(sigma=2, size=in_features)
            activations[:, 5] = 0
            arrays[f"{index:03d}.activations"] = activations.astype(np.float32)
    np.savez(path, **arrays)


def run(tree: Path, config: Sequence[str], folder: Path, backend: str) -> str:
    """Runs a config with the package of `tree`; what went wrong, "" if nothing."""
    command = [sys.executable, "-m", "awq_pycuda.run", *COMMON, f"backend={backend}", f"hydra.run.dir={folder}"]
    done = subprocess.run(
        [*command, *config],
        cwd=folder.parent,
        env=os.environ | {"PYTHONPATH": os.pathsep.join((str(tree), os.environ.get("PYTHONPATH", "")))},
        capture_output=True,
        text=True,
    )
    return done.stderr.strip() if done.returncode else ""


def contents(path: Path) -> dict[str, bytes | str]:
    """Everything of a result file that two runs of one config must share, by name."""
    found: dict[str, bytes | str] = {}

    def take(name: str, node: h5py.Group | h5py.Dataset) -> None:
        if name.startswith("timings/conditions"):  # measured, and not by every version
            return
        if isinstance(node, h5py.Dataset):
            found[f"{name} (shape, type)"] = f"{node.shape} {node.dtype}"
            if not name.endswith("_ms"):
                found[name] = np.asarray(node[()]).tobytes() if node.dtype != object else str(node[()])
        for key, value in node.attrs.items():
            if key not in ("DIMENSION_LIST", "REFERENCE_LIST"):  # addresses in the file
                found[f"{name}@{key}"] = np.asarray(value).tobytes() if not isinstance(value, str) else value

    with h5py.File(path, "r") as file:
        for group in ("layers", "timings"):
            file[group].visititems(lambda name, node, group=group: take(f"{group}/{name}", node))
    return found


def differences(old: Path, new: Path) -> Iterator[str]:
    """The names of what differs between two result files."""
    before, after = contents(old), contents(new)
    for name in sorted(before.keys() | after.keys()):
        if before.get(name) != after.get(name):
            where = "" if name in before and name in after else " (only before)" if name in before else " (only now)"
            yield f"{name}{where}"


def checked_out(commit: str, folder: Path) -> Path:
    """The files of a commit, in a new folder."""
    folder.mkdir()
    archive = subprocess.run(["git", "archive", commit], cwd=ROOT, check=True, capture_output=True).stdout
    subprocess.run(["tar", "-x", "-C", folder], input=archive, check=True)
    return folder


def main() -> int:
    """The command; its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base")
    parser.add_argument("commit", nargs="?", help="the working tree if left out")
    parser.add_argument("--backend", choices=("cpu", "cuda"), default="cpu")
    given = parser.parse_args()
    configs = CONFIGS if given.backend == "cpu" else ON_GPU
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        trees = {"base": checked_out(given.base, work / "base")}
        trees["now"] = ROOT if given.commit is None else checked_out(given.commit, work / "commit")
        write_layers(work / "layers.npz")

        def compare(number: int) -> list[str]:
            folders = [work / f"{name}-{number}" for name in trees]
            runs = zip(trees.items(), folders, strict=True)
            failures = [
                f"{name}: {why}"
                for (name, tree), folder in runs
                if (why := run(tree, configs[number], folder, given.backend))
            ]
            return failures or list(differences(*(folder / "results.h5" for folder in folders)))

        with ThreadPoolExecutor(PROCESSES) as pool:
            found = list(pool.map(compare, range(len(configs))))
    for config, lines in zip(configs, found, strict=True):
        print("same  " if not lines else "DIFFER", " ".join(config), flush=True)
        for line in lines:
            print(f"       {line}")
    print(f"{sum(not lines for lines in found)} of {len(configs)} configs the same")
    return int(any(found))


if __name__ == "__main__":
    sys.exit(main())
