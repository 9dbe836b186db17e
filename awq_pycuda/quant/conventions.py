"""How each tool chooses scales: one record per tool, whose every field can be set otherwise."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from awq_pycuda.config import Config, ConventionChoice, Normalization, Objective
from awq_pycuda.quant.format import Format


@dataclass(frozen=True)
class Convention:
    """What is searched, and for what.

    Attributes:
        statistic: what the scales are made of; `abs_mean`: the mean of |x| of each input channel.
        floor: the statistic counts as at least this, so that no live channel sends its scale to zero.
        gammas: the grid, in the order searched.
        formula: `plain`: a candidate is the statistic to the power of gamma.
        normalization: how the scales of one gamma are brought to a common size.
        clamp: bounds of the scales normalised by `mean`.
        least_power: the power of a dead channel, whose statistic is 0; and of `sqrt_max_min`, the least of any channel.
        identity: whether s = 1 (plain round-to-nearest) is always a candidate.
        objective: what the search minimises.
        quantizer: the format that candidates are quantized in.
        clip: what of the weights is clipped before they are quantized; `none`: nothing.
        sharing: which layers share their scales; `none`: each has its own.
    """

    statistic: Literal["abs_mean"] = "abs_mean"
    floor: float = 1e-8
    gammas: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    formula: Literal["plain"] = "plain"
    normalization: Normalization = Normalization.mean
    clamp: tuple[float, float] = (1 / 8, 8.0)
    least_power: float = 1e-4
    identity: bool = True
    objective: Objective = Objective.diag
    quantizer: Format = field(default_factory=Format)
    clip: Literal["none"] = "none"
    sharing: Literal["none"] = "none"

    @cached_property
    def grid(self) -> NDArray[np.float64]:
        """(G,) gammas, each once, in the order searched; with `identity` 0 stands in front where it is missing."""
        grid = np.array(list(dict.fromkeys(self.gammas)), np.float64) + 0.0  # which makes 0 of -0
        return grid if (grid == 0).any() or not self.identity else np.concatenate(([0.0], grid))


CONVENTIONS = {ConventionChoice.day58: Convention()}


def convention_of(config: Config) -> Convention:
    """The convention that a config names, with what the config sets otherwise."""
    return replace(
        CONVENTIONS[config.convention],
        gammas=tuple(config.gammas),
        normalization=config.search.normalization,
        objective=config.search.objective,
        quantizer=Format(**vars(config.quant)),
    )
