"""The error curve of a search in float64: between which bounds float32's roundings may leave it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from awq_pycuda.choices import Element
from awq_pycuda.engine.exact_format import (
    SMALLEST_NORMAL,
    Extents,
    ends_at_its_largest,
    extents,
    grouped,
    has_float_zeros,
    other_fits,
    rounded,
    steps_of,
    tensor_scales_of,
    to_levels,
    ungrouped,
    zeros_of,
)
from awq_pycuda.parallel import map_row_blocks
from awq_pycuda.quant.format import Format

Floats = NDArray[np.float64]

# In quantization steps. A code before its rounding, at most 127, has six roundings of 2^-24 behind it: 4.6e-5. Where
# codes reach further, a step counts as more: see `_units`.
CURVE_TOLERANCE = 5e-5
_REACH = 127
_AT_ONCE = 1 << 15  # outputs that codes at ties change, of so many at a time


class Curve(NamedTuple):
    """An error curve in float64, (G,) each.

    Attributes:
        low: the objective of each candidate, at the least: codes at rounding ties may go either way, and so may steps
            and zero points where they are rounded to the numbers of their type.
        high: the same, at the most.
        units: the square root of what it would be were each rounding a whole step.
    """

    low: Floats
    high: Floats
    units: Floats


class _Candidate(NamedTuple):
    """(groups, channels of one) scales; alike, the mean square of the activations by them; see `tensor_scales_of`."""

    s: Floats
    importance: Floats
    tensor_scale: float


def exact_curve(
    weights: Sequence[NDArray[Any]],
    scales: NDArray[Any],
    sq_mean: NDArray[Any],
    form: Format,
    x: NDArray[Any] | None = None,
) -> Curve:
    """The objective of each candidate, as far as rounding leaves it open, and what it is measured by.

    Args:
        weights: (N, K) of each layer whose scales are searched for, one or several that share them.
        scales: (G, K) candidates in float64.
        sq_mean: (K,) mean of x² in float64.
        form: the format of the run.
        x: (M, K) activations in float64 for the objective `output`; without them it is `diag`.
    """
    factors, importance = grouped(scales, form), grouped(sq_mean / scales**2, form, 0)

    def of_rows(w: NDArray[Any], candidates: Sequence[_Candidate], rows: slice) -> Floats:
        values = grouped(w[rows], form)
        if x is None and _is_odd(form):  # of whose rounding the sign does not matter
            np.abs(values, out=values)
        space = np.empty((2, *values.shape))
        return np.array([_squares(values, space, of, form, x) for of in candidates])

    sums: list[Floats] = []
    for w in weights:
        of_tensor = tensor_scales_of(w, scales, form).tolist()
        own = [_Candidate(*each) for each in zip(factors, importance, of_tensor, strict=True)]
        sums += map_row_blocks(partial(of_rows, w, own), w.shape)
    found = np.sum(sums, axis=0)
    exact, lowered, raised, units = found.T / (1 if x is None else sum(map(len, weights)))
    if x is not None:
        exact, lowered, raised = exact / len(x), lowered / len(x), raised / len(x)
    return Curve(np.maximum(0, exact - lowered), exact + raised, np.sqrt(units))


def _is_odd(form: Format) -> bool:
    """Whether -W has the negative codes of W."""
    return form.element is Element.e2m1 or ends_at_its_largest(form)


def _squares(
    weights: Floats, space: Floats, of: _Candidate, form: Format, x: NDArray[Any] | None
) -> tuple[float, float, float, float]:
    """Of rows of weights and one candidate, sums over rows: the objective's and the unit's squares.

    The objective's are three: as rounded in float64, and by how much float32 can lower it, and raise it.

    Args:
        weights: (rows, groups, channels of one); of `diag` their magnitudes, where these tell all.
        space: two arrays of that shape to work in.
        of: the candidate.
        form: of the run.
        x: (M, K) activations, or None.
    """
    levels, code = space
    np.multiply(weights, of.s, out=levels)
    found = extents(levels, form, magnitudes=x is None and _is_odd(form))
    steps = steps_of(found, form, of.tensor_scale)
    zeros = zeros_of(found, steps, form)
    to_levels(levels, steps, zeros, form)
    rounded(levels, zeros, form, code, may_clip=not ends_at_its_largest(form))
    units = units_of(found, steps, zeros, form)
    # Roundings of one size that know nothing of each other make in an output the sum of their squares.
    of_units = float(np.sum(np.maximum(units, SMALLEST_NORMAL) ** 2 @ of.importance.sum(axis=1)))
    others = _Others(weights, of, form, found, steps, zeros)
    if x is None:
        # Of `diag` a tie between codes changes nothing: what rounding takes from a code only changes its sign.
        code -= levels
        of_groups = np.einsum("rgk,rgk,gk->rg", code, code, of.importance) * steps**2
        return float(np.sum(of_groups)), *_sums([others.contributions(of_groups)]), of_units
    code -= levels
    ties = codes_at_ties(levels, code, steps, zeros, form, CURVE_TOLERANCE * np.maximum(1, units / steps))
    code *= steps[:, :, None]
    code /= of.s
    output = x @ ungrouped(code, x.shape[1]).T
    changes = [others.changes(code, x, output), *_of_ties(ties, of.s, x, output)]
    return float(np.vdot(output, output)), *_sums(changes), of_units


def units_of(of: Extents, steps: Floats, zeros: Floats | None, form: Format) -> Floats:
    """What the errors of groups are measured by: a step, where there is anything to round.

    Float32's errors grow with what is rounded. Where that is more than 127 steps, as of a range far from 0, a part in
    127 of it counts.
    """
    reach = of.size if zeros is None or not has_float_zeros(form) else np.maximum(of.size, np.abs(zeros))
    units: Floats = np.maximum(np.where(of.width == 0, 0, steps), reach / _REACH)
    return units


def _sums(changes: list[Floats]) -> tuple[float, float]:
    """By how much changes, (2, places) the least and the most of each, lower and raise a sum."""
    low, high = (sum(float(ends.sum()) for ends in side) for side in zip(*changes, strict=True))
    return -low, high


class _Others:
    """What groups become by other steps and zero points, where float32 may have come to these.

    Arguments as in `_squares`, which finds the first four of the rows' groups.
    """

    def __init__(
        self, weights: Floats, of: _Candidate, form: Format, found: Extents, steps: Floats, zeros: Floats | None
    ) -> None:
        self._of, self._form = of, form
        fits = other_fits(found, form, of.tensor_scale)
        differs = np.zeros(steps.shape, bool)
        for other_steps, other_zeros in fits:
            differs |= other_steps != steps
            if zeros is not None:
                differs |= other_zeros != zeros
        self.rows, self.groups = np.nonzero(differs)
        at = self.rows, self.groups
        self._fits = [(ours[at], None if theirs is None else theirs[at]) for ours, theirs in fits]
        self._scaled = weights[at] * of.s[self.groups]

    def _errors(self) -> Iterator[Floats]:
        """(places, channels) by each: what is added to scaled weights."""
        for steps, zeros in self._fits if len(self.rows) else ():
            levels = self._scaled.copy()
            to_levels(levels, steps, zeros, self._form)
            yield (rounded(levels, zeros, self._form) - levels) * steps[:, None]

    def contributions(self, of_groups: Floats) -> Floats:
        """(2, places): by how much less and more they may add than (rows, groups) tell, to the objective `diag`."""
        importance, exact = self._of.importance[self.groups], of_groups[self.rows, self.groups]
        changes = [np.sum(error**2 * importance, axis=1) - exact for error in self._errors()]
        return _ends(changes, len(exact))

    def changes(self, off: Floats, x: NDArray[Any], output: Floats) -> Floats:
        """The same to the square of an output, of (rows, groups, channels) that weights are off, and what it is."""
        size = off.shape[2]
        changes = []
        for error in self._errors():
            error /= self._of.s[self.groups]
            error -= off[self.rows, self.groups]
            found = np.empty(len(error))
            for group in np.unique(self.groups):
                columns = x[:, group * size : (group + 1) * size]
                for at in _pieces(np.flatnonzero(self.groups == group), len(x)):
                    own = columns @ error[at, : columns.shape[1]].T
                    found[at] = changed_squares(own, output[:, self.rows[at]])
            changes.append(found)
        return _ends(changes, len(self.rows))


def _ends(changes: list[Floats], places: int) -> Floats:
    """(2, places): the least and the most of changes that are alternatives, and 0, which is none."""
    every = np.array([np.zeros(places), *changes])
    return np.array([every.min(axis=0), every.max(axis=0)])


def _pieces(places: NDArray[Any], tokens: int) -> Iterator[NDArray[Any]]:
    """So many of the places at a time that their outputs take little memory."""
    size = max(1, _AT_ONCE // tokens)
    return (places[start : start + size] for start in range(0, len(places), size))


def changed_squares(own: Floats, output: Floats) -> Floats:
    """By how much the squares of (M, places) outputs change where these are added to them: (places,)."""
    changes: Floats = np.einsum("mp,mp->p", own, 2 * output + own)
    return changes


class Ties(NamedTuple):
    """(places,) each: where codes may be others, and what that adds to scaled weights."""

    rows: NDArray[Any]
    groups: NDArray[Any]
    within: NDArray[Any]
    change: Floats


def codes_at_ties(
    levels: Floats, off: Floats, steps: Floats, zeros: Floats | None, form: Format, margin: Floats
) -> Ties:
    """The codes that levels have if they are less, or more, by (rows, groups) margins; `off`: what codes add to levels.

    Only where a level is far enough from its code is another one near.
    """
    at = np.nonzero(np.abs(off) > 0.5 - margin[:, :, None])
    of_groups = at[:2]
    level, of_zeros = levels[at][:, None], None if zeros is None else zeros[of_groups]
    code = np.rint(level[:, 0] + off[at])
    found = []
    for way in (-1, 1):
        other = rounded(level + way * margin[of_groups][:, None], of_zeros, form)[:, 0]
        tie = np.flatnonzero(other != code)
        rows, groups, within = (index[tie] for index in at)
        found.append((rows, groups, within, (other[tie] - code[tie]) * steps[rows, groups]))
    return Ties(*map(np.concatenate, zip(*found, strict=True)))


def _of_ties(ties: Ties, s: Floats, x: NDArray[Any], output: Floats) -> tuple[Floats, Floats]:
    """What codes at ties may take from the squares of outputs, and add: (2, places) each alone, (2, rows) in pairs.

    There are few but by the divisor `half_range`, where the largest weight of a group is at one.
    """
    channels = ties.groups * s.shape[1] + ties.within
    real = channels < x.shape[1]
    rows, channels = ties.rows[real], channels[real]
    change = (ties.change / s[ties.groups, ties.within])[real]
    alone = [np.empty(0)]
    for part in _pieces(np.arange(len(rows)), len(x)):
        alone.append(changed_squares(x[:, channels[part]] * change[part], output[:, rows[part]]))
    pairs = [np.zeros(2)]
    for row in np.flatnonzero(np.bincount(rows) > 1):
        at = rows == row
        own = x[:, channels[at]] * change[at]
        products = own.T @ own
        np.fill_diagonal(products, 0)
        pairs.append(np.array([np.minimum(products, 0).sum(), np.maximum(products, 0).sum()]))
    return _ends([np.concatenate(alone)], len(rows)), np.transpose(pairs)


def curve_error(error: Floats, curve: Curve) -> float:
    """How far a curve is from the exact one, in quantization steps; the worst of its points.

    The objective `diag` is a sum of squares, `Σ a·r²` with `a = sq_mean/s² · step²` and r what rounding takes from a
    code. By the triangle inequality `|√error − √exact| / √Σa` is at most the largest error of any r. A relative error
    has no such bound: in a layer of few channels almost nothing may be left to round. Of the objective `output` it is
    the same with r of either sign in each sum.

    Args:
        error: (G,) from the run.
        curve: from `exact_curve`.
    """
    found = np.sqrt(error)
    # NaN stays NaN.
    off = np.maximum(np.maximum(np.sqrt(curve.low) - found, found - np.sqrt(curve.high)), 0)
    return float(np.max(off / np.maximum(curve.units, np.finfo(np.float64).tiny)))
