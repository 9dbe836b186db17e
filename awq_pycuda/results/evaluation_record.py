"""What an evaluation leaves, as plain data: the writer stores it, the reader gives it back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
ORIGINAL = "original"  # the name of the first recipe, which leaves the model as it is


@dataclass(frozen=True)
class OfTokens:
    """What a recipe does at each token predicted, (T,) each; natural logarithms.

    `kl` is KL(P||Q) and `kl_reverse` KL(Q||P), P the original's distribution and Q the recipe's; `nll` is
    -log Q(token); `top1` is true where both find the same token the likeliest.
    """

    kl: Floats
    kl_reverse: Floats
    nll: Floats
    top1: NDArray[Any]


@dataclass(frozen=True)
class OfLayers:
    """What a recipe makes of each layer, (L,) each; NaN where a layer is left as it is, but for its `bits`, 32."""

    bits: Floats
    output_sqnr_db: Floats
    rtn_output_sqnr_db: Floats
    gamma: Floats


@dataclass(frozen=True)
class Figure:
    """A figure of a recipe and the ends of its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class EvaluatedRecipe:
    """A recipe and what it does to the model; docs/evaluation.md tells every field."""

    name: str
    config: str
    overrides: str
    mixture: str
    config_hash: str
    results: str
    bits: float
    linear_bytes: float
    kl: Figure
    kl_reverse: Figure
    perplexity: Figure
    top1: Figure
    search_s: float
    evaluate_s: float
    of_tokens: OfTokens
    of_layers: OfLayers


@dataclass(frozen=True)
class Windows:
    """The windows, (W,) int64 each: index of the first token in the text, tokens predicted."""

    first_token: NDArray[np.int64]
    tokens: NDArray[np.int64]


@dataclass(frozen=True)
class Tokens:
    """The tokens predicted, (T,) each, window after window: window, id in the text, -log P(token) of the original."""

    of_window: NDArray[np.int64]
    id: NDArray[np.int64]
    nll: Floats


@dataclass(frozen=True)
class Layers:
    """The layers that recipes may replace, L of them in the order in which they run."""

    name: Sequence[str]
    in_features: NDArray[np.int64]
    out_features: NDArray[np.int64]


@dataclass(frozen=True)
class Alone:
    """What one recipe, by its index, costs with a single layer replaced: means of windows, (L, W), NaN if undone.

    `stream` is the error of the residual stream behind the layer's block; docs/evaluation.md tells all.
    """

    recipe: int
    kl: Floats
    kl_reverse: Floats
    nll: Floats
    stream: Floats


@dataclass(frozen=True)
class EvaluationRecord:
    """Everything that an evaluation's file holds: attributes of the file, the recipes, `original` first, and the rest.

    `ended`, which is not stored, is what ended it early.
    """

    root: Mapping[str, str | int | float | bool]
    recipes: Sequence[EvaluatedRecipe]
    windows: Windows
    tokens: Tokens
    layers: Layers
    alone: Alone | None = None
    ended: BaseException | None = None
