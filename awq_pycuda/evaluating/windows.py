"""A text cut into what recipes are searched on and what they are evaluated on, which lies behind it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from awq_pycuda.capturing.fault import Fault
from awq_pycuda.capturing.text import Around, read_ids


@dataclass(frozen=True)
class Window:
    """Token ids that run by themselves, with the tokenizer's special ones around them.

    `first` is the index in the text of the first that is the text's; `start` and `stop` are the positions whose tokens
    are predicted: those of the text, of which the first has to have a special one before it.
    """

    ids: list[int]
    first: int
    start: int
    stop: int

    @property
    def targets(self) -> Any:
        """(tokens,) int64, the ids predicted."""
        return torch.tensor(self.ids[self.start : self.stop])


@dataclass(frozen=True)
class Cut:
    """Windows of the calibration, token ids each, and those of the evaluation with the `tokens` of the text in them."""

    calibration: list[list[int]]
    evaluation: list[Window]
    tokens: int


def cut(
    path: Path, tokenizer: Any, around: Around, length: int, calibration: int, skipped: int, evaluation: int
) -> Cut:
    """Cuts a text from its beginning.

    Args:
        path: of the text.
        tokenizer: the model's.
        around: the special tokens around every window.
        length: of a window, in tokens with the special ones.
        calibration: tokens of the calibration, with the special ones: each is a row of every layer.
        skipped: tokens of the text between the two.
        evaluation: tokens of the text in the windows of the evaluation.

    Raises:
        Fault: the text is too short, or the evaluation is but one window, of which no interval can be told.
    """
    step = length - len(around)
    # As capture cuts it: the last window of the calibration ends with the tokens asked for.
    whole, rest = divmod(calibration, length)
    first = whole * step + min(step, max(0, rest - len(around.before)))
    needed = first + skipped + evaluation
    ids = read_ids(path, tokenizer, needed)
    if len(ids) < needed:
        what = f"holds {len(ids)} tokens of this model, fewer than calibration, skip and tokens together"
        raise Fault("text", what, f"texts of at least {needed}")
    windows = [
        [*around.before, *ids[start : min(start + step, first)], *around.behind]
        for start in range(0, whole * step + (rest > 0), step)
    ]
    if rest:
        windows[-1] = windows[-1][:rest]
    found = []
    least = max(1, len(around.before))
    for start in range(needed - evaluation, needed, step):
        part = ids[start : min(start + step, needed)]
        window = [*around.before, *part, *around.behind]
        stop = len(around.before) + len(part)
        if stop > least:  # else its only token has none before it
            found.append(Window(window, start, least, stop))
    if len(found) < 2:
        what = f"make {len(found)} window of up to {length} tokens, and intervals come from several"
        raise Fault("tokens", what, f"at least {step + least + 1 - len(around.before)}")
    return Cut(windows, found, sum(window.stop for window in found) - len(found) * len(around.before))


def hash_ids(windows: Sequence[Sequence[int]]) -> str:
    """SHA-256 over the ids of windows as little-endian int64, 64 hex digits."""
    ids = [index for window in windows for index in window]
    return hashlib.sha256(np.array(ids, "<i8").tobytes()).hexdigest()
