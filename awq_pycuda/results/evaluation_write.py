"""Writes an evaluation's file as its schema says, whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from awq_pycuda.results import evaluation_schema as schema
from awq_pycuda.results.evaluation_record import EvaluatedRecipe, EvaluationRecord, Figure
from awq_pycuda.results.filled import fill, write_whole


def write_evaluation(path: Path, record: EvaluationRecord) -> None:
    """Writes the file.

    Raises:
        OSError: it cannot be written; no temporary file is left.
        KeyError: the record holds something that the schema does not know.
    """
    # At once from the root: scales above the groups serve several of them.
    write_whole(path, schema, record.root, lambda file: fill(file, schema, "", _values(record)))


def _values(record: EvaluationRecord) -> dict[str, Any]:
    values: dict[str, Any] = {
        "recipe": np.arange(len(record.recipes)),
        "window": np.arange(len(record.windows.tokens)),
        "token": np.arange(len(record.tokens.id)),
        "layer": np.arange(len(record.layers.name)),
    }
    of_recipes = [dict(_of_recipe(recipe)) for recipe in record.recipes]
    for entry in schema.TABLE:
        path = entry.path.removeprefix("/")
        if entry.dims == ("recipe",) and not entry.is_scale:
            column = [each[entry.name] for each in of_recipes]
            values[path] = np.array(column, h5py.string_dtype() if entry.type == "str" else entry.type)
    values |= {f"windows/{name}": value for name, value in vars(record.windows).items()}
    values |= {f"tokens/{name}": value for name, value in vars(record.tokens).items()}
    values |= {f"layers/{name}": value for name, value in vars(record.layers).items()}
    for name in ("kl", "kl_reverse", "nll", "top1"):
        stored = "nll_recipe" if name == "nll" else name
        values[f"tokens/{stored}"] = np.stack([getattr(recipe.of_tokens, name) for recipe in record.recipes])
    for name in ("bits", "output_sqnr_db", "rtn_output_sqnr_db", "gamma"):
        values[f"layers/{name}"] = np.stack([getattr(recipe.of_layers, name) for recipe in record.recipes])
    if record.alone is not None:
        values |= {f"alone/{'@' * (name == 'recipe')}{name}": value for name, value in vars(record.alone).items()}
    return values


def _of_recipe(recipe: EvaluatedRecipe) -> Iterator[tuple[str, Any]]:
    """What stands in the table of recipes, by name."""
    for name, value in vars(recipe).items():
        if isinstance(value, Figure):
            yield from ((name, value.value), (f"{name}_low", value.low), (f"{name}_high", value.high))
        else:
            yield name, value
