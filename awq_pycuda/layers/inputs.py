"""Where weights and activations come from: a plan of every layer's shapes and sources, before anything is allocated."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import psutil
from numpy.typing import NDArray

from awq_pycuda import philox
from awq_pycuda.choices import WeightScale
from awq_pycuda.config import MAX_LAYERS, Config, FileInputs, OutlierInputs, SyntheticInputs, refuse
from awq_pycuda.hdf5_worker import ask
from awq_pycuda.layers.files import FileLayer, describe_layers, load_layers, try_layers
from awq_pycuda.layers.rows import StoredRows, file_stamp
from awq_pycuda.layers.sources import HDF5_SUFFIXES
from awq_pycuda.limits import refuse_beyond_memory
from awq_pycuda.parallel import product_part

Array = NDArray[np.float32]

# The salient channels draw from their own Philox subsequences, far from those of X (0) and the weights (l + 1).
_SALIENT_SUBSEQUENCE = 1 << 32
# Held-out tokens, too.
_HELD_OUT_SUBSEQUENCE = 1 << 33

# Numbers of a chunk where its size is left open: what goes into a layer, and what comes out of it.
_CHUNK = 1 << 24


@dataclass(frozen=True)
class Salient:
    """Which channels are larger, and by how much: a share of them, by factors drawn log-uniformly."""

    seed: int
    layer: int
    channels: float
    factor_min: float
    factor_max: float

    def gains(self, size: int) -> Array:
        """Factor of each channel: shape (size,), float32, 1 where the channel is not salient."""
        draw = philox.uniform(self.seed, _SALIENT_SUBSEQUENCE + self.layer, 2 * size).astype(np.float64)
        chosen = np.argsort(draw[:size], kind="stable")[: max(1, round(self.channels * size))]
        gains = np.ones(size, np.float32)
        gains[chosen] = self.factor_min * (self.factor_max / self.factor_min) ** draw[size:][chosen]
        return gains


@dataclass(frozen=True)
class Uniform:
    """A (rows, cols) float32 matrix `(2u - 1) * row_gain * col_gain`, made by the backend's `init`."""

    rows: int
    cols: int
    seed: int
    subsequence: int
    bound: float = 1.0
    salient_rows: Salient | None = None
    salient_cols: Salient | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows, self.cols

    def row_gain(self) -> Array | None:
        """Factor of each row, (rows,) float32, or None where all are 1."""
        if self.salient_rows is not None:
            return self.salient_rows.gains(self.rows) * np.float32(self.bound)
        return None if self.bound == 1 else np.full(self.rows, self.bound, np.float32)

    def col_gain(self) -> Array | None:
        """Factor of each column, (cols,) float32, or None where all are 1."""
        return None if self.salient_cols is None else self.salient_cols.gains(self.cols)


@dataclass(frozen=True)
class LayerSpec:
    """One layer to run. `activations` None: the layer takes relu of the output of the layer before.

    `tokens` are those that it is quantized on; `held_out` are others, as many as `held_out_tokens`, on which only its
    error is measured. `input_of` is the layer before it, if any, that has the same activations: one copy will do.
    Activations that stay in their file go through the layer in `chunk` tokens at a time, rounded up by `at_once`.
    """

    name: str
    tokens: int
    weight: Uniform | Array
    activations: Uniform | Array | StoredRows | None
    bias: Array | None = None
    held_out: Uniform | Array | StoredRows | None = None
    held_out_tokens: int = 0
    input_of: int | None = None
    chunk: int | None = None

    @property
    def out_features(self) -> int:
        return int(self.weight.shape[0])

    @property
    def in_features(self) -> int:
        return int(self.weight.shape[1])

    def at_once(self, tokens: int) -> int:
        """How many of so many tokens go through the layer together: all, or those of whole blocks of a product."""
        if self.chunk is None or self.chunk >= tokens:
            return tokens
        block = product_part(tokens, self.out_features)
        return min(-(-self.chunk // block) * block, tokens)


def plan_layers(config: Config, in_chunks: bool = False) -> list[LayerSpec]:
    """Every layer that the config asks for; reads and checks the layer file where there is one.

    Args:
        config: checked.
        in_chunks: whether activations stay in the file, though the config leaves that open.

    Raises:
        InputError: a file that cannot be used, or shapes that do not fit together.
    """
    inputs = config.inputs
    if isinstance(inputs, FileInputs):
        path = Path(inputs.path)
        with unchanged_file(config):
            if fault := _endless(path, file_stamp(path)):
                raise refuse("inputs.path", path, fault)
            in_chunks |= inputs.chunk_tokens is not None
            _refuse_too_large(path, config, inputs.first_token, in_chunks)
            loaded = _load(path, file_stamp(path), config.layers, config.tokens, in_chunks, inputs.first_token)
            specs = _from_file(config, inputs.chunk_tokens, loaded)
    else:
        assert isinstance(inputs, SyntheticInputs)
        specs = _synthetic(config, inputs)
    return specs


@contextmanager
def unchanged_file(config: Config) -> Iterator[None]:
    """All that is read of the config's layer file within the block, its hash as well, is of one content.

    Raises:
        InputError: the file has changed meanwhile.
    """
    path = Path(config.inputs.path) if isinstance(config.inputs, FileInputs) else None
    stamp = path and file_stamp(path)
    yield
    if path and file_stamp(path) != stamp:
        raise refuse("inputs.path", path, "it changed while it was read")


def _split(config: Config, layer: str, tokens: int) -> tuple[int, int]:
    """How many of a layer's tokens it is quantized on, and how many are held out.

    Raises:
        InputError: there would be none of one of them.
    """
    held_out = round(config.inputs.holdout * tokens)
    if config.inputs.holdout and not 0 < held_out < tokens:
        raise refuse("inputs.holdout", config.inputs.holdout, f"of {tokens} tokens of layer {layer} that is {held_out}")
    return tokens - held_out, held_out


def _synthetic(config: Config, inputs: SyntheticInputs) -> list[LayerSpec]:
    assert config.layers is not None
    assert config.tokens is not None
    n, seed = config.n, config.seed
    bound = math.sqrt(6 / n) if inputs.weight_scale is WeightScale.he else 1.0

    def salient(layer: int) -> Salient | None:
        if not isinstance(inputs, OutlierInputs) or layer == config.layers:
            return None
        return Salient(seed, layer, inputs.channels, inputs.factor_min, inputs.factor_max)

    # A salient channel of layer l + 1 is a large row of layer l's weights: relu passes it on. The last layer has none:
    # they would only let a few output channels decide its error.
    first = f"{0:03d}"
    tokens, held_out = _split(config, first, config.tokens)

    def drawn(rows: int, subsequence: int) -> Uniform:
        return Uniform(rows, n, seed, subsequence, salient_cols=salient(0))

    return [
        LayerSpec(
            name=f"{index:03d}",
            tokens=tokens,
            weight=Uniform(n, n, seed, index + 1, bound, salient_rows=salient(index + 1)),
            activations=drawn(tokens, 0) if index == 0 else None,
            held_out=drawn(held_out, _HELD_OUT_SUBSEQUENCE) if held_out and index == 0 else None,
            held_out_tokens=held_out,
        )
        for index in range(config.layers)
    ]


def _refuse_too_large(path: Path, config: Config, first: int, in_chunks: bool) -> None:
    """Reads the shapes alone: a file larger than the machine must not be loaded to find that out."""
    shapes = describe_layers(path, config.layers, config.tokens, first)
    if len(shapes) > MAX_LAYERS:
        raise refuse("layers", "null", f"inputs.path={path} holds {len(shapes)} layers")
    own = [0 if in_chunks or shape.input_of is not None else shape.tokens or 0 for shape in shapes]
    needed = 4 * sum(shape.in_features * (shape.out_features + m) for shape, m in zip(shapes, own, strict=True))
    refuse_beyond_memory(f"inputs.path={path}", needed, psutil.virtual_memory().available, "host's memory")


@lru_cache(maxsize=64)
def _endless(path: Path, _stamp: tuple[int, ...]) -> str:
    """What is wrong with a file that HDF5 hangs or crashes on, which another process finds out; "" if it does not."""
    if path.suffix.lower() not in HDF5_SUFFIXES or not path.is_file():
        return ""
    (answer,) = ask([(try_layers, path)])
    return "" if answer is None else str(answer)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content, read again only when it has been written to since; 64 hex digits."""
    return _sha256(path, file_stamp(path))


@lru_cache(maxsize=64)
def _sha256(path: Path, _stamp: tuple[int, ...]) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@lru_cache(maxsize=1)
def _load(
    path: Path, _stamp: tuple[int, ...], layers: int | None, tokens: int | None, stored: bool, first: int
) -> list[FileLayer]:
    # One load serves the checks before a run, the run itself and every job of a sweep over one file.
    return load_layers(path, layers, tokens, stored, first)


def _from_file(config: Config, chunk_tokens: int | None, layers: list[FileLayer]) -> list[LayerSpec]:
    specs: list[LayerSpec] = []
    tokens, held_out = 0, 0
    for index, layer in enumerate(layers):
        activations: Uniform | Array | StoredRows | None = None
        kept: Uniform | Array | StoredRows | None = None
        chunk: int | None = None
        if layer.activations is not None:
            # The last ones, not some in between: neighbours in a text say much of each other.
            tokens, held_out = _split(config, layer.name, len(layer.activations))
            activations, kept = (
                layer.activations.alone(rows) if isinstance(layer.activations, StoredRows) else layer.activations[rows]
                for rows in (slice(tokens), slice(tokens, None))
            )
            if isinstance(activations, StoredRows):
                chunk = chunk_tokens or max(1, _CHUNK // sum(layer.weight.shape))
        elif index == 0:
            tokens, held_out = _split(config, layer.name, config.n if config.tokens is None else config.tokens)
            activations, kept = (
                Uniform(rows, layer.weight.shape[1], config.seed, subsequence)
                for rows, subsequence in ((tokens, 0), (held_out, _HELD_OUT_SUBSEQUENCE))
            )
        kept = kept if held_out else None
        specs.append(
            LayerSpec(layer.name, tokens, layer.weight, activations, layer.bias, kept, held_out, layer.input_of, chunk)
        )
    return specs
