"""Two evaluations on the same tokens compared, recipe by recipe and window by window."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from awq_pycuda.analysis.evaluations import (
    OF_TOKENS,
    Evaluation,
    evaluations_of,
    resamples,
    window_means,
    without_original,
)
from awq_pycuda.errors import InputError
from awq_pycuda.hdf5 import UnreadableError
from awq_pycuda.hdf5_worker import ask
from awq_pycuda.results import evaluation_schema
from awq_pycuda.results.evaluation_record import EvaluationRecord
from awq_pycuda.results.files import read_any

_COLUMNS = ("recipe", "figure", "a", "b", "difference", "low", "high", "verdict")
_HIGHER = ("top1",)  # is better
_APART = {"model_sha256": "models", "calibration_sha256": "calibration tokens"}


@dataclass(frozen=True)
class EvaluationComparison:
    """What B changed against A.

    `figures` has a row per recipe of both and figure (`kl`, `kl_reverse`, `nll`, `top1`): the means over the tokens,
    B's less A's with its 95 % interval, and a verdict. `changed` are the recipes whose configs differ, `not_compared`
    (set, recipe, reason) those that only one of them has; `apart` is what else differs, such as the models.
    """

    figures: pd.DataFrame
    not_compared: pd.DataFrame
    changed: Sequence[str]
    apart: Sequence[str]


def read_evaluations(*paths: Path) -> list[Evaluation] | None:
    """The evaluations of these files, or of folders that hold an evaluation.h5; None where none of them is one.

    Raises:
        InputError: some are, and others are not.
    """
    files = [path / evaluation_schema.FILE_NAME if path.is_dir() else path for path in paths]
    answers = ask([(read_any, path) for path in files])
    records = [answer for answer in answers if isinstance(answer, EvaluationRecord)]
    if not records:
        return None
    for path, answer in zip(files, answers, strict=True):
        if not isinstance(answer, EvaluationRecord):
            reason = str(answer) if isinstance(answer, UnreadableError) else "the result of a run"
            raise InputError(f"{path}: {reason}; allowed: two evaluations, or results of runs")
    return evaluations_of(list(zip(files, records, strict=True)))


def compare_evaluations(a: Evaluation, b: Evaluation, tolerance: float = 0.0) -> EvaluationComparison:
    """Compares the recipes that both have, by name, on the same windows drawn again.

    `same`: every window's mean is equal, or the interval lies within ± tolerance of A's figure; `better` or `worse`:
    the interval leaves 0 out; `unclear`: anything else.

    Args:
        a: the reference.
        b: what is compared with it.
        tolerance: difference that does not matter, as a share of A's figure.

    Raises:
        InputError: they were evaluated on different tokens, or share no recipe.
    """
    own, other = a.record, b.record
    for name, what in (("evaluation_sha256", "evaluation tokens"), ("window", "tokens of a window")):
        values = [str(record.root[name])[:12] for record in (own, other)]
        if values[0] != values[1]:
            raise InputError(f"{what} differ: {values[0]} and {values[1]}; allowed: two evaluations on the same tokens")
    if not np.array_equal(own.windows.tokens, other.windows.tokens):
        raise InputError("the windows differ; allowed: two evaluations on the same tokens")
    theirs = {recipe.name: recipe for recipe in other.recipes[1:]}
    mine = {recipe.name: recipe for recipe in own.recipes[1:]}
    both = [name for name in without_original(a.recipes)["recipe"] if name in theirs]
    if not both:
        raise InputError("B has no recipe that A has; allowed: two evaluations that share a recipe")
    bootstrap = resamples(own)
    rows: list[tuple[Any, ...]] = []
    for name in both:
        ours, others = window_means(own, mine[name]), window_means(other, theirs[name])
        for figure in OF_TOKENS:
            equal = np.array_equal(ours[figure], others[figure], equal_nan=True)
            difference = np.zeros_like(ours[figure]) if equal else others[figure] - ours[figure]
            value = float(bootstrap.mean(ours[figure]))
            low, high = map(float, bootstrap.interval(difference))
            signed = (-high, -low) if figure in _HIGHER else (low, high)
            verdict = _verdict(difference, *signed, tolerance * abs(value))
            means = value, float(bootstrap.mean(others[figure])), float(bootstrap.mean(difference))
            rows.append((name, figure, *means, low, high, verdict))
    left = [("A", name, "B has no such recipe") for name in mine if name not in theirs]
    left += [("B", name, "A has no such recipe") for name in theirs if name not in mine]
    return EvaluationComparison(
        figures=pd.DataFrame(rows, columns=list(_COLUMNS)),
        not_compared=pd.DataFrame(left, columns=["set", "recipe", "reason"]),
        apart=[what for name, what in _APART.items() if own.root[name] != other.root[name]],
        changed=[name for name in both if mine[name].config_hash != theirs[name].config_hash],
    )


def _verdict(difference: Any, low: float, high: float, slack: float) -> str:
    """Of a difference of which lower is better."""
    if not np.any(difference) or (-slack <= low and high <= slack):
        return "same"
    return "better" if high < 0 else "worse" if low > 0 else "unclear"
