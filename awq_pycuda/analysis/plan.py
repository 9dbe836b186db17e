"""A recipe for each layer at a size given, from what every layer costs the model, as a file that `evaluate` takes."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from awq_pycuda.analysis.knapsack import Chosen, cheapest
from awq_pycuda.analysis.layer_costs import LayerCosts, layer_costs
from awq_pycuda.errors import InputError
from awq_pycuda.hdf5_worker import ask
from awq_pycuda.results.evaluation_reader import read_evaluation
from awq_pycuda.results.evaluation_record import EvaluationRecord
from awq_pycuda.results.evaluation_schema import FILE_NAME
from awq_pycuda.results.reader import config_by_key

# What of a run's config makes a recipe; all else is the machine's, or the evaluation's own.
_OF_RECIPES = re.compile(r"(quant|search|clip)\.|inputs\.(holdout|first_token)$|(convention|gammas|share|tokens|seed)$")
# What the names of a file of recipes do not hold.
_UNNAMED = re.compile(r"[^\w.+-]+", re.ASCII)
# Where costs are from, in words.
SOURCES = {
    "measured": "measured",
    "stream": "told from the stream's error behind each block",
    "scaled": "scaled by output errors",
}


@dataclass(frozen=True)
class Plan:
    """Which recipe each layer gets: `chosen` among those of `costs` at `candidates`; `bits` is what `size` allows."""

    name: str
    size: str
    costs: LayerCosts
    candidates: Sequence[int]
    chosen: Chosen
    bits: float

    @property
    def recipes(self) -> list[int]:
        """The recipe of each layer, an index into those of `costs`."""
        return [self.candidates[choice] for choice in self.chosen.choice]


def read_evaluations(paths: Sequence[Path]) -> list[tuple[Path, EvaluationRecord]]:
    """The evaluations of these files, or of folders that hold an evaluation.h5.

    Raises:
        InputError: one of them cannot be read.
    """
    files = [path / FILE_NAME if path.is_dir() else path for path in paths]
    found = []
    for path, answer in zip(files, ask([(read_evaluation, path) for path in files]), strict=True):
        if not isinstance(answer, EvaluationRecord):
            raise InputError(f"{path}: {answer}; allowed: files of awq_pycuda.evaluate")
        found.append((path, answer))
    return found


def make_plans(
    evaluations: Sequence[tuple[Path, EvaluationRecord]], sizes: Sequence[str], name: str, among: Sequence[str] = ()
) -> list[Plan]:
    """The plan of the least summed cost, for each size.

    Args:
        evaluations: with their paths; see `layer_costs`.
        sizes: mean bits of a weight, or the name of a recipe whose size it is.
        name: of the plan; of several, each with its size behind.
        among: names of the recipes that layers may get; none: all.

    Raises:
        InputError: costs that are not there, a recipe that none of the evaluations has, a size that nothing fits, a
            name that a recipe has.
    """
    costs = layer_costs(evaluations)
    for one in among:
        if one not in costs.names:
            raise InputError(f"among={','.join(among)}: {one} is no recipe; allowed: {', '.join(costs.names)}")
    candidates = [index for index, one in enumerate(costs.names) if not among or one in among]
    # Rounded: where the sizes of recipes are equal, so are their sums.
    of_candidates = (costs.weights * costs.bits[candidates]).round(6)
    plans = []
    for size in sizes:
        own = name if len(sizes) == 1 else f"{name}_{size}"
        if own in costs.names:
            raise InputError(f"name={name}: {own} is a recipe; allowed: another name")
        bits = _bits(costs, size)
        try:
            chosen = cheapest(costs.costs[candidates], of_candidates, round(float(costs.weights.sum()) * bits, 6))
        except ValueError:
            least = min(costs.mean_bits(index) for index in candidates)
            raise InputError(f"size={size}: no recipe is so small; allowed: from {least:.4g} bits") from None
        plans.append(Plan(own, size, costs, candidates, chosen, bits))
    return plans


def _bits(costs: LayerCosts, size: str) -> float:
    if size in costs.names:
        return costs.mean_bits(costs.names.index(size))
    try:
        bits = float(size)
    except ValueError:
        bits = 0.0
    if not 0 < bits <= 32:
        raise InputError(f"size={size}: allowed: bits of a weight up to 32, or a recipe: {', '.join(costs.names)}")
    return bits


def as_yaml(plans: Sequence[Plan]) -> str:
    """The recipes that the plans take, those whose size one has, and the plans as mixtures, all of the same costs."""
    costs = plans[0].costs
    used = {index for plan in plans for index in plan.recipes}
    used |= {costs.names.index(plan.size) for plan in plans if plan.size in costs.names}
    # The recipes of a study may be called by what no file of recipes takes as a name.
    names = [_UNNAMED.sub("_", name) for name in costs.names]
    recipes: dict[str, Any] = {names[index]: overrides(costs.recipes[index].config) for index in sorted(used)}
    for plan in plans:
        pairs = zip(costs.layers, plan.recipes, strict=True)
        recipes[_UNNAMED.sub("_", plan.name)] = {"layers": {layer: names[index] for layer, index in pairs}}
    return str(yaml.safe_dump(recipes, sort_keys=False, width=120))


def overrides(config: str) -> list[str]:
    """The overrides that make a run's quantization again, from its resolved config as YAML."""
    keys: Mapping[str, Any] = config_by_key(config)
    return [
        f"{key}={_value(value)}"
        for key, value in keys.items()
        if _OF_RECIPES.match(key) and (value is not None or key == "tokens")
    ]


def _value(value: Any) -> str:
    if isinstance(value, list):
        return f"[{','.join(map(_value, value))}]"
    return value if isinstance(value, str) and re.fullmatch(r"[\w.-]+", value) else json.dumps(value)


def describe(plans: Sequence[Plan]) -> Iterator[str]:
    """What the plans take and are expected to cost, line by line."""
    costs = plans[0].costs
    total = float(costs.weights.sum())
    for plan in plans:
        yield (
            f"{plan.name}: {plan.chosen.size / total:.4g} bits of a weight (up to {plan.bits:.4g}), sum of the layers' "
            f"costs {plan.chosen.cost:.4g} nats; no mixture of these goes below {plan.chosen.bound:.4g}"
        )
        for index, count in sorted(Counter(plan.recipes).items(), key=lambda pair: -pair[1]):
            source = SOURCES[costs.sources[index]]
            yield f"  {count} of {len(costs.layers)} layers {costs.names[index]} (costs {source})"
    yield "one recipe for all layers: bits, sum of the layers' costs, KL measured"
    for index in sorted(range(len(costs.recipes)), key=costs.mean_bits):
        recipe = costs.recipes[index]
        cost = costs.costs[index].sum()
        yield f"  {recipe.name}: {costs.mean_bits(index):.4g}, {cost:.4g}, {recipe.kl.value:.4g}"
