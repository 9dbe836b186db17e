"""`python -m awq_pycuda.run`: compose, validate, run, store, summarise.

Nothing else in the package uses Hydra; `hydra_errors` words its errors.
"""

from __future__ import annotations

import copy
import json
import os
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import hydra
import psutil
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import MISSING, DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from awq_pycuda import provenance, results, summary
from awq_pycuda.backends.base import Backend
from awq_pycuda.backends.choose import choose_backend
from awq_pycuda.config import Config, FileInputs, OutlierInputs, SyntheticInputs, check, config_hash, refuse
from awq_pycuda.errors import InputError
from awq_pycuda.hydra_errors import explain
from awq_pycuda.inputs import LayerSpec, plan_layers
from awq_pycuda.limits import refuse_beyond_memory
from awq_pycuda.paths import resource_dir
from awq_pycuda.pipeline import Pipeline, required_bytes

INTERRUPTED = 130  # the exit code that shells give a command stopped by Ctrl-C


class RunFailed(RuntimeError):
    """A run that could not finish. `interrupted`: because the user stopped it."""

    def __init__(self, reason: str, interrupted: bool = False) -> None:
        super().__init__(reason)
        self.interrupted = interrupted


def register_schemas() -> None:
    """Makes the config dataclasses known to Hydra's composition."""
    store = ConfigStore.instance()
    store.store(name="schema", node=Config)
    for name, schema in (("synthetic", SyntheticInputs), ("outliers", OutlierInputs), ("file", FileInputs)):
        store.store(group="inputs", name=f"{name}_schema", node=schema)


def to_config(composed: DictConfig) -> Config:
    """The composed config as checked dataclasses.

    Raises:
        InputError: a key without a value, one that the schema does not know (added with +key=value), or a value that
            a rule forbids.
    """
    task = copy.deepcopy(composed)
    with open_dict(task):
        task.pop("hydra", None)
    config = OmegaConf.to_object(task)
    assert isinstance(config, Config)
    _refuse_missing_and_added_keys(config, "")
    check(config)
    return config


def _refuse_missing_and_added_keys(node: Any, prefix: str) -> None:
    known = {item.name for item in fields(node)}
    for name, value in vars(node).items():
        if value == MISSING:
            raise refuse(f"{prefix}{name}", MISSING, "no value")
        if name not in known:
            raise InputError(
                f"{prefix}{name}={value}: no such key; allowed: {', '.join(prefix + k for k in sorted(known))}"
            )
        if is_dataclass(value):
            _refuse_missing_and_added_keys(value, f"{prefix}{name}.")


def validate(config: Config) -> tuple[list[LayerSpec], Backend[Any], str]:
    """Everything that can be wrong before any work: files, shapes, backend, memory. Allocates no arrays of the run.

    Returns:
        The layers to run, the backend (not entered), and the line that says which backend and why.

    Raises:
        InputError: the first thing wrong.
    """
    specs = plan_layers(config)
    backend, reason = choose_backend(config)
    arrays, host = required_bytes(specs, config)
    key = f"inputs.path={config.inputs.path}" if isinstance(config.inputs, FileInputs) else f"n={config.n}"
    with backend:
        free = backend.available_bytes()
    if free is None:
        host += arrays
    else:
        refuse_beyond_memory(key, arrays, free, "GPU's memory")
        # The search reads the weights on the host, where the driver keeps a second copy of them.
        host += sum(4 * spec.out_features * spec.in_features for spec in specs)
    refuse_beyond_memory(key, host, psutil.virtual_memory().available, "host's memory")
    return specs, backend, reason


def execute(config: Config, folder: Path, overrides: Sequence[str] = (), config_yaml: str = "") -> Path:
    """One run: all of it, from the config to `folder/results.h5` and the printed summary.

    Args:
        config: checked.
        folder: where the results go; made if missing.
        overrides: as given by the user, stored with the results.
        config_yaml: the resolved config as YAML, stored with the results.

    Returns:
        The path of the result file.

    Raises:
        InputError: something is wrong before any work.
        RunFailed: the run failed; the result file holds the reason and the finished layers.
    """
    specs, backend, reason = validate(config)
    console = summary.make_console()
    with _unread_output():
        console.print(reason, soft_wrap=True, markup=False)
    record, interrupted = _attempt(
        config, specs, backend, console, {"overrides": json.dumps(list(overrides)), "config": config_yaml}
    )
    try:
        path = results.write(folder, record)
    except OSError as error:
        raise RunFailed(f"{folder / results.FILE_NAME} cannot be written: {error}") from None
    if record.root["status"] == "failed":
        finished = f"{len(record.layers)} of {len(specs)} layers finished; see {path}"
        raise RunFailed(f"{record.root['error']} ({finished})", interrupted)
    with _unread_output():
        summary.print_summary(console, record.layers, record.timings, path)
    return path


@contextmanager
def _unread_output() -> Iterator[None]:
    """A full or closed stdout must not cost the run; rich ends the process when its reader is gone."""
    with suppress(OSError, SystemExit):
        yield


def _attempt(
    config: Config, specs: list[LayerSpec], backend: Backend[Any], console: Console, given: dict[str, str]
) -> tuple[results.RunRecord, bool]:
    """Runs the pipeline; what it left, and whether the user interrupted it.

    A failure comes back as text. Hydra keeps the exception of every failed job of a sweep, and an exception keeps its
    frames and with them all arrays of the run.
    """
    failure: str | None = None
    interrupted = False
    with backend:
        pipeline = Pipeline(backend, specs, config)
        try:
            with summary.progress(console) as on_progress:
                pipeline.run(on_progress)
        except (Exception, KeyboardInterrupt) as error:
            failure = f"{type(error).__name__}: {error}".removesuffix(": ")
            interrupted = isinstance(error, KeyboardInterrupt)
        commit, dirty = provenance.git_state()
        root = {
            "status": "complete" if failure is None else "failed",
            **({} if failure is None else {"error": failure}),
            "created": provenance.created(),
            **given,
            "config_hash": config_hash(config),
            "backend": backend.name,
            "device": json.dumps(backend.device()),
            "versions": json.dumps(provenance.versions() | backend.versions()),
            "git_commit": commit,
            "git_dirty": dirty,
            "kernels_sha256": provenance.kernels_sha256(),
        }
        return results.RunRecord(root, pipeline.layers, pipeline.timings), interrupted


class Preflight(Callback):
    """Runs before Hydra makes any folder: bad input ends here, with nothing written."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Checks the one job."""
        with _exit_on_error():
            validate(to_config(config))
            _check_writable("hydra.run.dir", Path(config.hydra.run.dir))

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Checks every job of a sweep, as the basic sweeper will expand it."""
        with _exit_on_error():
            tasks = list(config.hydra.overrides.task)
            tasks += [f"{key}={value}" for key, value in (config.hydra.sweeper.get("params") or {}).items()]
            parsed = OverridesParser.create(GlobalHydra.instance().config_loader()).parse_overrides(tasks)
            for batch in BasicSweeper.split_arguments(parsed, max_batch_size=None):
                for job in batch:
                    validate(to_config(hydra.compose(config.hydra.job.config_name, list(job))))
            _check_writable("hydra.sweep.dir", Path(config.hydra.sweep.dir))


@contextmanager
def _exit_on_error() -> Iterator[None]:
    """Ends the process on any exception: Hydra would turn one in a callback into a warning and go on."""
    try:
        yield
    except (InputError, HydraException, OmegaConfBaseException) as error:
        raise SystemExit(_report(error)) from None
    except Exception:
        traceback.print_exc()
        raise SystemExit(1) from None


def _check_writable(key: str, folder: Path) -> None:
    """Makes the run's folder and tries to write there; root passes every permission check, so only trying tells."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(
            f"{key}={folder}: {error.strerror or error}; allowed: a folder that can be written to"
        ) from None


def _report(error: Exception) -> int:
    print(f"error: {explain(error, sys.argv[1:])}", file=sys.stderr)
    return 2


@hydra.main(version_base="1.3", config_path=str(resource_dir("conf")), config_name="config")
def _hydra_main(composed: DictConfig) -> None:
    """One job of Hydra's."""
    settings = HydraConfig.get()
    try:
        execute(
            to_config(composed),
            Path(settings.runtime.output_dir),
            list(settings.overrides.task),
            OmegaConf.to_yaml(composed, resolve=True),
        )
    except RunFailed as error:
        print(f"failed: {error}", file=sys.stderr)
        # In a sweep the other jobs still run, unless the user stopped it. A single run ends here, before Hydra adds
        # lines of its own.
        if settings.mode is RunMode.MULTIRUN and not error.interrupted:
            raise
        raise SystemExit(INTERRUPTED if error.interrupted else 1) from None


def main() -> int:
    """The command. Returns the exit code: 0, 1 when a run failed, 2 for bad input, 130 when interrupted."""
    # Hydra would print its errors over several lines and exit with 1; raised, they become the one line of §3.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    register_schemas()
    try:
        _hydra_main()
    except RunFailed:
        return 1
    except KeyboardInterrupt:
        print("interrupted before any work", file=sys.stderr)
        return INTERRUPTED
    except (InputError, HydraException, OmegaConfBaseException, ValueError) as error:
        return _report(error)
    except OSError as error:
        # Hydra makes the folders of a sweep's jobs one by one, after every check.
        if error.filename is None:
            raise
        return _report(InputError(f"{error.filename}: {error.strerror}; allowed: a folder that can be written to"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
