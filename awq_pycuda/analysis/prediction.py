"""What recipes will cost a model, told from a file of its layers and the errors of each layer: no model runs.

A block of a transformer adds what two of its layers give to the residual stream, and every block behind reads the
stream alone, whatever its length, since it is normalized first. So an error counts by its share of the stream at the
place where it enters: a layer's relative output error, times the share that the output which it goes into has of the
stream there. docs/evaluation.md tells what this was held against.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from awq_pycuda.analysis.evaluations import rank_correlation
from awq_pycuda.analysis.find import LeftOut, find_files, run_names
from awq_pycuda.analysis.layer_costs import NATS
from awq_pycuda.bootstrap import Bootstrap
from awq_pycuda.errors import InputError
from awq_pycuda.layers.files import FileLayer, load_layers
from awq_pycuda.results.evaluation_record import ORIGINAL, EvaluationRecord
from awq_pycuda.results.evaluation_schema import FILE_NAME
from awq_pycuda.results.files import read_files

Floats = NDArray[np.float64]


def shares_of_stream(path: Path) -> dict[str, float]:
    """By layer, how much of the residual stream's power the output has that the layer's own goes into.

    A layer writes to the stream if it alone takes its input and gives as many channels as the first layer takes; the
    others go into the next one that writes. The stream is the sum of all that was written: without the embedding, which
    is small beside it. The share is the mean over tokens, for a few of them have a stream a thousand times the others'.

    Args:
        path: a layer file of all layers of the blocks of a model, in their order, as `capture` writes it.

    Raises:
        InputError: the file cannot be read, has layers without activations or of different tokens, or none that writes.
    """
    layers = load_layers(path)
    tokens = 0
    for index, layer in enumerate(layers):
        own = 0 if layer.activations is None else len(np.asarray(layer.activations))
        tokens = tokens or own
        if not own or own != tokens:
            what = "other tokens than the first layer" if own else "no activations"
            raise InputError(f"{path}: layer {index} ({layer.name}) has {what}; allowed: the same tokens in all")
    shared = {layer.input_of for layer in layers}
    width = layers[0].weight.shape[1]
    stream: Floats | None = None
    found: dict[str, float] = {}
    waiting: list[str] = []
    for index, layer in enumerate(layers):
        waiting.append(layer.name)
        if layer.input_of is None and index not in shared and layer.weight.shape[0] == width:
            written = _output(layer)
            stream = written if stream is None else stream + written
            power = np.square(stream).sum(axis=1)
            part = np.divide(np.square(written).sum(axis=1), power, out=np.zeros_like(power), where=power > 0)
            found |= dict.fromkeys(waiting, float(part.mean()))
            waiting.clear()
    if not found:
        raise InputError(
            f"{path}: no layer that writes {width} channels; allowed: all layers of a transformer's blocks"
        )
    return found


def _output(layer: FileLayer) -> Floats:
    """(tokens, out_features), what the layer gives."""
    product = np.asarray(layer.activations) @ layer.weight.T
    return np.asarray(product if layer.bias is None else product + layer.bias, np.float64)


def predicted_costs(shares: Mapping[str, float], names: Sequence[str], errors: Floats) -> Floats:
    """(L,) the KL(P||Q) that each layer costs alone, in nats; that of a recipe is their sum.

    Args:
        shares: `shares_of_stream`.
        names: of the layers.
        errors: (L,), each layer's output error as a share of its output's power; NaN, of a layer that stays as it is
            or that no signal reaches, costs nothing.
    """
    of_layers = np.array([shares[name] for name in names])
    return np.asarray(NATS * np.nan_to_num(errors) * of_layers)


@dataclass(frozen=True)
class Prediction:
    """A recipe's costs, predicted, beside what is known of them.

    Attributes:
        recipe: its name, or that of its file.
        layers: names of its layers, L of them.
        errors: (L,), see `predicted_costs`.
        costs: (L,), predicted.
        kl: measured on the whole model; NaN where it was not.
        alone: (L,), measured with each layer replaced alone; NaN where it was not.
        stream: (L,), the error of the residual stream behind its block then; NaN where it was not measured.
    """

    recipe: str
    layers: Sequence[str]
    errors: Floats
    costs: Floats
    kl: float
    alone: Floats
    stream: Floats


def predict(layer_file: Path, paths: Sequence[Path]) -> list[Prediction]:
    """The predictions for runs and for the recipes of evaluations.

    Args:
        layer_file: of the layers that the recipes were searched on.
        paths: files of runs and evaluations, and folders of such; of an evaluation's folder its evaluation.h5 alone.

    Raises:
        InputError: the layer file is none that `shares_of_stream` takes; no result; layers that it does not hold.
    """
    shares = shares_of_stream(layer_file)
    left_out: list[LeftOut] = []
    given = [path / FILE_NAME if (path / FILE_NAME).is_file() else path for path in paths]
    files = [path for path in find_files(given, left_out) if not path.samefile(layer_file)]
    found = []
    for path, name, answer in zip(files, run_names(files), read_files(files), strict=True):
        if isinstance(answer, str):
            left_out.append(LeftOut(path, answer))
        elif isinstance(answer, EvaluationRecord):
            found += list(_of_evaluation(shares, path, answer))
        else:
            layers = [layer.name for layer in answer.layers]
            decibels = [layer.metrics.get("output_sqnr_db", math.nan) for layer in answer.layers]
            found.append(_prediction(shares, path, name, layers, np.array(decibels)))
    if not found:
        named = ", ".join(f"{one.path} ({one.reason})" for one in left_out[:3])
        raise InputError(f"{paths[0]}: no result that can be read; left out: {named}")
    return found


def _of_evaluation(shares: Mapping[str, float], path: Path, record: EvaluationRecord) -> Iterator[Prediction]:
    for index, recipe in enumerate(record.recipes):
        if recipe.name != ORIGINAL:
            decibels = recipe.of_layers.output_sqnr_db
            found = _prediction(shares, path, recipe.name, record.layers.name, decibels)
            found = replace(found, kl=recipe.kl.value)
            if record.alone is not None and record.alone.recipe == index:
                bootstrap = Bootstrap(record.windows.tokens, resamples=1)
                found = replace(
                    found, alone=bootstrap.mean(record.alone.kl), stream=bootstrap.mean(record.alone.stream)
                )
            yield found


def _prediction(
    shares: Mapping[str, float], path: Path, name: str, layers: Sequence[str], decibels: Floats
) -> Prediction:
    """With nothing measured yet."""
    for layer in layers:
        if layer not in shares:
            raise InputError(f"{path}: its layer {layer} is not in the layer file; allowed: results of that file")
    errors = 10 ** (-np.asarray(decibels, np.float64) / 10)
    costs = predicted_costs(shares, layers, errors)
    unknown = np.full(len(layers), math.nan)
    return Prediction(name, layers, errors, costs, math.nan, unknown, unknown)


def describe(predictions: Sequence[Prediction], top: int) -> Iterator[str]:
    """The predictions line by line, and how well they rank what was measured.

    Args:
        predictions: of recipes.
        top: so many layers are named for each recipe whose layers were tried alone, or for the first one.
    """
    yield "recipe: KL predicted, KL measured"
    for one in sorted(predictions, key=lambda one: one.costs.sum()):
        measured = "not measured" if math.isnan(one.kl) else f"{one.kl:.4g}"
        yield f"  {one.recipe}: {one.costs.sum():.4g}, {measured}"
    known = [one for one in predictions if not math.isnan(one.kl)]
    if len(known) > 2:
        kl = [one.kl for one in known]
        own = rank_correlation([float(one.costs.sum()) for one in known], kl)
        by_error = rank_correlation([float(np.nanmean(one.errors)) for one in known], kl)
        yield f"rank correlation over {len(known)} recipes: {own:.2f}; of their layers' mean error: {by_error:.2f}"
    tried = [one for one in predictions if not np.isnan(one.alone).all()]
    for one in tried:
        ranks = [rank_correlation(values, one.alone) for values in (one.costs, one.errors, one.stream)]
        yield (
            f"{one.recipe}, rank correlation over its layers tried alone: {ranks[0]:.2f}; of their errors: "
            f"{ranks[1]:.2f}; of the stream's error behind their blocks: {ranks[2]:.2f}"
        )
    for one in tried or predictions[:1]:
        yield f"{one.recipe}, the layers that are to cost most: KL predicted, measured alone"
        for layer in np.argsort(-one.costs, kind="stable")[:top]:
            measured = "not measured" if math.isnan(one.alone[layer]) else f"{one.alone[layer]:.4g}"
            yield f"  {one.layers[layer]}: {one.costs[layer]:.4g}, {measured}"
