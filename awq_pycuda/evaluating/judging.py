"""What a recipe does to the model, token by token and summed up."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from awq_pycuda.bootstrap import Bootstrap
from awq_pycuda.evaluating.divergence import Original
from awq_pycuda.evaluating.forward import Runner
from awq_pycuda.evaluating.origin import find_origin
from awq_pycuda.evaluating.places import Place
from awq_pycuda.evaluating.quantized import QuantizedModel
from awq_pycuda.evaluating.windows import Window
from awq_pycuda.results.evaluation_record import ORIGINAL, EvaluatedRecipe, Figure, OfLayers, OfTokens

SEED = 0  # of the draws of windows


class NotFinite(Exception):
    """Logits that are NaN or infinite; the message says where in the forward that began, and in which window."""


class Judge:
    """Holds a model beside the original, of whose windows it has the last hidden states.

    Args:
        runner: of the model.
        windows: of the evaluation.
        hidden: what `Runner.keep` gave for the original.
    """

    def __init__(self, runner: Runner, windows: Sequence[Window], hidden: Sequence[Any]) -> None:
        self._runner, self._windows, self._hidden = runner, windows, hidden

    def judge(self, on_done: Callable[[], None]) -> list[OfTokens]:
        """The model as it is now, window by window; `on_done` is told of each.

        Raises:
            NotFinite: some logit is NaN or infinite.
        """
        found = self._runner.each(self._of_window, range(len(self._windows)), on_done)
        for window, each in zip(self._windows, found, strict=True):
            if not all(np.isfinite(values).all() for values in (each.kl, each.kl_reverse, each.nll)):
                origin = find_origin(self._runner, window)
                raise NotFinite(f"NaN or infinite logits, from {origin} on, in the window at token {window.first}")
        return found

    def _of_window(self, index: int) -> OfTokens:
        window = self._windows[index]
        original = Original(self._runner.logits_of(window, self._hidden[index]), window.targets)
        return original.against(self._runner.logits(window))


@dataclass(frozen=True)
class Summary:
    """What sums up windows, always on the same draws of them, and layers that recipes may leave as they are."""

    bootstrap: Bootstrap
    places: Mapping[str, Place]
    bits: Mapping[str, int]
    """Of a weight of each layer of the original, by path: 16 where a type of so many bits holds all of its weights."""

    @classmethod
    def of(cls, windows: Sequence[Window], places: Mapping[str, Place]) -> Summary:
        tokens = [window.stop - window.start for window in windows]
        return cls(Bootstrap(tokens, SEED), places, {name: _bits(place.view) for name, place in places.items()})

    def original(self, found: Sequence[OfTokens], seconds: float) -> EvaluatedRecipe:
        """The original's own line."""
        return self._line(ORIGINAL, found, {}, seconds)

    def recipe(
        self, model: QuantizedModel, overrides: Sequence[str], results: str, found: Sequence[OfTokens], seconds: float
    ) -> EvaluatedRecipe:
        """A recipe's line; `results` is the path of its run's file as the evaluation's tells it."""
        return self._line(
            model.name,
            found,
            model.layers,
            seconds,
            config=model.config,
            overrides=json.dumps(list(overrides)),
            mixture=json.dumps(dict(model.mixture)) if model.mixture else "",
            config_hash=model.config_hash,
            results=results,
            search_s=model.search_s,
        )

    def _line(
        self,
        name: str,
        found: Sequence[OfTokens],
        layers: Mapping[str, Any],
        seconds: float,
        **more: Any,
    ) -> EvaluatedRecipe:
        sizes = {path: math.prod(place.shape) for path, place in self.places.items()}
        stored = sum(
            layers[path].bytes if path in layers else size * self.bits[path] // 8 for path, size in sizes.items()
        )
        values: dict[str, Any] = {
            **{"config": "", "overrides": "[]", "mixture": "", "config_hash": "", "results": "", "search_s": 0.0},
            **more,
        }
        return EvaluatedRecipe(
            name=name,
            **values,
            bits=8 * stored / sum(sizes.values()),
            linear_bytes=float(stored),
            kl=self._figure([each.kl for each in found]),
            kl_reverse=self._figure([each.kl_reverse for each in found]),
            perplexity=self._figure([each.nll for each in found], np.exp),
            top1=self._figure([each.top1 for each in found]),
            evaluate_s=seconds,
            of_tokens=_joined(found),
            of_layers=OfLayers(
                np.array([layers[path].bits if path in layers else self.bits[path] for path in sizes], float),
                *(
                    np.array([getattr(layers[path], figure) if path in layers else math.nan for path in sizes], float)
                    for figure in ("output_sqnr_db", "rtn_output_sqnr_db", "gamma")
                ),
            ),
        )

    def _figure(self, of_windows: Sequence[Any], of: Callable[[Any], Any] | None = None) -> Figure:
        means = [math.fsum(values) / len(values) for values in of_windows]
        value = self.bootstrap.mean(means)
        return Figure(float(value if of is None else of(value)), *map(float, self.bootstrap.interval(means, of)))


def _joined(found: Sequence[OfTokens]) -> OfTokens:
    """Windows one after the other."""
    return OfTokens(*(np.concatenate([getattr(each, name) for each in found]) for name in vars(found[0])))


def _bits(weight: Any) -> int:
    exact = any(torch.equal(weight.to(kind).float(), weight) for kind in (torch.bfloat16, torch.float16))
    return 16 if exact else 32
