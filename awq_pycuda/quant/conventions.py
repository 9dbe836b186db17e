"""How each tool chooses scales: one record per tool, whose every field can be set otherwise."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from awq_pycuda.config import MAX_GAMMA, ConventionChoice, Normalization, Objective
from awq_pycuda.errors import InputError
from awq_pycuda.quant.format import Format

FINITE = (1e-9, 1e9)  # bounds that keep W·s, 1/s and the squared rounding errors within float32, whatever gamma

# What a convention may name; what is not here nothing implements, and a record that asks for it is refused.
Statistic = Literal["abs_mean"]
Formula = Literal["plain"]
Clip = Literal["none"]
Sharing = Literal["none"]


@dataclass(frozen=True)
class Convention:
    """What is searched, and for what.

    Raises an InputError for a value that nothing implements or that makes no sense: field, value and what is allowed.

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

    statistic: Statistic = "abs_mean"
    floor: float = 1e-8
    gammas: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    formula: Formula = "plain"
    normalization: Normalization = Normalization.mean
    clamp: tuple[float, float] = (1 / 8, 8.0)
    least_power: float = 1e-4
    identity: bool = True
    objective: Objective = Objective.diag
    quantizer: Format = field(default_factory=Format)
    clip: Clip = "none"
    sharing: Sharing = "none"

    def __post_init__(self) -> None:
        for name, (rule, allowed) in _RULES.items():
            if not rule(value := getattr(self, name)):
                raise InputError(f"{name}={' '.join(str(value).split())}: allowed: {allowed}")

    @cached_property
    def grid(self) -> NDArray[np.float64]:
        """(G,) gammas, each once, in the order searched; with `identity` 0 stands in front where it is missing."""
        grid = np.array(list(dict.fromkeys(self.gammas)), np.float64) + 0.0  # which makes 0 of -0
        return grid if (grid == 0).any() or not self.identity else np.concatenate(([0.0], grid))


Rule = tuple[Callable[[Any], bool], str]
_NUMBERS = (int, float, np.integer, np.floating)


def _one_of(names: Any) -> Rule:
    return lambda value: isinstance(value, str) and value in get_args(names), ", ".join(get_args(names))


def _member(kind: type[Enum]) -> Rule:
    return lambda value: isinstance(value, kind), ", ".join(map(str, kind))


def _number(value: Any, least: float, most: float) -> bool:
    """Whether it is a number from `least` to `most`; NaN and truth values are none."""
    return isinstance(value, _NUMBERS) and not isinstance(value, bool) and bool(least <= value <= most)


def _is_clamp(value: object) -> bool:
    """Whether it is a pair of bounds around 1, which is the scale of gamma 0."""
    if not isinstance(value, tuple | list) or len(value) != 2:
        return False
    return _number(value[0], FINITE[0], 1) and _number(value[1], 1, FINITE[1])


def _is_grid(value: object) -> bool:
    return isinstance(value, tuple | list) and bool(value) and all(_number(gamma, 0, MAX_GAMMA) for gamma in value)


_RULES: dict[str, Rule] = {
    "statistic": _one_of(Statistic),
    "floor": (lambda value: _number(value, sys.float_info.min, sys.float_info.max), "a finite number above 0"),
    "gammas": (_is_grid, f"at least one number from 0 to {MAX_GAMMA:g}"),
    "formula": _one_of(Formula),
    "normalization": _member(Normalization),
    "clamp": (_is_clamp, f"(low, high), low from {FINITE[0]:g} to 1, high from 1 to {FINITE[1]:g}"),
    "least_power": (lambda value: _number(value, sys.float_info.min, 1), "a number above 0, at most 1"),
    "identity": (lambda value: isinstance(value, bool), "True, False"),
    "objective": _member(Objective),
    "quantizer": (lambda value: isinstance(value, Format), "a Format"),
    "clip": _one_of(Clip),
    "sharing": _one_of(Sharing),
}

CONVENTIONS = {ConventionChoice.day58: Convention()}
