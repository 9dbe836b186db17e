"""What the report shows of evaluations: a table for each, made here, and figures, drawn by the page from this data."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from awq_pycuda.analysis.collect import Collection
from awq_pycuda.analysis.evaluations import FIGURES, Evaluation, cost_ranks, without_original
from awq_pycuda.analysis.printing_evaluation import interval, nats, over_rtn, summary
from awq_pycuda.analysis.report_data import numbers
from awq_pycuda.analysis.selection import layer_kinds, plural
from awq_pycuda.names import shorten, without_shared
from awq_pycuda.spread import percent

HEADS = (
    ("format", "what a weight becomes"),
    ("method", "how scales are chosen"),
    ("bits", "bits of a weight of the layers, with steps and zero points"),
    ("KL", "mean of KL(P‖Q) over the tokens, in nats; P is the original's distribution, Q the recipe's"),
    ("95 % interval", "by windows drawn again"),
    ("over RTN", "difference to RTN in the same format, as a share of RTN's; * where its 95 % interval leaves 0 out"),
    ("reverse", "mean of KL(Q‖P)"),
    ("top-1", "share of the tokens at which both find the same one the likeliest"),
    ("layers dB", "median over the layers of their own SQNR"),
    ("perplexity", "a footnote: it can fall while the model moves away from the original"),
)


@dataclass(frozen=True)
class RecipeRow:
    """A recipe in the page's table: its name, its place in the file (0: the original) and its texts under HEADS."""

    name: str
    index: int
    texts: list[str]


@dataclass(frozen=True)
class EvaluationPart:
    """What the page says of one evaluation around its figures."""

    title: str
    about: str
    said: list[str]
    error: str
    rows: list[RecipeRow]


def evaluation_part(evaluation: Evaluation) -> EvaluationPart:
    """Its heading, what it is of, what it said and its recipes, by size and then KL."""
    root = evaluation.record.root
    rows = [
        RecipeRow(
            row.recipe,
            row.index,
            [
                row.format,
                row.method,
                f"{row.bits:.2f}",
                nats(row.kl),
                interval(row.kl_low, row.kl_high),
                over_rtn(row),
                nats(row.kl_reverse),
                percent(row.top1),
                "-" if math.isnan(row.output_sqnr_db_median) else f"{row.output_sqnr_db_median:.2f}",
                f"{row.perplexity:#.4g}",
            ],
        )
        for row in evaluation.recipes.itertuples(index=False)
    ]
    error = "" if root["status"] == "complete" else str(root.get("error", "no reason stored"))
    return EvaluationPart(f"Evaluation {evaluation.name}", summary(evaluation), _said(root["said"]), error, rows)


def _said(text: Any) -> list[str]:
    """The lines that the evaluation said; another writer may have left no list."""
    try:
        found = json.loads(str(text))
    except (ValueError, RecursionError):
        return []
    return [str(line) for line in found] if isinstance(found, list) else []


def evaluation_data(evaluation: Evaluation) -> dict[str, Any]:
    """What the figures of one evaluation draw: its recipes and layers in the order of the file, as columns."""
    record = evaluation.record
    recipes = without_original(evaluation.recipes)
    figures = {
        name: {
            part: numbers(recipes[f"{name}{end}"]) for part, end in (("low", "_low"), ("value", ""), ("high", "_high"))
        }
        for name in FIGURES
    }
    names = list(record.layers.name)
    layers = [
        {
            "bits": numbers(recipe.of_layers.bits),
            "sqnr": numbers(recipe.of_layers.output_sqnr_db),
            "rtn": numbers(recipe.of_layers.rtn_output_sqnr_db),
            "gamma": numbers(recipe.of_layers.gamma),
        }
        for recipe in record.recipes
    ]
    return {
        "index": recipes["index"].tolist(),
        "names": list(recipes["recipe"]),
        "format": list(recipes["format"]),
        "method": list(recipes["method"]),
        "bits": numbers(recipes["bits"]),
        "bytes": numbers(recipes["linear_bytes"]),
        "figures": figures,
        "overRtn": [over_rtn(row) for row in recipes.itertuples(index=False)],
        "layerNames": [shorten(name, 60) for name in without_shared(names)],
        "kinds": layer_kinds(names),
        "shapes": [
            f"{out:,} × {into:,}"
            for out, into in zip(record.layers.out_features, record.layers.in_features, strict=True)
        ],
        "layers": layers,
        "alone": _alone(evaluation),
    }


def _alone(evaluation: Evaluation) -> dict[str, Any] | None:
    """What each layer costs alone, and how its own SQNR ranks that; None where it was not tried."""
    if evaluation.record.alone is None:
        return None
    table = evaluation.layers[evaluation.layers["recipe"] == evaluation.alone]
    ranks = {name: None if math.isnan(rho) else round(rho, 2) for name, rho in cost_ranks(table).items()}
    return {
        "recipe": evaluation.record.alone.recipe,
        "kl": numbers(table["kl_alone"]),
        "low": numbers(table["kl_alone_low"]),
        "high": numbers(table["kl_alone_high"]),
        "rank": numbers(table["rank_alone"]),
        "stream": numbers(table["stream_alone"]),
        "rho": ranks,
    }


def better_than_rtn(collection: Collection) -> tuple[int, int]:
    """How many recipes have a KL that is surely below that of RTN in their format, and how many have such an RTN."""
    tables = [each.recipes for each in collection.evaluations]
    high = pd.concat([table["kl_over_rtn_high"] for table in tables]).dropna() if tables else pd.Series(dtype=float)
    return int(np.sum(high < 0)), len(high)


def evaluation_title(collection: Collection) -> str:
    """What the page is about where it shows evaluations; empty where it shows none."""
    models = list(dict.fromkeys(str(each.record.root["model"]) for each in collection.evaluations))
    if len(models) == 1:
        return f"Evaluation of {models[0]}"
    return plural(len(collection.evaluations), "evaluation") if models else ""
