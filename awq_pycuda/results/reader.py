"""One result file as plain Python values, every one of them checked, so that a damaged file is told by its reason."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import h5py
import numpy as np
import yaml
from h5py import h5a, h5f, h5g, h5p, h5s, h5t
from numpy.typing import NDArray

from awq_pycuda import hdf5
from awq_pycuda.hdf5 import UnreadableError
from awq_pycuda.results import schema

_OF_LAYER = ("name", "tokens", "in_features", "out_features")
_OF_SEARCH = ("gamma_chosen", "error_chosen", "error_rtn", "objective")
_SIGNATURE = b"\x89HDF\r\n\x1a\n"
# Types in memory of what attributes hold; h5py takes as long to make one as to read a value.
_IN_MEMORY = {h5t.FLOAT: (h5t.NATIVE_DOUBLE, np.dtype("f8")), h5t.INTEGER: (h5t.NATIVE_INT64, np.dtype("i8"))}
_TEXT = {h5t.CSET_ASCII: h5py.string_dtype("ascii"), h5t.CSET_UTF8: h5py.string_dtype()}
_MAX_BYTES = 1 << 30  # of one dataset: a damaged size must not take the machine's memory

Array = NDArray[Any]
Scalar = str | int | float | bool
T = TypeVar("T")
# Types of attributes: as Python has them, and as messages name them.
_KINDS: dict[str, tuple[type | tuple[type, ...], str]] = {
    "str": (str, "text"),
    "i8": (int, "a whole number"),
    "f8": ((int, float), "a number"),
    "bool": (bool, "a truth value"),
}


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
    return _guarded(path, lambda file, root: _read_root(path, file, root))


def read_channels(path: Path, layers: Sequence[int]) -> list[dict[str, Array]]:
    """`abs_mean`, `sq_mean` and `s` of each of these layers, (in_features,) each.

    Raises:
        UnreadableError: the file is no result, or has no such layer.
    """

    def read_layers(file: _File, _root: Mapping[str, Scalar]) -> list[dict[str, Array]]:
        _group(file.found, "/layers")
        return [_channels(file, layer) for layer in layers]

    return _guarded(path, read_layers)


def _guarded(path: Path, reading: Callable[[_File, Mapping[str, Scalar]], T]) -> T:
    """Reads from the open file and its root attributes, and turns every way in which that can fail into the reason."""
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
            return reading(_File(found, _version(root), root.get("status") == "complete"), root)
        finally:
            file.close()
    except UnreadableError:
        raise
    except hdf5.RefusedError as error:
        raise UnreadableError(f"damaged HDF5 file: {error}") from None
    except Exception as error:  # HDF5 answers damage with whatever it runs into: OSError, KeyError, RuntimeError ...
        first = " ".join(str(error).split()) or type(error).__name__
        raise UnreadableError(f"damaged HDF5 file: {first}") from None


def _version(root: Mapping[str, Scalar]) -> int:
    if root.get("schema") != schema.NAME:
        raise UnreadableError(f"an HDF5 file, but no result of awq_pycuda (no attribute schema={schema.NAME})")
    version = int(_attribute(root, "/", schema.entry("/@schema_version")))
    if version > schema.VERSION:
        raise UnreadableError(f"schema_version {version} is newer than {schema.VERSION}, which this version reads")
    if version < 1:
        raise UnreadableError(f"schema_version {version} is unknown")
    return version


@dataclass
class _File:
    """An open file beside the schema: paths are the schema's; `layer` is the number of the layer to read them of."""

    found: hdf5.Objects
    version: int
    complete: bool
    _attributes: dict[str, Mapping[str, Scalar]] = field(default_factory=dict)

    def check(self, entries: Iterable[schema.Entry], layer: int = 0) -> None:
        """Raises an error for the first of these entries that a file of this version must have and this one has not."""
        absent = set()
        for entry in entries:
            where = _place(entry.path, layer)
            needed = entry.parent not in absent and entry.needed(self.version, self.complete)
            if entry.is_attribute:
                if needed:
                    _attribute(self.attributes(entry.parent, layer), _place(entry.parent, layer), entry)
            elif where not in self.found:
                if needed:
                    raise UnreadableError(f"{where} is missing")
                absent.add(entry.path)
            elif entry.type is None:
                _group(self.found, where)

    def attributes(self, group: str, layer: int = 0) -> Mapping[str, Scalar]:
        """Every attribute of a group that a file of this schema may have."""
        where = _place(group, layer)
        if where not in self._attributes:
            self._attributes[where] = _attributes(_group(self.found, where))
        return self._attributes[where]

    def attribute(self, path: str, layer: int = 0) -> Any:
        """An attribute in its type."""
        entry = schema.entry(path)
        return _attribute(self.attributes(entry.parent, layer), _place(entry.parent, layer), entry)

    def numbers(self, path: str, layer: int = 0) -> Array:
        """The numbers of a dataset, in float64."""
        return _numbers(self.found, _place(path, layer), len(schema.entry(path).dims))

    def texts(self, path: str) -> list[str]:
        """The texts of a dataset of one dimension."""
        return _texts(self.found, path)


def _place(path: str, layer: int) -> str:
    """Where the schema's path is found in a file."""
    return path.replace(schema.LAYER, f"/layers/{layer:03d}", 1)


def _read_root(path: Path, file: _File, root: Mapping[str, Scalar]) -> ResultFile:
    file.check(each for each in schema.TABLE if each.parent == "/")
    status = root["status"]
    if status not in ("complete", "failed"):
        raise UnreadableError(f"status is {status!r}, not complete or failed")
    config = dict(_flat(_parsed(root, "config", lambda text: yaml.load(text, yaml.CSafeLoader) or {}), ""))
    device = _parsed(root, "device", json.loads)
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


def _parsed(root: Mapping[str, Scalar], name: str, parse: Any) -> dict[str, Any]:
    try:
        value = parse(root[name])
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


def _read_layer(file: _File, layer: int) -> LayerRecord:
    file.check(schema.under(schema.LAYER), layer)
    where, search = _place(schema.LAYER, layer), f"{schema.LAYER}/search"
    gamma, error = (file.numbers(f"{search}/{name}", layer) for name in ("gamma", "error"))
    if gamma.shape != error.shape:
        raise UnreadableError(f"{where}/search: {gamma.size} gammas, but {error.size} errors")
    own = {name: file.attribute(f"{schema.LAYER}/@{name}", layer) for name in _OF_LAYER}
    # Read here and not only when a figure asks, so that a file that is damaged there is left out as a whole.
    channels = _channels(file, layer)["s"].size
    if channels != own["in_features"]:
        raise UnreadableError(f"{where}: {own['in_features']} in_features, but {channels} scales")
    figures = file.attributes(schema.METRICS, layer).items()
    return LayerRecord(
        index=layer,
        **own,
        gamma=gamma,
        error=error,
        **{name: file.attribute(f"{search}/@{name}", layer) for name in _OF_SEARCH},
        metrics={name: float(value) for name, value in figures if isinstance(value, int | float)},
    )


def _channels(file: _File, layer: int) -> dict[str, Array]:
    parts = ("stats/abs_mean", "stats/sq_mean", "scales/s")
    vectors = {part.partition("/")[2]: file.numbers(f"{schema.LAYER}/{part}", layer) for part in parts}
    if len({vector.size for vector in vectors.values()}) > 1:
        raise UnreadableError(f"{_place(schema.LAYER, layer)}: abs_mean, sq_mean and s differ in length")
    return vectors


def _read_timings(file: _File) -> dict[str, Any]:
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
    return {"stages": stages, "timed_layers": layers, **samples, "cold_ms": float(samples["cold_ms"])}


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


def _attribute(attributes: Mapping[str, Scalar], where: str, entry: schema.Entry) -> Any:
    value = attributes.get(entry.name)
    if value is None:
        raise UnreadableError(f"{where}: attribute {entry.name} is missing")
    assert entry.type is not None
    kind, expected = _KINDS[entry.type]
    if isinstance(value, bool) != (kind is bool) or not isinstance(value, kind):
        raise UnreadableError(f"{where}: attribute {entry.name} is {value!r:.40}, not {expected}")
    return float(value) if entry.type == "f8" else value
