"""Clipping of scaled weights: the group's largest magnitude is lowered where that lowers the error of its outputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from awq_pycuda.errors import InputError
from awq_pycuda.parallel import map_row_blocks
from awq_pycuda.quant.format import Format, Parts
from awq_pycuda.quant.quantized import column_peaks, tensor_scales

Array = NDArray[Any]


@dataclass(frozen=True)
class Clipping:
    """What is tried, and where: that of the AWQ reference (Lin et al., 2023, `auto_clip_layer`) by default.

    Raises an InputError for a value that makes no sense.

    Attributes:
        grid: ratios are `1 - i / grid`, from 1 down.
        least: ratios above this are tried.
        tokens: so many tokens or up to twice as many are looked at, evenly apart; of fewer all.
        skip: layers whose names contain one of these are left as they are.
        joint: whether each candidate of the search for scales is judged with clipping; see `quant.joint`.
    """

    grid: int = 20
    least: float = 0.5
    tokens: int = 512
    skip: tuple[str, ...] = ("q_", "k_", "query", "key", "Wqkv")
    joint: bool = False

    def __post_init__(self) -> None:
        rules = {
            "grid": (1 <= self.grid <= 1000, "a whole number from 1 to 1000"),
            "least": (0 <= self.least < 1, "a number from 0 to below 1"),
            "tokens": (self.tokens >= 1, "a whole number from 1"),
        }
        for name, (holds, allowed) in rules.items():
            if not holds:
                raise InputError(f"{name}={getattr(self, name)}: allowed: {allowed}")

    @property
    def ratios(self) -> NDArray[np.float64]:
        """(R,) from 1 down: of 20 in the grid and 0.5 the ten from 1 to 0.55."""
        ratios: NDArray[np.float64] = 1 - np.arange(self.grid) / self.grid
        return ratios[ratios > self.least + 1e-12]

    def skips(self, name: str) -> bool:
        """Whether a layer of this name is left as it is."""
        return any(part in name for part in self.skip)

    def of(self, x: Array) -> Array:
        """The (T, K) tokens of (M, K) that are looked at."""
        return x[:: max(1, len(x) // self.tokens)]


@dataclass(frozen=True)
class Clipped:
    """What clipping has found.

    Attributes:
        tried: (R,) float64 ratios.
        ratio: (N, groups) of the largest magnitude of each group that is kept, 1 where nothing is clipped.
        error: (R,) float64, mean over tokens and outputs of the sum of the groups' squared errors, all at one ratio.
        error_chosen: the same with each group at its own ratio.
    """

    tried: NDArray[np.float64]
    ratio: Array
    error: NDArray[np.float64]
    error_chosen: float


@dataclass(frozen=True)
class Ratios:
    """The ratio of every group, and the errors that it was chosen by: sums over groups of means over tokens.

    Attributes:
        tried: (R,) float64, the first one 1.
        ratio: (N, groups), the first of those tried with the lowest error.
        error: (R,) float64, summed over rows, all groups at one ratio.
        of_rows: (N,) float64, each group at its own ratio.
        unclipped: (N,) float64, all groups at the first ratio.
    """

    tried: NDArray[np.float64]
    ratio: Array
    error: NDArray[np.float64]
    of_rows: NDArray[np.float64]
    unclipped: NDArray[np.float64]

    @property
    def everywhere(self) -> Clipped:
        """What there is to tell if all rows are clipped."""
        return self.where(np.ones(len(self.ratio), bool))

    def where(self, rows: NDArray[np.bool]) -> Clipped:
        """What there is to tell if only these of the (N,) rows are clipped."""
        count = len(rows)
        ratio = np.where(rows[:, None], self.ratio, self.ratio.dtype.type(1))
        chosen = np.where(rows, self.of_rows, self.unclipped).sum() / count
        return Clipped(self.tried, ratio, self.error / count, float(chosen))


def find_ratios(w: Array, s: Array, x: Array, form: Format, tried: Sequence[float] | NDArray[np.float64]) -> Ratios:
    """Chooses a ratio for each group of each row by the error of the group's own part of the outputs.

    That is `mean_t (Σ_k x[t,k]/s[k] · (Ŵ − W·s)[n,k])²` with k in the group and Ŵ the quantized `clip(W·s, ±limit)`.
    Groups are taken as independent; the first of the ratios with the lowest error is chosen. Where steps are scaled
    together (`Format.tensor_scale`), the groups that hold the matrix's largest magnitude keep it: the scale is then the
    same before and after clipping, and each group is judged by the codes that it gets.

    Args:
        w: (N, K) weights.
        s: (K,) AWQ scale per input channel.
        x: (T, K) activations, those that are looked at.
        form: the format to come.
        tried: (R,) ratios, the first one 1.

    Returns:
        In the dtype of `w`.
    """
    activations = np.asarray(x / s, w.dtype)
    factors = [_factor(part) for _, part in form.parts(activations)]
    tensor_scale = tensor_scales(w, s[None, :], form)[0]
    never = (column_peaks(w) * s).max() if form.has_tensor_scale else np.inf
    ratio = np.ones((w.shape[0], form.groups(w.shape[1])), w.dtype)
    of_rows, unclipped = np.empty((2, len(w)))

    def of_block(block: slice) -> NDArray[np.float64]:
        scaled = w[block] * s
        peaks = largest_of_groups(scaled, form)
        least = np.full(peaks.shape, np.inf)
        sums = np.empty(len(tried))
        for index, each in enumerate(tried):
            limits = np.where(peaks == never, peaks, peaks * w.dtype.type(each))
            errors = _errors(scaled, limits, factors, form, tensor_scale) / len(x)
            sums[index] = errors.sum()
            if index == 0:
                unclipped[block] = errors.sum(axis=1)
            better = errors < least
            least[better] = errors[better]
            ratio[block][better] = each
        of_rows[block] = least.sum(axis=1)
        return sums

    error = np.sum(map_row_blocks(of_block, w.shape), axis=0)
    return Ratios(np.asarray(tried, np.float64), ratio, error, of_rows, unclipped)


def _factor(activations: Array) -> tuple[Array, bool]:
    """What the differences of a group are multiplied by: its activations, or their products where these are fewer.

    Args:
        activations: (T, groups, channels of one).

    Returns:
        (groups, channels, T), or (groups, channels, channels) and True.
    """
    by_group = activations.transpose(1, 2, 0)
    if activations.shape[2] > activations.shape[0]:
        return by_group, False
    exact = by_group.astype(np.float64)
    return np.asarray(np.matmul(exact, exact.transpose(0, 2, 1)), activations.dtype), True


def _errors(
    scaled: Array,
    limits: Array,
    factors: Sequence[tuple[Array, bool]],
    form: Format,
    tensor_scale: np.floating[Any],
) -> NDArray[np.float64]:
    """(rows, groups) sums over tokens of the squares of what quantization adds to a group's part of an output."""
    made = added(scaled, limits, form, tensor_scale)
    errors = [_squares(part, *factor) for (_, part), factor in zip(form.parts(made), factors, strict=True)]
    return np.concatenate(errors, axis=1)


def added(scaled: Array, limits: Array, form: Format, tensor_scale: np.floating[Any]) -> Array:
    """What clipping and quantization add to (rows, K) scaled weights, given the (rows, groups) limits, as a new array.

    Args:
        scaled: of a block of rows.
        limits: what the magnitudes of each group are held to.
        form: the format to come.
        tensor_scale: `Format.tensor_scale` of the whole matrix.
    """
    made = clip(scaled, limits, form)
    steps, zeros = form.fit(form.parts(np.abs(made) if form.is_odd else made), tensor_scale)
    form.round(made, steps, zeros)
    form.dequantize(made, steps, zeros, made)
    made -= scaled
    return made


def _squares(differences: Array, factor: Array, is_product: bool) -> NDArray[np.float64]:
    """(rows, groups) sums of squares, of (rows, groups, channels of one) differences times the activations."""
    by_group = differences.transpose(1, 0, 2)
    outputs = np.matmul(by_group, factor)
    sums = np.einsum("gnk,gnk->ng", outputs, by_group if is_product else outputs, dtype=np.float64)
    found: NDArray[np.float64] = np.maximum(sums, 0)  # a sum of products may fall below by its roundings
    return found


def largest_of_groups(scaled: Array, form: Format) -> Array:
    """(rows, groups) largest magnitudes of (rows, K) scaled weights."""
    found: Array = np.concatenate([np.abs(part).max(axis=2) for _, part in form.parts(scaled)], axis=1)
    return found


def clipped(w: Array, s: Array, ratio: Array, form: Format) -> Array:
    """(N, K) scaled weights `W·s` held to their groups' (N, groups) shares of the largest magnitude."""
    held = np.empty_like(w)

    def hold(block: slice) -> None:
        scaled = w[block] * s
        held[block] = clip(scaled, largest_of_groups(scaled, form) * ratio[block], form)

    map_row_blocks(hold, w.shape)
    return held


def clip(scaled: Array, limits: Array, form: Format) -> Array:
    """(rows, K) scaled weights held to the (rows, groups) limits of their groups, as a new array."""
    held = np.empty_like(scaled)
    parts: tuple[Parts, Parts] = form.parts(scaled), form.parts(held)
    for (groups, part), (_, out) in zip(*parts, strict=True):
        limit = limits[:, groups, None]
        np.clip(part, -limit, limit, out=out)
    return held
