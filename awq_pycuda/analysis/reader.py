"""One result file as plain Python values, every one of them checked, so that a damaged file is told by its reason."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import h5py
import numpy as np
import yaml
from h5py import h5a, h5f, h5g, h5p, h5s, h5t
from numpy.typing import NDArray

from awq_pycuda import hdf5
from awq_pycuda.results.schema import FIRST_WITH_CHECKSUMS, SCHEMA, SCHEMA_VERSION

METRICS = (
    "output_mse",
    "output_sqnr_db",
    "rtn_output_mse",
    "rtn_output_sqnr_db",
    "weight_mse",
    "saturated_fraction",
    "propagated_output_mse",
)
_SIGNATURE = b"\x89HDF\r\n\x1a\n"
# Types in memory of what attributes hold; h5py takes as long to make one as to read a value.
_IN_MEMORY = {h5t.FLOAT: (h5t.NATIVE_DOUBLE, np.dtype("f8")), h5t.INTEGER: (h5t.NATIVE_INT64, np.dtype("i8"))}
_TEXT = {h5t.CSET_ASCII: h5py.string_dtype("ascii"), h5t.CSET_UTF8: h5py.string_dtype()}
_MAX_BYTES = 1 << 30  # of one dataset: a damaged size must not take the machine's memory

Array = NDArray[Any]
Scalar = str | int | float | bool
T = TypeVar("T")


class UnreadableError(Exception):
    """This file holds no result that can be analysed; the message is the reason, in one line."""


@dataclass(frozen=True)
class LayerRecord:
    """One finished layer. `gamma` and `error` are (G,) float64; `metrics` is empty where a failed run has none."""

    index: int
    name: str
    tokens: int
    in_features: int
    out_features: int
    gamma: Array
    error: Array
    gamma_chosen: float
    error_chosen: float
    error_rtn: float
    objective: str
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class ResultFile:
    """One run.

    `root` are the scalar attributes of the file, `config` the resolved config by dotted key. `gpu_ms` and `host_ms`
    are (layers, stages, repeats) float64, `timed_layers` and `stages` name their first two axes, `pipeline_ms` is
    (repeats,), `cold_ms` NaN where the cold pass did not finish.
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


def read(path: Path) -> ResultFile:
    """Reads one result file.

    Raises:
        UnreadableError: whatever is wrong with it, in one line.
    """
    return _guarded(path, _read_root)


def read_channels(path: Path, layers: Sequence[int]) -> list[dict[str, Array]]:
    """`abs_mean`, `sq_mean` and `s` of each of these layers, (in_features,) each.

    Raises:
        UnreadableError: the file is no result, or has no such layer.
    """

    def read_layers(_path: Path, found: hdf5.Objects, _root: Mapping[str, Scalar]) -> list[dict[str, Array]]:
        _group(found, "/layers")
        return [_channels(found, f"/layers/{layer:03d}") for layer in layers]

    return _guarded(path, read_layers)


def _guarded(path: Path, reading: Callable[[Path, hdf5.Objects, Mapping[str, Scalar]], T]) -> T:
    """Reads from the file's objects and root attributes, and turns every way in which that can fail into the reason."""
    try:
        if not path.is_file():
            path.stat()
            raise UnreadableError("a folder, not a file" if path.is_dir() else "no regular file")
        with open(path, "rb") as start:
            signature = start.read(len(_SIGNATURE))
    except (OSError, ValueError) as error:
        raise UnreadableError(getattr(error, "strerror", None) or str(error)) from None
    if not signature:
        raise UnreadableError("empty file")
    # HDF5 allows a user block before the signature; awq_pycuda writes none.
    if signature != _SIGNATURE:
        raise UnreadableError("not an HDF5 file")
    try:
        access = h5p.create(h5p.FILE_ACCESS)
        # Result files are replaced, never written to, so a lock guards nothing; some network file systems have none.
        access.set_file_locking(False, False)
        access.set_fclose_degree(h5f.CLOSE_STRONG)
        file = h5f.open(bytes(path), h5f.ACC_RDONLY, access)
        try:
            with open(path, "rb") as stream:
                found = hdf5.checked_objects(file, stream)
            root = _attributes(found["/"])
            _check_schema(root, found)
            return reading(path, found, root)
        finally:
            file.close()
    except UnreadableError:
        raise
    except hdf5.RefusedError as error:
        raise UnreadableError(f"damaged HDF5 file: {error}") from None
    except Exception as error:  # HDF5 answers damage with whatever it runs into: OSError, KeyError, RuntimeError ...
        first = " ".join(str(error).split()) or type(error).__name__
        raise UnreadableError(f"damaged HDF5 file: {first}") from None


def _check_schema(root: Mapping[str, Scalar], found: hdf5.Objects) -> None:
    if root.get("schema") != SCHEMA:
        raise UnreadableError(f"an HDF5 file, but no result of awq_pycuda (no attribute schema={SCHEMA})")
    version = _attribute(root, "/", "schema_version", int)
    if version > SCHEMA_VERSION:
        raise UnreadableError(f"schema_version {version} is newer than {SCHEMA_VERSION}, which this version reads")
    if version < 1:
        raise UnreadableError(f"schema_version {version} is unknown")
    if version >= FIRST_WITH_CHECKSUMS and f"/{hdf5.DIGEST}" not in found:
        raise UnreadableError(f"/{hdf5.DIGEST} is missing")


def _read_root(path: Path, found: hdf5.Objects, root: Mapping[str, Scalar]) -> ResultFile:
    status = _attribute(root, "/", "status", str)
    if status not in ("complete", "failed"):
        raise UnreadableError(f"status is {status!r}, not complete or failed")
    for name in ("created", "config_hash", "backend"):
        _attribute(root, "/", name, str)
    config = dict(_flat(_parsed(root, "config", lambda text: yaml.load(text, yaml.CSafeLoader) or {}), ""))
    device = _parsed(root, "device", json.loads)
    layers = _read_layers(found, complete=status == "complete")
    if status == "failed" and "/timings" not in found:
        return ResultFile(path, root, config, device, layers)
    timed = _read_timings(found)
    if status == "complete" and [layer.index for layer in layers] != timed["timed_layers"]:
        raise UnreadableError(f"complete, but it holds {len(layers)} of {len(timed['timed_layers'])} layers")
    return ResultFile(path, root, config, device, layers, **timed)


def _parsed(root: Mapping[str, Scalar], name: str, parse: Any) -> dict[str, Any]:
    text = _attribute(root, "/", name, str)
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


def _read_layers(found: hdf5.Objects, complete: bool) -> list[LayerRecord]:
    paths = sorted(path for path in found if re.fullmatch(r"/layers/[0-9]{3}", path))
    return [_read_layer(found, path, complete) for path in paths]


def _read_layer(found: hdf5.Objects, where: str, complete: bool) -> LayerRecord:
    layer = _attributes(_group(found, where))
    chosen = _attributes(_group(found, f"{where}/search"))
    gamma, error = (_numbers(found, f"{where}/search/{name}", 1) for name in ("gamma", "error"))
    if gamma.shape != error.shape:
        raise UnreadableError(f"{where}/search: {gamma.size} gammas, but {error.size} errors")
    metrics = {
        name: float(value)
        for name, value in _attributes(_group(found, f"{where}/metrics")).items()
        if isinstance(value, int | float)
    }
    if complete:
        for name in METRICS:
            _attribute(metrics, f"{where}/metrics", name, float)
    sizes = {name: _attribute(layer, where, name, int) for name in ("tokens", "in_features", "out_features")}
    # Read here and not only when a figure asks, so that a file that is damaged there is left out as a whole.
    channels = _channels(found, where)["s"].size
    if channels != sizes["in_features"]:
        raise UnreadableError(f"{where}: {sizes['in_features']} in_features, but {channels} scales")
    return LayerRecord(
        index=int(where[-3:]),
        name=_attribute(layer, where, "name", str),
        **sizes,
        gamma=gamma,
        error=error,
        **{
            name: _attribute(chosen, f"{where}/search", name, float)
            for name in ("gamma_chosen", "error_chosen", "error_rtn")
        },
        objective=_attribute(chosen, f"{where}/search", "objective", str),
        metrics=metrics,
    )


def _channels(found: hdf5.Objects, where: str) -> dict[str, Array]:
    parts = ("stats/abs_mean", "stats/sq_mean", "scales/s")
    vectors = {part.partition("/")[2]: _numbers(found, f"{where}/{part}", 1) for part in parts}
    if len({vector.size for vector in vectors.values()}) > 1:
        raise UnreadableError(f"{where}: abs_mean, sq_mean and s differ in length")
    return vectors


def _read_timings(found: hdf5.Objects) -> dict[str, Any]:
    where = "/timings"
    _group(found, where)
    stages = _texts(found, f"{where}/stage")
    layers = [int(index) for index in _numbers(found, f"{where}/layer", 1)]
    for name, axis in (("stage", stages), ("layer", layers)):
        if len(set(axis)) < len(axis):
            raise UnreadableError(f"{where}/{name} names one twice")
    gpu, host = (_numbers(found, f"{where}/{name}", 3) for name in ("gpu_ms", "host_ms"))
    pipeline = _numbers(found, f"{where}/pipeline_ms", 1)
    shape = (len(layers), len(stages), pipeline.size)
    for name, samples in (("gpu_ms", gpu), ("host_ms", host)):
        if samples.shape != shape:
            raise UnreadableError(f"{where}/{name} has shape {samples.shape}, not {shape}")
    return {
        "stages": stages,
        "timed_layers": layers,
        "gpu_ms": gpu,
        "host_ms": host,
        "pipeline_ms": pipeline,
        "cold_ms": float(_numbers(found, f"{where}/cold_ms", 0)),
    }


# h5py's low-level objects, with the types that memory shall have: those above them take twice the time on small files.


def _group(found: hdf5.Objects, where: str) -> Any:
    if where not in found:
        raise UnreadableError(f"{where} is missing")
    if not isinstance(found[where], h5g.GroupID):
        raise UnreadableError(f"{where} is no group")
    return found[where]


def _dataset(found: hdf5.Objects, where: str, rank: int) -> tuple[Any, tuple[int, ...], Any]:
    """A dataset, its shape and its type."""
    if where not in found:
        raise UnreadableError(f"{where} is missing")
    dataset = found[where]
    if not isinstance(dataset, hdf5.Dataset):
        raise UnreadableError(f"{where} is no dataset")
    shape, stored = dataset.id.shape, dataset.id.get_type()
    if len(shape) != rank:
        raise UnreadableError(f"{where} has {len(shape)} dimensions, not {rank}")
    if math.prod(shape) * max(8, stored.get_size()) > _MAX_BYTES:
        raise UnreadableError(f"{where} claims the shape {shape}")
    hdf5.check_stored(dataset, shape, where)
    return dataset.id, shape, stored


def _numbers(found: hdf5.Objects, where: str, rank: int) -> Array:
    dataset, shape, stored = _dataset(found, where, rank)
    if stored.get_class() not in (h5t.FLOAT, h5t.INTEGER):
        raise UnreadableError(f"{where} holds no numbers")
    values = np.empty(shape)
    dataset.read(h5s.ALL, h5s.ALL, values, h5t.NATIVE_DOUBLE)
    return values


def _texts(found: hdf5.Objects, where: str) -> list[str]:
    dataset, shape, stored = _dataset(found, where, 1)
    if stored.get_class() != h5t.STRING:
        raise UnreadableError(f"{where} holds no text")
    values = np.empty(shape, stored.dtype)
    dataset.read(h5s.ALL, h5s.ALL, values)
    return [value.decode() for value in values]


def _attributes(location: Any) -> dict[str, Scalar]:
    """Every scalar attribute that is text, a number or a truth value; the schema has no others."""
    names: list[bytes] = []
    h5a.iterate(location, names.append)
    found: dict[str, Scalar] = {}
    for name in names:
        attribute = h5a.open(location, name)
        stored = attribute.get_type()
        kind = stored.get_class()
        # read() writes all the values that there are, so an array must never come to it.
        if attribute.shape != () or kind not in (h5t.FLOAT, h5t.INTEGER, h5t.STRING, h5t.ENUM):
            continue
        memory, dtype = _IN_MEMORY.get(kind, (None, None))
        if kind == h5t.STRING and stored.is_variable_str():
            dtype = _TEXT[stored.get_cset()]
        value = np.zeros((), stored.dtype if dtype is None else dtype)
        attribute.read(value, memory)
        item = value.item()
        found[name.decode()] = item.decode() if isinstance(item, bytes) else item
    return found


def _attribute(attributes: Mapping[str, Scalar], where: str, name: str, kind: type) -> Any:
    value = attributes.get(name)
    if value is None:
        raise UnreadableError(f"{where}: attribute {name} is missing")
    if isinstance(value, bool) or not isinstance(value, int | float if kind is float else kind):
        expected = {str: "text", int: "a whole number", float: "a number"}[kind]
        raise UnreadableError(f"{where}: attribute {name} is {value!r:.40}, not {expected}")
    return kind(value)
