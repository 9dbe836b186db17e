"""Every array that a run keeps: the one table that both allocation and the estimate of memory follow."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Generic

import numpy as np
from numpy.typing import DTypeLike, NDArray

from awq_pycuda.backends.base import Backend, H, Held, Layer, Trial
from awq_pycuda.choices import Share
from awq_pycuda.layers.inputs import LayerSpec, Uniform
from awq_pycuda.layers.rows import StoredRows
from awq_pycuda.quant.conventions import Convention
from awq_pycuda.quant.format import Format
from awq_pycuda.quant.quantized import Quantized


@dataclass(frozen=True)
class Array:
    """An array to allocate. `dtype` None: the backend's float type, of 4 bytes.

    `shared`: one for all layers that need it in this shape, since nobody needs what another layer left in it.
    `together`: arrays of one layer with the same word here are needed at the same time on the same side.
    """

    shape: tuple[int, ...]
    dtype: DTypeLike | None = None
    shared: bool = False
    together: str = ""

    @property
    def nbytes(self) -> int:
        """What it takes."""
        return math.prod(self.shape) * (4 if self.dtype is None else np.dtype(self.dtype).itemsize)


def sharing(specs: Sequence[LayerSpec], index: int, convention: Convention) -> tuple[int, ...]:
    """The layers that have the scales of layer `index`, itself among them, in their order; the first leads them."""
    if convention.share is not Share.inputs:
        return (index,)
    given = specs[index].input_of
    first = index if given is None else given
    return (first, *(other for other, spec in enumerate(specs) if spec.input_of == first))


def searched_rows(specs: Sequence[LayerSpec], index: int, convention: Convention) -> int:
    """Rows of weights that the search of layer `index` sees: of all layers that it leads; 0 where another leads it."""
    members = sharing(specs, index, convention)
    return sum(specs[member].out_features for member in members) if members[0] == index else 0


def _is_joint(specs: Sequence[LayerSpec], index: int, convention: Convention) -> bool:
    """Whether the scales of layer `index` are searched jointly with clipping, its own or that of who shares them."""
    members = sharing(specs, index, convention)
    jointly = convention.clip is not None and convention.clip.joint
    return jointly and any(convention.clips(specs[member].name) for member in members)


def layer_arrays(specs: Sequence[LayerSpec], index: int, convention: Convention) -> dict[str, Array]:
    """The arrays of layer `index`, by name.

    Of layers that share their scales the first one has all that is of the search, and `searched`, the weights of all.
    """
    spec, form = specs[index], convention.quantizer
    m, n, k = spec.at_once(spec.tokens), spec.out_features, spec.in_features
    steps = (n, form.groups(k))
    kept = {"steps": Array(steps, together="scales"), "codes": Array((n, k), form.code_dtype)}
    if not form.symmetric:
        kept["zero_points"] = Array(steps)
    if form.has_tensor_scale:
        kept["tensor_scale"] = Array((1,))
    rows = searched_rows(specs, index, convention)
    search = {
        "w" if rows == n else "searched": Array((rows, k)),
        "error": Array((convention.grid.size,), np.float64),
        "s": Array((k,), together="scales"),
        "inv_s": Array((k,), together="scales"),
    }
    if _is_joint(specs, index, convention):
        search["unclipped"] = search["error"]
    arrays = {
        "abs_mean": Array((k,), together="statistics"),
        "sq_mean": Array((k,), together="statistics"),
        "abs_max": Array((k,), together="statistics"),
        **(search if rows else {}),
        **kept,
        "y": Array((m, n), shared=True),
        "out": Array((m, n), shared=spec.chunk is not None),
        "trial error": Array((convention.grid.size,), np.float64, shared=True),
        "trial s": Array((k,), shared=True),
        "trial inv_s": Array((k,), shared=True),
        **{f"trial {name}": replace(array, shared=True, together="") for name, array in kept.items()},
        "trial y": Array((m, n), shared=True),
        "reference": Array((m, n), shared=True),
    }
    if convention.clips(spec.name):
        assert convention.clip is not None
        arrays |= {
            "held weights": Array((n, k)),
            "held ones": Array((k,), shared=True),
            "held ratio": Array(steps),
            "held error": Array((convention.clip.ratios.size,), np.float64),
            "held error_chosen": Array((1,), np.float64),
        }
    if spec.activations is not None and spec.input_of is None and spec.chunk is None:
        arrays["x"] = Array((m, k))
    if spec.bias is not None:
        arrays["bias"] = Array((n,))
    if spec.held_out_tokens:
        held_out = (spec.at_once(spec.held_out_tokens), n)
        arrays["held-out y"] = arrays["held-out reference"] = Array(held_out, shared=True)
        if spec.held_out is not None and spec.input_of is None and spec.chunk is None:
            arrays["held-out x"] = Array((spec.held_out_tokens, k))
        if index + 1 < len(specs) and specs[index + 1].held_out is None:
            arrays["held-out out"] = Array(held_out)
    # The same chain of layers without quantization, for the error that has come through it.
    if spec.activations is None:
        arrays["chain output"] = Array((m, n), shared=True)
    if index + 1 < len(specs) and specs[index + 1].activations is None:
        arrays["chain activations"] = Array((m, n), shared=True)
    return arrays


def kept_bytes(specs: Sequence[LayerSpec], convention: Convention) -> int:
    """What the arrays of a run take together; arithmetic only."""
    tables = [layer_arrays(specs, index, convention) for index in range(len(specs))]
    own = sum(array.nbytes for table in tables for array in table.values() if not array.shared)
    shared = {(name, array) for table in tables for name, array in table.items() if array.shared}
    return own + sum(array.nbytes for _, array in shared)


@dataclass(frozen=True)
class HeldOut(Generic[H]):
    """Tokens that a layer was not quantized on: `x` (M, K); `y` and `reference` (M, N) are work space; `outputs` = M·N.

    `out` (M, N) is where the next layer of the chain takes them from, None where it brings its own; for `parts` see
    `Layer`.
    """

    x: H
    y: H
    reference: H
    out: H | None
    outputs: int
    parts: tuple[slice, ...] | None


@dataclass
class Run(Generic[H]):
    """The handles of a whole run: `layers`, and what the metrics need besides, None where a layer does not."""

    layers: list[Layer[H]]
    held_out: list[HeldOut[H] | None]
    chain_outputs: list[H | None]
    chain_activations: list[H | None]


def allocate(backend: Backend[H], specs: Sequence[LayerSpec], convention: Convention) -> Run[H]:
    """Allocates every array of the table and makes the inputs of every layer."""
    run: Run[H] = Run([], [], [], [])
    form = convention.quantizer
    shared: dict[tuple[str, Array], H] = {}
    for index, spec in enumerate(specs):
        made = dict(_made(backend, layer_arrays(specs, index, convention), shared))
        if spec.input_of is not None:
            made["x"] = run.layers[spec.input_of].x
        elif spec.activations is None:
            made["x"] = run.layers[-1].out
        else:
            made["x"] = _filled(backend, made.get("x"), spec.activations)
        members = sharing(specs, index, convention)
        if len(members) == 1:
            _fill(backend, made["w"], spec.weight)
        else:
            made |= _in_common(backend, specs, members, index, made.get("searched"), run)
        if spec.bias is not None:
            _fill(backend, made["bias"], spec.bias)
        if "held ones" in made:
            backend.write(made["held ones"], np.ones(spec.in_features, np.float32))
        outputs = spec.tokens * spec.out_features
        run.layers.append(as_layer(made, form, outputs, _parts(spec, spec.tokens)))
        run.held_out.append(_held_out(backend, spec, made, run))
        run.chain_outputs.append(made.get("chain output"))
        run.chain_activations.append(made.get("chain activations"))
    for index, layer in enumerate(run.layers):
        first, *others = sharing(specs, index, convention)
        followers = [run.layers[other] for other in others] if index == first else []
        run.layers[index] = replace(layer, followers=tuple(followers), leads=index == first)
    return run


def _in_common(
    backend: Backend[H], specs: Sequence[LayerSpec], members: Sequence[int], index: int, searched: H | None, run: Run[H]
) -> dict[str, H]:
    """What layer `index` has of the arrays that it shares with the other `members`; `run` has the layers before it.

    The first one fills the weights of all, `searched`, which only it has.
    """
    rows = [specs[member].out_features for member in members]
    places = [slice(stop - each, stop) for stop, each in zip(itertools.accumulate(rows), rows, strict=True)]
    found: dict[str, H] = {}
    if searched is not None:
        for member, place in zip(members, places, strict=True):
            _write(backend, backend.rows(searched, place), specs[member].weight)
        backend.freeze(searched)
    else:
        leader = run.layers[members[0]]
        searched = leader.searched
        found |= {"s": leader.s, "inv_s": leader.inv_s, "error": leader.error}
        found |= {} if leader.unclipped is None else {"unclipped": leader.unclipped}
    return {**found, "w": backend.rows(searched, places[members.index(index)])}


def _held_out(backend: Backend[H], spec: LayerSpec, made: Mapping[str, H], run: Run[H]) -> HeldOut[H] | None:
    """The next layer's held-out tokens, of the handles of its table; `run` has those of the layers before."""
    if not spec.held_out_tokens:
        return None
    if spec.input_of is not None:
        given = run.held_out[spec.input_of]
        assert given is not None
        x = given.x
    elif spec.held_out is not None:
        x = _filled(backend, made.get("held-out x"), spec.held_out)
    else:
        before = run.held_out[-1]
        assert before is not None
        assert before.out is not None
        x = before.out
    outputs = spec.held_out_tokens * spec.out_features
    parts = _parts(spec, spec.held_out_tokens)
    return HeldOut(x, made["held-out y"], made["held-out reference"], made.get("held-out out"), outputs, parts)


def _parts(spec: LayerSpec, tokens: int) -> tuple[slice, ...] | None:
    """Those that so many tokens of a layer come in where they stay in their file."""
    if spec.chunk is None:
        return None
    size = spec.at_once(tokens)
    return tuple(slice(start, min(start + size, tokens)) for start in range(0, tokens, size))


_OF_LAYER = ("x", "w", "abs_mean", "sq_mean", "abs_max", "error", "s", "inv_s", "y", "out")


def as_layer(made: Mapping[str, H], form: Format, outputs: int, parts: tuple[slice, ...] | None = None) -> Layer[H]:
    """A layer of the handles of its table: `layer_arrays`, and `x` where it has none of its own."""
    names = [part.name for part in fields(Quantized) if part.name in made]
    own, trial = (Quantized(format=form, **{name: made[before + name] for name in names}) for before in ("", "trial "))
    held = {part.name: made[f"held {part.name}"] for part in fields(Held)} if "held ratio" in made else None
    return Layer(
        bias=made.get("bias"),
        held=None if held is None else Held(**held),
        unclipped=made.get("unclipped"),
        quantized=own,
        trial=Trial(
            **{name: made[f"trial {name}"] for name in ("error", "s", "inv_s", "y")},
            quantized=trial,
            reference=made["reference"],
        ),
        outputs=outputs,
        searched=made.get("searched", made["w"]),
        followers=(),
        leads=True,
        parts=parts,
        **{name: made[name] for name in _OF_LAYER},
    )


def _made(backend: Backend[H], arrays: dict[str, Array], shared: dict[tuple[str, Array], H]) -> Iterator[tuple[str, H]]:
    """The handle of each array: new, or another layer's where it is shared."""
    for word in dict.fromkeys(array.together for array in arrays.values() if array.together):
        names = [name for name, array in arrays.items() if array.together == word]
        yield from zip(names, backend.empty_together(*(arrays[name].shape for name in names)), strict=True)
    for name, array in arrays.items():
        if array.shared and (name, array) not in shared:
            shared[name, array] = backend.empty(array.shape, array.dtype)
        if array.shared:
            yield name, shared[name, array]
        elif not array.together:
            yield name, backend.empty(array.shape, array.dtype)


def _filled(backend: Backend[H], handle: H | None, activations: Uniform | NDArray[np.float32] | StoredRows) -> H:
    """Activations in the array that there is for them, or where they are stored."""
    if isinstance(activations, StoredRows):
        return backend.stored(activations)
    assert handle is not None
    _fill(backend, handle, activations)
    return handle


def _fill(backend: Backend[H], handle: H, source: Uniform | NDArray[np.float32]) -> None:
    _write(backend, handle, source)
    backend.freeze(handle)


def _write(backend: Backend[H], handle: H, source: Uniform | NDArray[np.float32]) -> None:
    if isinstance(source, Uniform):
        backend.init(handle, source.seed, source.subsequence, source.row_gain(), source.col_gain())
    else:
        backend.write(handle, source)
