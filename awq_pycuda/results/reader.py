"""One result file as plain Python values, every one of them checked, so that a damaged file is told by its reason."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from awq_pycuda import hdf5
from awq_pycuda.hdf5 import UnreadableError
from awq_pycuda.results import schema
from awq_pycuda.results.opened import Array, File, Scalar, group_of, opened, place

_OF_LAYER = ("name", "tokens", "in_features", "out_features")
_OF_SEARCH = ("gamma_chosen", "error_chosen", "error_rtn", "objective")


@dataclass(frozen=True)
class LayerRecord:
    """One finished layer; `metrics` is empty where a failed run has none.

    `gamma`, `beta`, `duo`, `error` and `error_by_max` are (G,) float64, of which `chosen` is an index; `beta` is NaN
    where none was searched, `duo` 1 where 1 - gamma was a power of the weights, else 0; of the baseline `error_by_max`
    and `chosen_by_max`, an index as well, are NaN without it.
    `shares_s_with` are the numbers of the other layers that have this search, such as `001 002`.
    """

    index: int
    name: str
    tokens: int
    in_features: int
    out_features: int
    gamma: Array
    beta: Array
    duo: Array
    error: Array
    error_by_max: Array
    chosen: int
    gamma_chosen: float
    error_chosen: float
    error_rtn: float
    objective: str
    chosen_by_max: float
    shares_s_with: str
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class ResultFile:
    """One run.

    `root` are the scalar attributes of the file, `config` the resolved config by dotted key. `gpu_ms` and `host_ms`
    are (layers, stages, repeats) float64, `timed_layers` and `stages` name their first two axes, `pipeline_ms` is
    (repeats,), `cold_ms` NaN where the cold pass did not finish, `conditions` (repeats,) by name where a GPU told them,
    `launched` how the passes were, "" where the file does not say.
    """

    path: Path
    root: Mapping[str, Scalar]
    config: Mapping[str, Any]
    device: Mapping[str, Any]
    layers: list[LayerRecord]
    stages: list[str] = field(default_factory=list)
    timed_layers: list[int] = field(default_factory=list)
    gpu_ms: Array = field(default_factory=lambda: np.empty((0, 0, 0)))
    host_ms: Array = field(default_factory=lambda: np.empty((0, 0, 0)))
    pipeline_ms: Array = field(default_factory=lambda: np.empty(0))
    cold_ms: float = float("nan")
    conditions: Mapping[str, Array] = field(default_factory=dict)
    launched: str = ""


def read(path: Path) -> ResultFile:
    """Reads one result file.

    Raises:
        UnreadableError: whatever is wrong with it, in one line.
    """
    return opened(path, schema, lambda file, root: read_root(path, file, root))


def read_channels(path: Path, layers: Sequence[int]) -> list[dict[str, Array]]:
    """`channels_of` each of these layers.

    Raises:
        UnreadableError: the file is no result, or has no such layer.
    """

    def read_layers(file: File, _root: Mapping[str, Scalar]) -> list[dict[str, Array]]:
        group_of(file.found, "/layers")
        return [channels_of(file, layer) for layer in layers]

    return opened(path, schema, read_layers)


def read_root(path: Path, file: File, root: Mapping[str, Scalar]) -> ResultFile:
    """The whole of an open result file."""
    file.check(each for each in schema.TABLE if each.parent == "/")
    status = root["status"]
    if status not in ("complete", "failed"):
        raise UnreadableError(f"status is {status!r}, not complete or failed")
    config = config_by_key(root["config"])
    device = _parsed(root["device"], "device", json.loads)
    layers = [_read_layer(file, layer) for layer in _layers(file.found)]
    if schema.TIMINGS not in file.found:
        return ResultFile(path, root, config, device, layers)
    timed = _read_timings(file)
    if file.complete and [layer.index for layer in layers] != timed["timed_layers"]:
        raise UnreadableError(f"complete, but it holds {len(layers)} of {len(timed['timed_layers'])} layers")
    return ResultFile(path, root, config, device, layers, **timed)


def _layers(found: hdf5.Objects) -> list[int]:
    numbers = (re.fullmatch(r"/layers/([0-9]{3})", path) for path in found)
    return sorted(int(number[1]) for number in numbers if number)


def config_by_key(text: Any) -> dict[str, Any]:
    """The resolved config that is stored as YAML, by dotted key.

    Raises:
        UnreadableError: it is no config.
    """
    return dict(_flat(_parsed(text, "config", lambda text: yaml.load(text, yaml.CSafeLoader) or {}), ""))


def _parsed(text: Any, name: str, parse: Any) -> dict[str, Any]:
    try:
        value = parse(text)
    except (ValueError, yaml.YAMLError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise UnreadableError(f"/: attribute {name} cannot be parsed")
    return value


def _flat(node: Mapping[Any, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    """The config's scalars, and lists of scalars, by dotted key; what is neither becomes text."""
    for key, value in node.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", [_scalar(item) for item in value] if isinstance(value, list) else _scalar(value)


def _scalar(value: Any) -> Scalar | None:
    return value if value is None or isinstance(value, str | int | float) else str(value)


def _read_layer(file: File, layer: int) -> LayerRecord:
    file.check(schema.under(schema.LAYER), layer)
    where, search = place(schema.LAYER, layer), f"{schema.LAYER}/search"
    gamma, error = (file.numbers(f"{search}/{name}", layer) for name in ("gamma", "error"))
    if gamma.shape != error.shape:
        raise UnreadableError(f"{where}/search: {gamma.size} gammas, but {error.size} errors")
    absent = {"beta": math.nan, "duo": 0, "error_by_max": math.nan}
    columns: dict[str, Any] = {name: np.full(gamma.shape, value, np.float64) for name, value in absent.items()}
    for name in columns:
        if f"{where}/search/{name}" in file.found:
            columns[name] = file.numbers(f"{search}/{name}", layer)
        if columns[name].shape != gamma.shape:
            raise UnreadableError(f"{where}/search: {gamma.size} gammas, but {columns[name].size} of {name}")
    chosen = _chosen(file, layer, gamma)
    own = {name: file.attribute(f"{schema.LAYER}/@{name}", layer) for name in _OF_LAYER}
    # Read here and not only when a figure asks, so that a file that is damaged there is left out as a whole.
    channels = channels_of(file, layer)["s"].size
    if channels != own["in_features"]:
        raise UnreadableError(f"{where}: {own['in_features']} in_features, but {channels} scales")
    shares_s_with = ""
    if "shares_s_with" in file.attributes(search, layer):
        shares_s_with = file.attribute(f"{search}/@shares_s_with", layer)
    figures = file.attributes(schema.METRICS, layer).items()
    return LayerRecord(
        index=layer,
        **own,
        gamma=gamma,
        **columns,
        error=error,
        chosen=chosen,
        **{name: file.attribute(f"{search}/@{name}", layer) for name in _OF_SEARCH},
        chosen_by_max=_chosen_by_max(file, layer),
        shares_s_with=shares_s_with,
        metrics={name: float(value) for name, value in figures if isinstance(value, int | float)},
    )


def _chosen(file: File, layer: int, gamma: Array) -> int:
    """Where the chosen candidate stands; files before version 5 tell it by its gamma."""
    search = f"{schema.LAYER}/search"
    if not schema.entry(f"{search}/@chosen").needed(file.version, file.complete):
        same = np.flatnonzero(gamma == file.attribute(f"{search}/@gamma_chosen", layer))
        return int(same[0]) if same.size else -1
    chosen: int = file.attribute(f"{search}/@chosen", layer)
    if not 0 <= chosen < gamma.size:
        raise UnreadableError(f"{place(search, layer)}: attribute chosen is {chosen}, of {gamma.size} candidates")
    return chosen


def _chosen_by_max(file: File, layer: int) -> float:
    search = f"{schema.LAYER}/search"
    has_it = "chosen_by_max" in file.attributes(search, layer)
    return float(file.attribute(f"{search}/@chosen_by_max", layer)) if has_it else math.nan


def channels_of(file: File, layer: int) -> dict[str, Array]:
    """`abs_mean`, `sq_mean`, `s` and, where there is one, `abs_max` of a layer of an open file, (in_features,) each."""
    parts = ["stats/abs_mean", "stats/sq_mean", "scales/s"]
    if f"{place(schema.LAYER, layer)}/stats/abs_max" in file.found:
        parts.append("stats/abs_max")
    vectors = {part.partition("/")[2]: file.numbers(f"{schema.LAYER}/{part}", layer) for part in parts}
    if len({vector.size for vector in vectors.values()}) > 1:
        raise UnreadableError(f"{place(schema.LAYER, layer)}: {', '.join(vectors)} differ in length")
    return vectors


def _read_timings(file: File) -> dict[str, Any]:
    where = schema.TIMINGS
    file.check(schema.under(where))
    stages = file.texts(f"{where}/stage")
    layers = [int(index) for index in file.numbers(f"{where}/layer")]
    for name, axis in (("stage", stages), ("layer", layers)):
        if len(set(axis)) < len(axis):
            raise UnreadableError(f"{where}/{name} names one twice")
    samples = {name: file.numbers(f"{where}/{name}") for name in ("gpu_ms", "host_ms", "pipeline_ms", "cold_ms")}
    shape = (len(layers), len(stages), samples["pipeline_ms"].size)
    for name in ("gpu_ms", "host_ms"):
        if samples[name].shape != shape:
            raise UnreadableError(f"{where}/{name} has shape {samples[name].shape}, not {shape}")
    paths = [each.path for each in schema.under(schema.CONDITIONS) if each.type is not None]
    conditions = {path.rpartition("/")[2]: file.numbers(path) for path in paths if path in file.found}
    for name, values in conditions.items():
        if values.shape != samples["pipeline_ms"].shape:
            raise UnreadableError(f"{schema.CONDITIONS}/{name} has shape {values.shape}, not that of pipeline_ms")
    (launched,) = file.texts(f"{where}/launched") if f"{where}/launched" in file.found else [""]
    whole = {"cold_ms": float(samples["cold_ms"]), "conditions": conditions, "launched": launched}
    return {"stages": stages, "timed_layers": layers, **samples, **whole}
