"""What a config makes of weights, in a few characters: the format, and the recipe by which it gets there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_FP4: dict[tuple[Any, Any], str] = {("e4m3", 16): "nvfp4", ("e8m0", 32): "mxfp4"}
_FORMULAS = {"plain": "AWQ", "both": "AWQ or duo", "gamma_beta": "γ × β"}

# The config keys that each of the two may stand for where several of them are swept at once.
PARTS = {"format": ("quant.",), "recipe": ("search.formula", "search.statistic", "clip.enabled", "clip.joint", "gamma")}


def format_name(config: Mapping[str, Any]) -> str:
    """Such as `int8 row`, `int4 g128` or `nvfp4`, from a config by dotted key; an absent one is as in older files."""
    size, steps = config.get("quant.group_size"), config.get("quant.step_dtype")
    group = "row" if size is None else f"g{size}"
    if config.get("quant.element", "int") == "int":
        return f"int{config.get('quant.bits', 8)} {group}"
    return _FP4.get((steps, size), f"fp4 {group}{'' if steps is None else f' {steps}'}")


def recipe_name(config: Mapping[str, Any]) -> str:
    """Such as `RTN`, `AWQ`, `duo + clip` or, judged with clipping, `AWQ with clip`, from a config by dotted key."""
    formula = config.get("search.formula") or "plain"
    scaled = formula != "plain" or config.get("gammas") not in ([0], [0.0])
    name = _FORMULAS.get(formula, formula) if scaled else "RTN"
    if scaled and config.get("search.statistic") == "abs_max":
        name += " of max|x|"
    if not config.get("clip.enabled"):
        return name
    return f"{name} with clip" if config.get("clip.joint") and scaled else f"{name} + clip"
