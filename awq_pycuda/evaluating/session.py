"""A whole evaluation: the original, one calibration for all recipes, and every recipe in turn."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from awq_pycuda import provenance
from awq_pycuda.backends.cpu import CpuBackend
from awq_pycuda.capturing.fault import Fault
from awq_pycuda.capturing.loading import LIBRARIES, Loaded, load
from awq_pycuda.capturing.probing import Plan
from awq_pycuda.capturing.text import Around, find_around, hash_text
from awq_pycuda.capturing.windows import Window, check_ids, find_window
from awq_pycuda.capturing.writing import model_name
from awq_pycuda.errors import InputError
from awq_pycuda.evaluating.alone import costs, undone
from awq_pycuda.evaluating.calibration import calibrate, hash_model, plan_of
from awq_pycuda.evaluating.estimate import estimate
from awq_pycuda.evaluating.forward import Runner
from awq_pycuda.evaluating.judging import SEED, Judge, NotFinite, Summary
from awq_pycuda.evaluating.places import Place, places_of, replaced
from awq_pycuda.evaluating.quantized import QuantizedModel, made
from awq_pycuda.evaluating.recipes import Recipe, fitting, tokens_needed
from awq_pycuda.evaluating.request import Request
from awq_pycuda.evaluating.windows import Cut, cut, hash_ids
from awq_pycuda.limits import refuse_beyond_memory
from awq_pycuda.results.evaluation_record import (
    Alone,
    EvaluatedRecipe,
    EvaluationRecord,
    Layers,
    OfTokens,
    Tokens,
    Windows,
)
from awq_pycuda.results.evaluation_schema import CALIBRATION_NAME
from awq_pycuda.results.status import status_attributes
from awq_pycuda.signals import Stopped

Progress = Callable[[str, int, int], None]


@dataclass
class _Done:
    """What an evaluation has found so far; a record as soon as the original is there."""

    root: dict[str, Any] = field(default_factory=dict)
    said: list[str] = field(default_factory=list)
    recipes: list[EvaluatedRecipe] = field(default_factory=list)
    windows: Windows | None = None
    tokens: Tokens | None = None
    layers: Layers | None = None
    alone: Alone | None = None

    def record(self, ended: BaseException | None) -> EvaluationRecord:
        assert self.windows is not None
        assert self.tokens is not None
        assert self.layers is not None
        failure = None if ended is None else f"{type(ended).__name__}: {ended}".removesuffix(": ")
        if isinstance(ended, Stopped):
            failure = str(ended)
        root = {**self.root, **status_attributes(failure), "said": json.dumps(self.said)}
        return EvaluationRecord(root, self.recipes, self.windows, self.tokens, self.layers, self.alone, ended)


def evaluate(
    request: Request,
    tell: Callable[[str], None],
    on_progress: Progress = lambda what, done, total: None,
    interruptible: AbstractContextManager[None] = nullcontext(),  # noqa: B008  # a nullcontext has no state
) -> EvaluationRecord:
    """Evaluates all recipes of a request. What ends it early is in the record as soon as the original is done.

    Args:
        request: what is to be evaluated.
        tell: told, line by line, what must be known of model, text and calibration, as soon as it is.
        on_progress: told what is going on, how many steps of that are done, and of how many.
        interruptible: held while it works.

    Raises:
        Fault: model or text cannot be evaluated.
        InputError: recipes do not fit the model.
    """
    done = _Done()
    try:
        with interruptible:
            _work(request, done, tell, on_progress)
    except (Exception, KeyboardInterrupt) as ended:
        if not done.recipes:
            raise
        return done.record(ended)
    return done.record(None)


@dataclass(frozen=True)
class _Ready:
    """A model, a text and recipes that fit together."""

    loaded: Loaded
    around: Around
    window: Window
    texts: Cut
    plan: Plan
    places: Mapping[str, Place]
    recipes: Sequence[Recipe]
    origin: Mapping[str, Any]
    """Attributes of the file that say what text this is."""


def _work(request: Request, done: _Done, tell: Callable[[str], None], on_progress: Progress) -> None:
    def say(lines: Sequence[str]) -> None:
        """What the record keeps, too; once, for a calibration that was there tells of the model again."""
        for line in lines:
            if line not in done.said:
                done.said.append(line)
                tell(line)

    on_progress("loading", 0, 1)
    ready = _prepare(request, say)
    loaded, texts, plan, places = ready.loaded, ready.texts, ready.plan, ready.places
    done.layers = _layers(places)
    path, folder = request.out / CALIBRATION_NAME, request.out / "recipes"
    with Runner(loaded.causal, loaded.model, request.workers, request.device) as runner:
        runner.try_on(texts.evaluation[0])
        say(runner.said)
        done.root |= {**_origin(request, ready, runner), **ready.origin}
        origin = {name: str(done.root[name]) for name in _OF_CALIBRATION}
        on_progress("estimate", 0, 1)
        alone = 0.0 if not request.alone else 1.0 if request.alone_to_logits else _TO_BLOCK
        expected = estimate(runner, loaded, plan, places, ready.recipes, texts, alone, path, origin, folder)
        tell(f"estimate: {expected.line}")
        free = psutil.virtual_memory().available
        refuse_beyond_memory(f"model={request.model}", expected.bytes, free, "host's memory")
        each = _Each(runner, texts, places, on_progress)
        original = each.original()
        done.windows, done.tokens = each.windows(), each.tokens(original.of_tokens)
        done.recipes.append(original)
        if original.of_tokens.kl.any():
            say([f"the model is not the same from run to run: its KL to itself is {original.kl.value:.3g}"])
        with runner.on_host():
            request.out.mkdir(exist_ok=True)
            windows, around = texts.calibration, ready.around
            calibration = calibrate(loaded, plan, windows, around, ready.window, path, origin, on_progress)
        say(calibration.said)
        for number, recipe in enumerate(ready.recipes, 1):
            called = f"{recipe.name}, {number} of {len(ready.recipes)}"
            model = made(recipe, calibration, folder, _prefixed(on_progress, called))
            done.recipes.append(each.recipe(recipe, model, request.out, called))
            if recipe.name == request.alone:
                tried = len(done.recipes) - 1, model
        if request.alone:
            done.alone = undone(tried[0], len(places), len(texts.evaluation))
            say(each.alone(tried[1], done.alone, request.alone_to_logits))


def _prepare(request: Request, say: Callable[[Sequence[str]], None]) -> _Ready:
    """Loads the model and cuts the text. Raises `Fault`, and `InputError` for recipes that do not fit."""
    text_hash = hash_text(request.text)
    loaded = load(request.model, causal=True)
    base, tokenizer = loaded.model, loaded.tokenizer
    around = find_around(request.text, tokenizer)
    window = find_window(base, tokenizer, max(request.window, len(around) + 1), len(around))
    calibrated = tokens_needed(request.recipes, request.calibration)
    texts = cut(request.text, tokenizer, around, window.length, calibrated, request.skip, request.tokens)
    check_ids(base, tokenizer, [*texts.calibration, *(each.ids for each in texts.evaluation)])
    plan = plan_of(loaded, around, window.length)
    places = places_of(base, plan)
    recipes, lines = fitting(request.recipes, {path: place.shape for path, place in places.items()})
    if request.alone and request.alone not in {recipe.name for recipe in recipes}:
        raise Fault("alone", "is left out, since it does not fit the model", "a recipe that fits")
    say([*loaded.said, *([] if window.why is None else [f"windows of {window.length} tokens: {window.why}"]), *lines])
    origin = {
        "text_sha256": text_hash,
        "calibration_sha256": hash_ids(texts.calibration),
        "evaluation_sha256": hash_ids([each.ids for each in texts.evaluation]),
        "calibration_tokens": calibrated,
        "skipped_tokens": request.skip,
        "evaluation_tokens": texts.tokens,
        "predicted_tokens": sum(each.stop - each.start for each in texts.evaluation),
        "window": window.length,
    }
    return _Ready(loaded, around, window, texts, plan, places, recipes, origin)


def _prefixed(on_progress: Progress, called: str) -> Progress:
    return lambda what, done, total: on_progress(f"{called}: {what}", done, total)


def _layers(places: Mapping[str, Place]) -> Layers:
    rows, columns = (np.array([place.shape[axis] for place in places.values()], np.int64) for axis in (0, 1))
    return Layers(list(places), columns, rows)


_TO_BLOCK = 0.1  # of the time of forwards to the logits, those to the end of a layer's block
_OF_CALIBRATION = ("model", "model_type", "model_sha256", "text_sha256", "calibration_sha256")


class _Each:
    """Evaluates the original, then recipes, one after the other, on the same windows."""

    def __init__(self, runner: Runner, texts: Cut, places: Mapping[str, Place], on_progress: Progress) -> None:
        self._runner, self._windows, self._places, self._tell = runner, texts.evaluation, places, on_progress
        self._summary = Summary.of(texts.evaluation, places)

    def original(self) -> EvaluatedRecipe:
        """The original beside itself, as any recipe: that finds out whether it is finite, and the same each time."""
        self._hidden = self._runner.keep(self._windows, self._counted("original"))
        self._judge = Judge(self._runner, self._windows, self._hidden)
        begin = time.perf_counter()
        try:
            found = self._judge.judge(self._counted("original"))
        except NotFinite as fault:
            raise Fault("model", f"has {fault}", "models whose logits are finite") from None
        return self._summary.original(found, time.perf_counter() - begin)

    def recipe(self, recipe: Recipe, model: QuantizedModel, out: Path, called: str) -> EvaluatedRecipe:
        """A recipe's line; it is `called` so in the progress."""
        begin = time.perf_counter()
        try:
            with replaced(self._places, model.weight):
                found = self._judge.judge(self._counted(called))
        except NotFinite as fault:
            raise InputError(f"recipes: {recipe.name}: has {fault}; allowed: recipes with finite logits") from None
        results = "" if model.results is None else os.path.relpath(model.results, out)
        return self._summary.recipe(model, recipe.overrides, results, found, time.perf_counter() - begin)

    def alone(self, model: QuantizedModel, into: Alone, to_logits: bool) -> list[str]:
        """Every layer alone as a recipe quantizes it; see `costs`."""

        def on_done(done: int, total: int) -> None:
            self._tell(f"{model.name}, layers alone", done, total)

        of_original = self._windows, self._hidden
        try:
            return costs(self._runner, self._places, *of_original, model.weight, into, on_done, to_logits)
        except NotFinite as fault:
            raise InputError(f"alone={model.name}: has {fault}; allowed: recipes with finite logits") from None

    def windows(self) -> Windows:
        """As the record has them."""
        return Windows(
            np.array([window.first for window in self._windows], np.int64),
            np.array([window.stop - window.start for window in self._windows], np.int64),
        )

    def tokens(self, of_original: OfTokens) -> Tokens:
        """As the record has them."""
        counts = [window.stop - window.start for window in self._windows]
        ids = [window.targets.numpy() for window in self._windows]
        return Tokens(np.repeat(np.arange(len(counts)), counts), np.concatenate(ids), of_original.nll)

    def _counted(self, what: str) -> Callable[[], None]:
        """Tells of one window more each time it is called."""
        total = len(self._windows)
        steps = iter(range(1, total + 1))
        self._tell(what, 0, total)
        return lambda: self._tell(what, next(steps), total)


def _origin(request: Request, ready: _Ready, runner: Runner) -> dict[str, Any]:
    """The attributes of the file that say of what model it is, and where that ran."""
    made_by = provenance.made_by(CpuBackend())
    if runner.device != "cpu":
        gpu = torch.cuda.get_device_properties(runner.device)
        told = {"name": gpu.name, "capability": f"{gpu.major}.{gpu.minor}", "memory_bytes": gpu.total_memory}
        made_by |= {"backend": "cuda", "device": json.dumps(told)}
    libraries = {name: str(sys.modules[name].__version__) for name in LIBRARIES}
    return {
        **made_by,
        "versions": json.dumps(json.loads(str(made_by["versions"])) | libraries),
        "options": json.dumps(request.options),
        "model": model_name(request.model),
        "model_type": ready.loaded.model.config.model_type,
        "model_sha256": hash_model(runner.causal),
        "vocabulary": runner.vocabulary,
        "parameters": sum(parameter.numel() for parameter in runner.causal.parameters()),
        "linear_parameters": sum(math.prod(place.shape) for place in ready.places.values()),
        "seed": SEED,
    }
