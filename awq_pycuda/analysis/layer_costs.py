"""What each layer costs a model under each recipe: measured where layers were tried alone, or scaled from that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from awq_pycuda.bootstrap import Bootstrap
from awq_pycuda.errors import InputError
from awq_pycuda.results.evaluation_record import EvaluatedRecipe, EvaluationRecord

Floats = NDArray[np.float64]

# KL(P||Q) in nats for the sum of squared errors as shares of the stream's square, as found with SmolLM2.
NATS = 2.0
# What has to be the same in evaluations whose layers' costs are taken together.
_SAME = ("model_sha256", "calibration_sha256")


@dataclass(frozen=True)
class LayerCosts:
    """Costs of every layer under every plain recipe of some evaluations of one model.

    Attributes:
        layers: paths of the layers, L of them.
        weights: (L,) how many weights each has.
        recipes: R of them, each with its layers' figures.
        sources: of R, where a recipe's costs are from: `measured`, `stream` or `scaled`.
        bits: (R, L), of a weight.
        errors: (R, L), a layer's output error as a share of its output's power; NaN where there is none.
        costs: (R, L), mean KL(P||Q) over tokens with that layer alone replaced, in nats; where forwards ended behind
            the layer's block, what the error of the stream there lets expect.
    """

    layers: Sequence[str]
    weights: NDArray[np.int64]
    recipes: Sequence[EvaluatedRecipe]
    sources: Sequence[str]
    bits: Floats
    errors: Floats
    costs: Floats

    @property
    def names(self) -> list[str]:
        """Of the recipes."""
        return [recipe.name for recipe in self.recipes]

    def mean_bits(self, recipe: int) -> float:
        """Of a weight, over all layers."""
        return float(self.weights @ self.bits[recipe] / self.weights.sum())


def layer_costs(evaluations: Sequence[tuple[Path, EvaluationRecord]]) -> LayerCosts:
    """The costs of the layers, from evaluations of which at least one tried them alone.

    A recipe that was not tried alone is scaled from one that was: the KL divergence of small changes goes with their
    square, and so with the power of a layer's output error, which every recipe's run has. Of several it is, for each
    layer, the one whose error is the nearest.

    Raises:
        InputError: no evaluation, or not all layers of one, tried alone; models or calibrations that differ; two
            recipes of one name that differ.
    """
    first_path, first = evaluations[0]
    recipes: dict[str, EvaluatedRecipe] = {}
    alone: dict[str, Floats] = {}
    sources: dict[str, str] = {}
    for path, record in evaluations:
        for key in _SAME:
            if record.root[key] != first.root[key]:
                raise InputError(f"{path}: its {key} is not that of {first_path}; allowed: one model and calibration")
        for recipe in record.recipes:
            known = recipes.setdefault(recipe.name, recipe)
            if known.config_hash != recipe.config_hash:
                raise InputError(f"{path}: its recipe {recipe.name} is another than that of {first_path}")
        if record.alone is not None:
            name = record.recipes[record.alone.recipe].name
            found = _alone_costs(record)
            if found is None:
                raise InputError(f"{path}: not all layers were tried alone; allowed: a complete evaluation")
            alone[name], by_stream = found
            sources[name] = "stream" if by_stream else "measured"
    kept = [recipe for recipe in recipes.values() if recipe.config]
    if not any(recipe.name in alone for recipe in kept):
        what = "a mixture was tried alone" if alone else "no layer was tried alone"
        raise InputError(f"{first_path}: {what}; allowed: an evaluation with alone=RECIPE, which is no mixture")
    errors = np.array([10 ** (-recipe.of_layers.output_sqnr_db / 10) for recipe in kept])
    return LayerCosts(
        first.layers.name,
        first.layers.in_features * first.layers.out_features,
        kept,
        [sources.get(recipe.name, "scaled") for recipe in kept],
        np.array([recipe.of_layers.bits for recipe in kept]),
        errors,
        np.array(
            [
                alone[recipe.name] if recipe.name in alone else _scaled(own, _tried(kept, errors, alone))
                for recipe, own in zip(kept, errors, strict=True)
            ]
        ),
    )


def _alone_costs(record: EvaluationRecord) -> tuple[Floats, bool] | None:
    """The mean KL(P||Q) of each layer replaced alone, (L,), and whether any of them is told from the stream's error.

    Of an evaluation that was interrupted, it is over the windows that all layers were tried on; None without any.
    """
    assert record.alone is not None
    by_stream = np.asarray(np.isnan(record.alone.kl).all(axis=1))
    values = np.where(by_stream[:, None], NATS * record.alone.stream, record.alone.kl)
    done = np.flatnonzero(~np.isnan(values).any(axis=0))
    if not len(done):
        return None
    means = Bootstrap(record.windows.tokens[done], resamples=1).mean(values[:, done])
    return means, bool(by_stream.any())


def _tried(recipes: Sequence[EvaluatedRecipe], errors: Floats, alone: dict[str, Floats]) -> tuple[Floats, Floats]:
    """Errors and costs of the recipes that were tried alone, (A, L) each."""
    tried = [index for index, recipe in enumerate(recipes) if recipe.name in alone]
    return errors[tried], np.array([alone[recipes[index].name] for index in tried])


@np.errstate(divide="ignore", invalid="ignore")
def _scaled(own: Floats, tried: tuple[Floats, Floats]) -> Floats:
    """Costs (L,) for these errors (L,), scaled from the nearest error tried; 0 where there is no error."""
    errors, costs = tried
    ratios = own / errors
    far = np.abs(np.log(ratios))
    nearest = np.where(np.isnan(far), np.inf, far).argmin(axis=0)
    layers = np.arange(len(own))
    found = costs[nearest, layers] * ratios[nearest, layers]
    return np.where(np.isfinite(found), found, 0.0)
