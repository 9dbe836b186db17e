"""Layer files: real weights and activations that a run takes instead of synthetic ones.

A file holds one group of tensors per layer, in HDF5 (``/layers/000/weight``) or as the flat keys ``000.weight`` of
safetensors and npz. `load_layers` refuses whatever the pipeline could not use, with the exact place of the fault.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from awq_pycuda.errors import InputError
from awq_pycuda.layers.rows import StoredRows
from awq_pycuda.layers.sources import TENSOR_DIMS, Source, Tensor, allowed_tensors, open_sources, refuse

# Larger values would overflow float32 in W*s (s is at most 8) and in the mean of x**2.
MAX_MAGNITUDE = {"weight": 1e37, "activations": 1e18, "bias": 1e37}

# Values that are looked at together, of tensors that stay in the file.
_LOOKED_THROUGH = 1 << 22


@dataclass(frozen=True)
class FileLayer:
    """One layer as read: read-only, C-contiguous float32 arrays whose values are all finite.

    Activations may have stayed in the file, their values looked at.
    """

    name: str
    """Path of the module in its model, or the name of the layer's group where the file gives none."""
    weight: NDArray[np.float32]
    """(out_features, in_features)"""
    activations: NDArray[np.float32] | StoredRows | None
    """(tokens, in_features), or None: the layer takes the ReLU of the previous layer's output."""
    bias: NDArray[np.float32] | None
    """(out_features,), or None."""
    input_of: int | None = None
    """Which of the layers read has the same activations, the same array; None: they are this layer's own."""


@dataclass(frozen=True)
class LayerShape:
    """Dimensions of one layer of a file."""

    name: str
    out_features: int
    in_features: int
    tokens: int | None
    """Rows of activations that would be read, or None where the layer brings none of its own."""
    has_bias: bool
    input_of: int | None = None
    """See `FileLayer.input_of`."""


def load_layers(
    path: Path, layers: int | None = None, tokens: int | None = None, stored: bool = False, first: int = 0
) -> list[FileLayer]:
    """Read the first ``layers`` layers of a file (default: all), in the order of their group names.

    Layers that no token reached are left out: they have nothing to run on, see `unreached_layers`.
    ``tokens`` takes only so many rows of every layer's own activations (default: all), from the row ``first`` on, and
    all from there of a layer that holds fewer, such as an expert to which few tokens were routed. Float16 tensors come
    back as float32. With ``stored`` activations stay in the file, which then has to be HDF5 with those of every layer.
    Raises `InputError` for any fault of the file, for more layers than it holds, for more tokens than any of them does
    and for a layer that holds none from ``first`` on.
    """
    loaded: list[FileLayer] = []
    rows = slice(first, None if tokens is None else first + tokens)
    with _open_checked(path, layers, tokens, first) as sources:
        for index, (source, input_of) in enumerate(zip(sources, _inputs_of(sources), strict=True)):
            label = _label(index, source.name)
            arrays = {
                name: _read(path, label, name, tensor)
                for name, tensor in source.tensors.items()
                if name != "activations"
            }
            activations: NDArray[np.float32] | StoredRows | None = None
            if input_of is not None:
                activations = loaded[input_of].activations
            elif stored:
                activations = _looked_through(path, label, source.tensors.get("activations"), rows)
            elif "activations" in source.tensors:
                activations = _read(path, label, "activations", source.tensors["activations"], rows, first)
            loaded.append(FileLayer(source.name, arrays["weight"], activations, arrays.get("bias"), input_of))
    return loaded


def _read(
    path: Path, label: str, name: str, tensor: Tensor, rows: slice = slice(None), first_row: int = 0
) -> NDArray[np.float32]:
    """Rows of a tensor, read-only, whose values are within their limit; `first_row` is where they begin in it."""
    there = range(tensor.shape[0])[rows]
    array = tensor.read(slice(there.start, there.stop))
    fault = find_fault(array, MAX_MAGNITUDE[name], first_row)
    if fault is not None:
        raise refuse(path, f"{label} {name}{fault}")
    array.setflags(write=False)
    return array


def _looked_through(path: Path, label: str, tensor: Tensor | None, rows: slice) -> StoredRows:
    """Rows of activations that stay in the file, whose values are within their limit."""
    if tensor is None:
        raise _refuse_chunks(path, f"{label} has no activations of its own, and the outputs of others are not kept")
    if tensor.rows is None:
        raise _refuse_chunks(path, f"{path.suffix} is read as a whole")
    found = tensor.rows.alone(rows)
    step = max(1, _LOOKED_THROUGH // tensor.shape[1])
    first = rows.start
    for start in range(first, first + len(found), step):
        _read(path, label, "activations", tensor, slice(start, min(start + step, first + len(found))), start)
    return found


def _refuse_chunks(path: Path, why: str) -> InputError:
    return refuse(path, f"{why}; allowed in chunks (inputs.chunk_tokens) is HDF5 with activations of every layer")


def describe_layers(
    path: Path, layers: int | None = None, tokens: int | None = None, first: int = 0
) -> list[LayerShape]:
    """Dimensions of what `load_layers` would read, without reading it, so that its memory can be counted first.

    Raises `InputError` as `load_layers` does, except for faults that only the values show.
    """
    shapes = []
    with _open_checked(path, layers, tokens, first) as sources:
        for source, input_of in zip(sources, _inputs_of(sources), strict=True):
            rows = source.tensors["activations"].shape[0] - first if "activations" in source.tensors else None
            shapes.append(
                LayerShape(
                    name=source.name,
                    out_features=source.tensors["weight"].shape[0],
                    in_features=source.tensors["weight"].shape[1],
                    tokens=rows if rows is None or tokens is None else min(rows, tokens),
                    has_bias="bias" in source.tensors,
                    input_of=input_of,
                ),
            )
    return shapes


def _inputs_of(sources: Sequence[Source]) -> list[int | None]:
    """For each layer the first one with the same activations, where it has none of its own."""
    places = {source.key: index for index, source in enumerate(sources)}
    return [places[source.shared] if source.shared else None for source in sources]


def try_layers(path: Path) -> None:
    """Reads all of an HDF5 file but its tensors, whatever is wrong with it: for a process that may hang or crash."""
    with suppress(InputError):
        describe_layers(path)


def stored_weights(path: Path) -> dict[str, StoredRows]:
    """The (out_features, in_features) weights of the layers of an HDF5 file that a token reached, not read, by name.

    Raises `InputError` as `describe_layers` does, and for two layers of one name.
    """
    found: dict[str, StoredRows] = {}
    with _open_checked(path, None, None) as sources:
        for source in sources:
            rows = source.tensors["weight"].rows
            if rows is None or source.name in found:
                raise refuse(path, f"holds two layers named {source.name}" if rows else "is read as a whole")
            found[source.name] = rows.opened()
    return found


def unreached_layers(path: Path) -> list[str]:
    """Names of the layers of a file that `load_layers` leaves out, since no token reached them when it was made.

    Raises `InputError` as `describe_layers` does.
    """
    with open_sources(path) as sources:
        return [source.name for source in sources if source.unreached]


def find_fault(array: NDArray[Any], limit: float, first_row: int = 0) -> str | None:
    """Say where and how an array breaks a limit on its magnitude, such as ``[17, 3] is nan; allowed are ...``, or None.

    Not a number and infinity break any limit. The first such element in C order is named; ``first_row`` is the place of
    the array's first row in the whole that it is a part of.
    """
    # min and max pass NaN on and make no temporaries; the comparison is written so that NaN fails it.
    if array.min() >= -limit and array.max() <= limit:
        return None
    for row in np.ndindex(array.shape[:-1]):
        bad = np.flatnonzero(~(np.abs(array[row]) <= limit))
        if bad.size:
            index = [*row, int(bad[0])]
            value = float(array[tuple(index)])
            index[0] += first_row
            allowed = f"magnitudes up to {limit:g}" if np.isfinite(value) else "finite values"
            return f"[{', '.join(map(str, index))}] is {value:g}; allowed are {allowed}"
    raise AssertionError("an array beyond its limit has an element beyond it")


@contextmanager
def _open_checked(path: Path, layers: int | None, tokens: int | None, first: int = 0) -> Iterator[list[Source]]:
    """Open a file of any of the formats, with its structure and its shapes checked for the layers chosen."""
    with open_sources(path) as sources:
        reached = [source for source in sources if not source.unreached]
        if sources and not reached:
            raise refuse(path, "holds no layer that a token reached; allowed is a file with activations")
        _check_layers(path, reached, layers)
        chosen = reached[:layers]
        _check_structure(path, chosen)
        _check_tokens(chosen, tokens, first)
        yield chosen


def _label(index: int, name: str) -> str:
    return f"layer {index} ({name})"


def _check_layers(path: Path, sources: list[Source], layers: int | None) -> None:
    if not sources:
        raise refuse(path, "holds no layers; allowed is a file with at least one layer")
    if layers is not None and not 1 <= layers <= len(sources):
        raise InputError(
            f"layers={layers}: inputs.path holds {len(sources)} layers; allowed are 1 to {len(sources)}",
        )


def _check_structure(path: Path, sources: list[Source]) -> None:
    """Check tensor names, dtypes and shapes, within a layer and from one to the next."""
    out_features = 0
    for index, source in enumerate(sources):
        if not source.name.isprintable():
            # The results could not store bytes that are no UTF-8, or a NUL; tables and messages need one line.
            raise refuse(path, f"layer {index} has the name {source.name!r}; allowed are printable characters")
        label = _label(index, source.name)
        for tensor_name, tensor in source.tensors.items():
            _check_tensor(path, f"{label} {tensor_name}", tensor_name, tensor)
        if "weight" not in source.tensors:
            raise refuse(path, f"{label} has no weight; every layer needs one, (out_features, in_features)")
        features = source.tensors["weight"].shape
        if "bias" in source.tensors and source.tensors["bias"].shape[0] != features[0]:
            length = source.tensors["bias"].shape[0]
            raise refuse(path, f"{label} bias has {length} values; allowed are its {features[0]} out_features")
        if "activations" in source.tensors:
            columns = source.tensors["activations"].shape[1]
            if columns != features[1]:
                raise refuse(
                    path, f"{label} activations has {columns} columns; allowed are its {features[1]} in_features"
                )
        elif index > 0 and features[1] != out_features:
            raise refuse(
                path,
                f"{label} has {features[1]} in_features and no activations of its own; "
                f"allowed are the {out_features} out_features of {_label(index - 1, sources[index - 1].name)}",
            )
        out_features = features[0]


def _check_tensor(path: Path, label: str, tensor_name: str, tensor: Tensor) -> None:
    if tensor_name not in TENSOR_DIMS:
        raise refuse(path, f"{label} is not known; {allowed_tensors()}")
    if tensor.dtype not in ("float32", "float16"):
        raise refuse(path, f"{label} has dtype {tensor.dtype}; allowed are float32 and float16")
    dims = TENSOR_DIMS[tensor_name]
    if len(tensor.shape) != dims:
        raise refuse(path, f"{label} has shape {tensor.shape}; allowed are {dims} dimension{'s' * (dims > 1)}")
    if 0 in tensor.shape:
        raise refuse(path, f"{label} has shape {tensor.shape}; allowed are dimensions of at least 1")


def _check_tokens(sources: list[Source], tokens: int | None, first: int) -> None:
    held = {
        index: source.tensors["activations"].shape[0]
        for index, source in enumerate(sources)
        if "activations" in source.tensors
    }
    if not held:
        if first:
            raise InputError(f"inputs.first_token={first}: inputs.path holds no activations; allowed is 0")
        return
    least, most = min(held, key=held.__getitem__), max(held, key=held.__getitem__)
    if first >= held[least]:
        raise InputError(
            f"inputs.first_token={first}: {_label(least, sources[least].name)} of inputs.path holds activations of "
            f"{held[least]} tokens; allowed are 0 to {held[least] - 1}",
        )
    if tokens is not None and not 1 <= tokens <= held[most] - first:
        behind = f" from inputs.first_token={first} on" if first else ""
        raise InputError(
            f"tokens={tokens}: inputs.path holds activations of at most {held[most] - first} tokens{behind}, those of "
            f"{_label(most, sources[most].name)}; allowed are 1 to {held[most] - first}",
        )
