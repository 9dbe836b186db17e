"""Watches a tool's functions at work: what they have in their local variables, without a change to them."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from awq_pycuda.quant.conventions import Candidate

Array = NDArray[Any]


class Searched(NamedTuple):
    """What a search tried: candidates, their (G, K) scales and (G,) errors, and which it chose."""

    candidates: tuple[Candidate, ...]
    scales: Array
    errors: Array
    chosen: int


@dataclass
class Trial:
    """Local variables of a search in one of its trials."""

    candidate: Candidate
    scales: Array
    loss: float = float("nan")


@contextmanager
def watched(search: str, trial: str) -> Iterator[list[Searched]]:
    """Yields what each call of a function tries and chooses, by its local variables; filled when it returns.

    Args:
        search: name of the function. It holds `ratio`, `scales`, after a trial `loss`, in the end `best_scales`.
        trial: name of a function that it calls in each trial, when `scales` are made and before `loss` is.
    """
    searches: list[Searched] = []
    trials: list[Trial] = []

    def look(frame: types.FrameType, event: str, _: object) -> None:
        name = frame.f_code.co_name
        if event == "call" and name == trial:
            caller: types.FrameType | None = frame.f_back
            while caller is not None and caller.f_code.co_name != search:
                caller = caller.f_back
            if caller is None:
                return
            held = caller.f_locals
            duo = held["use_duo_scaling"] if "use_duo_scaling" in held else getattr(held.get("self"), "duo_scaling", 0)
            candidate = Candidate(float(held["ratio"]), duo=bool(duo))
            if trials and trials[-1].candidate == candidate:  # of several layers, each is quantized in a trial
                return
            if trials:
                trials[-1].loss = float(held["loss"])
            trials.append(Trial(candidate, numbers(held["scales"]).reshape(-1).copy()))
        elif event == "return" and name == search and trials:
            trials[-1].loss = float(frame.f_locals["loss"])
            searches.append(_searched(trials, numbers(frame.f_locals["best_scales"])))
            trials.clear()

    sys.setprofile(look)
    try:
        yield searches
    finally:
        sys.setprofile(None)


def _searched(trials: Sequence[Trial], best: Array) -> Searched:
    """What a search tried, and of that the candidate whose scales are the best."""
    scales = np.array([each.scales for each in trials])
    chosen = int(np.flatnonzero((scales == best.reshape(-1)).all(axis=1))[0])
    return Searched(tuple(each.candidate for each in trials), scales, np.array([each.loss for each in trials]), chosen)


@contextmanager
def returned(function: str) -> Iterator[dict[str, Any]]:
    """Yields what a function of this name has in its local variables when it returns; filled by then."""
    held: dict[str, Any] = {}

    def look(frame: types.FrameType, event: str, _: object) -> None:
        if event == "return" and frame.f_code.co_name == function:
            held.update(frame.f_locals)

    sys.setprofile(look)
    try:
        yield held
    finally:
        sys.setprofile(None)


def numbers(tensor: Any) -> Array:
    """A tensor as an array."""
    found: Array = tensor.detach().cpu().numpy()
    return found
