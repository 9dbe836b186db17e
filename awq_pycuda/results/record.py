"""What a run leaves, as plain data on the host: the pipeline fills it, the writer stores it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from awq_pycuda.quant.clipping import Clipped
from awq_pycuda.quant.metrics import Lost
from awq_pycuda.quant.quantized import Steps
from awq_pycuda.quant.search import SearchResult


@dataclass
class LayerResult:
    """What a run leaves of one layer; arrays are the host's own copies.

    `abs_max` is None where nothing asked for it, `by_max` the search of that baseline where there is one, `quantized` a
    `Quantized` where the codes were kept; `shares_s_with` are the numbers of the other layers of which `search` and
    `by_max` are the searches, too.
    """

    name: str
    tokens: int
    abs_mean: NDArray[Any]
    sq_mean: NDArray[Any]
    search: SearchResult
    objective: str
    quantized: Steps[NDArray[Any]]
    abs_max: NDArray[Any] | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    lost: Lost | None = None
    clipped: Clipped | None = None
    by_max: SearchResult | None = None
    shares_s_with: tuple[int, ...] = ()
    verify: dict[str, float] = field(default_factory=dict)

    @property
    def without_codes(self) -> LayerResult:
        """The same without the codes."""
        return replace(self, quantized=self.quantized.without_codes)


@dataclass
class Timings:
    """Milliseconds: `gpu_ms` and `host_ms` (layers, stages, repeats), `pipeline_ms` (repeats,), `cold_ms` once.

    `stages` are the names of the stages, in the order run; `conditions` what the device told after each pass, by name,
    (repeats,) each; nothing where it told nothing. `launched` is how the passes were, in a few words; "" before any.
    """

    stages: tuple[str, ...]
    gpu_ms: NDArray[np.float64]
    host_ms: NDArray[np.float64]
    pipeline_ms: NDArray[np.float64]
    cold_ms: float
    conditions: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)
    launched: str = ""


@dataclass(frozen=True)
class RunRecord:
    """Everything that a result file holds.

    `root` are the attributes of the file (status, config, device and so on); `layers` the finished layers in order;
    `tolerances` what was allowed of each error in a layer's `verify`. `interrupted` says that the user stopped the run,
    and is not stored.
    """

    root: Mapping[str, str | int | bool]
    layers: Sequence[LayerResult]
    timings: Timings
    interrupted: bool = False
    tolerances: Mapping[str, float] = field(default_factory=dict)
