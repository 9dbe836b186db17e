"""Experts fused into one parameter: its slices are linear layers, each with the tokens routed to it."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_Record = Callable[["Expert", Any, Any], None]


@dataclass(frozen=True)
class Expert:
    """One linear layer of a stack of experts."""

    stack: str
    """Path of the module that holds the stack."""
    parameter: str
    """Name of the parameter that all experts share."""
    index: int
    count: int
    """Experts in the stack."""

    @property
    def name(self) -> str:
        """Path as if each expert were a module."""
        return f"{self.stack}.{self.index}.{self.parameter}"


def find_stacks(model: Any) -> dict[str, Any]:
    """The modules, by path, that may hold a stack of experts: with a parameter of their own and no layer themselves."""
    conv1d = importlib.import_module("transformers.pytorch_utils").Conv1D
    layers = (torch.nn.Linear, torch.nn.Bilinear, torch.nn.Embedding, torch.nn.RNNBase, conv1d)
    return {
        name: module
        for name, module in model.named_modules()
        if name
        and any(parameter.ndim > 1 for parameter in module.parameters(recurse=False))
        and not isinstance(module, (*layers, torch.nn.modules.conv._ConvNd))
    }


class Interception:
    """A context in which every product with one slice of a stack's parameter is shown to ``record``.

    It gets the expert, its weight (out_features, in_features) and the rows that go in, (rows, in_features), each at the
    moment of the product, by what the model itself computes: no gate or activation is known here.
    """

    def __init__(self, stacks: dict[str, Any], record: _Record) -> None:
        self._stacks = stacks
        self._record = record

    def __enter__(self) -> None:
        for name, module in self._stacks.items():
            module.forward = self._wrap(name, module, module.forward)

    def __exit__(self, *_: object) -> None:
        for module in self._stacks.values():
            del module.forward

    def _wrap(self, name: str, module: Any, forward: Callable[..., Any]) -> Callable[..., Any]:
        mode = _Products(name, dict(module.named_parameters(recurse=False)), self._record)

        def intercepted(*args: Any, **kwargs: Any) -> Any:
            with mode:
                return forward(*args, **kwargs)

        return intercepted


class _Products(TorchFunctionMode):  # type: ignore[misc] # PyTorch is not read by mypy
    """Sees the matrix products inside a forward."""

    def __init__(self, stack: str, parameters: dict[str, Any], record: _Record) -> None:
        super().__init__()
        self._stack = stack
        self._parameters = {name: value for name, value in parameters.items() if value.ndim > 1}
        self._record = record

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.linear:
            self._see(args[0], args[1] if len(args) > 1 else kwargs["weight"])
        elif func in (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.mm, torch.Tensor.mm):
            self._see(args[0], args[1].transpose(-1, -2) if args[1].ndim == 2 else args[1])
        elif func in (torch.bmm, torch.Tensor.bmm) and args[1].ndim == 3:
            # All experts at once: rows of zeros are those of tokens that are not routed to an expert.
            for rows, weight in zip(args[0], args[1], strict=True):
                self._see(rows[rows.any(-1)], weight.transpose(-1, -2))
        return func(*args, **kwargs)

    def _see(self, rows: Any, weight: Any) -> None:
        if weight.ndim != 2 or not weight.numel():
            return
        for name, parameter in self._parameters.items():
            offset = (weight.data_ptr() - parameter.data_ptr()) // parameter.element_size()
            count, rest = divmod(parameter.numel(), weight.numel())
            if 0 <= offset < parameter.numel() and offset % weight.numel() == rest == 0 and count > 1:
                expert = Expert(self._stack, name, offset // weight.numel(), count)
                if rows.numel():
                    self._record(expert, weight.detach(), rows.detach().reshape(-1, rows.shape[-1]))
                return


def weight_of(stack: Any, expert: Expert, like: Any) -> Any:
    """The weight, (out_features, in_features), of an expert that may not have run, laid out as another's, ``like``."""
    size = like.numel()
    parameter = getattr(stack, expert.parameter).detach()
    return parameter.as_strided(like.shape, like.stride(), parameter.storage_offset() + expert.index * size)


def bias_of(stack: Any, expert: Expert) -> Any | None:
    """The bias, (out_features,), that a stack keeps for an expert, or None."""
    bias = getattr(stack, f"{expert.parameter}_bias", None)
    return None if bias is None else bias.detach()[expert.index]
