"""Experts fused into one parameter: its slices are linear layers, each with the tokens routed to it."""

import bisect
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
        return f"{self.stack}.{self.index}" + ("" if self.parameter == "weight" else f".{self.parameter}")


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


class Interception(TorchFunctionMode):  # type: ignore[misc] # PyTorch is not read by mypy
    """A context in which every product with one slice of a stack's parameter is shown to ``record``.

    It gets the expert, its weight (out_features, in_features) and the rows that go in, (rows, in_features), each at the
    moment of the product, by what the model itself computes: no gate or activation is known here. The rows are in the
    order of their tokens, also where the model has picked them in another.
    """

    def __init__(self, stacks: dict[str, Any], record: _Record) -> None:
        super().__init__()
        parameters = [
            (parameter.data_ptr(), stack, name, parameter)
            for stack, module in stacks.items()
            for name, parameter in module.named_parameters(recurse=False)
            if parameter.ndim > 1
        ]
        self._parameters = sorted(parameters, key=lambda entry: entry[0])
        self._starts = [entry[0] for entry in self._parameters]
        self._record = record
        # Rows picked last by their tokens, and the expert that they went into.
        self._picked: Any = None
        self._order: Any = None
        self._reader: tuple[str, int] | None = None

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.linear:
            self._see(args[0], args[1] if len(args) > 1 else kwargs["weight"])
        elif func in (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.mm, torch.Tensor.mm):
            self._see(args[0], args[1].transpose(-1, -2) if args[1].ndim > 1 else args[1])
        elif func in (torch.bmm, torch.Tensor.bmm):
            # All experts at once: rows of zeros are those of tokens that are not routed to an expert.
            for rows, weight in zip(args[0], args[1], strict=True):
                self._see(rows, weight.transpose(-1, -2), dense=True)
        result = func(*args, **kwargs)
        if func is torch.Tensor.__getitem__ and isinstance(args[1], torch.Tensor) and args[1].ndim == 1:
            self._picked, self._reader = result, None
            self._order = None if args[1].dtype == torch.bool else args[1].argsort(stable=True)
        return result

    def _see(self, rows: Any, weight: Any, dense: bool = False) -> None:
        place = bisect.bisect(self._starts, weight.data_ptr()) - 1
        if place < 0 or weight.ndim != 2 or not weight.numel() or not rows.numel():
            return
        start, stack, name, parameter = self._parameters[place]
        offset = (weight.data_ptr() - start) // parameter.element_size()
        count, rest = divmod(parameter.numel(), weight.numel())
        if offset >= parameter.numel() or offset % weight.numel() or rest or count < 2:
            return
        expert = Expert(stack, name, offset // weight.numel(), count)
        if dense:
            rows = rows[rows.any(-1)]
        elif self._order is not None and self._follows(rows, expert):
            rows = rows[self._order]
        if rows.numel():
            self._record(expert, weight.detach(), rows.detach().reshape(-1, rows.shape[-1]))

    def _follows(self, rows: Any, expert: Expert) -> bool:
        """Whether these are the rows picked last, or what the same expert has made of them."""
        if rows is self._picked:
            self._reader = expert.stack, expert.index
        return self._reader == (expert.stack, expert.index) and len(rows) == len(self._order)


def weight_of(stack: Any, expert: Expert, like: Any) -> Any:
    """The weight, (out_features, in_features), of an expert that may not have run, laid out as another's, ``like``."""
    size = like.numel()
    parameter = getattr(stack, expert.parameter).detach()
    return parameter.as_strided(like.shape, like.stride(), parameter.storage_offset() + expert.index * size)


def bias_of(stack: Any, expert: Expert) -> Any | None:
    """The bias, (out_features,), that a stack keeps for an expert, or None."""
    bias = getattr(stack, f"{expert.parameter}_bias", None)
    return None if bias is None else bias.detach()[expert.index]
