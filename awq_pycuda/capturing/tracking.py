"""Looks over every operation of a model: which tensors it uses, and which rows of a table it asks for."""

import importlib
from collections.abc import Callable
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class BeyondTable(Exception):
    """A row asked of an embedding table that has fewer."""

    def __init__(self, index: int, rows: int, name: str) -> None:
        super().__init__(f"row {index} of {name}, which has {rows}")
        self.index = index
        self.rows = rows
        self.name = name


class Watch(TorchDispatchMode):  # type: ignore[misc] # PyTorch is not read by mypy
    """A context in which every operation on tensors is looked at before it runs.

    Raises `BeyondTable` where a table is asked for a row beyond its last, and calls ``used`` with the names of those
    ``tensors`` that an operation takes, whole or in part, directly or through a view.
    """

    def __init__(self, model: Any, tensors: dict[str, Any], used: Callable[[str], None]) -> None:
        super().__init__()
        self._names = {parameter.data_ptr(): name for name, parameter in model.named_parameters()}
        self._ranges = [
            (tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes, name) for name, tensor in tensors.items()
        ]
        self._used = used

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        torch = importlib.import_module("torch")
        if func is torch.ops.aten.embedding.default:
            table, indices = args[:2]
            if indices.numel() and int(indices.max()) >= table.shape[0]:
                name = self._names.get(table.data_ptr(), "a table")
                raise BeyondTable(int(indices.max()), table.shape[0], name)
        if self._ranges:
            for leaf in torch.utils._pytree.tree_leaves((args, kwargs)):
                if isinstance(leaf, torch.Tensor):
                    self._check_use(leaf.data_ptr())
        return func(*args, **(kwargs or {}))

    def _check_use(self, address: int) -> None:
        for start, end, name in self._ranges:
            if start <= address < end:
                self._used(name)
