"""Evaluations of whole models as tables: what each recipe costs the model, and each layer where it was tried alone."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from awq_pycuda.analysis.find import run_names
from awq_pycuda.analysis.frames import frame
from awq_pycuda.analysis.recipes import format_name, recipe_name
from awq_pycuda.bootstrap import Bootstrap
from awq_pycuda.hdf5 import UnreadableError
from awq_pycuda.results.evaluation_record import ORIGINAL, EvaluatedRecipe, EvaluationRecord
from awq_pycuda.results.reader import config_by_key
from awq_pycuda.spread import Spread

FIGURES = ("kl", "kl_reverse", "top1", "perplexity")
OF_TOKENS = ("kl", "kl_reverse", "nll", "top1")
MIXTURE = "mixture"  # the format of a recipe that takes several
TOP_SHARE = 0.01  # of the tokens: those of which `kl_in_top` tells how much of all KL they hold
_ROOT = (
    *("model", "model_type", "status", "created", "window"),
    *("calibration_tokens", "skipped_tokens", "evaluation_tokens"),
)
_RECIPE_COLUMNS = (
    *("evaluation", "recipe", "format", "method", "bits", "linear_bytes"),
    *("kl", "kl_low", "kl_high", "rtn", "kl_over_rtn", "kl_over_rtn_low", "kl_over_rtn_high"),
    *(f"{name}{end}" for name in FIGURES[1:] for end in ("", "_low", "_high")),
    *("output_sqnr_db_median", "rtn_output_sqnr_db_median", "kl_in_top", "search_s", "evaluate_s"),
    *("index", "config_hash", "results", "path", *_ROOT),
)
_WINDOW_COLUMNS = ("evaluation", "recipe", "window", "first_token", "tokens", *OF_TOKENS)
_LAYER_COLUMNS = (
    *("evaluation", "recipe", "layer", "name", "in_features", "out_features", "bits", "gamma"),
    *("output_sqnr_db", "rtn_output_sqnr_db", "kl_alone", "kl_alone_low", "kl_alone_high", "kl_reverse_alone"),
    *("stream_alone", "rank_alone"),
)


@dataclass(frozen=True, eq=False)
class Evaluation:
    """One evaluation's file under a short name, and its tables; docs/analysis.md has their columns.

    `recipes` has a row per recipe, by size and then KL, so that the original is the last; `windows` one per recipe and
    window; `layers` one per recipe and layer, without the original. `alone` is the name of the recipe whose layers were
    tried alone, empty without.
    """

    name: str
    path: Path
    record: EvaluationRecord
    recipes: pd.DataFrame
    windows: pd.DataFrame
    layers: pd.DataFrame
    alone: str


def evaluations_of(found: Sequence[tuple[Path, EvaluationRecord]]) -> list[Evaluation]:
    """The evaluations of these files."""
    names = run_names([path for path, _ in found])
    return [_tables(name, path, record) for name, (path, record) in zip(names, found, strict=True)]


def together(evaluations: Sequence[Evaluation], table: str) -> pd.DataFrame:
    """One table of several evaluations: `recipes`, `windows` or `layers`."""
    columns = {"recipes": _RECIPE_COLUMNS, "windows": _WINDOW_COLUMNS, "layers": _LAYER_COLUMNS}[table]
    parts = [getattr(each, table) for each in evaluations]
    return pd.concat(parts, ignore_index=True) if parts else frame([], columns)


def window_means(record: EvaluationRecord, recipe: EvaluatedRecipe) -> dict[str, NDArray[np.float64]]:
    """By figure of a token, its mean in each window, (W,)."""
    of_window, tokens = record.tokens.of_window, record.windows.tokens
    return {
        name: np.bincount(of_window, np.asarray(getattr(recipe.of_tokens, name), np.float64), tokens.size) / tokens
        for name in OF_TOKENS
    }


def resamples(record: EvaluationRecord) -> Bootstrap:
    """The resamples of its windows, by its own seed."""
    return Bootstrap(record.windows.tokens, int(record.root["seed"]))


def rank_correlation(x: Any, y: Any) -> float:
    """Spearman's ρ of the pairs of which both are finite; NaN where they are less than three."""
    pairs = pd.DataFrame({"x": x, "y": y}, dtype=float)
    ranks = pairs[np.isfinite(pairs).all(axis=1)].rank()
    return float(ranks["x"].corr(ranks["y"])) if len(ranks) > 2 else float("nan")


def cost_ranks(layers: pd.DataFrame) -> dict[str, float]:
    """Spearman's ρ of what layers cost alone with what is known of each: `own` noise (−SQNR), error of the `stream`.

    NaN where it is not known.
    """
    known = {"own": -layers["output_sqnr_db"], "stream": layers["stream_alone"]}
    return {name: rank_correlation(layers["kl_alone"], values) for name, values in known.items()}


def without_original(recipes: pd.DataFrame) -> pd.DataFrame:
    """The rows of the recipes that change the model."""
    return recipes[recipes["index"] > 0]


@np.errstate(all="ignore")  # another writer may have left any number
def _tables(name: str, path: Path, record: EvaluationRecord) -> Evaluation:
    means = [window_means(record, recipe) for recipe in record.recipes]
    bootstrap = resamples(record)
    recipes = frame(_recipe_rows(name, path, record, means, bootstrap), _RECIPE_COLUMNS)
    windows = [
        {
            "evaluation": name,
            "recipe": recipe.name,
            "window": window,
            "first_token": int(record.windows.first_token[window]),
            "tokens": int(record.windows.tokens[window]),
            **{figure: float(of_recipe[figure][window]) for figure in OF_TOKENS},
        }
        for recipe, of_recipe in zip(record.recipes, means, strict=True)
        for window in range(len(record.windows.tokens))
    ]
    return Evaluation(
        name,
        path,
        record,
        recipes.sort_values(["bits", "kl", "index"], ignore_index=True),
        frame(windows, _WINDOW_COLUMNS),
        _layers(name, record, bootstrap),
        record.recipes[record.alone.recipe].name if record.alone else "",
    )


def _recipe_rows(
    name: str,
    path: Path,
    record: EvaluationRecord,
    means: Sequence[Mapping[str, NDArray[np.float64]]],
    bootstrap: Bootstrap,
) -> list[dict[str, Any]]:
    configs = [_config(recipe) for recipe in record.recipes]
    formats = _formats(record.recipes, configs)
    methods = [recipe_name(config) if config else "" for config in configs]
    rtn: dict[str, int] = {}
    for index, (form, method) in enumerate(zip(formats, methods, strict=True)):
        if method == "RTN":
            rtn.setdefault(form, index)
    rows = []
    for index, recipe in enumerate(record.recipes):
        row: dict[str, Any] = {"evaluation": name, "recipe": recipe.name, "index": index, "path": str(path)}
        row |= {"format": formats[index], "method": methods[index]}
        row |= {key: getattr(recipe, key) for key in ("bits", "linear_bytes", "search_s", "evaluate_s")}
        row |= {"config_hash": recipe.config_hash, "results": recipe.results}
        for figure in FIGURES:
            value = getattr(recipe, figure)
            row |= {figure: value.value, f"{figure}_low": value.low, f"{figure}_high": value.high}
        row |= dict.fromkeys(("kl_over_rtn", "kl_over_rtn_low", "kl_over_rtn_high"), math.nan)
        of = rtn.get(formats[index], index)
        if of != index:
            difference = means[index]["kl"] - means[of]["kl"]
            low, high = map(float, bootstrap.interval(difference))
            row |= {"rtn": record.recipes[of].name, "kl_over_rtn": float(bootstrap.mean(difference))}
            row |= {"kl_over_rtn_low": low, "kl_over_rtn_high": high}
        for figure in ("output_sqnr_db", "rtn_output_sqnr_db"):
            row[f"{figure}_median"] = Spread.of(getattr(recipe.of_layers, figure)).median
        row["kl_in_top"] = _share_of_highest(recipe.of_tokens.kl)
        rows.append(row | {key: record.root[key] for key in _ROOT})
    return rows


def _config(recipe: EvaluatedRecipe) -> dict[str, Any]:
    try:
        return config_by_key(recipe.config)
    except UnreadableError:  # of another writer: then nothing tells its format
        return {}


def _formats(recipes: Sequence[EvaluatedRecipe], configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """The name of each recipe's format; where formats of one name differ, with the keys in which they do.

    What a config leaves to its convention differs with that.
    """
    found = [
        ORIGINAL if index == 0 else format_name(config) if config else MIXTURE if recipe.mixture else ""
        for index, (recipe, config) in enumerate(zip(recipes, configs, strict=True))
    ]
    for form in set(found):
        alike = [index for index, name in enumerate(found) if name == form and configs[index]]
        keys = sorted({key for index in alike for key in configs[index] if key.startswith("quant.")})
        left = [key for key in keys if key != "quant.group_size"]  # of which null is a whole row
        if any(configs[index].get(key) is None for index in alike for key in left):
            keys.append("convention")
        differing = [key for key in keys if len({json.dumps(configs[index].get(key)) for index in alike}) > 1]
        for index in alike:
            found[index] += "".join(_setting(key, configs[index].get(key)) for key in differing)
    return found


def _setting(key: str, value: Any) -> str:
    return f" {value}" if key == "convention" else f" {key.removeprefix('quant.')}={json.dumps(value)}"


def _share_of_highest(kl: NDArray[np.float64]) -> float:
    """How much of the sum the highest hundredth of the tokens hold; NaN where it is 0."""
    highest = np.sort(kl)[::-1][: max(1, round(TOP_SHARE * kl.size))]
    return float(highest.sum() / kl.sum()) if kl.size else float("nan")


def _layers(name: str, record: EvaluationRecord, bootstrap: Bootstrap) -> pd.DataFrame:
    own = {key: np.asarray(getattr(record.layers, key)) for key in ("name", "in_features", "out_features")}
    parts = []
    for index, recipe in enumerate(record.recipes[1:], 1):
        table = pd.DataFrame({"layer": np.arange(len(own["name"])), **own, **vars(recipe.of_layers)})
        table = table.assign(evaluation=name, recipe=recipe.name).reindex(columns=list(_LAYER_COLUMNS))
        if record.alone and record.alone.recipe == index:
            alone = record.alone
            low, high = bootstrap.interval(alone.kl)
            table = table.assign(kl_alone=bootstrap.mean(alone.kl), kl_alone_low=low, kl_alone_high=high)
            table = table.assign(
                kl_reverse_alone=bootstrap.mean(alone.kl_reverse), stream_alone=bootstrap.mean(alone.stream)
            )
            table["rank_alone"] = table["kl_alone"].rank(ascending=False, method="first")
        parts.append(table)
    table = pd.concat(parts, ignore_index=True) if parts else frame([], _LAYER_COLUMNS)
    numbers = dict.fromkeys(_LAYER_COLUMNS, "float64") if table.empty else {}  # without any row no column has a type
    return table.astype(numbers | {"evaluation": "str", "recipe": "str", "name": "str"})
