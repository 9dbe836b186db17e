"""Tensors of a safetensors file, of types that NumPy has no name for as well: bf16, E4M3 and E8M0 by their bits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, TensorSpec, deserialize, serialize

from awq_pycuda.choices import StepDtype
from awq_pycuda.errors import InputError
from awq_pycuda.quant.step_types import rounded

Array = NDArray[Any]

# By the file's name of a type: the library's name when it writes, and the NumPy type that has the bits.
_TYPES: dict[str, tuple[str, type[np.generic]]] = {
    "F32": ("float32", np.float32),
    "F16": ("float16", np.float16),
    "BF16": ("bfloat16", np.uint16),
    "F8_E4M3": ("float8_e4m3fn", np.uint8),
    "U8": ("uint8", np.uint8),
    "I32": ("int32", np.int32),
    "I64": ("int64", np.int64),
}
# E8M0 is a plain byte to the tools.
_OF_STEPS = {
    StepDtype.fp32: "F32",
    StepDtype.fp16: "F16",
    StepDtype.bf16: "BF16",
    StepDtype.e4m3: "F8_E4M3",
    StepDtype.e8m0: "U8",
    StepDtype.e8m0_up: "U8",
}
_E8M0_BIAS = 127


@dataclass(frozen=True)
class Tensor:
    """A tensor of a file: its type, by the file's name, and its bits."""

    kind: str
    bits: Array


def of(array: Array) -> Tensor:
    """An array of a type that NumPy has."""
    for kind in ("F32", "F16", "U8", "I32", "I64"):
        if array.dtype == _TYPES[kind][1]:
            return Tensor(kind, array)
    raise TypeError(f"no checkpoint has {array.dtype}")


def encode(steps: Array, dtype: StepDtype) -> Tensor:
    """Steps from 0 on in the type that they are rounded to.

    Args:
        steps: float32, of any shape.
        dtype: of the tensor.

    Raises:
        InputError: a step is not a number of that type.
    """
    tensor = nearest(steps, dtype)
    wrong = floats(tensor) != steps
    if wrong.any():
        raise InputError(f"steps: {steps[wrong][0]:g} is no number of {dtype.name}; allowed: those of the step_dtype")
    return tensor


def nearest(steps: Array, dtype: StepDtype) -> Tensor:
    """As `encode`, but with numbers of no such type rounded to it; of E8M0 to the power of two below."""
    kind = _OF_STEPS[dtype]
    bits: Array
    if kind == "U8":
        bits = np.clip(np.frexp(steps)[1] - 1 + _E8M0_BIAS, 0, 254).astype(np.uint8)
    elif kind == "BF16":
        bits = (rounded(steps, dtype).view(np.uint32) >> 16).astype(np.uint16)
    elif kind == "F8_E4M3":
        bits = np.searchsorted(_E4M3[:-1], rounded(steps, dtype)).astype(np.uint8)
    else:
        bits = rounded(steps, dtype).astype(_TYPES[kind][1])
    return Tensor(kind, bits)


def floats(tensor: Tensor) -> NDArray[np.float32]:
    """The numbers of a tensor, a byte taken as E8M0."""
    bits = tensor.bits
    found: NDArray[np.float32]
    if tensor.kind == "BF16":
        found = (bits.astype(np.uint32) << 16).view(np.float32)
    elif tensor.kind == "F8_E4M3":
        found = _E4M3[np.minimum(bits, len(_E4M3) - 1)]
    elif tensor.kind == "U8":
        found = np.ldexp(np.float32(1), bits.astype(np.int32) - _E8M0_BIAS)
    else:
        found = bits.astype(np.float32)
    return found


def step_dtype(tensor: Tensor) -> StepDtype:
    """What the steps of a tensor are rounded to."""
    return next(dtype for dtype, kind in _OF_STEPS.items() if kind == tensor.kind)


def _e4m3() -> NDArray[np.float32]:
    """Its numbers from 0 to 448 by their bits; the last, 127, is NaN, as are all bits with the sign from there on."""
    bits = np.arange(128)
    exponent, mantissa = bits >> 3, bits & 7
    found = np.where(exponent == 0, np.ldexp(mantissa * 1.0, -9), np.ldexp(mantissa + 8.0, exponent - 10))
    found[-1] = np.nan
    numbers: NDArray[np.float32] = found.astype(np.float32)
    return numbers


_E4M3 = _e4m3()


def to_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """A safetensors file of these tensors, marked as PyTorch's, which loaders ask for."""
    kept = {name: np.ascontiguousarray(tensor.bits) for name, tensor in tensors.items()}
    specs = {
        name: TensorSpec(
            dtype=_TYPES[tensors[name].kind][0], shape=bits.shape, data_ptr=bits.ctypes.data, data_len=bits.nbytes
        )
        for name, bits in kept.items()
    }
    return bytes(serialize(specs, metadata={"format": "pt"}))


def read(path: Path) -> dict[str, Tensor]:
    """Every tensor of a safetensors file, by name; those of other types are left out.

    Raises:
        InputError: the file cannot be read.
    """
    try:
        found = deserialize(path.read_bytes())  # type: ignore[no-untyped-call]
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: {error}; allowed: a whole safetensors file") from None
    return {
        name: Tensor(entry["dtype"], np.frombuffer(entry["data"], _TYPES[entry["dtype"]][1]).reshape(entry["shape"]))
        for name, entry in found
        if entry["dtype"] in _TYPES
    }
