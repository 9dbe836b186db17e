"""An evaluation's file as plain Python values, every one of them checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from awq_pycuda.hdf5 import UnreadableError
from awq_pycuda.results import evaluation_schema as schema
from awq_pycuda.results.evaluation_record import (
    Alone,
    EvaluatedRecipe,
    EvaluationRecord,
    Figure,
    Layers,
    OfLayers,
    OfTokens,
    Tokens,
    Windows,
)
from awq_pycuda.results.opened import File, Scalar, opened


def read_evaluation(path: Path) -> EvaluationRecord:
    """Reads the file of one evaluation.

    Raises:
        UnreadableError: whatever is wrong with it, in one line.
    """
    return opened(path, schema, read_evaluation_root)


def read_evaluation_root(file: File, root: Mapping[str, Scalar]) -> EvaluationRecord:
    """The whole of an open file of an evaluation."""
    file.check(schema.TABLE)
    scales = {each.name: len(file.numbers(each.path)) for each in schema.TABLE if each.is_scale}
    found: dict[str, Any] = {}
    for each in schema.TABLE:
        if each.dims and not each.is_scale and each.path in file.found:
            values: Any = file.texts(each.path) if each.type == "str" else file.numbers(each.path)
            shape = np.shape(values)
            if shape != tuple(scales[name] for name in each.dims):
                raise UnreadableError(f"{each.path} has the shape {shape}, and not that of {', '.join(each.dims)}")
            found[each.path] = values.astype(np.int64) if each.type == "i8" else values
    tokens = Tokens(**_group(found, schema.TOKENS, ("token",)))
    windows = Windows(**_group(found, schema.WINDOWS, ("window",)))
    counts = np.bincount(tokens.of_window, minlength=len(windows.tokens)) if (tokens.of_window >= 0).all() else None
    if counts is None or not np.array_equal(counts, windows.tokens):
        raise UnreadableError(f"{schema.TOKENS}/of_window and {schema.WINDOWS}/tokens disagree")
    return EvaluationRecord(
        root,
        [_recipe(found, index) for index in range(scales["recipe"])],
        windows,
        tokens,
        Layers(**_group(found, schema.LAYERS, ("layer",))),
        _alone(file, found, scales["recipe"]),
    )


def _group(found: Mapping[str, Any], group: str, dims: tuple[str, ...]) -> dict[str, Any]:
    """The datasets of a group along these dimensions, by name."""
    return {
        each.name: found[each.path]
        for each in schema.TABLE
        if each.parent == group and each.dims == dims and not each.is_scale
    }


def _recipe(found: Mapping[str, Any], index: int) -> EvaluatedRecipe:
    own = {name: values[index] for name, values in _group(found, schema.RECIPES, ("recipe",)).items()}
    for name in ("kl", "kl_reverse", "perplexity", "top1"):
        own[name] = Figure(*(float(own.pop(f"{name}{end}")) for end in ("", "_low", "_high")))
    for each in fields(EvaluatedRecipe):
        if each.type == "float":
            own[each.name] = float(own[each.name])
    tokens = {name: values[index] for name, values in _group(found, schema.TOKENS, ("recipe", "token")).items()}
    layers = {name: values[index] for name, values in _group(found, schema.LAYERS, ("recipe", "layer")).items()}
    tokens["nll"] = tokens.pop("nll_recipe")
    tokens["top1"] = tokens["top1"] != 0
    return EvaluatedRecipe(**own, of_tokens=OfTokens(**tokens), of_layers=OfLayers(**layers))


def _alone(file: File, found: Mapping[str, Any], recipes: int) -> Alone | None:
    if schema.ALONE not in file.found:
        return None
    recipe = file.attribute(f"{schema.ALONE}/@recipe")
    if not 0 <= recipe < recipes:
        raise UnreadableError(f"{schema.ALONE}: its recipe {recipe} is none of {recipes}")
    return Alone(recipe, **_group(found, schema.ALONE, ("layer", "window")))
