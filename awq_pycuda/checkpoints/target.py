"""What a kind of checkpoint is to the rest: what it holds, its layers' tensors, its section of the model's config."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from awq_pycuda.checkpoints.tensors import Tensor
from awq_pycuda.errors import InputError
from awq_pycuda.quant.format import Format
from awq_pycuda.quant.quantized import Quantized

Array = NDArray[Any]
Tensors = Mapping[str, Tensor]  # of one layer, by their names within it


@dataclass(frozen=True)
class Target:
    """A kind of checkpoint.

    Attributes:
        method: `quant_method` of its section.
        holds: what it can hold, in words.
        misfit: what of a format it has no place for, as key and value; "" if it holds it.
        layer_misfit: the same of a layer's (out_features, in_features) in that format, in words.
        section: `quantization_config` of layers in a format, by their names.
        pack: a layer's tensors.
        unpack: back from `pack`, with the section that it stands under.
    """

    method: str
    holds: str
    misfit: Callable[[Format], str]
    layer_misfit: Callable[[Format, tuple[int, int]], str]
    section: Callable[[Format, Sequence[str]], dict[str, Any]]
    pack: Callable[[Quantized[Array]], dict[str, Tensor]]
    unpack: Callable[[Mapping[str, Any], Tensors], Quantized[Array]]


def taken(tensors: Tensors, name: str, kinds: Sequence[str], dims: int = 2) -> Tensor:
    """A tensor of a layer.

    Raises:
        InputError: it is not there, or of another type or number of dimensions.
    """
    tensor = tensors.get(name)
    if tensor is None:
        raise InputError(f"{name}: is missing; allowed: a tensor of {dims} dimensions")
    if tensor.kind not in kinds or tensor.bits.ndim != dims:
        shape = tuple(tensor.bits.shape)
        raise InputError(f"{name}: {tensor.kind} {shape}; allowed: {' or '.join(kinds)} of {dims} dimensions")
    return tensor


def of_shape(tensors: Tensors, name: str, kinds: Sequence[str], shape: tuple[int, ...]) -> Tensor:
    """A tensor of a layer, of this shape.

    Raises:
        InputError: see `taken`; or it has another shape.
    """
    tensor = taken(tensors, name, kinds, len(shape))
    if tensor.bits.shape != shape:
        raise InputError(f"{name}: has shape {tuple(tensor.bits.shape)}; allowed: {shape}")
    return tensor


def in_full_groups(form: Format, shape: tuple[int, int]) -> str:
    """For `Target.layer_misfit`: the groups of a row must be of one size."""
    if form.group_size is None or shape[1] % form.group_size == 0:
        return ""
    return f"{shape[1]} in_features in groups of {form.group_size}"
