"""AutoAWQ's layout, `version: gemm`: 4 bits, eight outputs in a word, everything transposed.

Nibble i of a word, the least significant first, holds output `8c + ORDER[i]`: so the kernel that reads it gets pairs of
outputs by masks alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from awq_pycuda.checkpoints import tensors as numbers
from awq_pycuda.checkpoints.target import Target, Tensors, in_full_groups, of_shape, taken
from awq_pycuda.checkpoints.tensors import Tensor
from awq_pycuda.choices import Divisor, StepDtype, ZeroPoint
from awq_pycuda.errors import InputError
from awq_pycuda.quant import packing
from awq_pycuda.quant.format import Format
from awq_pycuda.quant.quantized import Quantized

Array = NDArray[Any]

_METHOD = "awq"
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_BITS, _IN_A_WORD = 4, 8
_MIDDLE = 1 << (_BITS - 1)


def _misfit(form: Format) -> str:
    if form.is_e2m1:
        return "quant.element=e2m1"
    if form.bits != _BITS:
        return f"quant.bits={form.bits}"
    if not form.symmetric and form.zero_point is not ZeroPoint.integer:
        return f"quant.zero_point={form.zero_point.name}"
    if form.group_size is None:
        return "quant.group_size=null"
    return "" if form.step_dtype is StepDtype.fp16 else f"quant.step_dtype={form.step_dtype.name}"


def _layer_misfit(form: Format, shape: tuple[int, int]) -> str:
    if shape[0] % _IN_A_WORD:
        return f"{shape[0]} out_features"
    return in_full_groups(form, shape)


def _section(form: Format, names: Sequence[str]) -> dict[str, Any]:
    return {
        "quant_method": _METHOD,
        "version": "gemm",
        "bits": _BITS,
        "group_size": form.group_size,
        "zero_point": not form.symmetric,
        "modules_to_not_convert": None,
    }


def _pack(quantized: Quantized[Array]) -> dict[str, Tensor]:
    """The zero point of symmetric codes is the code in the middle, 8 of 0 to 15."""
    zeros = np.zeros_like(quantized.steps) if quantized.zero_points is None else quantized.zero_points
    return {
        "qweight": numbers.of(_words(quantized.codes)),
        "qzeros": numbers.of(_words(zeros)),
        "scales": numbers.encode(np.ascontiguousarray(quantized.steps.T), StepDtype.fp16),
    }


def _words(codes: Array) -> NDArray[np.int32]:
    """(N, K) codes as (K, N / 8) words."""
    nibbles = (codes.T.astype(np.int8) + np.int8(_MIDDLE)).astype(np.uint8)
    ordered = nibbles.reshape(len(nibbles), -1, _IN_A_WORD)[:, :, ORDER].reshape(len(nibbles), -1)
    words: NDArray[np.int32] = packing.pack(ordered, _BITS).view(np.int32)
    return words


def _codes(words: NDArray[np.int32]) -> NDArray[np.int8]:
    """Back from `_words`."""
    count = words.shape[1] * _IN_A_WORD
    nibbles = packing.unpack(np.ascontiguousarray(words).view(np.uint8), _BITS, count)
    places = np.argsort(ORDER)
    in_order = nibbles.reshape(len(nibbles), -1, _IN_A_WORD)[:, :, places].reshape(len(nibbles), -1)
    return np.ascontiguousarray(in_order.T.astype(np.int8) - np.int8(_MIDDLE))


def _unpack(section: Mapping[str, Any], tensors: Tensors) -> Quantized[Array]:
    for key, allowed in (("version", "gemm"), ("bits", _BITS)):
        if section.get(key) != allowed:
            raise InputError(f"{key}={section.get(key)}: allowed: {allowed}")
    words = taken(tensors, "qweight", ["I32"]).bits
    in_features, size = len(words), section.get("group_size")
    if not isinstance(size, int) or size < 1 or in_features % size:
        raise InputError(f"group_size={size}: allowed: what divides the {in_features} in_features of qweight")
    groups = in_features // size
    steps = of_shape(tensors, "scales", ["F16", "BF16"], (groups, words.shape[1] * _IN_A_WORD))
    zeros = _codes(of_shape(tensors, "qzeros", ["I32"], (groups, words.shape[1])).bits)
    symmetric = not section.get("zero_point", True)
    if symmetric and zeros.any():
        raise InputError(f"qzeros: hold others than {_MIDDLE}; allowed: zero_point true, or {_MIDDLE} alone")
    return Quantized(
        np.ascontiguousarray(numbers.floats(steps).T),
        Format(size, _BITS, symmetric=symmetric, divisor=Divisor.half_range, step_dtype=numbers.step_dtype(steps)),
        None if symmetric else zeros.astype(np.float32),
        codes=_codes(words),
    )


TARGET = Target(
    method=_METHOD,
    holds=(
        "4 bits, symmetric or with integer zero points, groups that divide in_features, out_features that 8 divides, "
        "quant.step_dtype=fp16"
    ),
    misfit=_misfit,
    layer_misfit=_layer_misfit,
    section=_section,
    pack=_pack,
    unpack=_unpack,
)
