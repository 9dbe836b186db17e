"""Streams what goes into the layers of a plan into a layer file, window by window."""

import hashlib
from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import numpy as np
from numpy.typing import NDArray

from awq_pycuda.capturing.experts import Expert, Interception, bias_of, weight_of
from awq_pycuda.capturing.fault import Fault
from awq_pycuda.capturing.probing import Padding, Plan, hooked
from awq_pycuda.capturing.tracking import Watch
from awq_pycuda.capturing.windows import diagnose, run_window
from awq_pycuda.layers.files import MAX_MAGNITUDE, find_fault
from awq_pycuda.layers.writer import LayerWriter


class Recorder:
    """Writes the layers of a plan: their weights at once, their inputs as the windows run.

    ``dtype`` is that of the file; ``absent`` are the tensors, by name, that the model's files do not give, each with
    what they do instead.
    """

    def __init__(
        self, writer: LayerWriter, model: Any, plan: Plan, tokens: int, dtype: np.dtype[Any], absent: dict[str, str]
    ) -> None:
        self._writer = writer
        self._model = model
        self._plan = plan
        self._tokens = tokens
        self._dtype = dtype
        self._absent = absent
        self._ids: dict[str, str] = {}
        self.left_out: dict[str, str] = {}
        """Layers of the plan that turned out not to see every token, by path, each with the reason."""
        self._length = 0
        self._padding = Padding(model)
        self._pending: set[str] = set()
        self._seen: dict[bytes, str] = {}  # inputs of this window, each with the first layer that saw it

    def add_layers(self) -> None:
        """Write weights and biases, in the order in which the layers run. Raises `Fault` for what no file may hold."""
        for name in self._plan.order:
            if name in self._plan.layers:
                self._add_module(name)
            else:
                for expert in self._plan.experts[name]:
                    self._add_expert(expert)

    def _add_module(self, name: str) -> None:
        module = self._plan.layers[name]
        weight = module.weight.detach().numpy()
        # transformers' Conv1D, a linear layer under another name, keeps (in_features, out_features).
        weight = weight if hasattr(module, "in_features") else weight.T
        self._add(name, weight, module.bias, self._tokens)
        for part in ("weight", "bias"):
            self._check_given(f"{name}.{part}")

    def _add_expert(self, expert: Expert) -> None:
        stack = self._model.get_submodule(expert.stack)
        example = self._plan.examples[expert.stack, expert.parameter]
        self._add(expert.name, weight_of(stack, expert, example).numpy(), bias_of(stack, expert), None)
        for part in (expert.parameter, f"{expert.parameter}_bias"):
            self._check_given(f"{expert.stack}.{part}")

    def _check_given(self, tensor: str) -> None:
        if tensor in self._absent:
            raise Fault("model", f"its weights {self._absent[tensor]}, which was made up")

    def _add(self, name: str, weight: NDArray[np.float32], bias: Any | None, tokens: int | None) -> None:
        self._check(name, "weight", weight)
        bias = None if bias is None else bias.detach().numpy()
        if bias is not None:
            self._check(name, "bias", bias)
        self._ids[name] = self._writer.add(name, weight, bias, tokens)

    def run(self, windows: Iterable[list[int]]) -> None:
        """Run the windows, (tokens,) ids each, one after the other.

        Raises `Fault` where the model fails, where it uses a tensor that its files do not give before the last of the
        layers has run, and for activations that no layer file may hold.
        """
        absent = {name: self._model.get_parameter_or_buffer(name) for name in self._absent}
        with ExitStack() as stack:
            stack.enter_context(self._padding)
            stack.enter_context(hooked(self._plan.layers, self._see_layer))
            if self._plan.experts:
                stacks = {name: self._model.get_submodule(name) for name in self._plan.experts}
                stack.enter_context(Interception(stacks, self._see_expert))
            if absent:
                stack.enter_context(Watch(self._model, absent, self._see_use))
            for window in windows:
                self._length = len(window)
                self._seen.clear()
                self._padding.expect(window)
                self._pending = {name for name in self._plan.order if name not in self.left_out}
                self._run_window(window)

    def _run_window(self, window: list[int]) -> None:
        try:
            run_window(self._model, window)
        except (Fault, OSError):
            raise
        except Exception as error:
            # Whatever a model's code raises when it is not run as it should be.
            raise diagnose(error, self._model, window) from error
        for name in self._plan.layers:
            if name in self._pending:
                self._leave_out(name, "does not run in every window")

    def _see_layer(self, name: str, _module: Any, inputs: Any) -> None:
        if name not in self._pending:
            return
        self._pending.discard(name)
        rows = inputs.reshape(-1, inputs.shape[-1])
        if len(rows) != self._padding.length:
            self._leave_out(name, f"{len(rows)} rows in a window of {self._length} tokens")
            return
        # What the model has padded the window with stands behind its tokens.
        self._append(name, rows[: min(self._length, self._tokens - self._writer.rows(self._ids[name]))].numpy())

    def _see_expert(self, expert: Expert, _weight: Any, inputs: Any) -> None:
        self._pending.discard(expert.stack)
        if expert.name in self._ids:
            self._append(expert.name, inputs.numpy())

    def _see_use(self, tensor: str) -> None:
        if self._pending:
            raise Fault("model", f"its weights {self._absent[tensor]}, which was made up")

    def _leave_out(self, name: str, reason: str) -> None:
        self._writer.remove(self._ids.pop(name))
        self.left_out[name] = reason

    def _append(self, name: str, rows: NDArray[np.float32]) -> None:
        self._check(name, "activations", rows, self._writer.rows(self._ids[name]))
        # By what it holds, not by where it lies: a model may write over one layer's input before another sees it.
        digest = hashlib.blake2b(np.ascontiguousarray(rows).data, key=str(rows.shape).encode()).digest()
        first = self._ids.get(self._seen.setdefault(digest, name))
        self._writer.append(self._ids[name], rows, None if first == self._ids[name] else first)

    def rows(self) -> dict[str, int]:
        """Rows of activations of every layer written, by path, in the order of the file."""
        return {name: self._writer.rows(layer_id) for name, layer_id in self._ids.items()}

    def _check(self, name: str, tensor_name: str, array: NDArray[np.float32], first_row: int = 0) -> None:
        """Refuse what `awq_pycuda.layers.files.load_layers` would not read back, and what the dtype cannot hold."""
        fault = find_fault(array, MAX_MAGNITUDE[tensor_name], first_row)
        if fault is not None:
            raise Fault("model", *_split(f"{name} {tensor_name}{fault}"))
        fault = find_fault(array, float(np.finfo(self._dtype).max), first_row) or _find_lost(
            array, self._dtype, first_row
        )
        if fault is not None:
            what, allowed = _split(f"{name} {tensor_name}{fault}")
            raise Fault("dtype", what, f"{allowed}, or dtype=float32", self._dtype.name)


def _split(fault: str) -> tuple[str, str]:
    what, _, allowed = fault.partition("; allowed are ")
    return what, allowed


def _find_lost(array: NDArray[np.float32], dtype: np.dtype[Any], first_row: int) -> str | None:
    """Say where a value is too small for a dtype, which would make it 0, such as ``[17, 3] is 1e-9; ...``, or None."""
    if dtype == array.dtype:
        return None
    for number, row in enumerate(array if array.ndim > 1 else array[None]):
        lost = np.flatnonzero((row != 0) & (row.astype(dtype) == 0))
        if lost.size:
            index = [first_row + number, int(lost[0])] if array.ndim > 1 else [int(lost[0])]
            smallest = float(np.finfo(dtype).smallest_subnormal)
            value = f"{', '.join(map(str, index))}] is {row[lost[0]]:g}"
            return f"[{value}; allowed are 0 and magnitudes above {smallest / 2:.3g}"
    return None
