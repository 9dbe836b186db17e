"""An evaluation made up of random figures, for the tests of its file and of what reads it."""

import json
from typing import Any

import numpy as np

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

ROOT: dict[str, Any] = {
    **dict.fromkeys(("created", "versions", "git_commit", "kernels_sha256", "options", "model_type"), ""),
    **{"status": "complete", "backend": "cpu", "device": '{"name": "a CPU"}', "git_dirty": False, "model": "tiny"},
    **{f"{of}_sha256": of[0] * 64 for of in ("model", "text", "calibration", "evaluation")},
    **{
        "calibration_tokens": 8,
        "skipped_tokens": 0,
        "evaluation_tokens": 12,
        "predicted_tokens": 9,
        "window": 4,
        "vocabulary": 50,
    },
    **{"parameters": 4096, "linear_parameters": 1024, "seed": 0, "said": json.dumps(["every token was seen"])},
}
WINDOWS, TOKENS, LAYERS = 3, 9, 2


def recipe(name: str, size: float, **changed: Any) -> EvaluatedRecipe:
    """A recipe whose KL divergence is about `size`; 0 is that of the original."""
    rng = np.random.default_rng(round(1e6 * size))
    kl = size * (0.5 + rng.random(TOKENS))
    figures = {of: Figure(float(kl.mean()), 0.8 * size, 1.2 * size) for of in ("kl", "kl_reverse")}
    original = name == ORIGINAL
    of_layers = OfLayers(
        np.full(LAYERS, 32.0 if original else 4.25),
        *(np.full(LAYERS, np.nan) if original else 20 + rng.random(LAYERS) for _ in range(2)),
        np.full(LAYERS, np.nan if original else 0.5),
    )
    values = {
        **{"name": name, "config": "", "overrides": "[]", "mixture": "", "config_hash": "", "results": ""},
        **{"bits": of_layers.bits[0], "linear_bytes": 128 * of_layers.bits[0], **figures},
        **{"perplexity": Figure(20 + size, 18 + size, 22 + size), "top1": Figure(1 - size / 2, 1 - size, 1.0)},
        **{"search_s": 0.0 if original else 0.5, "evaluate_s": 0.25, "of_layers": of_layers},
        **{"of_tokens": OfTokens(kl, 1.1 * kl, 3 + kl, rng.random(TOKENS) >= size)},
    }
    return EvaluatedRecipe(**values | changed)


def evaluation(*recipes: EvaluatedRecipe, alone: bool = False, **root: Any) -> EvaluationRecord:
    """The evaluation of the original and these recipes (default: two)."""
    of_window = np.repeat(np.arange(WINDOWS), TOKENS // WINDOWS)
    rng = np.random.default_rng(3)
    costs = rng.random((4, LAYERS, WINDOWS)) / 10
    return EvaluationRecord(
        ROOT | root,
        [recipe(ORIGINAL, 0.0), *(recipes or (recipe("int4", 0.25), recipe("int8", 0.002)))],
        Windows(8 + 4 * np.arange(WINDOWS), np.bincount(of_window)),
        Tokens(of_window, rng.integers(0, 50, TOKENS), np.full(TOKENS, 3.0)),
        Layers(["layers.0.q_proj", "layers.0.k_proj"], np.array([16, 16]), np.array([32, 32])),
        Alone(1, *costs) if alone else None,
    )
