"""Runs a causal language model from one of its decoder blocks on: what lies before is computed once."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch.utils import _pytree as pytree

from awq_pycuda.capturing.fault import one_line
from awq_pycuda.evaluating.forward import Runner
from awq_pycuda.evaluating.windows import Window


@dataclass(frozen=True)
class Blocks:
    """A model's decoder blocks, in the order in which they run.

    `path` is that of their list in the base model. Without blocks every forward is one of the whole model, for the
    reason that `why` tells.
    """

    path: str
    modules: Sequence[Any]
    why: str = ""

    def of(self, layer: str) -> int | None:
        """The index of the block that holds a layer, by its path; None where none does."""
        head, _, rest = layer.removeprefix(f"{self.path}.").partition(".")
        return int(head) if self.modules and layer.startswith(f"{self.path}.") and rest else None


class Replay:
    """Forwards of some windows that begin at a block, which moves from the first to the last.

    A replay is the model's own forward, in which the blocks before the one that it begins with all give what the last
    of them gave once. So embeddings, masks, positions, norms and head are the model's own, whatever it is. Whether a
    model can be run so is not assumed but tried, by `find_blocks`. Two outputs of blocks are kept for each window.
    """

    def __init__(self, runner: Runner, blocks: Blocks, windows: Sequence[Window]) -> None:
        self._runner = runner
        self._modules = blocks.modules
        self._windows = windows
        self._begin = -1
        self._before: list[Any] = []  # what the block before the one to begin with gives
        self._behind: list[Any] = []  # what that one gives, the model being the original
        self._at = threading.local()  # the window that a thread runs: all threads run the same modules

    def advance(self, block: int) -> None:
        """Begin at this block from now on, or stay where that is behind; the model has to be the original."""
        while self._modules and self._begin < block:
            self._begin += 1
            self._before = self._behind
            with self.begun():
                self._behind = self._runner.each(self.given, range(len(self._windows)))

    @contextmanager
    def begun(self) -> Iterator[None]:
        """Within it forwards may be run, from the runner's threads."""
        with ExitStack() as stack:
            for module in self._modules[: max(0, self._begin)]:
                stack.enter_context(mock.patch.object(module, "forward", self._hand_on))
            if self._modules:
                stack.callback(self._modules[self._begin].register_forward_hook(self._see).remove)
            yield

    def hidden(self, index: int) -> Any:
        """The last hidden states of a window, as `Runner.hidden` gives them."""
        self._at.index, self._at.ends = index, False
        return self._runner.hidden(self._windows[index])

    def logits(self, index: int) -> Any:
        """The logits of a window, as `Runner.logits` gives them."""
        self._at.index, self._at.ends = index, False
        return self._runner.logits(self._windows[index])

    def given(self, index: int) -> Any:
        """What the block to begin with gives for a window; the forward ends there."""
        self._at.index, self._at.ends = index, True
        try:
            self._runner.hidden(self._windows[index])
        except _Reached as reached:
            return _copied(reached.output)
        raise RuntimeError("a decoder block did not run")  # `find_blocks` has seen it run

    def stream_error(self, index: int) -> float:
        """How far the model as it is now is from the original behind the block to begin with, for a window.

        The squared difference of the hidden states that the block gives, as a share of their square: the mean over all
        tokens of the window.
        """
        found, original = (_hidden(output).double() for output in (self.given(index), self._behind[index]))
        shares = (found - original).square().sum(1) / original.square().sum(1)
        return float(shares.mean())

    def _hand_on(self, *_args: Any, **_kwargs: Any) -> Any:
        # A copy: a model may write over what a block has given.
        return _copied(self._before[self._at.index])

    def _see(self, _module: Any, _args: Any, output: Any) -> None:
        if self._at.ends:
            raise _Reached(output)


class _Reached(BaseException):
    """Ends a forward behind a block. No failure, and so no Exception, which a model's code or the runner would word."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output


def _copied(output: Any) -> Any:
    return pytree.tree_map_only(torch.Tensor, torch.clone, output)


def _hidden(output: Any) -> Any:
    """(tokens, width) the hidden states, the first of what a block gives."""
    hidden = pytree.tree_leaves(output)[0]
    return hidden.reshape(-1, hidden.shape[-1])


def find_blocks(runner: Runner, window: Window, hidden: Any) -> Blocks:
    """The decoder blocks of a model, tried on one window.

    They are the outermost list of modules that run in its order. Replays that begin at every one of them have to give
    the last hidden states of the whole forward bit for bit. A model in which anything but the next block takes what a
    block gives fails that, and is left without blocks.

    Args:
        runner: of the original model.
        window: to try it on.
        hidden: the window's last hidden states.
    """
    path, modules = _find_list(runner, window)
    if not modules:
        return Blocks("", (), "it has no list of modules that run in order")
    blocks = Blocks(path, modules)
    replay = Replay(runner, blocks, [window])
    for index in range(len(modules)):
        try:
            replay.advance(index)
            with replay.begun():
                (found,) = runner.each(replay.hidden, [0])
        except Exception as error:
            # Whatever a model's code raises where a block has not run.
            return Blocks("", (), f"it fails without the blocks before {path}.{index} ({one_line(error)})")
        if not torch.equal(found, hidden):
            return Blocks("", (), f"it takes more from the blocks before {path}.{index} than the last one gives")
    return blocks


def _find_list(runner: Runner, window: Window) -> tuple[str, Sequence[Any]]:
    """The outermost list whose modules run in its order, the longest where there are several; its path and modules."""
    lists = {
        name: list(module) for name, module in runner.base.named_modules() if isinstance(module, torch.nn.ModuleList)
    }
    ran: list[Any] = []
    with ExitStack() as stack:
        for module in {id(module): module for modules in lists.values() for module in modules}.values():
            stack.callback(module.register_forward_pre_hook(lambda module, _args: ran.append(module)).remove)
        runner.each(runner.hidden, [window])
    in_order = {
        name: modules
        for name, modules in lists.items()
        if modules and [one for one in ran if one in modules] == modules
    }
    name = min(in_order, key=lambda name: (name.count("."), -len(in_order[name])), default="")
    return name, in_order.get(name, ())
