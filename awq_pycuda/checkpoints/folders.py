"""Writes and reads a checkpoint: a folder with the layers' tensors and the section that tells how to read them.

`config.json` holds `quantization_config` alone, which belongs into the config of the layers' model. A layer whose
inputs are to be divided by AWQ's scales has `act_pre_scale`, 1 / s per input channel, float32. The targets' layouts
have no place for it, and it cannot be multiplied into codes, which are whole numbers: it belongs into what makes the
layer's input.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from awq_pycuda.checkpoints import autoawq, compressed_tensors, tensors
from awq_pycuda.checkpoints.target import Target, of_shape
from awq_pycuda.config import Export
from awq_pycuda.errors import InputError
from awq_pycuda.quant.format import Format
from awq_pycuda.quant.quantized import Quantized, dequantize
from awq_pycuda.temporary import replacing

TENSORS, CONFIG = "model.safetensors", "config.json"
PRE_SCALE, BIAS = "act_pre_scale", "bias"
_TARGETS: dict[Export, Target] = {
    Export.awq: autoawq.TARGET,
    Export.compressed_tensors: compressed_tensors.TARGET,
}


@dataclass(frozen=True)
class CheckpointLayer:
    """A layer as a checkpoint holds it.

    Attributes:
        quantized: codes of `W·s` (N, K), with their steps and zero points.
        act_pre_scale: (K,) float32, 1 / s, what the layer's inputs are to be multiplied by; None for 1.
        bias: (N,) float32, or None.
    """

    quantized: Quantized[NDArray[Any]]
    act_pre_scale: NDArray[np.float32] | None = None
    bias: NDArray[np.float32] | None = None

    @classmethod
    def scaled(
        cls, quantized: Quantized[NDArray[Any]], s: NDArray[np.float32], bias: NDArray[np.float32] | None = None
    ) -> CheckpointLayer:
        """Of codes of `W·s`."""
        return cls(quantized, None if np.all(s == 1) else np.float32(1) / s, bias)

    def dequantize(self) -> NDArray[np.float32]:
        """What the codes stand for, (N, K) float32: close to W, with s divided out again."""
        return dequantize(self.quantized, self.act_pre_scale)


def refuse_misfit(target: Export, form: Format, layers: Sequence[tuple[str, tuple[int, int]]]) -> None:
    """Refuses what a target has no place for.

    Args:
        target: the kind of checkpoint.
        form: the format of all layers.
        layers: name and (out_features, in_features) of each.

    Raises:
        InputError: the format, or a layer in it, does not fit; or two have one name.
    """
    of_target = _TARGETS[target]
    allowed = f"allowed: {of_target.holds}"
    if misfit := of_target.misfit(form):
        raise InputError(f"export={target.name}: has no place for {misfit}; {allowed}")
    least = np.full(1, form.least_step, np.float32)
    if form.least_step and tensors.floats(tensors.nearest(least, form.step_dtype)) != least:
        misfit = f"quant.least_step={form.least_step:g}, which {form.step_dtype.name} does not have"
        raise InputError(f"export={target.name}: has no place for {misfit}; {allowed}")
    for name, shape in layers:
        if misfit := of_target.layer_misfit(form, shape):
            raise InputError(f"export={target.name}: has no place for {misfit} (layer {name}); {allowed}")
    for name, count in Counter(name for name, _ in layers).items():
        if count > 1:
            raise InputError(f"export={target.name}: {count} layers are named {name}; allowed: a name for each")


def write(folder: Path, target: Export, layers: Mapping[str, CheckpointLayer]) -> Path:
    """Writes a checkpoint and returns its folder, which is made if missing.

    Both files stand under temporary names until both are whole; the config takes its own last.

    Args:
        folder: files of these names are replaced.
        target: the kind of checkpoint.
        layers: by the paths of their modules; all of one format.

    Raises:
        InputError: the target has no place for them.
        OSError: the folder cannot be written to; nothing is left.
    """
    formats = {layer.quantized.format for layer in layers.values()}
    if len(formats) != 1:
        raise InputError(f"layers: are of {len(formats)} formats; allowed: one")
    (form,) = formats
    refuse_misfit(target, form, [(name, layer.quantized.codes.shape) for name, layer in layers.items()])
    of_target = _TARGETS[target]
    image = tensors.to_bytes(
        {
            f"{name}.{part}": tensor
            for name, layer in layers.items()
            for part, tensor in (of_target.pack(layer.quantized) | _beside(layer)).items()
        }
    )
    section = {"quantization_config": of_target.section(form, list(layers))}
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / CONFIG) as of_config, replacing(folder / TENSORS) as of_tensors:
        of_tensors.write_bytes(image)
        of_config.write_text(json.dumps(section, indent=2) + "\n", encoding="utf-8")
    return folder


def _beside(layer: CheckpointLayer) -> dict[str, tensors.Tensor]:
    """What a layer has beside its weights."""
    found = {PRE_SCALE: layer.act_pre_scale, BIAS: layer.bias}
    return {name: tensors.of(array) for name, array in found.items() if array is not None}


def read(folder: Path) -> dict[str, CheckpointLayer]:
    """Every quantized layer of a checkpoint, by name.

    Codes, steps and zero points are those that were written. Their format dequantizes alike; how steps were made is
    not in a checkpoint, so that its `divisor` and the like say no more than what range codes may have.

    Raises:
        InputError: a file cannot be read, or holds what is no layer of the layouts here.
    """
    section = _section(folder / CONFIG)
    of_target = next((target for target in _TARGETS.values() if target.method == section.get("quant_method")), None)
    if of_target is None:
        methods = ", ".join(target.method for target in _TARGETS.values())
        raise InputError(f"{folder / CONFIG}: quant_method={section.get('quant_method')}: allowed: {methods}")
    by_layer: dict[str, dict[str, tensors.Tensor]] = {}
    for name, tensor in tensors.read(folder / TENSORS).items():
        layer, _, part = name.rpartition(".")
        by_layer.setdefault(layer, {})[part] = tensor
    found = {}
    for name, parts in sorted(by_layer.items()):
        if "qweight" not in parts and "weight_packed" not in parts:
            continue  # a norm, an embedding, or a layer that was left as it is
        try:
            found[name] = _layer(of_target.unpack(section, parts), parts)
        except InputError as error:
            raise InputError(f"{folder}: layer {name}: {error}") from None
    return found


def _section(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: {error}; allowed: the config of a quantized model") from None
    section = config.get("quantization_config") if isinstance(config, dict) else None
    if not isinstance(section, dict):
        raise InputError(f"{path}: has no quantization_config; allowed: the config of a quantized model")
    return section


def _layer(quantized: Quantized[NDArray[Any]], parts: Mapping[str, tensors.Tensor]) -> CheckpointLayer:
    rows, columns = quantized.codes.shape

    def beside(name: str, count: int) -> NDArray[np.float32] | None:
        if name not in parts:
            return None
        tensor = of_shape(parts, name, ["F32", "F16", "BF16"], (count,))
        return tensors.floats(tensor)

    return CheckpointLayer(quantized, beside(PRE_SCALE, columns), beside(BIAS, rows))
