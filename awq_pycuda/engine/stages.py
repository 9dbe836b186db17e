"""The stages of a layer, in the order that they run in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from awq_pycuda.backends.base import Backend, Layer
from awq_pycuda.choices import Statistic
from awq_pycuda.quant.conventions import Convention
from awq_pycuda.results.record import Timings


@dataclass(frozen=True)
class Stage:
    """A stage: its name in the results, and its call. It passes handles on; only the backend touches what they hold.

    `by_parts`: where a layer has parts it is called for each of them.
    """

    name: str
    call: Callable[[Backend[Any], Layer[Any], Convention], None]
    by_parts: bool = False


def _statistics(backend: Backend[Any], layer: Layer[Any], convention: Convention) -> None:
    backend.accum_stats(layer.x, layer.abs_mean, layer.sq_mean)
    if convention.statistic is Statistic.abs_max:
        backend.find_abs_max(layer.x, layer.abs_max)


def _search(backend: Backend[Any], layer: Layer[Any], convention: Convention) -> None:
    """Searches the scales; those of a layer that another leads are there already."""
    if layer.leads:
        backend.compute_s(layer, convention)


STAGES = (
    Stage("accum_stats", _statistics),
    Stage("compute_s", _search),
    Stage("clip_weights", lambda backend, layer, convention: backend.clip_weights(layer, convention)),
    Stage("compute_scale_b", lambda backend, layer, _: backend.compute_scale_b(*layer.fitted, layer.quantized)),
    Stage("quantize_awq", lambda backend, layer, _: backend.quantize_awq(*layer.fitted, layer.quantized)),
    Stage("dequantizeTiled", lambda backend, layer, _: backend.multiply(layer), by_parts=True),
    Stage("relu", lambda backend, layer, _: backend.relu(layer.y, layer.bias, layer.out), by_parts=True),
)

CLIPPING = "clip_weights"
STAGE_NAMES = tuple(stage.name for stage in STAGES)
UP_TO_CODES = STAGES[: STAGE_NAMES.index("quantize_awq") + 1]  # what quantizes a layer


def stages_of(backend: Backend[Any], convention: Convention) -> tuple[Stage, ...]:
    """The stages that a pass of this backend calls, and that it has times of."""
    without = backend.within | (set() if convention.clip else {CLIPPING})
    return tuple(stage for stage in STAGES if stage.name not in without)


# Of a run whose process died: what it had measured went with it.
_ALWAYS = tuple(name for name in STAGE_NAMES if name != CLIPPING)
_NONE = np.empty((0, len(_ALWAYS), 0))
NO_TIMINGS = Timings(_ALWAYS, _NONE, _NONE, np.empty(0), float("nan"))
