"""Where in a model's forward the first number comes up that is none: NaN or infinite."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch.utils import _pytree as pytree

from awq_pycuda.evaluating.forward import Runner
from awq_pycuda.evaluating.windows import Window


def find_origin(runner: Runner, window: Window) -> str:
    """The path of the module whose output is the first in a forward that is not finite, in the causal model.

    Where a module is given such numbers before any has made them, they come of what the module around it does, whose
    path is returned. Masks do not count: theirs are infinite on purpose.
    """
    paths = {module: name for name, module in runner.causal.named_modules()}
    inside: list[Any] = []
    found: list[str] = []

    def before(module: Any, args: Any, kwargs: Any) -> None:
        given = (args, {name: value for name, value in kwargs.items() if "mask" not in name})
        if not found and inside and not _is_finite(given):
            found.append(paths[inside[-1]])
        inside.append(module)

    def after(module: Any, _args: Any, _kwargs: Any, output: Any) -> None:
        inside.pop()
        if not found and not _is_finite(output):
            found.append(paths[module])

    with ExitStack() as stack:
        for module in paths:
            stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(after, with_kwargs=True).remove)
        runner.logits(window)
    return (found[0] or "its head") if found else "its head"


def _is_finite(value: Any) -> bool:
    return all(bool(torch.isfinite(each).all()) for each in _floats(value))


def _floats(value: Any) -> Iterator[Any]:
    for leaf in pytree.tree_leaves(value):
        if isinstance(leaf, torch.Tensor) and leaf.is_floating_point():
            yield leaf
