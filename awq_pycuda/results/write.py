"""Writes results.h5 as the schema says, whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from awq_pycuda import hdf5
from awq_pycuda.quant.format import Quantized
from awq_pycuda.results import schema
from awq_pycuda.results.record import LayerResult, RunRecord, Timings
from awq_pycuda.temporary import replacing

_CHUNK_BYTES = 64 << 20  # of one dataset's chunk, which is read as a whole; HDF5's limit is 4 GB


def write(folder: Path, record: RunRecord) -> Path:
    """Writes `folder/results.h5` and returns its path.

    The file is built in memory (HDF5 itself crashes on a full disk), written under a temporary name in the same folder,
    flushed, fsynced and renamed, so that a reader never sees half a file and a killed run leaves none under the final
    name.

    Raises:
        OSError: the folder cannot be written to; no temporary file is left.
        KeyError: the record holds something that the schema does not know.
    """
    # HDF5 1.10's format has checksums over metadata, so that most damage is told before it leads HDF5 astray.
    with h5py.File(schema.FILE_NAME, "w", driver="core", backing_store=False, libver=("v110", "v110")) as file:
        _fill(file, "", {"@schema": schema.NAME, "@schema_version": schema.VERSION} | _attributes("", record.root))
        for index, layer in enumerate(record.layers):
            group = file.create_group(f"layers/{index:03d}")
            _fill(group, schema.LAYER, _of_layer(layer, record.tolerances))
        _fill(file.create_group("timings"), schema.TIMINGS, _of_timings(record.timings))
        image = hdf5.sealed_image(file)
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / schema.FILE_NAME
    with replacing(final) as temporary, open(temporary, "wb") as written:
        written.writelines(image)
    return final


def _attributes(group: str, values: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{group}@{name}": value for name, value in values.items()}


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
        "search/gamma": search.gamma,
        "search/error": search.error,
        "search/@gamma_chosen": search.gamma_chosen,
        "search/@error_chosen": search.error_chosen,
        "search/@error_rtn": search.error_rtn,
        "search/@objective": layer.objective,
        "scales/s": search.s,
    }
    if not of_row:
        values["group"] = np.arange(groups)
    values["scales/scale_b"] = quantized.steps[:, 0] if of_row else quantized.steps
    values["metrics"] = None  # the group is there even where a run failed before it had any
    values |= _attributes("metrics/", layer.metrics)
    for stage, error in layer.verify.items():
        values |= {f"verify/@{stage}": error, f"verify/@{stage}_tolerance": float(tolerances[stage])}
    if isinstance(quantized, Quantized):
        values["weights/Wq"] = quantized.format.pack(quantized.codes)
    return values


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
    }


def _fill(group: h5py.Group, place: str, values: Mapping[str, Any]) -> None:
    """Writes what stands at `place` of the schema, by path below it, with all that the schema says of it."""
    scales: dict[str, h5py.Dataset] = {}
    for path, value in values.items():
        entry = schema.entry(f"{place}/{path}")
        above = path.rpartition("/")[0]
        parent = group.require_group(above) if above else group
        if entry.is_attribute:
            parent.attrs[entry.name] = value
        elif entry.type is None:
            parent.require_group(entry.name)
        else:
            _write_dataset(parent, entry, value, scales)


def _write_dataset(group: h5py.Group, entry: schema.Entry, value: Any, scales: dict[str, h5py.Dataset]) -> None:
    """Writes one dataset along the `scales`, which it joins if it is one."""
    values = value if entry.type == "str" else np.asarray(value, entry.type)
    dataset = group.create_dataset(entry.name, data=values, **_checksum(values))
    dataset.attrs["units"] = entry.units
    dataset.attrs["description"] = entry.description
    if entry.is_scale:
        dataset.make_scale(entry.name)
        scales[entry.name] = dataset
        return
    for dimension, name in zip(dataset.dims, (name for name in entry.dims if name in scales), strict=True):
        dimension.attach_scale(scales[name])


def _checksum(values: Any) -> dict[str, Any]:
    """How to store these values under a checksum.

    HDF5 has none for scalars and strings of variable length, which the digest covers; what is empty needs none.
    """
    if np.ndim(values) == 0 or np.size(values) == 0 or values.dtype == object:
        return {}
    row = max(1, values.nbytes // len(values))
    return {"fletcher32": True, "chunks": (min(len(values), max(1, _CHUNK_BYTES // row)), *values.shape[1:])}
