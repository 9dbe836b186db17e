"""The layouts of compressed-tensors: `pack-quantized` for integers, `nvfp4-` and `mxfp4-pack-quantized` for FP4."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from awq_pycuda.checkpoints import tensors as numbers
from awq_pycuda.checkpoints.target import Target, Tensors, in_full_groups, of_shape, taken
from awq_pycuda.checkpoints.tensors import Tensor
from awq_pycuda.choices import Divisor, Element, StepDtype, ZeroPoint
from awq_pycuda.errors import InputError
from awq_pycuda.quant import packing
from awq_pycuda.quant.format import BITS, Format
from awq_pycuda.quant.quantized import Quantized

Array = NDArray[Any]

_METHOD = "compressed-tensors"
_INTEGERS, _NVFP4, _MXFP4 = "pack-quantized", "nvfp4-pack-quantized", "mxfp4-pack-quantized"
_FP4_GROUPS = {_NVFP4: 16, _MXFP4: 32}


def _layout(form: Format) -> str:
    if not form.is_e2m1:
        return _INTEGERS
    return _NVFP4 if form.has_tensor_scale else _MXFP4


def _misfit(form: Format) -> str:
    if not form.is_e2m1:
        floats = not form.symmetric and form.zero_point is ZeroPoint.float
        return "quant.zero_point=float" if floats else ""
    if form.step_dtype not in (StepDtype.e4m3, StepDtype.e8m0, StepDtype.e8m0_up):
        return f"quant.element=e2m1 with quant.step_dtype={form.step_dtype.name}"
    size = "null" if form.group_size is None else form.group_size
    return "" if size == _FP4_GROUPS[_layout(form)] else f"quant.group_size={size} with {form.step_dtype.name} steps"


def _section(form: Format, names: Sequence[str]) -> dict[str, Any]:
    layout = _layout(form)
    weights: dict[str, Any] = {
        "num_bits": form.bits,
        "type": "float" if form.is_e2m1 else "int",
        "symmetric": form.symmetric,
        "strategy": "channel" if form.group_size is None else "tensor_group" if layout == _NVFP4 else "group",
        "group_size": form.group_size,
        "dynamic": False,
    }
    if form.is_e2m1:
        weights["scale_dtype"] = "torch.float8_e4m3fn" if layout == _NVFP4 else "torch.uint8"
    scheme = {
        "targets": list(names),  # whatever else a model has stays as it is
        "weights": weights,
        "input_activations": None,
        "output_activations": None,
        "format": layout,
    }
    return {
        "quant_method": _METHOD,
        "format": layout,
        "quantization_status": "compressed",
        "config_groups": {"group_0": scheme},
        "ignore": [],
    }


def _pack(quantized: Quantized[Array]) -> dict[str, Tensor]:
    form, steps = quantized.format, quantized.steps
    if not form.is_e2m1:
        found = {
            "weight_packed": numbers.of(_words(quantized.codes, form)),
            "weight_scale": numbers.encode(steps, form.step_dtype),
            "weight_shape": numbers.of(np.array(quantized.codes.shape, np.int64)),
        }
        if quantized.zero_points is not None:
            found["weight_zero_point"] = numbers.of(np.ascontiguousarray(_words(quantized.zero_points.T, form).T))
        return found
    # The numbers of FP4 are half of the codes.
    found = {"weight_packed": numbers.of(form.pack(quantized.codes))}
    if quantized.tensor_scale is None:
        return found | {"weight_scale": numbers.encode(steps * 2, form.step_dtype)}
    scale = quantized.tensor_scale.astype(np.float32)
    before = numbers.nearest(steps * 2 * scale, form.step_dtype)
    if not np.array_equal(_scaled(before, scale), steps):
        raise InputError(f"steps: are no numbers of {form.step_dtype.name} over the tensor's scale; allowed: these")
    return found | {"weight_scale": before, "weight_global_scale": numbers.of(scale)}


def _scaled(stored: Tensor, scale: Array) -> Array:
    """NVFP4's steps of codes, from what a checkpoint stores."""
    steps: Array = numbers.floats(stored) / scale / np.float32(2)
    return steps


def _words(codes: Array, form: Format) -> NDArray[np.int32]:
    """(rows, count) codes in (rows, words): densely, code i of a row from bit i·bits on, from the least code on."""
    unsigned = codes.astype(np.int8, copy=False).view(np.uint8) + np.uint8(form.middle)  # modulo 256
    packed = packing.pack(unsigned, form.bits)
    words = np.zeros((len(packed), -(-packed.shape[1] // 4) * 4), np.uint8)
    words[:, : packed.shape[1]] = packed
    return words.view(np.int32)


def _codes(words: NDArray[np.int32], form: Format, count: int) -> NDArray[np.int8]:
    """Back from `_words`."""
    unsigned = packing.unpack(np.ascontiguousarray(words).view(np.uint8), form.bits, count)
    return (unsigned - np.uint8(form.middle)).view(np.int8)


def _unpack(section: Mapping[str, Any], tensors: Tensors) -> Quantized[Array]:
    layout, weights = section.get("format"), _weights(section)
    if layout in _FP4_GROUPS:
        return _unpack_fp4(layout, tensors)
    if layout != _INTEGERS:
        raise InputError(f"format={layout}: allowed: {', '.join((_INTEGERS, *_FP4_GROUPS))}")
    bits, symmetric, size = weights.get("num_bits"), weights.get("symmetric"), weights.get("group_size")
    if not isinstance(bits, int) or bits not in BITS or weights.get("type") != "int":
        raise InputError(f"weights={weights}: allowed: integers of {BITS[0]} to {BITS[-1]} bits")
    if weights.get("strategy") == "channel":
        size = None
    elif weights.get("strategy") != "group" or not isinstance(size, int) or size < 1:
        raise InputError(f"weights={weights}: allowed: strategy channel, or group with a group_size")
    rows, columns = (int(each) for each in of_shape(tensors, "weight_shape", ["I64"], (2,)).bits)
    steps = taken(tensors, "weight_scale", ["F32", "F16", "BF16"])
    dtype = numbers.step_dtype(steps)
    form = Format(size, bits, symmetric=bool(symmetric), divisor=Divisor.half_range, step_dtype=dtype)
    groups = form.groups(columns)
    if steps.bits.shape != (rows, groups):
        raise InputError(f"weight_scale: has shape {tuple(steps.bits.shape)}; allowed: {(rows, groups)}")
    packed = of_shape(tensors, "weight_packed", ["I32"], (rows, -(-columns * bits // 32)))
    zeros = None
    if not symmetric:
        words = of_shape(tensors, "weight_zero_point", ["I32"], (-(-rows * bits // 32), groups)).bits
        zeros = np.ascontiguousarray(_codes(words.T, form, rows).T).astype(np.float32)
    return Quantized(numbers.floats(steps), form, zeros, codes=_codes(packed.bits, form, columns))


def _weights(section: Mapping[str, Any]) -> Mapping[str, Any]:
    groups = section.get("config_groups")
    if not isinstance(groups, Mapping) or len(groups) != 1:
        raise InputError("config_groups: allowed: one group")
    (scheme,) = groups.values()
    weights = scheme.get("weights") if isinstance(scheme, Mapping) else None
    if not isinstance(weights, Mapping):
        raise InputError("config_groups: has no weights; allowed: how the weights are quantized")
    return weights


def _unpack_fp4(layout: str, tensors: Tensors) -> Quantized[Array]:
    packed = taken(tensors, "weight_packed", ["U8"]).bits
    rows, columns = packed.shape[0], 2 * packed.shape[1]
    dtype = StepDtype.e4m3 if layout == _NVFP4 else StepDtype.e8m0
    form = Format(_FP4_GROUPS[layout], 4, Element.e2m1, step_dtype=dtype)
    kind = "F8_E4M3" if layout == _NVFP4 else "U8"
    stored = of_shape(tensors, "weight_scale", [kind], (rows, form.groups(columns)))
    codes = form.unpack(packed, columns)
    if layout == _MXFP4:
        return Quantized(numbers.floats(stored) / np.float32(2), form, codes=codes)
    scale = of_shape(tensors, "weight_global_scale", ["F32"], (1,)).bits
    return Quantized(_scaled(stored, scale), form, tensor_scale=scale, codes=codes)


TARGET = Target(
    method=_METHOD,
    holds=(
        "integers of 2 to 8 bits, symmetric or with integer zero points, a step per row or per group that divides "
        "in_features, in fp32, fp16 or bf16; quant=nvfp4 and quant=mxfp4"
    ),
    misfit=_misfit,
    layer_misfit=in_full_groups,
    section=_section,
    pack=_pack,
    unpack=_unpack,
)
