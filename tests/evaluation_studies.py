"""Evaluations of several recipes, made up as a real model's come out, for the tests of their analysis."""

import math
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from evaluation_records import ROOT

from awq_pycuda.bootstrap import Bootstrap
from awq_pycuda.results.evaluation_record import (
    ORIGINAL,
    Alone,
    EvaluatedRecipe,
    EvaluationRecord,
    Figure,
    Layers,
    OfLayers,
    OfTokens,
    Tokens,
    Windows,
)
from awq_pycuda.results.evaluation_write import write_evaluation

_INT4 = "quant: {element: int, bits: 4, group_size: 128, step_dtype: f16}\n"
_INT8 = "quant: {element: int, bits: 8, group_size: null, step_dtype: f32}\n"
_NVFP4 = "quant: {element: fp4, group_size: 16, step_dtype: e4m3}\n"
RTN, CLIP = "gammas: [0]\n", "clip: {enabled: true}\n"
SWEPT = "gammas: [0, 0.5, 1]\n"
# By name: config, bits of a weight, KL; the two of nvfp4 are the one of a format that AWQ makes worse.
RECIPES: dict[str, tuple[str, float, float]] = {
    "awq_int4": (_INT4 + SWEPT, 4.125, 0.2),
    "rtn_int4": (_INT4 + RTN, 4.125, 0.4),
    "rtn_int8": (_INT8 + RTN, 8.06, 0.003),
    "clip_int4": (_INT4 + SWEPT + CLIP, 4.125, 0.15),
    "rtn_nvfp4": (_NVFP4 + RTN, 4.5, 0.2),
    "awq_nvfp4": (_NVFP4 + SWEPT, 4.5, 0.24),
    "plan": ("", 4.2, 0.1),
}
PARTS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")


def study(
    recipes: Mapping[str, tuple[str, float, float]] = RECIPES,
    *,
    alone: str = "",
    windows: int = 8,
    per_window: int = 12,
    blocks: int = 2,
    seed: int = 0,
    **root: Any,
) -> EvaluationRecord:
    """An evaluation of the original and these recipes; with `alone`, of this one layer by layer, too.

    Tokens that are hard for one recipe are hard for the others; each has noise of its own from `seed`.
    """
    shared, own = np.random.default_rng(0), np.random.default_rng(seed + 1)
    count = windows * per_window
    of_window = np.repeat(np.arange(windows), per_window)
    hardness = shared.lognormal(-0.6, 1.2, count) * np.repeat(shared.lognormal(0, 0.3, windows), per_window)
    nll = shared.exponential(3, count)
    names = [f"model.layers.{block}.{part}" for block in range(blocks) for part in PARTS]
    bootstrap = Bootstrap(np.full(windows, per_window))

    def recipe(name: str, config: str, bits: float, size: float) -> EvaluatedRecipe:
        kl = size * hardness * own.lognormal(0, 0.2, count)
        likeliest = own.random(count) > 0.5 * math.sqrt(size)
        of_tokens = OfTokens(kl, 1.2 * kl, nll + size * own.normal(0.8, 0.5, count), likeliest)
        means = {
            key: np.bincount(of_window, np.asarray(getattr(of_tokens, key), float)) / per_window
            for key in ("kl", "kl_reverse", "nll", "top1")
        }
        figures = {
            key: Figure(float(bootstrap.mean(m)), *map(float, bootstrap.interval(m))) for key, m in means.items()
        }
        loss = figures.pop("nll")
        figures["perplexity"] = Figure(*(math.exp(each) for each in vars(loss).values()))
        decibels = 50 - 20 * bool(size) + own.normal(0, 4, len(names)) - 8 * math.log10(1 + 100 * size)
        none = np.full(len(names), np.nan)
        rtn = RTN in config
        original = name == ORIGINAL
        of_layers = OfLayers(
            np.full(len(names), bits),
            none if original else decibels,
            none if original else decibels - (0 if rtn else 1.5),
            none if original else np.full(len(names), 0.0) if rtn else own.choice([0.25, 0.5, 0.75], len(names)),
        )
        mixture = "" if config or original else '{"model.layers.0.self_attn.q_proj": "rtn_int8"}'
        hashed = config and f"{zlib.crc32(config.encode()):08x}"
        folder = f"recipes/{name}/results.h5" if config else ""
        return EvaluatedRecipe(
            **{
                "name": name,
                "config": config,
                "overrides": "[]",
                "mixture": mixture,
                "config_hash": hashed,
                "results": folder,
            },
            **{"bits": bits, "linear_bytes": 128 * bits, "search_s": 2.0, "evaluate_s": 1.0},
            **figures,
            of_tokens=of_tokens,
            of_layers=of_layers,
        )

    evaluated = [recipe(ORIGINAL, "", 32.0, 0.0), *(recipe(name, *values) for name, values in recipes.items())]
    costs = own.lognormal(-6, 1, (len(names), 1)) * own.lognormal(0, 0.4, (len(names), windows))
    placed = {name: index for index, name in enumerate(recipes, 1)}
    facts = {"window": per_window + 1, "evaluation_tokens": windows * (per_window + 1), "predicted_tokens": count}
    return EvaluationRecord(
        ROOT | facts | root,
        evaluated,
        Windows(512 + (per_window + 1) * np.arange(windows), np.full(windows, per_window)),
        Tokens(of_window, shared.integers(0, 50, count), nll),
        Layers(names, np.full(len(names), 64), np.full(len(names), 128)),
        Alone(placed[alone], costs, 1.2 * costs, 3 + costs, costs / 2) if alone else None,
    )


def write_study(folder: Path, *arguments: Any, **options: Any) -> Path:
    """The same as folder/evaluation.h5."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "evaluation.h5"
    write_evaluation(path, study(*arguments, **options))
    return path
