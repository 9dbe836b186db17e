"""One run, from a checked config to its results.h5: for single runs, jobs of sweeps and the library; no Hydra."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import psutil

from awq_pycuda import provenance, signals
from awq_pycuda.backends.base import Backend
from awq_pycuda.backends.choose import choose_backend, settle_search
from awq_pycuda.checkpoints import folders as checkpoints
from awq_pycuda.choices import Objective, Save
from awq_pycuda.config import Config, Export, FileInputs, SearchPlace, SyntheticInputs
from awq_pycuda.engine.arrays import sharing
from awq_pycuda.engine.memory import required_bytes, search_sizes
from awq_pycuda.engine.pipeline import Pipeline
from awq_pycuda.engine.spec import RunSpec, spec_of
from awq_pycuda.engine.verify import TOLERANCES
from awq_pycuda.errors import InputError, RunFailed
from awq_pycuda.kernels import table
from awq_pycuda.layers.files import unreached_layers
from awq_pycuda.layers.inputs import LayerSpec
from awq_pycuda.limits import BeyondMemory, refuse_beyond_memory
from awq_pycuda.names import listed
from awq_pycuda.parallel import use_threads
from awq_pycuda.quant.quantized import Quantized
from awq_pycuda.results.record import LayerResult, RunRecord
from awq_pycuda.results.schema import FILE_NAME
from awq_pycuda.results.status import status_attributes
from awq_pycuda.results.write import write

CHECKPOINT = "checkpoint"  # the folder beside the results that export=... makes


@dataclass(frozen=True)
class Prepared:
    """A run and the backend that it gets, not yet entered; `reason` says which and why, in one line."""

    spec: RunSpec
    backend: Backend[Any]
    reason: str

    @contextmanager
    def at_work(self) -> Iterator[Backend[Any]]:
        """Within it the backend is entered, and the host's threads are those that the run asks for."""
        with use_threads(self.spec.threads), self.backend:
            yield self.backend


def prepared(spec: RunSpec) -> Prepared:
    """The run with its backend.

    Raises:
        InputError: the backend cannot be had, or cannot do what is asked.
    """
    form = spec.convention.quantizer
    if spec.in_chunks:
        _refuse_whole(spec)
    if spec.export is not Export.none:
        shapes = [(layer.name, (layer.out_features, layer.in_features)) for layer in spec.layers]
        checkpoints.refuse_misfit(spec.export, form, shapes)
    weights = sum(layer.out_features * layer.in_features for layer in spec.layers)
    inputs = {sharing(spec.layers, index, spec.convention) for index in range(len(spec.layers))}
    shared = [len(members) for members in inputs if len(members) > 1]
    backend, variants, search, reason = choose_backend(
        spec.backend,
        spec.variants,
        spec.tile,
        spec.convention,
        spec.search,
        weights,
        shares=bool(shared),
        in_chunks=spec.in_chunks,
    )
    told = [f"one s for all layers of an input (inputs: {len(shared)}, layers: {sum(shared)})"] if shared else []
    limits = None if search is SearchPlace.host else backend.limits
    if limits is not None and spec.convention.objective is Objective.output:  # one of its variants is much faster
        sizes = search_sizes(spec.layers, spec.convention)
        told += settle_search(table.SEARCHES[Objective.output.name], sizes, limits)
    return Prepared(replace(spec, variants=variants, search=search), backend, "; ".join([reason, *told]))


def _refuse_whole(spec: RunSpec) -> None:
    """Refuses what takes activations whole, of a run whose activations come in chunks."""
    clip, by_output = spec.convention.clip, spec.convention.objective is Objective.output
    whole = {
        "verify": ("the oracle", spec.verify),
        "clip.joint": ("with search.objective=output it", clip is not None and clip.joint and by_output),
    }
    for key, (what, asked) in whole.items():
        if asked:
            raise InputError(
                f"{key}=true: {what} takes activations whole; allowed in chunks (inputs.chunk_tokens): false"
            )


class FreeMemory:
    """What is free on this machine, in bytes, each asked for once."""

    def __init__(self) -> None:
        self._device: dict[str, int | None] = {}

    @cached_property
    def host(self) -> int:
        """Of the host's memory."""
        return int(psutil.virtual_memory().available)

    def device(self, backend: Backend[Any]) -> int | None:
        """Of the device's; None where the backend has none of its own."""
        if backend.name not in self._device:
            with backend:
                self._device[backend.name] = backend.available_bytes()
        return self._device[backend.name]


def validate(config: Config, free: FreeMemory | None = None) -> Prepared:
    """Everything that can be wrong before any work: files, shapes, backend, memory. Allocates no arrays of the run.

    Args:
        config: checked.
        free: shared by configs that are looked at together; asking takes longer than the rest.

    Raises:
        InputError: the first thing wrong.
    """
    free = free or FreeMemory()
    try:
        return _fitting(spec_of(config), config, free)
    except BeyondMemory as refused:
        if not isinstance(config.inputs, FileInputs) or config.inputs.chunk_tokens is not None:
            raise
        too_large = str(refused)  # without the frames that hold what was read
    try:
        run = _fitting(spec_of(config, in_chunks=True), config, free)
    except InputError as error:
        raise InputError(f"{too_large}; in chunks: {error}") from None
    return replace(run, reason=f"{run.reason}; activations in chunks: whole, {too_large}")


def _fitting(spec: RunSpec, config: Config, free: FreeMemory) -> Prepared:
    """The run with its backend, whose memory holds it.

    Raises:
        BeyondMemory: it does not.
        InputError: see `prepared`.
    """
    run = prepared(spec)
    key = f"inputs.path={config.inputs.path}" if isinstance(config.inputs, FileInputs) else f"n={config.n}"
    with use_threads(run.spec.threads):
        device, host = required_bytes(run.spec, run.backend.limits)
    if (on_device := free.device(run.backend)) is not None:
        refuse_beyond_memory(key, device, on_device, "GPU's memory")
    refuse_beyond_memory(key, host, free.host, "host's memory")
    return run


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
    from awq_pycuda.console import make_console, progress  # what draws takes its time to import, and jobs of sweeps
    from awq_pycuda.summary import print_summary  # print nothing

    run = validate(config)
    console = make_console()
    with alone_in(folder, "hydra.run.dir"), signals.held():
        with _unread_output():
            console.print(run.reason, soft_wrap=True, markup=False)
            if isinstance(config.inputs, FileInputs) and (idle := unreached_layers(Path(config.inputs.path))):
                line = f"left out, since no token reached them when they were captured: {listed(idle)}"
                console.print(line, soft_wrap=True, markup=False)
            if fewer := with_fewer_tokens(run.spec.layers, config.tokens):
                console.print(f"fewer than tokens={config.tokens}: {fewer}", soft_wrap=True, markup=False)
        with run.at_work():
            origin = describe(run, overrides, config_yaml)
            with progress(console) as on_progress:
                record = attempt(run, origin, on_progress, signals.released())
        path = store(folder, run.spec, record)
        with _unread_output():
            uniform = type(config.inputs) is SyntheticInputs
            checkpoint = None if config.export is Export.none else folder / CHECKPOINT
            print_summary(console, record.layers, record.timings, path, uniform, checkpoint)
    return path


def with_fewer_tokens(specs: Sequence[LayerSpec], tokens: int | None) -> str:
    """The layers whose own activations have fewer rows than asked for, each with how many; "" if there are none."""
    own = [(spec.name, spec.tokens + spec.held_out_tokens) for spec in specs if spec.activations is not None]
    return listed([f"{name} ({count})" for name, count in own if tokens and count < tokens])


@contextmanager
def alone_in(folder: Path, key: str) -> Iterator[None]:
    """The folder of a single run, made if missing: no other run may be at work there, and no results are replaced.

    Raises:
        InputError: there are results, or another run is about to leave some.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks; results.h5 itself is still seen
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise _taken(key, folder, "another run is at work there") from None
        if os.path.lexists(folder / FILE_NAME):
            raise _taken(key, folder, f"holds the {FILE_NAME} of another run")
        yield
    finally:
        os.close(descriptor)


def _taken(key: str, folder: Path, why: str) -> InputError:
    return InputError(f"{key}={folder}: {why}; allowed: a folder without {FILE_NAME}")


@contextmanager
def _unread_output() -> Iterator[None]:
    """A full or closed stdout must not cost the run; rich ends the process when its reader is gone."""
    with suppress(OSError, SystemExit):
        yield


def describe(run: Prepared, overrides: Sequence[str], config_yaml: str) -> dict[str, str | int | bool]:
    """The attributes of a result file that are known before the run, at work: what is asked for, of which machine."""
    return {
        "overrides": json.dumps(list(overrides)),
        "config": config_yaml,
        "config_hash": run.spec.config_hash,
        **provenance.made_by(run.backend),
    }


def attempt(
    run: Prepared,
    origin: dict[str, str | int | bool],
    on_progress: Callable[[str, int, int], None] = lambda what, done, total: None,
    interruptible: AbstractContextManager[None] = nullcontext(),  # noqa: B008  # a nullcontext has no state
) -> RunRecord:
    """Runs the pipeline of a run that is at work; what it left, with a failure or a signal as the record's text.

    Args:
        run: from `validate`, within its `at_work`.
        origin: from `describe`.
        on_progress: see `Pipeline.run`.
        interruptible: held while the pipeline runs.
    """
    failure: str | None = None
    interrupted = False
    pipeline = Pipeline(run.backend, run.spec)
    try:
        with interruptible:
            pipeline.run(on_progress)
    except (Exception, KeyboardInterrupt) as error:
        failure = f"{type(error).__name__}: {error}".removesuffix(": ")
        if isinstance(error, signals.Stopped):
            failure = str(error)
        interrupted = isinstance(error, KeyboardInterrupt)
    root = status_attributes(failure) | origin
    return RunRecord(root, pipeline.layers, pipeline.timings, interrupted, TOLERANCES)


def store(folder: Path, spec: RunSpec, record: RunRecord) -> Path:
    """Writes the result file of a run and returns its path; before it, so that it tells of all, the checkpoint.

    Raises:
        RunFailed: the run that it tells of failed, or a file cannot be written.
    """
    if spec.export is not Export.none and record.root["status"] == "complete":
        try:
            checkpoints.write(folder / CHECKPOINT, spec.export, _for_checkpoint(spec.layers, record.layers))
        except (OSError, InputError) as error:
            failure = f"{folder / CHECKPOINT} cannot be written: {error}"
            record = replace(record, root={**record.root, **status_attributes(failure)})
    if spec.save is not Save.full:
        record = replace(record, layers=[layer.without_codes for layer in record.layers])
    try:
        path = write(folder, record)
    except OSError as error:
        raise RunFailed(f"{folder / FILE_NAME} cannot be written: {error}") from None
    refuse_failed(record, path)
    return path


def _for_checkpoint(
    specs: Sequence[LayerSpec], results: Sequence[LayerResult]
) -> dict[str, checkpoints.CheckpointLayer]:
    """The layers of a complete run, by name."""
    found = {}
    for spec, result in zip(specs, results, strict=True):
        assert isinstance(result.quantized, Quantized)
        found[spec.name] = checkpoints.CheckpointLayer.scaled(result.quantized, result.search.s, spec.bias)
    return found


def refuse_failed(record: RunRecord, path: Path | None = None) -> None:
    """Raises what a failed run's record says; `path` is where it was stored.

    Raises:
        RunFailed: the run failed.
    """
    if record.root["status"] == "failed":
        finished = f"{len(record.layers)} of {record.timings.gpu_ms.shape[0]} layers finished"
        where = "" if path is None else f"; see {path}"
        raise RunFailed(f"{record.root['error']} ({finished}{where})", record.interrupted)
