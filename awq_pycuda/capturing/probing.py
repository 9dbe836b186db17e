"""Finds out which layers of a model see the tokens of a window, one row each, before anything is captured."""

import importlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from awq_pycuda.capturing.experts import Expert, Interception, find_stacks
from awq_pycuda.capturing.text import Around
from awq_pycuda.capturing.windows import draw_ids, explain, run_window

# Tokens of the text in the windows of the probes: unlike each other, and unlike the usual sizes of tables.
_PROBES = (11, 6)


@dataclass(frozen=True)
class Plan:
    """What is to be captured, and what is not."""

    layers: dict[str, Any]
    """Modules that see one row per token, by path, in the order in which they run."""
    experts: dict[str, list[Expert]]
    """Experts by the path of their stack, in the order of their first products; those of one stack by index."""
    examples: dict[tuple[str, str], Any]
    """Weight of one expert, by stack and parameter, whose layout all others share."""
    left_out: dict[str, str]
    """Linear layers that cannot be captured, by path, each with the reason."""
    order: list[str]
    """Paths of layers and stacks in the order in which they run."""

    def choose(self, chosen: Callable[[str], bool]) -> "Plan":
        """The part of the plan whose layers are ``chosen`` by their paths."""
        layers = {name: module for name, module in self.layers.items() if chosen(name)}
        experts = {
            stack: kept for stack, found in self.experts.items() if (kept := [one for one in found if chosen(one.name)])
        }
        left_out = {name: reason for name, reason in self.left_out.items() if chosen(name)}
        order = [name for name in self.order if name in layers or name in experts]
        return Plan(layers, experts, self.examples, left_out, order)


@dataclass(frozen=True)
class _Probe:
    """What went into the layers of one window: rows of the first run of each layer, and of all of each expert's."""

    length: int
    padded: int
    """The length with what the model itself adds behind the tokens, such as Longformer up to its attention's window."""
    rows: dict[str, NDArray[np.float32]]
    experts: dict[Expert, NDArray[np.float32]]
    weights: dict[Expert, Any]
    order: list[str]


def find_linears(model: Any) -> dict[str, Any]:
    """The linear layers that are modules, by path: torch's, and transformers' Conv1D, which is one by another name."""
    conv1d = importlib.import_module("transformers.pytorch_utils").Conv1D
    return {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear | conv1d)}


@contextmanager
def hooked(modules: dict[str, Any], hook: Any) -> Iterator[None]:
    """Call ``hook(name, module, input)`` before every run of each of the modules."""

    def hook_of(name: str) -> Any:
        def call(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hook(name, module, next(iter((*args, *kwargs.values()))).detach())

        return call

    with ExitStack() as stack:
        for name, module in modules.items():
            stack.callback(module.register_forward_pre_hook(hook_of(name), with_kwargs=True).remove)
        yield


class Padding:
    """A context that finds out up to which length a model pads a window, by what it looks up in its token table."""

    def __init__(self, model: Any) -> None:
        try:
            table = model.get_input_embeddings()
        except NotImplementedError:
            table = None
        self._tables = {"": table} if isinstance(table, torch.nn.Module) else {}
        self._window: list[int] = []
        self.length = 0
        """Length of the window last expected, with what the model has put behind it since."""

    def __enter__(self) -> None:
        self._stack = ExitStack()
        self._stack.enter_context(hooked(self._tables, self._see))

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def expect(self, window: list[int]) -> None:
        """Say which token ids run next."""
        self._window = window
        self.length = len(window)

    def _see(self, _name: str, _module: Any, inputs: Any) -> None:
        ids = inputs.reshape(-1)
        if len(ids) > len(self._window) and ids[: len(self._window)].tolist() == self._window:
            self.length = len(ids)


def make_plan(model: Any, ids: list[int], around: Around, longest: int) -> Plan:
    """Probe the model with windows of random tokens, at most ``longest`` with the special ones.

    Where a layer's rows come from is told by what they answer to. They are tokens where their number is that of the
    window's tokens, and of what the model pads them with, for windows of two lengths; where most change when all
    tokens do, since a model may put a row of its own before them; where some change when one token does; and where
    they are unlike each other. Rows of a position table answer to no token; pooled rows, learned queries, heads and
    the channels of a transposed tensor do not follow the length; copies of one row are alike. Rows without any signal,
    all zero, prove nothing and pass by their number. Raises `Fault` where the model fails.
    """
    room = longest - len(around)
    lengths = [min(count, room) for count in _PROBES]
    text = draw_ids(ids, lengths[0], seed=1)
    try:
        first = _probe(model, around, text)
    except Exception:
        # The model may run at its own length alone.
        lengths = [room, max(1, room // 2)]
        text = draw_ids(ids, room, seed=1)
        first = _try_probe(model, around, text)
    others = [_next(ids, token) for token in text]
    middle = len(text) // 2
    probes = [
        first,
        _try_probe(model, around, others),
        _try_probe(model, around, [*text[:middle], others[middle], *text[middle + 1 :]]),
        _try_probe(model, around, draw_ids(ids, lengths[1], seed=2)),
    ]
    return _judge(model, probes, slice(len(around.before), len(around.before) + len(text)))


def _next(ids: list[int], token: int) -> int:
    return ids[(ids.index(token) + 1) % len(ids)]


def _try_probe(model: Any, around: Around, ids: list[int]) -> _Probe:
    try:
        return _probe(model, around, ids)
    except Exception as error:
        # Whatever a model's code raises.
        raise explain(error, model, len(ids) + len(around)) from error


def _probe(model: Any, around: Around, ids: list[int]) -> _Probe:
    rows: dict[str, NDArray[np.float32]] = {}
    experts: dict[Expert, list[NDArray[np.float32]]] = {}
    weights: dict[Expert, Any] = {}
    order: dict[str, None] = {}

    def see_layer(name: str, _module: Any, inputs: Any) -> None:
        order.setdefault(name)
        if name not in rows:
            rows[name] = inputs.reshape(-1, inputs.shape[-1]).numpy().copy()

    def see_expert(expert: Expert, weight: Any, inputs: Any) -> None:
        order.setdefault(expert.stack)
        weights[expert] = weight
        experts.setdefault(expert, []).append(inputs.numpy().copy())

    window = [*around.before, *ids, *around.behind]
    padding = Padding(model)
    with padding, hooked(find_linears(model), see_layer), Interception(find_stacks(model), see_expert):
        padding.expect(window)
        run_window(model, window)
    joined = {expert: np.concatenate(parts) for expert, parts in experts.items()}
    return _Probe(len(window), padding.length, rows, joined, weights, list(order))


def _judge(model: Any, probes: list[_Probe], text: slice) -> Plan:
    first, _, _, other = probes
    layers = {}
    left_out = {}
    for name, module in find_linears(model).items():
        reason = _why_no_tokens(name, probes, text)
        if reason is None:
            layers[name] = module
        else:
            left_out[name] = reason
    experts: dict[str, list[Expert]] = {}
    examples = {}
    for expert in dict.fromkeys(expert for probe in probes for expert in probe.experts):
        key = (expert.stack, expert.parameter)
        if key in examples:
            continue
        examples[key] = next(probe.weights[expert] for probe in probes if expert in probe.weights)
        stack = [Expert(*key, index, expert.count) for index in range(expert.count)]
        fault = _why_not_routed(stack, probes)
        if fault is None:
            experts.setdefault(expert.stack, []).extend(stack)
        else:
            left_out[f"{expert.stack}.{expert.parameter}"] = fault
    for stack in experts.values():
        stack.sort(key=lambda expert: expert.index)
    order = [name for name in dict.fromkeys([*first.order, *other.order]) if name in layers or name in experts]
    return Plan({name: layers[name] for name in order if name in layers}, experts, examples, left_out, order)


def _why_no_tokens(name: str, probes: list[_Probe], text: slice) -> str | None:
    """Why the rows of a layer are not the window's tokens, or None where they are."""
    first, fresh, changed, other = probes
    if name not in first.rows:
        return f"does not run in a window of {first.length} tokens"
    counts = [len(probe.rows[name]) if name in probe.rows else 0 for probe in (first, other)]
    lengths = [first.length, other.length]
    if counts != [first.padded, other.padded]:
        if counts[0] == counts[1]:
            return f"{counts[0]} row{'s' * (counts[0] > 1)} whatever the number of tokens"
        return f"{counts[0]} rows of {lengths[0]} tokens, {counts[1]} of {lengths[1]}"
    rows, fresh_rows, changed_rows = (probe.rows[name][text] for probe in (first, fresh, changed))
    live = rows.any(axis=1) | fresh_rows.any(axis=1)
    answers = (rows != fresh_rows).any(axis=1)[live]
    if live.any() and (answers.mean() < 0.5 or (rows == changed_rows).all()):
        return "its rows do not come from the tokens"
    if len(rows) > 1 and live.any() and (rows == rows[0]).all():
        return "its rows are copies of one"
    return None


def _why_not_routed(stack: list[Expert], probes: list[_Probe]) -> str | None:
    """Why the rows of a stack's experts are not tokens routed to them, or None where they are."""
    first, fresh, _, _ = probes
    for probe in probes:
        most = max((len(probe.experts[expert]) for expert in stack if expert in probe.experts), default=0)
        if most > probe.length:
            return f"{most} rows for an expert in a window of {probe.length} tokens"
    seen = [
        {row.tobytes() for expert in stack if expert in probe.experts for row in probe.experts[expert]}
        for probe in (first, fresh)
    ]
    # Special tokens stay the same in both windows, and are rows of few.
    if len(seen[0] & seen[1]) > len(seen[0]) / 2:
        return "its rows do not come from the tokens"
    return None
