"""How long an evaluation takes and how much memory, told before its start from one window and a few layers of it."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from awq_pycuda.capturing.experts import Interception
from awq_pycuda.capturing.loading import Loaded
from awq_pycuda.capturing.probing import Plan, hooked
from awq_pycuda.capturing.windows import run_window
from awq_pycuda.config import Export, FileInputs, SyntheticInputs
from awq_pycuda.engine.execution import prepared
from awq_pycuda.engine.memory import required_bytes
from awq_pycuda.engine.spec import spec_of
from awq_pycuda.evaluating.calibration import Calibration, is_kept
from awq_pycuda.evaluating.divergence import Original
from awq_pycuda.evaluating.forward import Runner
from awq_pycuda.evaluating.places import Place
from awq_pycuda.evaluating.quantized import is_there, made
from awq_pycuda.evaluating.recipes import Recipe
from awq_pycuda.evaluating.windows import Cut, Window
from awq_pycuda.layers.files import stored_weights
from awq_pycuda.layers.inputs import LayerSpec, file_sha256
from awq_pycuda.layers.writer import LayerWriter
from awq_pycuda.parallel import use_threads


@dataclass(frozen=True)
class Estimate:
    """What an evaluation will take.

    Attributes:
        seconds: by what takes them.
        bytes: of the host's memory at its peak, beside what the process has at the time of the estimate.
    """

    seconds: Mapping[str, float]
    bytes: int

    @property
    def line(self) -> str:
        """In words, such as `about 4 min (...) and 2.1 GiB`."""
        parts = ", ".join(f"{what} {_clock(seconds)}" for what, seconds in self.seconds.items() if seconds >= 1)
        return f"about {_clock(sum(self.seconds.values()))} ({parts}) and {self.bytes / 2**30:.1f} GiB more memory"


def _clock(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def estimate(
    runner: Runner,
    loaded: Loaded,
    plan: Plan,
    places: Mapping[str, Place],
    recipes: Sequence[Recipe],
    texts: Cut,
    alone: float,
    calibration: Path,
    origin: Mapping[str, str],
    folder: Path,
) -> Estimate:
    """What the evaluation of these recipes will take.

    One window runs through the model in every worker, and each recipe that is not there yet quantizes a few layers, one
    of each shape, on random activations.

    Args:
        runner: of the original, already tried on a window.
        loaded: the model.
        plan: of its layers.
        places: of the same.
        recipes: that fit it.
        texts: what they are searched and evaluated on.
        alone: 1 where a recipe will be tried on every layer alone, less where its forwards end early, 0 where not.
        calibration: where the layer file is or will be.
        origin: what it notes of itself, see `calibrate`.
        folder: where the recipes' runs are or will be.
    """
    hidden, judged = _of_window(runner, texts.evaluation[0])
    windows = sum(len(window.ids) for window in texts.evaluation) / len(texts.evaluation[0].ids)
    tokens = sum(map(len, texts.calibration))
    sha256 = file_sha256(calibration) if is_kept(calibration, texts.calibration, origin) else ""
    runs = {run.name: run for recipe in recipes for run in (recipe, *recipe.parts.values()) if run.config}
    left = [run for run in runs.values() if not is_there(run, calibration, sha256, folder)]
    seconds = {
        "original": windows * (hidden + judged),
        "calibration": 0.0,
        "runs": 0.0,
        "recipes": windows * judged * len(recipes),
        # Of a layer alone only what stands behind it runs again, half of the model on average.
        "layers alone": windows * len(places) * (judged - hidden / 2) * alone,
    }
    writing, seconds["runs"] = _of_layers(places, tokens, left)
    if not sha256:
        seconds["calibration"] = writing + tokens / len(texts.evaluation[0].ids) * hidden * runner.workers
    with runner.on_host():
        sizes = _sizes(loaded, plan, places, texts.calibration)
    steps = [_bytes_of(run, sizes, tokens) for run in left]
    # The layers as they are read stay for the next run.
    read = sum(each.bytes for each in sizes) if left else 0
    hidden_states = (
        4 * loaded.model.config.get_text_config().hidden_size * sum(len(each.ids) for each in texts.evaluation)
    )
    return Estimate(seconds, hidden_states + read + max([*steps, _forward_bytes(runner, places, texts)]))


def _of_window(runner: Runner, window: Window) -> tuple[float, float]:
    """Seconds that a window takes while all workers are at work: its last hidden states, and all of a comparison."""
    begin = time.perf_counter()
    runner.each(lambda _: runner.hidden(window), range(runner.workers))
    middle = time.perf_counter()

    def judge(_: int) -> None:
        logits = runner.logits(window)
        Original(logits, window.targets.to(logits.device)).against(logits)

    runner.each(judge, range(runner.workers))
    end, (base, whole) = time.perf_counter(), runner.seconds
    return (middle - begin) / runner.workers, (end - middle + whole - base) / runner.workers


def _of_layers(places: Mapping[str, Place], tokens: int, runs: Sequence[Recipe]) -> tuple[float, float]:
    """Seconds for a layer file of all layers, and for runs on it and the weights that they give.

    A layer of each shape, on random activations, and the smallest one alone say what is for each weight and what for
    each run.
    """
    of_shapes = {place.shape: (path, place) for path, place in places.items()}
    few, least = list(of_shapes.values()), [of_shapes[min(of_shapes, key=math.prod)]]
    whole, part, one = (sum(math.prod(place.shape) for _, place in each) for each in (places.items(), few, least))
    with TemporaryDirectory() as scratch:
        begin = time.perf_counter()
        of_few = _calibration(Path(scratch) / "few.h5", few, tokens)
        writing = (time.perf_counter() - begin) * whole / part
        of_least = _calibration(Path(scratch) / "least.h5", least, tokens)
        seconds = 0.0
        for number, run in enumerate(runs):
            if number == 0:
                _timed(run, of_least, Path(scratch) / "first")  # which imports and compiles, too
            for_each = _timed(run, of_least, Path(scratch) / "least")
            more = _timed(run, of_few, Path(scratch) / "few") - for_each
            seconds += for_each + max(0.0, more) * (whole - one) / max(1, part - one)
    return writing, seconds


def _calibration(path: Path, layers: Sequence[tuple[str, Place]], tokens: int) -> Calibration:
    random = np.random.default_rng(0)
    with LayerWriter(path) as writer:
        for name, place in layers:
            layer = writer.add(name, place.read(), tokens=tokens)
            writer.append(layer, random.standard_normal((tokens, place.shape[1]), np.float32))
    return Calibration(path, file_sha256(path), tokens, [], False, stored_weights(path))


def _timed(run: Recipe, calibration: Calibration, folder: Path) -> float:
    begin = time.perf_counter()
    found = made(run, calibration, folder)
    for path in found.layers:
        found.weight(path)
    return time.perf_counter() - begin


@dataclass(frozen=True)
class _Size:
    """A layer of the calibration: (out_features, in_features), rows, and whose activations it sees, if another's."""

    shape: tuple[int, int]
    rows: int
    input_of: int | None

    @property
    def bytes(self) -> int:
        """Of its weight and its own activations."""
        return 4 * (math.prod(self.shape) + (0 if self.input_of is not None else self.rows * self.shape[1]))


def _sizes(loaded: Loaded, plan: Plan, places: Mapping[str, Place], windows: Sequence[list[int]]) -> list[_Size]:
    """The layers that runs will have, as the first window of the calibration tells them."""
    rows: dict[str, int] = {}
    first: dict[bytes, str] = {}
    same: dict[str, str] = {}

    def see(name: str, inputs: Any) -> None:
        values = np.ascontiguousarray(inputs.reshape(-1, inputs.shape[-1]).numpy())
        if name not in rows:
            rows[name] = len(values)
            found = first.setdefault(hashlib.blake2b(values.data).digest(), name)
            if found != name:
                same[name] = found

    stacks = {name: loaded.model.get_submodule(name) for name in plan.experts}
    with (
        hooked(plan.layers, lambda name, _module, inputs: see(name, inputs)),
        Interception(stacks, lambda expert, _weight, inputs: see(expert.name, inputs)),
    ):
        run_window(loaded.model, windows[0])
    share = sum(map(len, windows)) / len(windows[0])
    numbers = {name: number for number, name in enumerate(name for name in places if rows.get(name))}
    return [
        _Size(places[name].shape, round(rows[name] * share), numbers[same[name]] if name in same else None)
        for name in numbers
    ]


def _bytes_of(run: Recipe, sizes: Sequence[_Size], tokens: int) -> int:
    """What a run makes on the host, beside the layers that it has read."""
    config = run.config
    assert config is not None
    assert isinstance(config.inputs, FileInputs)
    rows = config.tokens or tokens - config.inputs.first_token
    nothing = np.zeros(1, np.float32)  # no memory for what is only counted
    layers = []
    for number, size in enumerate(sizes[: config.layers]):
        taken = min(rows, size.rows)
        weight, inputs = np.broadcast_to(nothing, size.shape), np.broadcast_to(nothing, (taken, size.shape[1]))
        layers.append(LayerSpec(str(number), taken, weight, inputs, input_of=size.input_of))
    # Of a file, which is not there yet, a run would have its layers alone.
    without = replace(config, inputs=SyntheticInputs(), n=1, tokens=1, layers=1, export=Export.none)
    ready = prepared(replace(spec_of(without), layers=layers))
    with use_threads(ready.spec.threads):
        return required_bytes(ready.spec, ready.backend.limits)[1]


def _forward_bytes(runner: Runner, places: Mapping[str, Place], texts: Cut) -> int:
    """What a comparison makes: other weights in the layers' place, and in every worker logits and activations."""
    weights = 4 * sum(math.prod(place.shape) for place in places.values())
    longest = max(len(window.ids) for window in texts.evaluation)
    widest = max(max(place.shape) for place in places.values())
    # The logits of both; a block's activations, of which the widest and its product with another are there at once.
    of_worker = 4 * longest * (2 * runner.vocabulary + 3 * widest)
    return weights + runner.workers * of_worker
