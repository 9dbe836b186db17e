"""One choice for each layer, such that all together cost the least within a size."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Chosen:
    """`choice` (L,) is an index of what each layer may have; `cost` and `size` are the sums of theirs.

    `bound` is a cost that no choice within the size goes below.
    """

    choice: NDArray[np.int64]
    cost: float
    size: float
    bound: float


def cheapest(costs: Floats, sizes: Floats, room: float) -> Chosen:
    """The knapsack with one choice per layer, by the steps that save the most cost for their size.

    Each layer begins with its smallest choice and goes up along the lower convex hull of its costs over its sizes; the
    steps of all layers are taken in the order of cost saved per size (which is what a Lagrange multiplier on the size
    gives), and a step that does not fit ends its layer's. Taken in part, the first step that does not fit gives the
    bound. Equal steps are taken in the layers' order.

    Args:
        costs: (R, L), of each choice for each layer.
        sizes: (R, L), of the same.
        room: what the sizes may come to.

    Raises:
        ValueError: even the smallest choices do not fit.
    """
    choice = _smallest(costs, sizes)
    layers = np.arange(costs.shape[1])
    size, cost = math.fsum(sizes[choice, layers]), math.fsum(costs[choice, layers])
    if size > room:
        raise ValueError(f"the smallest choices take {size:g}")
    steps = sorted(step for layer in layers for step in _steps(costs[:, layer], sizes[:, layer], int(layer)))
    bound, ended = cost, set()
    fits = True
    for rate, layer, wanted in steps:
        grows = sizes[wanted, layer] - sizes[choice[layer], layer]
        if fits:
            # Steps are taken whole as long as they all fit; the bound takes a part of the first that does not.
            bound += rate * min(grows, room - size)
            fits = size + grows <= room
        if layer in ended or size + grows > room:
            ended.add(layer)
            continue
        choice[layer] = wanted
        size = math.fsum(sizes[choice, layers])
    return Chosen(choice, math.fsum(costs[choice, layers]), size, bound)


def _smallest(costs: Floats, sizes: Floats) -> NDArray[np.int64]:
    """Of each layer the smallest choice, of equal ones the cheapest."""
    return np.array([np.lexsort((costs[:, layer], sizes[:, layer]))[0] for layer in range(costs.shape[1])])


def _steps(costs: Floats, sizes: Floats, layer: int) -> Iterator[tuple[float, int, int]]:
    """The steps of a layer up its hull: cost per size (negative, and rising from step to step), layer, next choice."""
    at = int(_smallest(costs[:, None], sizes[:, None])[0])
    while True:
        ahead = np.flatnonzero((sizes > sizes[at]) & (costs < costs[at]))
        if not len(ahead):
            return
        rates = (costs[ahead] - costs[at]) / (sizes[ahead] - sizes[at])
        # Of equal rates the larger step, so that a hull has no point within an edge.
        best = max(np.flatnonzero(rates == rates.min()), key=lambda one: sizes[ahead[one]])
        at = int(ahead[best])
        yield float(rates[best]), layer, at
