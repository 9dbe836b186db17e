"""A model's layers as a recipe quantizes them: its run, and the weights that the run's file stands for."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from awq_pycuda import signals
from awq_pycuda.config import Config, FileInputs
from awq_pycuda.config_text import as_yaml, config_hash
from awq_pycuda.engine.execution import alone_in, attempt, describe, store, validate
from awq_pycuda.engine.spec import convention_of
from awq_pycuda.errors import InputError
from awq_pycuda.evaluating.calibration import Calibration
from awq_pycuda.evaluating.recipes import Recipe, recipes_of
from awq_pycuda.evaluating.stored import Stored, stored
from awq_pycuda.hdf5 import UnreadableError
from awq_pycuda.layers.rows import StoredRows
from awq_pycuda.quant.clipping import clipped
from awq_pycuda.quant.format import Format
from awq_pycuda.quant.quantized import Quantized, dequantize, quantize, steps_of
from awq_pycuda.results.evaluation_record import ORIGINAL
from awq_pycuda.results.reader import LayerRecord, read
from awq_pycuda.results.scales import LayerScales, read_scales
from awq_pycuda.results.schema import FILE_NAME

Array = NDArray[Any]

# Most steps of a run are this near to those that its weights give; not all, and not equal: a layer file of float16 has
# rounded the weights, and steps that are powers of two jump.
_NEAR, _MOST = 0.01, 0.9


@dataclass(frozen=True)
class LayerFigures:
    """What a recipe makes of a layer: bits of a weight with steps and zero points, bytes, and its run's figures."""

    bits: float
    bytes: int
    output_sqnr_db: float
    rtn_output_sqnr_db: float
    gamma: float


@dataclass(frozen=True)
class QuantizedModel:
    """The layers of a model as a recipe quantizes them.

    Attributes:
        name: the recipe's.
        config: of its run, as YAML; "" for a mixture.
        config_hash: of its run's config, wherever its layer file lies, or over those of a mixture's layers.
        results: its run's file; None for a mixture.
        mixture: the recipe of each layer, by path; empty where one is that of all.
        layers: figures of the layers that are replaced, by path.
        search_s: seconds that its run took; 0 where its file was there already.
    """

    name: str
    config: str
    config_hash: str
    results: Path | None
    mixture: Mapping[str, str]
    layers: Mapping[str, LayerFigures]
    search_s: float
    _weights: Mapping[str, Callable[[], NDArray[np.float32]]]

    def weight(self, path: str) -> NDArray[np.float32] | None:
        """(out_features, in_features) float32: what the layer's codes stand for; None where it stays as it is.

        Made anew each time, of the weights in the calibration's file.

        Raises:
            InputError: the result file's steps are not those of the model's weights.
        """
        make = self._weights.get(path)
        return None if make is None else make()


class _Run:
    """A complete run's file beside the weights that it quantized."""

    def __init__(self, file: Stored, weights: Mapping[str, StoredRows]) -> None:
        self.file = file
        self.format = convention_of(file.config).quantizer
        self._weights = weights
        self._numbers = {layer.name: number for number, layer in enumerate(file.layers)}

    @cached_property
    def _scales(self) -> Sequence[LayerScales]:
        try:
            return read_scales(self.file.path, len(self.file.layers))
        except UnreadableError as error:
            raise InputError(f"recipes={self.file.path}: {error}; allowed: a whole result file") from None

    def figures(self, layer: LayerRecord) -> LayerFigures:
        bits = self.format.stored_bits(layer.out_features, layer.in_features)
        return LayerFigures(
            bits / (layer.out_features * layer.in_features),
            -(-bits // 8),
            layer.metrics.get("output_sqnr_db", np.nan),
            layer.metrics.get("rtn_output_sqnr_db", np.nan),
            layer.gamma_chosen,
        )

    def dequantized(self, path: str) -> NDArray[np.float32]:
        """See `QuantizedModel.weight`."""
        scales = self._scales[self._numbers[path]]
        where = f"recipes={self.file.path}: layer {path}"
        return dequantize(codes_of(self._weights[path][:], scales, self.format, where), 1 / scales.s)


def codes_of(w: Array, scales: LayerScales, form: Format, where: str) -> Quantized[Array]:
    """The codes that a run has made of (N, K) weights, by what its file says of the layer.

    Raises:
        InputError: the weights give other steps, in a line that begins with `where`.
    """
    fitted = w, scales.s
    if scales.ratio is not None:
        fitted = clipped(w, scales.s, scales.ratio, form), np.ones_like(scales.s)
    codes: Array = np.empty(w.shape, form.code_dtype)
    found: Quantized[Array] = Quantized(scales.steps, form, scales.zero_points, scales.tensor_scale, codes=codes)
    steps = steps_of(*fitted, form).steps
    if steps.shape != scales.steps.shape or np.mean(np.isclose(steps, scales.steps, _NEAR, 0)) < _MOST:
        raise InputError(f"{where}: its steps are those of other weights; allowed: results of this model's")
    quantize(*fitted, found)
    return found


def made(
    recipe: Recipe,
    calibration: Calibration,
    folder: Path,
    on_progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> QuantizedModel:
    """A recipe's layers; its run, or those of a mixture's recipes, go first where their files are not there yet.

    Args:
        recipe: one that fits the model.
        calibration: what runs read, and the weights.
        folder: a run's file lies in a folder of it that has the recipe's name.
        on_progress: see `Pipeline.run`.

    Raises:
        InputError: something is wrong before a run's work.
        RunFailed: a run failed or was interrupted.
    """
    if recipe.mixture:
        return _mixed(recipe, calibration, folder, on_progress)
    file, seconds = (recipe.stored, 0.0) if recipe.stored else _run(recipe, calibration, folder, on_progress)
    run = _Run(file, calibration.weights)
    if recipe.stored:  # results of other weights are told before any forward pass
        run.dequantized(file.layers[0].name)
    return QuantizedModel(
        recipe.name,
        file.config_yaml,
        file.config_hash if recipe.stored else config_hash(_anywhere(file.config)),
        file.path,
        {},
        {layer.name: run.figures(layer) for layer in file.layers},
        seconds,
        {layer.name: partial(run.dequantized, layer.name) for layer in file.layers},
    )


def _mixed(
    recipe: Recipe, calibration: Calibration, folder: Path, on_progress: Callable[[str, int, int], None]
) -> QuantizedModel:
    names = recipes_of(recipe, calibration.weights)
    parts = {name: made(part, calibration, folder, on_progress) for name, part in recipe.parts.items()}
    chosen = {path: parts[name] for path, name in names.items() if name != ORIGINAL and path in parts[name].layers}
    hashes = {path: parts[name].config_hash if name != ORIGINAL else "" for path, name in names.items()}
    return QuantizedModel(
        recipe.name,
        "",
        hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest(),
        None,
        names,
        {path: part.layers[path] for path, part in chosen.items()},
        sum(part.search_s for part in parts.values()),
        {path: partial(part.weight, path) for path, part in chosen.items()},  # type: ignore[misc]
    )


def _run(
    recipe: Recipe, calibration: Calibration, folder: Path, on_progress: Callable[[str, int, int], None]
) -> tuple[Stored, float]:
    """The file of a recipe's run, and the seconds that it took; 0 where the file was there."""
    config = _config_on(recipe, calibration.path)
    path = folder / recipe.name / FILE_NAME
    if there := _complete(path, config, calibration.sha256):
        return there, 0.0
    begin = time.perf_counter()
    try:
        run = validate(config)
    except InputError as error:
        raise InputError(f"recipes: {recipe.name}: {error}") from None
    path.unlink(missing_ok=True)
    with alone_in(path.parent, "out"), signals.held():
        with run.at_work():
            origin = describe(run, recipe.composed, as_yaml(config)) | {"inputs_sha256": calibration.sha256}
            record = attempt(run, origin, on_progress, signals.released())
        store(path.parent, run.spec, record)
        with signals.released():  # by a signal that came while the file was written
            pass
    return stored(read(path), recipe.name), time.perf_counter() - begin


def is_there(recipe: Recipe, calibration: Path, sha256: str, folder: Path) -> bool:
    """Whether a recipe's run on a calibration's file of this hash is among those in a folder."""
    return _complete(folder / recipe.name / FILE_NAME, _config_on(recipe, calibration), sha256) is not None


def _config_on(recipe: Recipe, calibration: Path) -> Config:
    """The config of a recipe's run on a calibration's file."""
    assert recipe.config is not None
    assert isinstance(recipe.config.inputs, FileInputs)
    return replace(recipe.config, inputs=replace(recipe.config.inputs, path=str(calibration)))


def _complete(path: Path, config: Config, sha256: str) -> Stored | None:
    """A run's file that is complete and of this config and calibration, or None."""
    with suppress(UnreadableError, InputError):
        file = read(path)
        there = stored(file, path.parent.name)
        same = config_hash(_anywhere(there.config)) == config_hash(_anywhere(config))
        if file.root["status"] == "complete" and same and there.inputs_sha256 == sha256:
            return there
    return None


def _anywhere(config: Config) -> Config:
    """A config without what says where its run was made, not what it found: the layer file's folder, host threads."""
    assert isinstance(config.inputs, FileInputs)
    return replace(config, inputs=replace(config.inputs, path=Path(config.inputs.path).name), threads=None)
