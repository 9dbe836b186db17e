"""Scales searched jointly with clipping: each candidate is judged by the weights that it would be stored as."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from awq_pycuda.choices import Objective
from awq_pycuda.parallel import map_numbers, product_rows
from awq_pycuda.quant.clipping import Clipped, added, find_ratios, largest_of_groups
from awq_pycuda.quant.conventions import Convention
from awq_pycuda.quant.format import Format
from awq_pycuda.quant.quantized import tensor_scales
from awq_pycuda.quant.search import best

Array = NDArray[Any]


@dataclass(frozen=True)
class Joint:
    """What a joint search has found.

    Attributes:
        error: (G,) float64, the objective of each candidate with its own clipping.
        unclipped: (G,) float64, the same without.
        clipped: how the candidate with the lowest error clips each of the layers.
    """

    error: NDArray[np.float64]
    unclipped: NDArray[np.float64]
    clipped: list[Clipped]


def search_jointly(
    convention: Convention, layers: Sequence[tuple[Array, bool]], scales: Array, x: Array, sq_mean: Array
) -> Joint:
    """The objective of each candidate once its weights are clipped.

    A candidate's ratios are those that `find_ratios` chooses for its scales, in the rows whose part of the objective
    they lower; the other rows stay unclipped. So no candidate is worse than it is without clipping.

    Args:
        convention: of the run; it clips.
        layers: (N, K) weights, and whether these are clipped; of several layers that share their scales each.
        scales: (G, K) candidates in the same dtype.
        x: (M, K) activations.
        sq_mean: (K,) mean of x² per input channel.
    """
    clip, form = convention.clip, convention.quantizer
    assert clip is not None
    # Those that are not searched yet count as none.
    error, unclipped = np.full((2, len(scales)), np.nan)
    kept: list[Clipped] = []
    looked_at = clip.of(x)  # once, where it is read from a file
    with np.errstate(over="ignore", invalid="ignore"):
        for index, s in enumerate(scales):
            importance = None
            if convention.objective is Objective.diag:
                importance = sq_mean.astype(np.float64) / s.astype(np.float64) ** 2
            sums, how = np.zeros(2), []
            for w, clips in layers:
                found = find_ratios(w, s, looked_at, form, clip.ratios if clips else clip.ratios[:1])
                without, with_ratios = _of_rows(w, s, found.ratio, form, x, importance)
                is_less = with_ratios < without
                sums += np.where(is_less, with_ratios, without).sum(), without.sum()
                how.append(found.where(is_less))
            error[index], unclipped[index] = np.where(np.isfinite(sums), sums, np.inf)
            if best(convention, error) == index:
                kept = how
    shared = 1 if convention.objective is Objective.diag else len(x) * sum(len(w) for w, _ in layers)
    return Joint(error / shared, unclipped / shared, kept)


def _of_rows(
    w: Array, s: Array, ratio: Array, form: Format, x: Array, importance: NDArray[np.float64] | None
) -> NDArray[np.float64]:
    """(2, N) each row's part of the objective, times what it is shared by: unclipped, and at the (N, groups) ratios.

    Args:
        w: (N, K).
        s: (K,).
        ratio: (N, groups).
        form: the format to come.
        x: (M, K), for the objective `output`.
        importance: (K,) `sq_mean / s²`, for the objective `diag`; else None.
    """
    found = np.empty((2, len(w)))
    size, inv_s, tensor_scale = product_rows(len(w)), 1 / s, tensor_scales(w, s[None, :], form)[0]

    def of_block(number: int) -> None:
        block = slice(number * size, (number + 1) * size)
        scaled = w[block] * s
        peaks = largest_of_groups(scaled, form)
        for into, limits in zip(found, (peaks, peaks * ratio[block]), strict=True):
            off = added(scaled, limits, form, tensor_scale)
            if importance is not None:
                into[block] = np.square(off, dtype=np.float64) @ importance
            else:
                off *= inv_s
                made = x @ off.T
                into[block] = np.einsum("mn,mn->n", made, made, dtype=np.float64)

    map_numbers(of_block, -(-len(w) // size))
    return found
