"""How long an evaluation takes and how much memory, told before its start from one window and a few layers of it."""

from __future__ import annotations

import hashlib
import math
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from awq_pycuda.capturing.experts import Interception
from awq_pycuda.capturing.loading import Loaded
from awq_pycuda.capturing.probing import Plan, hooked
from awq_pycuda.capturing.windows import run_window
from awq_pycuda.config import Config, Export, FileInputs, SyntheticInputs
from awq_pycuda.config_text import config_hash
from awq_pycuda.engine.execution import Prepared, prepared
from awq_pycuda.engine.memory import required_bytes
from awq_pycuda.engine.pipeline import Pipeline
from awq_pycuda.engine.spec import spec_of
from awq_pycuda.evaluating.calibration import Calibration, is_kept
from awq_pycuda.evaluating.divergence import Original
from awq_pycuda.evaluating.forward import Runner
from awq_pycuda.evaluating.places import Place
from awq_pycuda.evaluating.quantized import codes_of, is_there, made
from awq_pycuda.evaluating.recipes import Recipe
from awq_pycuda.evaluating.windows import Cut, Window
from awq_pycuda.layers.files import stored_weights
from awq_pycuda.layers.inputs import LayerSpec, file_sha256
from awq_pycuda.layers.writer import LayerWriter
from awq_pycuda.parallel import use_threads
from awq_pycuda.quant.quantized import dequantize
from awq_pycuda.results.scales import LayerScales


@dataclass(frozen=True)
class Estimate:
    """What an evaluation will take.

    Attributes:
        seconds: by what takes them.
        bytes: of the host's memory at its peak, beside what the process has once the estimate is made.
    """

    seconds: Mapping[str, float]
    bytes: int

    @property
    def line(self) -> str:
        """In words, such as `about 4 min (...) and 2.1 GiB`."""
        parts = ", ".join(f"{what} {_clock(seconds)}" for what, seconds in self.seconds.items() if seconds >= 1)
        of_parts = f" ({parts})" if parts else ""
        return f"about {_clock(sum(self.seconds.values()))}{of_parts} and {self.bytes / 2**30:.1f} GiB more memory"


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
    of each kind, on random activations.

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
    if left or not sha256:
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

    A layer of each kind, on random activations, says what is for each weight; by the smallest one and all of them the
    first run says what its files take.
    """
    kinds = {(re.sub(r"\d+", "*", path), place.shape): (path, place) for path, place in places.items()}
    few = _specs(kinds.values(), tokens)
    least = [min(few, key=lambda spec: spec.out_features * spec.in_features)]
    of_few = sum(spec.out_features * spec.in_features for spec in few)
    times = _weights(places.values()) / of_few
    with TemporaryDirectory() as scratch:
        begin = time.perf_counter()
        calibration = _written(Path(scratch) / "few.h5", few)
        writing = (time.perf_counter() - begin) * times
        seconds, of_files = 0.0, math.nan
        of_config: dict[str, float] = {}
        for run in runs:
            assert run.config is not None
            config = _without_layers(run)
            if (key := config_hash(config)) not in of_config:
                _searched(config, least)  # which imports and compiles, too
                of_config[key] = _searched(config, few)
            if math.isnan(of_files):
                whole = replace(run, config=replace(run.config, layers=None))
                once = _stored(whole, _written(Path(scratch) / "least.h5", least)) - _searched(config, least)
                of_files = once + max(0.0, _stored(whole, calibration) - of_config[key] - once) * times
            seconds += of_files + of_config[key] * _weights(list(places.values())[: run.config.layers]) / of_few
    return writing, seconds


def _stored(recipe: Recipe, calibration: Calibration) -> float:
    """Seconds of a recipe's run with all that stands in files, and of its weights."""
    begin = time.perf_counter()
    found = made(recipe, calibration, calibration.path.with_suffix(""))
    for path in found.layers:
        found.weight(path)
    return time.perf_counter() - begin


def _weights(places: Iterable[Place]) -> int:
    return sum(math.prod(place.shape) for place in places)


def _specs(layers: Iterable[tuple[str, Place]], tokens: int) -> list[LayerSpec]:
    """Layers with random activations."""
    random = np.random.default_rng(0)
    return [
        LayerSpec(name, tokens, place.read(), random.standard_normal((tokens, place.shape[1]), np.float32))
        for name, place in layers
    ]


def _array(values: Any) -> NDArray[np.float32]:
    """What `_specs` has made an array of."""
    assert isinstance(values, np.ndarray)
    return values


def _written(path: Path, specs: Sequence[LayerSpec]) -> Calibration:
    with LayerWriter(path) as writer:
        for spec in specs:
            layer = writer.add(spec.name, _array(spec.weight), tokens=spec.tokens)
            writer.append(layer, _array(spec.activations))
    return Calibration(path, file_sha256(path), specs[0].tokens, [], False, stored_weights(path))


def _searched(config: Config, layers: Sequence[LayerSpec]) -> float:
    """Seconds in which a run on so many rows of these layers finds what it finds, and its weights are made again."""
    rows = config.tokens or layers[0].tokens
    run = _on(config, [replace(spec, tokens=rows, activations=_array(spec.activations)[:rows]) for spec in layers])
    with run.at_work():
        pipeline = Pipeline(run.backend, run.spec)
        begin = time.perf_counter()
        pipeline.run()
        for spec, found in zip(layers, pipeline.layers, strict=True):
            of = found.quantized
            ratio = None if found.clipped is None else found.clipped.ratio
            scales = LayerScales(found.search.s, of.steps, of.zero_points, of.tensor_scale, ratio)
            dequantize(codes_of(_array(spec.weight), scales, of.format, spec.name), 1 / scales.s)
        return time.perf_counter() - begin


def _without_layers(recipe: Recipe) -> Config:
    """The config of a recipe's run but for where its layers are, which is in no file yet."""
    assert recipe.config is not None
    return replace(recipe.config, inputs=SyntheticInputs(), n=1, layers=1, export=Export.none)


def _on(config: Config, layers: Sequence[LayerSpec]) -> Prepared:
    """A run on layers that are in no file."""
    return prepared(replace(spec_of(replace(config, tokens=1)), layers=list(layers)))


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
    ready = _on(_without_layers(run), layers)
    with use_threads(ready.spec.threads):
        return required_bytes(ready.spec, ready.backend.limits)[1]


def _forward_bytes(runner: Runner, places: Mapping[str, Place], texts: Cut) -> int:
    """What a comparison makes: other weights in the layers' place, and in every worker logits and activations."""
    weights = 4 * _weights(places.values())
    longest = max(len(window.ids) for window in texts.evaluation)
    widest = max(max(place.shape) for place in places.values())
    # The logits of both; a block's activations, of which the widest and its product with another are there at once.
    of_worker = 4 * longest * (2 * runner.vocabulary + 3 * widest)
    return weights + runner.workers * of_worker
