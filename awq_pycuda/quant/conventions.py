"""How each tool chooses scales: one record per tool, whose every field can be set otherwise."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from awq_pycuda.choices import (
    ConventionChoice,
    Divisor,
    Formula,
    Normalization,
    Objective,
    Share,
    Statistic,
    Ties,
    ZeroOrder,
    ZeroPoint,
    ZeroStep,
)
from awq_pycuda.errors import InputError
from awq_pycuda.quant.clipping import Clipping
from awq_pycuda.quant.format import Format
from awq_pycuda.quant.tools import DAY58, FINITE, MAX_GAMMA, TOOLS, is_clamp, is_floor, is_grid, is_least_power


class Candidate(NamedTuple):
    """One point of a search: `statistic^gamma`, divided by what `Formula` says of the weights.

    `beta` is NaN where no power of the weights is searched, `duo` whether it is 1 - gamma.
    """

    gamma: float
    beta: float = math.nan
    duo: bool = False

    @property
    def is_rtn(self) -> bool:
        """Whether its scales are all 1: plain round-to-nearest."""
        return self.gamma == 0 and not self.duo and not self.beta > 0

    def __str__(self) -> str:
        """In a few characters, such as `0.25`, `0.25 duo` or, with a beta, `0.25 0.5`."""
        return f"{self.gamma:g}{' duo' if self.duo else ''}{'' if math.isnan(self.beta) else f' {self.beta:g}'}"


class Grid:
    """The candidates of a search, in order, also as columns of (G,): `gamma` and `beta` float64, `duo` bool."""

    def __init__(self, candidates: Sequence[Candidate]) -> None:
        self.candidates = tuple(candidates)
        self.gamma = np.array([each.gamma for each in candidates], np.float64)
        self.beta = np.array([each.beta for each in candidates], np.float64)
        self.duo = np.array([each.duo for each in candidates], bool)

    @property
    def size(self) -> int:
        """How many there are."""
        return len(self.candidates)

    @cached_property
    def rtn(self) -> int | None:
        """Where plain round-to-nearest stands; None where it is no candidate."""
        return next((index for index, each in enumerate(self.candidates) if each.is_rtn), None)


@dataclass(frozen=True)
class Convention:
    """What is searched, and for what.

    Raises an InputError for a value that nothing implements or that makes no sense: field, value and what is allowed.

    Attributes:
        statistic: what the scales are made of, one number of each input channel.
        floor: the statistic counts as at least this, so that no live channel sends its scale to zero.
        gammas: the grid, in the order searched.
        betas: that of the formula `gamma_beta`, searched for each gamma.
        formula: how a candidate follows from the statistic.
        normalization: how the scales of one candidate are brought to a common size.
        clamp: bounds of the scales normalised by `mean`.
        least_power: the power of a dead channel, whose statistic is 0; and of `sqrt_max_min`, the least of any channel.
        identity: whether s = 1 (plain round-to-nearest) is always a candidate.
        ties: which of the candidates with the lowest error is chosen.
        objective: what the search minimises.
        quantizer: the format that candidates are quantized in.
        clip: how scaled weights are clipped before they are quantized; None: not at all.
        share: which layers have the same scales, searched for the error of all of their outputs.
    """

    statistic: Statistic = Statistic.abs_mean
    floor: float = 1e-8
    gammas: tuple[float, ...] = DAY58
    betas: tuple[float, ...] = DAY58
    formula: Formula = Formula.plain
    normalization: Normalization = Normalization.mean
    clamp: tuple[float, float] = (1 / 8, 8.0)
    least_power: float = 1e-4
    identity: bool = True
    ties: Ties = Ties.smaller_gamma
    objective: Objective = Objective.diag
    quantizer: Format = field(default_factory=Format)
    clip: Clipping | None = None
    share: Share = Share.layers

    def __post_init__(self) -> None:
        for name, (rule, allowed) in _RULES.items():
            if not rule(value := getattr(self, name)):
                raise InputError(f"{name}={' '.join(str(value).split())}: allowed: {allowed}")

    @cached_property
    def grid(self) -> Grid:
        """The candidates, each once, in the order searched; with `identity` RTN stands in front where it is missing."""
        gammas = [gamma + 0.0 for gamma in self.gammas]  # which makes 0 of -0
        if self.formula is Formula.gamma_beta:
            found = [Candidate(gamma, beta + 0.0) for gamma in gammas for beta in self.betas]
        else:
            duos = {Formula.plain: (False,), Formula.duo: (True,)}.get(self.formula, (False, True))
            found = [Candidate(gamma, duo=duo) for gamma in gammas for duo in duos]
        if self.identity and not any(each.is_rtn for each in found):
            found.insert(0, Candidate(0.0, 0.0 if self.formula is Formula.gamma_beta else math.nan))
        return Grid(list(dict.fromkeys(found)))  # of NaN there is one object, which is itself

    def clips(self, name: str) -> bool:
        """Whether the weights of a layer of this name are clipped."""
        return self.clip is not None and not self.clip.skips(name)

    @cached_property
    def ranks(self) -> NDArray[np.int32]:
        """(G,) of candidates whose errors are the same: the one of the lowest rank is chosen, see `Ties`."""
        gamma, ranks = self.grid.gamma, np.arange(self.grid.size, dtype=np.int32)
        if self.ties is Ties.smaller_gamma:
            ranks[np.argsort(gamma, kind="stable")] = np.arange(self.grid.size)
        return ranks

    @property
    def asks_weights(self) -> bool:
        """Whether the scales follow from the weights, too."""
        return self.formula is not Formula.plain


Rule = tuple[Callable[[Any], bool], str]
_EXPONENTS = f"at least one number from 0 to {MAX_GAMMA:g}"


def _member(kind: type[Enum]) -> Rule:
    return lambda value: isinstance(value, kind), ", ".join(map(str, kind))


_RULES: dict[str, Rule] = {
    "statistic": _member(Statistic),
    "floor": (is_floor, "a finite number above 0"),
    "gammas": (is_grid, _EXPONENTS),
    "betas": (is_grid, _EXPONENTS),
    "formula": _member(Formula),
    "normalization": _member(Normalization),
    "clamp": (is_clamp, f"(low, high), low from {FINITE[0]:g} to 1, high from 1 to {FINITE[1]:g}"),
    "least_power": (is_least_power, "a number above 0, at most 1"),
    "identity": (lambda value: isinstance(value, bool), "True, False"),
    "ties": _member(Ties),
    "objective": _member(Objective),
    "quantizer": (lambda value: isinstance(value, Format), "a Format"),
    "clip": (lambda value: value is None or isinstance(value, Clipping), "None, a Clipping"),
    "share": _member(Share),
}

_LLM_AWQ = Format(symmetric=False, include_zero=False, least_range=1e-5)
_LLM_COMPRESSOR = Format(
    symmetric=False, divisor=Divisor.half_range, zero_order=ZeroOrder.shift_first, zero_step=ZeroStep.epsilon
)
_TORCHAO = Format(
    symmetric=False, zero_point=ZeroPoint.float, include_zero=False, least_step=1e-6, zero_step=ZeroStep.epsilon
)
_QUANTIZERS = {
    ConventionChoice.day58: Format(),
    ConventionChoice.llm_awq: _LLM_AWQ,
    ConventionChoice.autoawq: _LLM_AWQ,
    ConventionChoice.llm_compressor: _LLM_COMPRESSOR,
    ConventionChoice.torchao: _TORCHAO,
    ConventionChoice.gptqmodel: Format(include_zero=False, least_range=1e-5),
}


def _of_tool(choice: ConventionChoice) -> Convention:
    tool = TOOLS[choice]
    return Convention(
        statistic=tool.statistic,
        floor=tool.floor,
        gammas=tool.gammas_for(tool.formula),
        formula=tool.formula,
        normalization=tool.normalization,
        ties=tool.ties,
        objective=tool.objective,
        quantizer=_QUANTIZERS[choice],
        clip=Clipping() if tool.clips else None,
        share=tool.share,
    )


CONVENTIONS = {choice: _of_tool(choice) for choice in ConventionChoice}
