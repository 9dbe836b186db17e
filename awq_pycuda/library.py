"""The harness from Python, without Hydra: one layer quantized, or a whole run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from awq_pycuda.checkpoints.folders import CheckpointLayer, read, write
from awq_pycuda.choices import ConventionChoice, Formula
from awq_pycuda.config import BackendChoice, Config, Export, FileInputs, check, settled
from awq_pycuda.config_text import as_yaml
from awq_pycuda.engine.arrays import allocate
from awq_pycuda.engine.evaluation import found_by
from awq_pycuda.engine.execution import alone_in, attempt, describe, prepared, refuse_failed, store, validate
from awq_pycuda.engine.spec import spec_of
from awq_pycuda.engine.stages import UP_TO_CODES
from awq_pycuda.errors import InputError
from awq_pycuda.layers.inputs import LayerSpec
from awq_pycuda.quant.conventions import CONVENTIONS, Convention
from awq_pycuda.quant.format import Format
from awq_pycuda.quant.quantized import Quantized, dequantize
from awq_pycuda.quant.search import SearchResult
from awq_pycuda.results.record import RunRecord

__all__ = [
    "CheckpointLayer",
    "Config",
    "Convention",
    "Format",
    "QuantizedLayer",
    "quantize",
    "read_checkpoint",
    "run_pipeline",
    "write_checkpoint",
]


@dataclass(frozen=True)
class QuantizedLayer:
    """A layer's quantized weights, and how their scales were found.

    Attributes:
        quantized: `W·s` as codes and steps, with their format.
        search: the scales `s`, and the error of every candidate.
    """

    quantized: Quantized[NDArray[Any]]
    search: SearchResult

    @property
    def codes(self) -> NDArray[Any]:
        """(out_features, in_features), of `W·s`."""
        return self.quantized.codes

    @property
    def steps(self) -> NDArray[np.float32]:
        """(out_features, groups)."""
        return self.quantized.steps

    @property
    def zero_points(self) -> NDArray[Any] | None:
        """(out_features, groups) where the format has them."""
        return self.quantized.zero_points

    @property
    def format(self) -> Format:
        """What the codes mean."""
        return self.quantized.format

    @property
    def s(self) -> NDArray[np.float32]:
        """(in_features,), AWQ scale per input channel."""
        return self.search.s

    @property
    def gamma(self) -> NDArray[np.float64]:
        """(G,), the exponents searched."""
        return self.search.gamma

    @property
    def error(self) -> NDArray[np.float64]:
        """(G,), the objective at each."""
        return self.search.error

    @property
    def gamma_chosen(self) -> float:
        """The exponent of `s`."""
        return self.search.gamma_chosen

    def dequantize(self) -> NDArray[np.float32]:
        """What the codes stand for, (out_features, in_features) float32: close to W, with s divided out again."""
        return dequantize(self.quantized, 1 / self.s)


def quantize(
    w: ArrayLike,
    x: ArrayLike | None = None,
    *,
    format: Format | None = None,  # the field's word
    convention: Convention | str = "day58",
    backend: str = "auto",
    threads: int | None = None,
) -> QuantizedLayer:
    """Quantizes one layer's weights.

    Args:
        w: (out_features, in_features) weights, taken as float32.
        x: (tokens, in_features) activations, taken as float32; None quantizes without scales (round-to-nearest).
        format: None for the convention's.
        convention: by its name, or a record of your own.
        backend: auto, cuda or cpu.
        threads: host threads; None for all cores that the process may use.

    Raises:
        InputError: an argument that cannot be used; the message names it and what is allowed.
        FloatingPointError: the activations overflow float32 when squared.
    """
    weights = _matrix("w", w)
    tokens = np.zeros((1, weights.shape[1]), np.float32) if x is None else _matrix("x", x)
    if tokens.shape[1] != weights.shape[1]:
        raise InputError(f"x: {tokens.shape[1]} channels; allowed: as many as w has, {weights.shape[1]}")
    if isinstance(convention, str):
        convention = CONVENTIONS[_member("convention", convention, ConventionChoice)]
    if format is not None:
        convention = replace(convention, quantizer=format)
    if x is None:
        convention = replace(convention, gammas=(0.0,), formula=Formula.plain)
    config = Config(tokens=len(tokens), backend=_member("backend", backend, BackendChoice), threads=threads)
    check(config)
    config = settled(config)
    layers = [LayerSpec("layer", tokens.shape[0], weights, tokens)]
    run = prepared(replace(spec_of(config), layers=layers, convention=convention))
    with run.at_work() as device:
        (layer,) = allocate(device, layers, convention).layers
        for stage in UP_TO_CODES:
            stage.call(device, layer, convention)
        search = found_by(device, layer, convention)
        return QuantizedLayer(layer.quantized.map(lambda handle: device.read(handle).copy()), search)


def run_pipeline(
    config: Config,
    folder: Path | str | None = None,
    on_progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> RunRecord:
    """What `python -m awq_pycuda.run` does, but for what it prints.

    Args:
        config: of the run; without a file, `tokens` None is as many as n.
        folder: where `results.h5`, and what `export` asks for, goes, made if missing; None writes nothing.
        on_progress: told what is going on, how many steps are done, and of how many.

    Returns:
        The finished layers with their metrics, and the timings.

    Raises:
        InputError: something is wrong before any work.
        RunFailed: the run failed or was interrupted; the result file, if any, holds the reason and the finished layers.
    """
    if config.tokens is None and not isinstance(config.inputs, FileInputs):
        config = replace(config, tokens=config.n)
    check(config)
    if folder is None and config.export is not Export.none:
        raise InputError(f"export={config.export.name}: without a folder there is no checkpoint; allowed: none")
    config = settled(config)
    run = validate(config)
    with nullcontext() if folder is None else alone_in(Path(folder), "folder"):
        with run.at_work():
            origin = describe(run, (), as_yaml(config))
            record = attempt(run, origin, on_progress)
        if folder is not None:
            store(Path(folder), run.spec, record)
    refuse_failed(record)
    return record


def write_checkpoint(
    folder: Path | str, layers: Mapping[str, QuantizedLayer | CheckpointLayer], target: str = "compressed_tensors"
) -> Path:
    """Writes layers as a checkpoint in another tool's layout; see `checkpoints.folders` for what it holds.

    Args:
        folder: made if missing; a `model.safetensors` and a `config.json` there are replaced.
        layers: by the paths of their modules, all of one format; a `CheckpointLayer` may have a bias.
        target: awq or compressed_tensors.

    Returns:
        The folder.

    Raises:
        InputError: a name or a format that the target has no place for; the message says what it has.
        OSError: the folder cannot be written to.
    """
    kinds = {kind.name: kind for kind in Export if kind is not Export.none}
    if target not in kinds:
        raise InputError(f"target={target}: allowed: {', '.join(kinds)}")
    made = {
        name: layer if isinstance(layer, CheckpointLayer) else CheckpointLayer.scaled(layer.quantized, layer.s)
        for name, layer in layers.items()
    }
    return write(Path(folder), kinds[target], made)


def read_checkpoint(folder: Path | str) -> dict[str, CheckpointLayer]:
    """The quantized layers of a checkpoint, by name, whoever wrote it; see `checkpoints.folders.read`.

    Raises:
        InputError: a file cannot be read, or holds a layout that is not known here.
    """
    return read(Path(folder))


def _matrix(name: str, values: ArrayLike) -> NDArray[np.float32]:
    try:
        with np.errstate(over="ignore"):  # told below
            matrix = np.ascontiguousarray(values, np.float32)
    except (TypeError, ValueError) as error:
        raise InputError(f"{name}: {error}; allowed: a matrix of numbers") from None
    if matrix.ndim != 2 or matrix.size == 0:
        raise InputError(f"{name}: has shape {matrix.shape}; allowed: two dimensions, none of them 0")
    if not np.isfinite(matrix).all():
        raise InputError(f"{name}: holds NaN or infinity; allowed: finite numbers within float32")
    return matrix


def _member(name: str, value: str, kind: Any) -> Any:
    if value not in kind.__members__:
        raise InputError(f"{name}={value}: allowed: {', '.join(kind.__members__)}")
    return kind[value]
