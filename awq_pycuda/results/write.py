"""Writes results.h5, whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from awq_pycuda import hdf5
from awq_pycuda.results.record import STAGES, LayerResult, RunRecord, Timings
from awq_pycuda.results.schema import FILE_NAME, SCHEMA, SCHEMA_VERSION
from awq_pycuda.temporary import replacing
from awq_pycuda.verify import TOLERANCES

_CHUNK_BYTES = 64 << 20  # of one dataset's chunk, which is read as a whole; HDF5's limit is 4 GB


def write(folder: Path, record: RunRecord) -> Path:
    """Writes `folder/results.h5` and returns its path.

    The file is built in memory (HDF5 itself crashes on a full disk), written under a temporary name in the same folder,
    flushed, fsynced and renamed, so that a reader never sees half a file and a killed run leaves none under the final
    name.

    Raises:
        OSError: the folder cannot be written to; no temporary file is left.
    """
    # HDF5 1.10's format has checksums over metadata, so that most damage is told before it leads HDF5 astray.
    with h5py.File(FILE_NAME, "w", driver="core", backing_store=False, libver=("v110", "v110")) as file:
        _write_root(file, record.root)
        for index, layer in enumerate(record.layers):
            _write_layer(file.create_group(f"layers/{index:03d}"), layer)
        _write_timings(file.create_group("timings"), record.timings)
        image = hdf5.sealed_image(file)
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / FILE_NAME
    with replacing(final) as temporary, open(temporary, "wb") as written:
        written.writelines(image)
    return final


def _write_root(file: h5py.File, root: Mapping[str, str | int | bool]) -> None:
    file.attrs["schema"] = SCHEMA
    file.attrs["schema_version"] = SCHEMA_VERSION
    for name, value in root.items():
        file.attrs[name] = value


def _scale(
    group: h5py.Group, name: str, values: NDArray[Any] | Sequence[str], units: str, description: str
) -> h5py.Dataset:
    """A dimension scale: a coordinate that other datasets of the group or below attach to."""
    data = values if isinstance(values, np.ndarray) else np.array(values, dtype=h5py.string_dtype())
    scale = _dataset(group, name, data, (), units, description)
    scale.make_scale(name)
    return scale


def _dataset(
    group: h5py.Group, name: str, values: Any, scales: Sequence[h5py.Dataset], units: str, description: str
) -> h5py.Dataset:
    dataset = group.create_dataset(name, data=values, **_checksum(values))
    dataset.attrs["units"] = units
    dataset.attrs["description"] = description
    for dimension, scale in zip(dataset.dims, scales, strict=False):
        dimension.attach_scale(scale)
    return dataset


def _checksum(values: Any) -> dict[str, Any]:
    """How to store these values under a checksum.

    HDF5 has none for scalars and strings of variable length, which the digest covers; what is empty needs none.
    """
    if np.ndim(values) == 0 or np.size(values) == 0 or values.dtype == object:
        return {}
    row = max(1, values.nbytes // len(values))
    return {"fletcher32": True, "chunks": (min(len(values), max(1, _CHUNK_BYTES // row)), *values.shape[1:])}


def _write_layer(group: h5py.Group, layer: LayerResult) -> None:
    out_features = layer.scale_b.shape[0]
    in_features = layer.abs_mean.shape[0]
    group.attrs["name"] = layer.name
    group.attrs["tokens"] = layer.tokens
    group.attrs["in_features"] = in_features
    group.attrs["out_features"] = out_features
    inputs = _scale(group, "in_features", np.arange(in_features), "1", "index of the input channel")
    outputs = _scale(group, "out_features", np.arange(out_features), "1", "index of the output channel")

    stats = group.create_group("stats")
    # Units of the activations themselves are unknown: they are whatever the layer's inputs are measured in.
    _dataset(stats, "abs_mean", layer.abs_mean.astype("f4"), [inputs], "1", "mean of |x| over the tokens")
    _dataset(stats, "sq_mean", layer.sq_mean.astype("f4"), [inputs], "1", "mean of x^2 over the tokens")

    _write_search(group.create_group("search"), layer)

    scales = group.create_group("scales")
    _dataset(scales, "s", layer.search.s.astype("f4"), [inputs], "1", "AWQ scale per input channel")
    steps = [outputs]
    if layer.scale_b.ndim == 2:
        count = layer.scale_b.shape[1]
        steps.append(_scale(group, "group", np.arange(count), "1", "index of the group of input channels"))
    _dataset(
        scales, "scale_b", layer.scale_b.astype("f4"), steps, "1", "quantization step per output channel (and group)"
    )

    metrics = group.create_group("metrics")
    for name, value in layer.metrics.items():
        metrics.attrs[name] = value
    if layer.verify:
        verify = group.create_group("verify")
        for stage, error in layer.verify.items():
            verify.attrs[stage] = error
            verify.attrs[f"{stage}_tolerance"] = float(TOLERANCES[stage])
    if layer.wq is not None:
        _dataset(
            group.create_group("weights"), "Wq", layer.wq, [outputs, inputs], "1", "quantized weights, -127 to 127"
        )


def _write_search(group: h5py.Group, layer: LayerResult) -> None:
    search = layer.search
    gamma = _scale(group, "gamma", search.gamma, "1", "exponent of abs_mean, in the order searched")
    _dataset(group, "error", search.error, [gamma], "1", "the objective at each gamma")
    group.attrs["gamma_chosen"] = search.gamma_chosen
    group.attrs["error_chosen"] = search.error_chosen
    group.attrs["error_rtn"] = search.error_rtn
    group.attrs["objective"] = layer.objective


def _write_timings(group: h5py.Group, timings: Timings) -> None:
    layers, _, repeats = timings.gpu_ms.shape
    stage = _scale(group, "stage", STAGES, "1", "stage of the pipeline, in the order run")
    layer = _scale(group, "layer", np.arange(layers), "1", "index of the layer")
    repeat = _scale(group, "repeat", np.arange(repeats), "1", "index of the measured pass")
    whole = "one whole pass over all layers, host steps included: on the stream, or on the host's clock without a GPU"
    on_stream = (
        "time on the stream between the events around the stage; a host stage's is the time the stream waited for it; "
        "NaN without a GPU"
    )
    axes = [layer, stage, repeat]
    _dataset(group, "gpu_ms", timings.gpu_ms, axes, "ms", on_stream)
    _dataset(group, "host_ms", timings.host_ms, axes, "ms", "time the host spent in the stage; launches return early")
    _dataset(group, "pipeline_ms", timings.pipeline_ms, [repeat], "ms", whole)
    cold = "host time of the first pass with all that precedes it: making inputs, compiling, allocating"
    _dataset(group, "cold_ms", timings.cold_ms, [], "ms", cold)
