"""Work of each kernel from the shapes of its layer, and the ceilings of the device that ran it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from awq_pycuda.analysis.collect import Collection
from awq_pycuda.analysis.selection import complete_layers, complete_runs
from awq_pycuda.kernels.work import WORK, Sizes
from awq_pycuda.spread import QUARTILES

KERNELS = ("accum_stats", "quantize_awq", "dequantizeTiled", "relu")  # the other stages run on the host
_SHAPE = ["tokens", "out_features", "in_features"]
_KERNEL_KEYS = ["tile", "matmul.kernel", "stats", "quant.group_size"]  # what selects another kernel, or its work


@dataclass(frozen=True)
class Ceilings:
    """Limits of a device: fp32 arithmetic in GFLOP/s and memory in GB/s; None where the result file does not tell."""

    gflops: float | None
    gbytes: float | None


def ceilings(device: str) -> Ceilings:
    """The limits that follow from a result file's `device` attribute (JSON).

    Arithmetic is multiprocessors · fp32 FMA lanes · 2 · clock; memory is clock · 2 (double data rate) · bus width.
    Lanes per multiprocessor are those of the CUDA C++ Programming Guide's table of arithmetic throughput: 64 for the
    capabilities 7.x and 8.0, 128 from 8.6 on.
    """
    limits = json.loads(device or "{}")

    def positive(name: str) -> float | None:
        value = limits.get(name)
        return float(value) if isinstance(value, int | float) and value > 0 else None

    multiprocessors, clock = positive("multiprocessors"), positive("clock_khz")
    memory_clock, bits = positive("memory_clock_khz"), positive("memory_bus_bits")
    try:
        capability = tuple(int(part) for part in str(limits.get("capability", "")).split("."))
    except ValueError:
        capability = ()
    lanes = None if capability < (7, 0) else 64 if capability <= (8, 0) else 128
    return Ceilings(
        2e-6 * multiprocessors * lanes * clock if multiprocessors and lanes and clock else None,
        2e-6 * memory_clock * bits / 8 if memory_clock and bits else None,
    )


def samples(collection: Collection) -> pd.DataFrame:
    """One row per time of a kernel on a GPU's stream, of every layer and pass of the complete runs.

    Returns:
        device_name, stage, tokens, out_features, in_features, the config keys that select a kernel, ms, and the work:
        flop and moved (bytes).
    """
    layers = complete_layers(collection)
    layers = layers[layers["clock"] == "gpu"][["run", "layer", *_keys(layers)]]
    timings = collection.timings[(collection.timings["clock"] == "gpu") & (collection.timings["ms"] > 0)]
    found = []
    for stage in KERNELS if len(layers) else ():  # without any the columns have no type
        mine = timings.loc[timings["stage"] == stage, ["run", "layer", "stage", "ms"]].merge(
            layers, on=["run", "layer"]
        )
        if len(mine):
            flop, moved = work(stage, mine)
            found.append(mine.assign(flop=flop, moved=moved).drop(columns=["run", "layer"]))
    return pd.concat(found, ignore_index=True) if found else pd.DataFrame(columns=["device_name", "stage"])


def points(collection: Collection) -> pd.DataFrame:
    """One row per device, kernel and shape: medians and quartiles over the complete runs' layers and passes on a GPU.

    Returns:
        device_name, stage, tokens, out_features, in_features, ms, intensity (flop per byte), gflops (GFLOP/s) with its
        quartiles gflops_low and gflops_high, and the config keys that select a kernel. Bytes are the least that a
        kernel must move, each array once.
    """
    table = samples(collection)
    found = []
    for stage, mine in table.groupby("stage", sort=False):
        keys = _keys(mine)
        spread = mine.groupby(keys, dropna=False)["ms"].quantile(list(QUARTILES)).unstack().reset_index()
        spread.columns = pd.Index([*keys, "fast", "ms", "slow"])
        flop, moved = work(str(stage), spread)
        rates = {"gflops": "ms", "gflops_low": "slow", "gflops_high": "fast"}
        shown = {name: flop / (spread[time] / 1e3) / 1e9 for name, time in rates.items()}
        found.append(spread.drop(columns=["fast", "slow"]).assign(stage=stage, intensity=flop / moved, **shown))
    return pd.concat(found, ignore_index=True) if found else table


def _keys(table: pd.DataFrame) -> list[str]:
    """The columns that tell a kernel's device, shape and variant."""
    return ["device_name", *_SHAPE, *(key for key in _KERNEL_KEYS if key in table)]


def work(stage: str, shapes: pd.DataFrame) -> tuple[Any, Any]:
    """Operations and least bytes of a kernel, as `kernels.work` has them, for each row of a table.

    Args:
        stage: one of `KERNELS`.
        shapes: columns tokens, out_features, in_features, and quant.group_size where rows are quantized in groups.
    """
    m, n, k = (shapes[name].to_numpy(dtype=float) for name in _SHAPE)
    size = (
        pd.to_numeric(shapes["quant.group_size"]) if "quant.group_size" in shapes else pd.Series(np.nan, shapes.index)
    )
    groups = np.where(size.isna(), 1, np.ceil(k / size.astype("float64").fillna(1).to_numpy()))
    least = WORK[stage](Sizes(m, n, k, groups))
    return least.operations, least.read + least.written


def device_of(collection: Collection, device_name: str) -> str:
    """The `device` attribute of a complete run on this device, one that tells every ceiling where there is one."""
    texts = complete_runs(collection).loc[lambda runs: runs["device_name"] == device_name, "device"].unique()
    return str(max(texts, key=lambda text: "memory_bus_bits" in text))
