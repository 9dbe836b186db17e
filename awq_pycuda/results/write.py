"""Writes results.h5 as the schema says, whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from awq_pycuda.quant.quantized import Quantized
from awq_pycuda.quant.search import SearchResult
from awq_pycuda.results import schema
from awq_pycuda.results.filled import attributes, fill, write_whole
from awq_pycuda.results.record import LayerResult, RunRecord, Timings


def write(folder: Path, record: RunRecord) -> Path:
    """Writes `folder/results.h5` and returns its path.

    Raises:
        OSError: the folder cannot be written to; no temporary file is left.
        KeyError: the record holds something that the schema does not know.
    """

    def filling(file: h5py.File) -> None:
        for index, layer in enumerate(record.layers):
            group = file.create_group(f"layers/{index:03d}")
            fill(group, schema, schema.LAYER, _of_layer(layer, record.tolerances))
        fill(file.create_group("timings"), schema, schema.TIMINGS, _of_timings(record.timings))

    path = folder / schema.FILE_NAME
    write_whole(path, schema, record.root, filling)
    return path


def _of_layer(layer: LayerResult, tolerances: Mapping[str, float]) -> dict[str, Any]:
    """What a file holds of a layer, by path below its group, in the order to write it."""
    search, quantized = layer.search, layer.quantized
    (out_features, groups), in_features = quantized.steps.shape, layer.abs_mean.shape[0]
    of_row = quantized.format.group_size is None
    values = {
        "@name": layer.name,
        "@tokens": layer.tokens,
        "@in_features": in_features,
        "@out_features": out_features,
        "in_features": np.arange(in_features),
        "out_features": np.arange(out_features),
        "stats/abs_mean": layer.abs_mean,
        "stats/sq_mean": layer.sq_mean,
        **({} if layer.abs_max is None else {"stats/abs_max": layer.abs_max}),
        "search/gamma": search.gamma,
        "search/error": search.error,
        **_of_candidates(search),
        **_of_baseline(layer.by_max),
        "search/@chosen": search.chosen,
        "search/@gamma_chosen": search.gamma_chosen,
        "search/@error_chosen": search.error_chosen,
        "search/@error_rtn": search.error_rtn,
        "search/@objective": layer.objective,
        "scales/s": search.s,
    }
    if layer.shares_s_with:
        values["search/@shares_s_with"] = " ".join(f"{other:03d}" for other in layer.shares_s_with)
    if not of_row:
        values["group"] = np.arange(groups)
    values["scales/scale_b"] = quantized.steps[:, 0] if of_row else quantized.steps
    if quantized.zero_points is not None:
        values["scales/zero_point"] = quantized.zero_points[:, 0] if of_row else quantized.zero_points
    if quantized.tensor_scale is not None:
        values["scales/tensor_scale"] = quantized.tensor_scale[0]
    if layer.clipped is not None:
        ratio = layer.clipped.ratio
        values |= {
            "clip/tried": layer.clipped.tried,
            "clip/error": layer.clipped.error,
            "clip/ratio": ratio[:, 0] if of_row else ratio,
            "clip/@clipped_fraction": float(np.mean(ratio < 1)),
            "clip/@error_chosen": layer.clipped.error_chosen,
        }
    values["metrics"] = None  # the group is there even where a run failed before it had any
    values |= attributes("metrics/", layer.metrics)
    if layer.lost is not None:
        values |= {"lost/by_channel": layer.lost.by_channel, "lost/by_row": layer.lost.by_row}
        values |= {} if layer.clipped is None else {"lost/@clipped": layer.lost.clipped}
    for stage, error in layer.verify.items():
        values |= {f"verify/@{stage}": error, f"verify/@{stage}_tolerance": float(tolerances[stage])}
    if isinstance(quantized, Quantized):
        packed = quantized.format.pack(quantized.codes)
        if quantized.format.bits == 8:
            values["weights/Wq"] = packed
        else:
            values |= {"byte": np.arange(packed.shape[1]), "weights/Wq_packed": packed}
    return values


def _of_candidates(search: SearchResult) -> dict[str, Any]:
    """What there is of candidates beside gamma and error: what else they were made of, their error without clipping."""
    grid = search.grid
    found: dict[str, Any] = {}
    if search.unclipped is not None:
        found["search/unclipped_error"] = search.unclipped
    if not np.isnan(grid.beta).all():
        found["search/beta"] = grid.beta
    if grid.duo.any():
        found["search/duo"] = grid.duo
    return found


def _of_baseline(search: SearchResult | None) -> dict[str, Any]:
    return {} if search is None else {"search/error_by_max": search.error, "search/@chosen_by_max": search.chosen}


def _of_timings(timings: Timings) -> dict[str, Any]:
    layers, _, repeats = timings.gpu_ms.shape
    return {
        "stage": np.array(timings.stages, h5py.string_dtype()),
        "layer": np.arange(layers),
        "repeat": np.arange(repeats),
        "gpu_ms": timings.gpu_ms,
        "host_ms": timings.host_ms,
        "pipeline_ms": timings.pipeline_ms,
        "cold_ms": timings.cold_ms,
        **({"launched": timings.launched} if timings.launched else {}),
        **{f"conditions/{name}": values for name, values in timings.conditions.items()},
    }
