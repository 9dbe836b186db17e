"""The error curve of a joint search in float64: between which bounds float32 may leave it.

Of every group and each ratio all is told that its quantization may come to: by its steps and zero points, and by codes
at rounding ties. So there are several ratios of which float32 may have found the least error, and of each row the least
and the most of what they make of the objective.

Weights at their limit, and the zero point of a group that is held at both ends, are at such a turn by what clipping is,
in every group: there both ways would allow almost anything. The largest weights, their limits and the quotient of these
and the step are therefore those of float32, whose products and quotients are rounded once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from awq_pycuda.choices import Objective, StepDtype
from awq_pycuda.engine.exact_curve import CURVE_TOLERANCE, Curve, Ties, changed_squares, codes_at_ties, units_of
from awq_pycuda.engine.exact_format import (
    SMALLEST_NORMAL,
    Extents,
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
from awq_pycuda.quant.clipping import Clipping
from awq_pycuda.quant.format import Format

Floats = NDArray[np.float64]
Singles = NDArray[np.float32]

_OF_SUMS = 2.0**-22  # what float32 errs in a sum of n products by, over √n times the most that they can come to


class _Option(NamedTuple):
    """What float32 may make of groups at one of the ratios: (rows, groups) each.

    Attributes:
        at: which ratio.
        limits: what magnitudes are held to.
        of: the extents of what is held.
        steps: of the groups.
        zeros: their zero points, if they have any.
    """

    at: int
    limits: Floats
    of: Extents
    steps: Floats
    zeros: Floats | None

    @property
    def top(self) -> Floats:
        """(rows, groups) how many steps the limit is from zero."""
        return (self.limits.astype(np.float32) / self.steps.astype(np.float32)).astype(np.float64)


class _Layer(NamedTuple):
    """What a candidate is judged by.

    Attributes:
        form: of the run.
        looked_at: (groups, channels of one, tokens or fewer) activations by the candidate that ratios are chosen by, or
            what has the same products with itself, which is all that squares of outputs follow from.
        tokens: how many these are.
        importance: (groups, channels of one) mean square of the activations by the candidate.
        x: (M, K) activations by the candidate, for the objective `output`.
    """

    form: Format
    looked_at: Floats
    tokens: int
    importance: Floats
    x: Floats | None


class _Changes(NamedTuple):
    """(places,) of groups, in which row they are, and (places, channels of one) what may be added to weights there."""

    rows: NDArray[Any]
    groups: NDArray[Any]
    off: Floats


def exact_joint_curve(
    layers: Sequence[tuple[NDArray[Any], bool]],
    scales: NDArray[Any],
    sq_mean: NDArray[Any],
    form: Format,
    x: NDArray[Any],
    clip: Clipping,
    objective: Objective,
) -> Curve:
    """The objective of each candidate with the clipping that it gets, as far as float32 leaves it open.

    Args:
        layers: (N, K) weights, and whether these are clipped; of several layers that share their scales each.
        scales: (G, K) candidates in float64.
        sq_mean: (K,) mean of x² in float64.
        form: the format of the run.
        x: (M, K) activations.
        clip: the run's clipping, of which only the fields are read.
        objective: what candidates are judged by.
    """
    by_output = objective is Objective.output
    tried = [1 - index / clip.grid for index in range(clip.grid) if 1 - index / clip.grid > clip.least + 1e-12]
    ratios = np.array(tried, np.float32)
    looked_at = x[:: max(1, len(x) // clip.tokens)].astype(np.float64)
    sums = np.empty((3, len(scales)))
    for index, s in enumerate(scales):
        triangles: Any = np.linalg.qr(grouped(looked_at / s, form, 0).transpose(1, 0, 2), mode="r")
        layer = _Layer(
            form,
            triangles.transpose(0, 2, 1),
            len(looked_at),
            grouped(sq_mean[None, :] / s**2, form, 0)[0],
            x / s if by_output else None,
        )
        sums[:, index] = sum(_of_candidate(w, s, ratios if clips else ratios[:1], layer) for w, clips in layers)
    sums /= sum(len(w) for w, _ in layers) if by_output else 1
    sums[:2] /= len(x) if by_output else 1
    return Curve(np.maximum(0, sums[0]), sums[1], np.sqrt(sums[2]))


def _of_candidate(w: NDArray[Any], s: Floats, ratios: Singles, layer: _Layer) -> Floats:
    """The least and the most of the objective of (K,) scales, and the unit's squares, summed over rows: (3,)."""
    form, singles = layer.form, s.astype(np.float32)
    factor, tensor_scale = grouped(s[None, :], form), float(tensor_scales_of(w, s[None, :], form)[0])

    def peaks_of(rows: slice) -> Singles:
        scaled = grouped(w[rows].astype(np.float32) * singles, form)
        return np.asarray(np.abs(scaled).max(axis=2), np.float32)

    peaks = np.concatenate(map_row_blocks(peaks_of, w.shape))
    never = peaks.max() if form.step_dtype is StepDtype.e4m3 else np.float32(np.inf)

    def bounds_of(rows: slice) -> Floats:
        scaled = grouped(w[rows], form) * factor
        return _bounds(scaled, _options(scaled, peaks[rows], ratios, never, form, tensor_scale), layer)

    sums: Floats = np.sum(map_row_blocks(bounds_of, w.shape), axis=0)
    return sums


def _options(
    scaled: Floats, peaks: Singles, ratios: Singles, never: np.float32, form: Format, tensor_scale: float
) -> list[_Option]:
    """All that float32 may make of (rows, groups, channels) scaled weights; groups that reach `never` are not held."""
    options = []
    for at, ratio in enumerate(ratios):
        limits = np.where(peaks < never, peaks * ratio, peaks).astype(np.float64)
        held = _held(scaled, limits)
        of = extents(held, form)
        at_both = (held.min(axis=2) == -limits) & (held.max(axis=2) == limits)
        steps = steps_of(of, form, tensor_scale)
        for each in [(steps, zeros_of(of, steps, form)), *other_fits(of, form, tensor_scale)]:
            option = _Option(at, limits, of, *each)
            if option.zeros is not None and not has_float_zeros(form):
                middle = 2 ** (form.bits - 1)
                told = np.minimum(np.rint(option.top), 2 * middle - 1) - middle
                option = option._replace(zeros=np.where(at_both, told, option.zeros))
            options.append(option)
    return options


def _at_limit(scaled: Floats, limits: Floats) -> NDArray[np.bool]:
    """Which of (..., channels) scaled weights are held, or are what the limit of their group is made of."""
    found: NDArray[np.bool] = np.abs(scaled) >= limits[..., None] * (1 - 2.0**-23)
    return found


def _held(scaled: Floats, limits: Floats) -> Floats:
    return np.where(_at_limit(scaled, limits), np.copysign(limits[..., None], scaled), scaled)


def _added(scaled: Floats, option: _Option, form: Format) -> tuple[Floats, Floats, Floats]:
    """Of (..., channels) scaled weights: levels, what rounding adds to these, and what all adds to the weights."""
    levels = _held(scaled, option.limits)
    off = levels - scaled
    to_levels(levels, option.steps, option.zeros, form)
    if not has_float_zeros(form):
        np.copyto(levels, np.copysign(option.top[..., None], scaled), where=_at_limit(scaled, option.limits))
    by_rounding = rounded(levels, option.zeros, form) - levels
    off += by_rounding * option.steps[..., None]
    return levels, by_rounding, off


def _bounds(scaled: Floats, options: list[_Option], layer: _Layer) -> Floats:
    """The least and the most of the objective, summed over rows, and the unit's squares: (3,)."""
    judged = np.array([_judged(scaled, option, layer) for option in options])
    of_ratios = np.array([option.at for option in options])
    most = [judged[of_ratios == at, 2].max(axis=0) for at in range(of_ratios[-1] + 1)]
    may_be = judged[:, 1] <= np.min(most, axis=0)
    clipped = _of_rows(scaled, options, judged[:, 0].argmin(axis=0), may_be, layer)
    plain = [option for option in options if option.at == 0]
    everywhere = np.ones((len(plain), *scaled.shape[:2]), bool)
    unclipped = _of_rows(scaled, plain, np.zeros(scaled.shape[:2], int), everywhere, layer)
    units = np.maximum(units_of(plain[0].of, plain[0].steps, plain[0].zeros, layer.form), SMALLEST_NORMAL)
    low, high = np.minimum(clipped, unclipped).sum(axis=1)
    return np.array([low, high, np.sum(units**2 @ layer.importance.sum(axis=1))])


def _judged(scaled: Floats, option: _Option, layer: _Layer) -> Floats:
    """(3, rows, groups): the error of a group's part of the outputs, its least and its most."""
    levels, by_rounding, off = _added(scaled, option, layer.form)
    size = scaled.shape[2]
    outputs = np.matmul(off.transpose(1, 0, 2), layer.looked_at)
    exact = np.einsum("grt,grt->rg", outputs, outputs)
    size_of = np.square(off).sum(axis=2) * np.square(layer.looked_at).sum(axis=(1, 2))
    low = exact - _OF_SUMS * np.sqrt(size) * size_of
    high = exact + _OF_SUMS * np.sqrt(size) * size_of
    codes = _ties(scaled, levels, by_rounding, option, layer.form)
    at = codes.rows, codes.groups
    own = layer.looked_at[codes.groups, codes.within] * codes.change[:, None]
    squares = np.square(own).sum(axis=1)
    alone = squares + 2 * np.einsum("pt,pt->p", own, outputs[codes.groups, codes.rows])
    np.add.at(low, at, np.minimum(alone, 0))
    np.add.at(high, at, np.maximum(alone, 0))
    # Of several ties in one group each pair adds twice its product, at most that of their sizes.
    sizes, own_squares = np.zeros((2, *exact.shape))
    np.add.at(sizes, at, np.sqrt(squares))
    np.add.at(own_squares, at, squares)
    pairs = np.maximum(sizes**2 - own_squares, 0)
    found: Floats = np.array([exact, low - pairs, high + pairs]) / layer.tokens
    return found


def _ties(scaled: Floats, levels: Floats, by_rounding: Floats, option: _Option, form: Format) -> Ties:
    """The codes that may be others, but for those of weights at their limits."""
    units = units_of(option.of, option.steps, option.zeros, form)
    margin = CURVE_TOLERANCE * np.maximum(1, units / option.steps)
    found = codes_at_ties(levels, by_rounding, option.steps, option.zeros, form, margin)
    if has_float_zeros(form):
        return found
    left = ~_at_limit(scaled, option.limits)[found.rows, found.groups, found.within]
    return Ties(*(part[left] for part in found))


def _picked(options: Sequence[_Option], which: NDArray[Any]) -> _Option:
    """The option of each group, by the (rows, groups) indices of one."""

    def pick(arrays: list[Any]) -> Any:
        return np.take_along_axis(np.array(arrays), which[None], 0)[0]

    of = Extents(*(pick([option.of[part] for option in options]) for part in range(len(Extents._fields))))
    zeros = None if options[0].zeros is None else pick([option.zeros for option in options])
    return _Option(-1, pick([option.limits for option in options]), of, pick([o.steps for o in options]), zeros)


def _of_places(option: _Option, at: tuple[NDArray[Any], ...]) -> _Option:
    """The option of these groups alone."""
    zeros = None if option.zeros is None else option.zeros[at]
    return _Option(option.at, option.limits[at], Extents(*(part[at] for part in option.of)), option.steps[at], zeros)


def _of_rows(
    scaled: Floats, options: Sequence[_Option], which: NDArray[Any], may_be: NDArray[np.bool], layer: _Layer
) -> Floats:
    """(2, rows): the least and the most of each row's part of the objective.

    Args:
        scaled: (rows, groups, channels of one).
        options: what there is to choose from.
        which: (rows, groups) the one that float64 chooses.
        may_be: (options, rows, groups) whether float32 may choose it.
        layer: what the objective is made of.
    """
    chosen = _picked(options, which)
    levels, by_rounding, off = _added(scaled, chosen, layer.form)
    others = []
    for index, option in enumerate(options):
        rows, groups = np.nonzero(may_be[index] & (which != index))
        at = rows, groups
        others.append(_Changes(rows, groups, _added(scaled[at], _of_places(option, at), layer.form)[2] - off[at]))
    if layer.x is None:
        exact = np.einsum("rgc,rgc,gc->rg", off, off, layer.importance)
        low, high = exact.copy(), exact.copy()
        for change in others:
            at = change.rows, change.groups
            of_groups = np.einsum("pc,pc,pc->p", *[off[at] + change.off] * 2, layer.importance[change.groups])
            low[at], high[at] = np.minimum(low[at], of_groups), np.maximum(high[at], of_groups)
        return np.array([low.sum(axis=1), high.sum(axis=1)])
    codes = _ties(scaled, levels, by_rounding, chosen, layer.form)
    real = codes.groups * scaled.shape[2] + codes.within < layer.x.shape[1]
    of_codes = np.zeros((np.count_nonzero(real), scaled.shape[2]))
    of_codes[np.arange(len(of_codes)), codes.within[real]] = codes.change[real]
    others.append(_Changes(codes.rows[real], codes.groups[real], of_codes))
    output = layer.x @ ungrouped(off, layer.x.shape[1]).T
    exact = np.einsum("mr,mr->r", output, output)
    ends = np.array([exact, exact])
    rows, groups = (np.concatenate(each) for each in zip(*((each.rows, each.groups) for each in others), strict=True))
    changes = np.concatenate([each.off for each in others])
    # A group has one ratio and one fit; each code at a tie is a place of its own.
    places = np.concatenate([groups[: len(groups) - len(of_codes)], -1 - np.arange(len(of_codes))])
    for row in np.unique(rows):
        here = np.flatnonzero(rows == row)
        own = _outputs(layer.x, changes[here], groups[here])
        ends[:, row] += _ends(own, output[:, row], places[here])
    return ends


def _outputs(x: Floats, off: Floats, groups: NDArray[Any]) -> Floats:
    """(M, places): what (places, channels of one) changes of weights in these groups add to outputs."""
    found = np.empty((len(x), len(groups)))
    size = off.shape[1]
    for group in np.unique(groups):
        columns, at = x[:, group * size : (group + 1) * size], groups == group
        found[:, at] = columns @ off[at, : columns.shape[1]].T
    return found


def _ends(own: Floats, output: Floats, places: NDArray[Any]) -> tuple[float, float]:
    """By how much (M, changes) of an output (M,) can lower and raise its square; at each place there is one at most."""
    alone = changed_squares(own, output[:, None])
    products = own.T @ own
    products[places[:, None] == places] = 0
    low, high = np.minimum(products, 0).sum(), np.maximum(products, 0).sum()
    for place in np.unique(places):
        of_place = alone[places == place]
        low, high = low + min(0, of_place.min()), high + max(0, of_place.max())
    return float(low), float(high)
