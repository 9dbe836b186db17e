"""What each tool's search is where the config leaves it open, and what its numbers may be: no arrays."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

from awq_pycuda.choices import ConventionChoice, Formula, Normalization, Objective, Share, Statistic, Ties

MAX_GAMMA = 10.0  # of exponents: the literature searches 0 to 1; far beyond, every scale is at its clamp
FINITE = (1e-9, 1e9)  # bounds that keep W·s, 1/s and the squared rounding errors within float32, whatever gamma
NO_FLOOR = sys.float_info.min  # below all that float32 holds

Exponents = tuple[float, ...]

DAY58: Exponents = (0.0, 0.25, 0.5, 0.75, 1.0)
AWQ20: Exponents = tuple(index / 20 for index in range(20))


def inclusive(points: int) -> Exponents:
    """So many exponents from 0 to 1 at equal distances."""
    return tuple(index / (points - 1) for index in range(points))


def _number(value: Any, least: float, most: float) -> bool:
    """Whether it is a number from `least` to `most`; NaN and truth values are none."""
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    return is_number and bool(least <= value <= most)


def is_grid(value: object) -> bool:
    """Whether it is a list of exponents."""
    return isinstance(value, tuple | list) and bool(value) and all(_number(each, 0, MAX_GAMMA) for each in value)


def is_clamp(value: object) -> bool:
    """Whether it is a pair of bounds around 1, which is the scale of gamma 0."""
    if not isinstance(value, tuple | list) or len(value) != 2:
        return False
    return _number(value[0], FINITE[0], 1) and _number(value[1], 1, FINITE[1])


def is_floor(value: object) -> bool:
    """Whether the statistic may count as at least this."""
    return _number(value, NO_FLOOR, sys.float_info.max)


def is_least_power(value: object) -> bool:
    """Whether it may be the power of a dead channel."""
    return _number(value, sys.float_info.min, 1)


@dataclass(frozen=True)
class ToolSearch:
    """How a tool searches; `Convention` has the meaning of each field.

    `grids` are its gammas by formula where they are not `gammas`, `clips` says whether it goes on to clip weights.
    """

    objective: Objective = Objective.output
    statistic: Statistic = Statistic.abs_mean
    normalization: Normalization = Normalization.sqrt_max_min
    formula: Formula = Formula.plain
    ties: Ties = Ties.first
    floor: float = NO_FLOOR
    gammas: Exponents = AWQ20
    grids: Mapping[Formula, Exponents] | None = None
    clips: bool = False
    share: Share = Share.inputs

    def gammas_for(self, formula: Formula) -> Exponents:
        """The tool's own grid with this formula."""
        return self.gammas if self.grids is None else self.grids.get(formula, self.gammas)


# Which of its 20 points are gammas depends on what else it tries: RTN in front of duo, each twice with both.
_LLM_COMPRESSOR = {Formula.duo: inclusive(19), Formula.both: inclusive(10)}

TOOLS = {
    ConventionChoice.day58: ToolSearch(
        Objective.diag,
        normalization=Normalization.mean,
        ties=Ties.smaller_gamma,
        floor=1e-8,
        gammas=DAY58,
        share=Share.layers,
    ),
    ConventionChoice.llm_awq: ToolSearch(clips=True),
    ConventionChoice.autoawq: ToolSearch(formula=Formula.duo, clips=True),
    ConventionChoice.llm_compressor: ToolSearch(formula=Formula.duo, gammas=inclusive(20), grids=_LLM_COMPRESSOR),
    ConventionChoice.torchao: ToolSearch(share=Share.layers),
    ConventionChoice.gptqmodel: ToolSearch(formula=Formula.duo, clips=True),
}
