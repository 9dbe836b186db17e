"""One layer of a result file with all that tells where its error comes from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from awq_pycuda.hdf5 import UnreadableError
from awq_pycuda.names import listed
from awq_pycuda.results import schema
from awq_pycuda.results.opened import Array, File, Scalar, opened, place
from awq_pycuda.results.reader import LayerRecord, ResultFile, channels_of, read_root


@dataclass(frozen=True)
class Explained:
    """Of a finished layer all that tells where its error comes from.

    Attributes:
        record: its figures and its search.
        config: the run's, by dotted key.
        channels: see `reader.channels_of`.
        by_channel: (in_features,) error of the outputs, see the schema.
        by_row: (out_features,) the same sum.
        clipped: of it the part of clipped weights; None where nothing is clipped.
        clipped_fraction: share of the groups that are clipped.
        unclipped: (G,) objective without clipping, where the search was joint with it.
    """

    record: LayerRecord
    config: Mapping[str, Any]
    channels: Mapping[str, Array]
    by_channel: Array
    by_row: Array
    clipped: float | None
    clipped_fraction: float
    unclipped: Array | None


def read_explained(path: Path, layer: str) -> Explained:
    """A layer by its name or its number.

    Raises:
        UnreadableError: the file is no result, or has no such layer, or nothing of its errors.
    """

    def read_layer(file: File, root: Mapping[str, Scalar]) -> Explained:
        run = read_root(path, file, root)
        record = _named(run, layer)
        if file.version < schema.entry(f"{schema.LAYER}/lost").since:
            raise UnreadableError(f"schema_version {file.version} has nothing of where errors come from; run it again")
        by_channel, by_row = (
            file.numbers(f"{schema.LAYER}/lost/{name}", record.index) for name in ("by_channel", "by_row")
        )
        channels = channels_of(file, record.index)
        if (by_channel.size, by_row.size) != (record.in_features, record.out_features):
            raise UnreadableError(f"{place(schema.LAYER, record.index)}/lost is not of the layer's shape")
        clipped, share = None, 0.0
        if place(f"{schema.LAYER}/clip", record.index) in file.found:
            clipped = file.attribute(f"{schema.LAYER}/lost/@clipped", record.index)
            share = file.attribute(f"{schema.LAYER}/clip/@clipped_fraction", record.index)
        unclipped = None
        if place(f"{schema.LAYER}/search/unclipped_error", record.index) in file.found:
            unclipped = file.numbers(f"{schema.LAYER}/search/unclipped_error", record.index)
            if unclipped.shape != record.gamma.shape:
                raise UnreadableError(f"{place(schema.LAYER, record.index)}/search: not every gamma has both errors")
        return Explained(record, run.config, channels, by_channel, by_row, clipped, share, unclipped)

    return opened(path, schema, read_layer)


def _named(found: ResultFile, layer: str) -> LayerRecord:
    """The layer of this name, else of this number."""
    for record in found.layers:
        if layer == record.name:
            return record
    for record in found.layers:
        if layer.isdecimal() and int(layer) == record.index:
            return record
    names = [record.name for record in found.layers]
    raise UnreadableError(f"no layer is called {layer}; there are {listed(names) if names else 'none'}")
