"""Result files for the tests of the analysis: real ones of tiny runs, and variants of them by the hundred."""

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import h5py
import hydra
import pytest
import yaml

from awq_pycuda import hdf5, run
from awq_pycuda.config_text import as_yaml
from awq_pycuda.engine.execution import execute
from awq_pycuda.paths import resource_dir


def make_run(folder: Path, *overrides: str) -> Path:
    """Runs the real pipeline on the CPU with these overrides (small sizes by default); returns folder/results.h5."""
    run.register_schemas()
    given = ["n=16", "layers=3", "backend=cpu", "inputs=outliers", *overrides]
    with hydra.initialize_config_dir(str(resource_dir("conf")), version_base="1.3"):
        composed = hydra.compose("config", given)
    config = run.to_config(composed)
    return execute(config, folder, given, as_yaml(config))


@contextmanager
def editing(path: Path) -> Iterator[h5py.File]:
    """The file, open for changes; after them its digest is made anew, as if a run had written it so."""
    with h5py.File(path, "r+", driver="core", backing_store=False) as file:
        yield file
        image = hdf5.sealed_image(file)
    path.write_bytes(b"".join(image))


def vary(path: Path, folder: Path, config: dict | None = None, slower: float = 1.0, **attributes) -> Path:
    """A copy as folder/results.h5 with config keys (dotted) and attributes changed and all times multiplied.

    The value `...` takes a config key away.
    """
    folder.mkdir(parents=True, exist_ok=True)
    copy = folder / "results.h5"
    shutil.copy(path, copy)
    with editing(copy) as file:
        if config is not None:
            tree = yaml.safe_load(file.attrs["config"])
            for key, value in config.items():
                *groups, last = key.split(".")
                node = tree
                for group in groups:
                    node = node.setdefault(group, {})
                if value is ...:
                    del node[last]
                else:
                    node[last] = value
            file.attrs["config"] = yaml.safe_dump(tree, sort_keys=False)
            file.attrs["config_hash"] = hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()
        for name, value in attributes.items():
            file.attrs[name] = value
        if slower != 1:
            for name in ("gpu_ms", "host_ms", "pipeline_ms", "cold_ms"):
                file["timings"][name][...] *= slower
    return copy


def told(path: Path, **conditions: list[float]) -> Path:
    """The file with conditions beside its passes, as a GPU would have told them; a value per measured pass."""
    with editing(path) as file:
        group = file["timings"].create_group("conditions")
        for name, values in conditions.items():
            group.create_dataset(name, data=values, dtype="f8").dims[0].attach_scale(file["timings/repeat"])
    return path


def make_many(folder: Path, count: int, *overrides: str) -> list[Path]:
    """`count` results of a sweep over n, tile and seed: one real run, the others varied from it."""
    first = make_run(folder / "first", *overrides)
    paths = []
    for index in range(count):
        key = {"n": 16 * (1 + index % 5), "tile": (8, 16, 32)[index // 5 % 3], "seed": index // 15}
        paths.append(vary(first, folder / "sweep" / f"{index:03d}", key, slower=1 + index % 7 / 10))
    shutil.rmtree(folder / "first")
    return paths


TABLES = ("runs", "layers", "curves", "timings", "passes")


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """One whole result; tests copy it."""
    return make_run(tmp_path_factory.mktemp("real"), "n=32", "gammas=[0.5,0.25]")


def edited(real, folder, edit):
    path = vary(real, folder)
    with editing(path) as file:
        edit(file)
    return path


H100 = (
    '{"name": "H100", "capability": "9.0", "multiprocessors": 132, "clock_khz": 1980000, "memory_clock_khz": 2619000, '
    '"memory_bus_bits": 5120}'
)
