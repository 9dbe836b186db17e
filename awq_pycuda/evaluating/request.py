"""What an evaluation is asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from awq_pycuda.evaluating.recipes import Recipe


@dataclass(frozen=True)
class Request:
    """What is to be evaluated.

    Attributes:
        model: its folder or file.
        text: UTF-8.
        out: folder for calibration and runs; it is made where it is not there.
        recipes: parsed.
        calibration: tokens that recipes are searched on, where they do not ask for more.
        skip: tokens of the text behind them that nothing runs on.
        tokens: tokens of the text behind these that the evaluation runs on.
        window: the longest window, with special tokens.
        alone: name of the recipe that is to be tried on every layer alone; "" for none.
        alone_to_logits: whether forwards with a layer alone go on behind the layer's block.
        device: `cpu` or `cuda`.
        workers: windows that run at a time on a CPU.
        options: the command's keys, for the record.
    """

    model: Path
    text: Path
    out: Path
    recipes: Sequence[Recipe]
    calibration: int
    skip: int
    tokens: int
    window: int
    alone: str
    alone_to_logits: bool
    device: str
    workers: int
    options: Mapping[str, Any]
