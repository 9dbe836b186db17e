"""What each layer costs the model by itself: one at a time is replaced, and the model runs from its block on."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from awq_pycuda.evaluating.divergence import Original
from awq_pycuda.evaluating.forward import Runner
from awq_pycuda.evaluating.judging import NotFinite
from awq_pycuda.evaluating.places import Place, replaced
from awq_pycuda.evaluating.replay import Blocks, Replay, find_blocks
from awq_pycuda.evaluating.windows import Window
from awq_pycuda.results.evaluation_record import Alone

_FIGURES = ("kl", "kl_reverse", "nll")


def undone(recipe: int, layers: int, windows: int) -> Alone:
    """What `costs` fills for the recipe of that index: (layers, windows) each, nothing done yet."""
    return Alone(recipe, *(np.full((layers, windows), math.nan) for _ in (*_FIGURES, "stream")))


def costs(
    runner: Runner,
    places: Mapping[str, Place],
    windows: Sequence[Window],
    hidden: Sequence[Any],
    weight: Callable[[str], NDArray[np.float32] | None],
    into: Alone,
    on_done: Callable[[int, int], None],
    to_logits: bool = True,
) -> list[str]:
    """Each layer replaced alone, on each window.

    As many windows as there are workers go through all layers, then the next ones: what is there after an interruption
    is the ranking of all layers on the first windows. No digit depends on the number of workers.

    Args:
        runner: of the model, which is the original.
        places: of its layers, by path, in the order in which they run.
        windows: of the evaluation.
        hidden: the original's last hidden states of each, as `runner.keep` gives them.
        weight: float32 (out_features, in_features) by a layer's path; None leaves the layer as it is.
        into: `undone`, filled as windows are done.
        on_done: told how many pairs of a layer and a window are done, and of how many.
        to_logits: False ends forwards behind the layer's block; the error of the stream there is all that they give.

    Returns:
        What is to be said, line by line.

    Raises:
        NotFinite: a layer makes logits NaN or infinite.
    """
    blocks = find_blocks(runner, windows[0], hidden[0])
    of_layers = [blocks.of(name) for name in places]
    # Stable: layers of a block stay in their order. Behind a layer in no block all may follow.
    order = sorted(range(len(of_layers)), key=lambda layer: of_layers[layer] or 0)
    whole = to_logits or None in of_layers
    names = list(places)
    done, total = 0, len(names) * len(windows)
    for start in range(0, len(windows), runner.workers):
        part = range(start, min(start + runner.workers, len(windows)))
        replay = Replay(runner, blocks, [windows[index] for index in part])
        originals = runner.each(partial(_original, runner, windows, hidden), part) if whole else []
        for layer in order:
            name, block = names[layer], of_layers[layer]
            replay.advance(block or 0)
            with replaced({name: places[name]}, weight), replay.begun():
                if to_logits or block is None:
                    found = runner.each(partial(_figures, replay, originals), range(len(part)))
                    for figure, values in zip(_FIGURES, np.transpose(found), strict=True):
                        getattr(into, figure)[layer, part.start : part.stop] = values
                    if not np.isfinite(found).all():
                        raise NotFinite(f"NaN or infinite logits with {name} alone replaced")
                if block is not None:
                    into.stream[layer, part.start : part.stop] = runner.each(replay.stream_error, range(len(part)))
            done += len(part)
            on_done(done, total)
    return [_told(blocks)]


def _original(runner: Runner, windows: Sequence[Window], hidden: Sequence[Any], index: int) -> Original:
    return Original(runner.logits_of(windows[index], hidden[index]), windows[index].targets)


def _figures(replay: Replay, originals: Sequence[Original], index: int) -> list[float]:
    """The means of a window's figures."""
    of_tokens = originals[index].against(replay.logits(index))
    return [math.fsum(getattr(of_tokens, figure)) / len(of_tokens.kl) for figure in _FIGURES]


def _told(blocks: Blocks) -> str:
    if blocks.modules:
        return f"alone: forwards begin at the layer's own of the {len(blocks.modules)} blocks in {blocks.path}"
    return f"alone: every forward is one of the whole model, since {blocks.why}"
