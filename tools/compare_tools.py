"""Holds our scale search and quantizer against a tool's own code, layer by layer of a layer file.

`compare_tools.py --tool autoawq --layers FILE --format int4_g128 int4_g128_sym`, in an environment that has the tool's
package, or with `--source FOLDER` its source; and what this project needs. PyTorch on the CPU suffices, nothing is
fetched. A format is `int` and its bits, then `g` and its group size or `row`, with `_sym` for one without zero points.

Both work in float32, so that mathematics is compared and not the rounding of a model's half precision. For each layer:

- which candidate each chose, and how much larger the tool's error is at our choice;
- at the tool's own scales of every candidate: how many codes, steps and zero points differ (`codes`), and by how much
  the errors do (`same s`), both with PyTorch's product: where the tool's outputs are a thousand times their errors, the
  order in which float32 sums are made moves these by more than the codes do;
- by how much the scales differ (`scales`), and errors where each has its own (`own s`): what differs in its last bits
  sends weights at a rounding tie to another code.

With `--clip`, where the tool has it, also what clipping leaves to each group at the tool's choice: how many groups
differ, and by how much at most their errors do.

Ours has one candidate more where the tool has no RTN; it is left out here, and told where it would have been chosen.

A choice that differs although at the tool's scales ours is the tool's is a near tie. Exit code 1: anything else that
differs. 2: what was asked for cannot be.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import tool_adapters
from tool_adapters import Codes
from tool_watch import Array, Searched

from awq_pycuda import quantize
from awq_pycuda.choices import ConventionChoice, Formula
from awq_pycuda.errors import InputError
from awq_pycuda.layers.files import load_layers
from awq_pycuda.quant import quantized, search
from awq_pycuda.quant.clipping import Clipping, added, find_ratios, largest_of_groups
from awq_pycuda.quant.conventions import CONVENTIONS, Candidate, Convention
from awq_pycuda.quant.format import Format
from awq_pycuda.quant.tools import TOOLS

ADAPTERS: dict[str, type[tool_adapters.Tool]] = {
    "llm_awq": tool_adapters.LlmAwq,
    "autoawq": tool_adapters.AutoAwq,
    "gptqmodel": tool_adapters.GptqModel,
    "llm_compressor": tool_adapters.LlmCompressor,
    "torchao": tool_adapters.TorchAo,
}
SCALES, CLIPPED = 5e-6, 1e-5  # relative, of float32: scales, and errors of groups that clip otherwise

_FORMAT = re.compile(r"int(?P<bits>\d+)_(?:g(?P<size>\d+)|row)(?P<sym>_sym)?")


class AtWork(Protocol):
    """A tool in one format; see `tool_adapters.Tool`."""

    rounding: float

    def search(self, w: Array, x: Array) -> Searched: ...

    def quantize(self, scaled: Array) -> Codes: ...

    def clip(self, scaled: Array, x: Array) -> Array | None: ...

    def product(self, x: Array, w: Array) -> Array: ...


@dataclass(frozen=True)
class Comparison:
    """What was seen of one layer.

    Attributes:
        name: of the layer.
        theirs: the candidate that the tool chose.
        ours: that of ours, of the tool's candidates.
        at_theirs: that of ours at the tool's scales; the tool's own, where only the last bits of scales differ.
        margin: how much larger the tool's error is at our choice, relative; 0 where it is the same.
        runner_up: how much larger it is at its own second best.
        different: codes, steps and zero points that differ at the tool's scales, of all candidates.
        same_s: largest relative difference of errors at the tool's scales.
        scales: largest relative difference of the scales themselves.
        own_s: that of errors where each has its own scales.
        rounding: by how much errors at the tool's scales may differ.
        rtn: whether our RTN, which the tool does not try, has a lower error than all that it tries.
        clips: how many groups are clipped otherwise, of how many; None where it is not compared.
        clip_margin: how much their errors differ at most, relative.
    """

    name: str
    theirs: Candidate
    ours: Candidate
    at_theirs: Candidate
    margin: float
    runner_up: float
    different: int
    same_s: float
    scales: float
    own_s: float
    rounding: float
    rtn: bool
    clips: tuple[int, int] | None = None
    clip_margin: float = 0.0

    @property
    def fault(self) -> str | None:
        """What differs beyond the last bits of scales."""
        if self.different:
            return f"{self.different} codes, steps or zero points differ"
        if not self.same_s < self.rounding:
            return "errors differ at the same scales"
        if not self.scales < SCALES:
            return "scales differ"
        if self.at_theirs != self.theirs:
            return "another candidate at the same scales"
        if not self.clip_margin < CLIPPED:
            return "clipped otherwise"
        return None

    @property
    def verdict(self) -> str:
        """The last cell of its row."""
        found = self.fault or ("same" if self.ours == self.theirs else "near tie")
        if self.clips:
            found += f"; of {self.clips[1]} groups {self.clips[0]} clipped otherwise, by {self.clip_margin:.1e}"
        return f"{found}; RTN is better" if self.rtn else found

    @property
    def row(self) -> str:
        """As a line of the table; `HEAD` names its cells."""
        return (
            f"{self.name:38} {self.theirs!s:>12} {self.ours!s:>12} {self.margin:9.1e} {self.runner_up:9.1e} "
            f"{self.different:6} {self.same_s:8.1e} {self.scales:8.1e} {self.own_s:8.1e}  {self.verdict}"
        )


HEAD = (
    f"{'layer':38} {'theirs':>12} {'ours':>12} {'margin':>9} {'runner-up':>9} {'codes':>6} {'same s':>8} {'scales':>8} "
    f"{'own s':>8}  verdict"
)


def read_format(text: str, tool: Format) -> Format:
    """The tool's format with the bits, the groups and the symmetry that a text such as `int4_g128_sym` names.

    Raises an InputError.
    """
    found = _FORMAT.fullmatch(text)
    if found is None:
        raise InputError(f"--format={text}: allowed: int and 2 to 8 bits, _g and a group size or _row, maybe _sym")
    size = found["size"]
    return replace(
        tool, bits=int(found["bits"]), group_size=None if size is None else int(size), symmetric=bool(found["sym"])
    )


def convention_of(tool: str, form: Format, formula: Formula) -> Convention:
    """Ours of that name, in a format and with a formula of the tool's; without clipping, which comes after scales."""
    choice = ConventionChoice[tool]
    gammas = TOOLS[choice].gammas_for(formula)
    return replace(CONVENTIONS[choice], quantizer=form, formula=formula, gammas=gammas, clip=None)


def compare(name: str, tool: AtWork, convention: Convention, w: Array, x: Array, clip: bool = False) -> Comparison:
    """Lets the tool and ours search one layer's scales, and quantize it at the tool's.

    Args:
        name: of the layer.
        tool: in the format and with the formula of the convention.
        convention: ours.
        w: (N, K) float32 weights.
        x: (M, K) float32 activations.
        clip: whether to compare clipping, too.

    Returns:
        Everything that differs. A tool that tries other candidates than ours is an InputError.
    """
    theirs = tool.search(w, x)
    ours = quantize(w, x, convention=convention, backend="cpu")
    grid = ours.search.grid.candidates
    places = [_place(grid, each) for each in theirs.candidates]
    extra = set(range(len(grid))) - set(places)
    if -1 in places or any(not grid[place].is_rtn for place in extra):
        tried = ", ".join(map(str, theirs.candidates))
        raise InputError(f"{name}: the tool tries {tried}; allowed: {', '.join(map(str, grid))}")
    errors, scales = ours.error[places], _scales(convention, w, x)[places]
    chosen = int(np.argmin(errors))
    second = np.partition(theirs.errors, 1)[1] if len(theirs.errors) > 1 else np.inf
    least = theirs.errors[theirs.chosen]
    at_theirs = [_at(tool, convention.quantizer, w, x, s) for s in theirs.scales]
    same_s = np.array([error for _, error in at_theirs])
    clips = _clips(tool, convention.quantizer, w, x, theirs.scales[theirs.chosen]) if clip else (None, 0.0)
    return Comparison(
        name,
        theirs.candidates[theirs.chosen],
        theirs.candidates[chosen],
        theirs.candidates[int(np.argmin(same_s))],
        float(theirs.errors[chosen] / least - 1),
        float(second / least - 1),
        sum(different for different, _ in at_theirs),
        _largest(same_s / theirs.errors - 1),
        _largest(scales / theirs.scales - 1),
        _largest(errors / theirs.errors - 1),
        tool.rounding,
        bool(extra) and bool(ours.error[ours.search.grid.rtn] < errors.min()),
        *clips,
    )


def _place(candidates: Iterable[Candidate], wanted: Candidate) -> int:
    """Where it stands, -1 for nowhere; the tools' exponents may differ in the last bit."""
    found = (
        index
        for index, each in enumerate(candidates)
        if each.duo == wanted.duo and abs(each.gamma - wanted.gamma) < 1e-9
    )
    return next(found, -1)


def _scales(convention: Convention, w: Array, x: Array) -> Array:
    """Ours of every candidate: (G, K)."""
    abs_mean = np.abs(x).mean(axis=0, dtype=np.float64).astype(np.float32)
    return search.candidates(convention, abs_mean, search.weight_means([w], convention.quantizer))


def _largest(differences: Array) -> float:
    return float(np.abs(differences).max())


def _at(tool: AtWork, form: Format, w: Array, x: Array, s: Array) -> tuple[int, float]:
    """What differs between the tool's and our codes of `W·s`, and our error there, by the tool's float32 product."""
    scaled, ones = (w * s).astype(w.dtype), np.ones(w.shape[1], w.dtype)  # llm-compressor's duo has s in float64
    steps = quantized.steps_of(scaled, ones, form)
    made = quantized.Quantized(codes=np.empty(w.shape, form.code_dtype), format=form, **steps.arrays)
    quantized.quantize(scaled, ones, made)
    theirs = tool.quantize(scaled)
    pairs = [(made.codes, theirs.codes), (made.steps, theirs.steps)]
    if made.zero_points is not None:
        pairs.append((made.zero_points, np.empty(0) if theirs.zeros is None else theirs.zeros))
    different = sum(
        int(np.count_nonzero(one != other)) if one.shape == other.shape else one.size for one, other in pairs
    )
    dequantized = (quantized.dequantize(made) / s).astype(w.dtype)
    off = tool.product(x, w).astype(np.float64) - tool.product(x, dequantized)
    return different, float(np.mean(off**2))


def _clips(tool: AtWork, form: Format, w: Array, x: Array, s: Array) -> tuple[tuple[int, int] | None, float]:
    """`Comparison.clips` and its margin, at these scales."""
    scaled, ones = (w * s).astype(w.dtype), np.ones(w.shape[1], w.dtype)
    limits = tool.clip(scaled, (x / s).astype(x.dtype))
    if limits is None:
        return None, 0.0
    settings = Clipping()
    seen = (settings.of(x) / s).astype(x.dtype)
    ours = find_ratios(scaled, ones, seen, form, settings.ratios).ratio
    peaks = largest_of_groups(scaled, form)
    theirs = np.ones_like(peaks)  # of zeros there is nothing to clip
    np.divide(limits, peaks, out=theirs, where=peaks > 0)
    other = np.abs(ours - theirs) > 1e-3
    if not other.any():
        return (0, other.size), 0.0
    errors = [_group_errors(scaled, peaks * ratio, seen, form)[other] for ratio in (ours, theirs)]
    return (int(other.sum()), other.size), _largest(errors[1] / errors[0] - 1)


def _group_errors(scaled: Array, limits: Array, x: Array, form: Format) -> Array:
    """(N, groups) squares of what clipping and quantization add to each group's part of an output, in float64."""
    off = added(scaled, limits, form, np.float32(1)).astype(np.float64)
    found = []
    for (_, weights), (_, tokens) in zip(form.parts(off), form.parts(x.astype(np.float64)), strict=True):
        products = np.matmul(weights.transpose(1, 0, 2), tokens.transpose(1, 2, 0))
        found.append((products**2).mean(axis=2).T)
    return np.concatenate(found, axis=1)


def summary(seen: Sequence[Comparison]) -> str:
    """All layers in one format, in words."""
    same = sum(each.ours == each.theirs for each in seen)
    ties = sum(each.ours != each.theirs and each.fault is None for each in seen)
    faults = sum(each.fault is not None for each in seen)
    same_s, scales, own_s = (max(getattr(each, name) for each in seen) for name in ("same_s", "scales", "own_s"))
    return (
        f"{same} of {len(seen)} layers choose the same candidate, {ties} another at a near tie, {faults} differ; "
        f"{sum(each.different for each in seen)} codes, steps or zero points differ; errors at the same s by at most "
        f"{same_s:.1e}, scales by {scales:.1e}, errors with own s by {own_s:.1e}; RTN is better in "
        f"{sum(each.rtn for each in seen)}{_of_clips(seen)}"
    )


def _of_clips(seen: Sequence[Comparison]) -> str:
    clips = [each.clips for each in seen if each.clips]
    if not clips:
        return ""
    other, groups = (sum(numbers) for numbers in zip(*clips, strict=True))
    return f"; of {groups} groups {other} clipped otherwise, by {max(each.clip_margin for each in seen):.1e}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the tables; see the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tool", required=True, choices=sorted(ADAPTERS))
    parser.add_argument("--source", type=Path, help="the tool's source folder, instead of its installed package")
    parser.add_argument("--layers", required=True, type=Path, help="a layer file with activations")
    parser.add_argument("--count", type=int, help="so many of its layers; all by default")
    parser.add_argument("--format", nargs="+", default=["int4_g128"])
    parser.add_argument("--clip", action="store_true", help="compare clipping, too")
    parser.add_argument("--formula", choices=[each.name for each in Formula], help="the tool's default by default")
    chosen = parser.parse_args(arguments)
    try:
        return _tables(chosen)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _tables(chosen: argparse.Namespace) -> int:
    adapter = ADAPTERS[chosen.tool]
    formula = Formula[chosen.formula] if chosen.formula else adapter.formulas[0]
    if formula not in adapter.formulas:
        raise InputError(f"--formula={formula.name}: allowed: {', '.join(each.name for each in adapter.formulas)}")
    forms = [read_format(text, CONVENTIONS[ConventionChoice[chosen.tool]].quantizer) for text in chosen.format]
    for text, form in zip(chosen.format, forms, strict=True):
        if why := adapter.refusal(form):
            raise InputError(f"--format={text}: {why}")
    layers = load_layers(chosen.layers, chosen.count)
    print(adapter.find(chosen.source))
    failed = False
    for text, form in zip(chosen.format, forms, strict=True):
        tool, convention = adapter(form, formula), convention_of(chosen.tool, form, formula)
        print(f"\n{chosen.tool}, {text}, {formula.name}\n{HEAD}")
        seen = []
        settings = CONVENTIONS[ConventionChoice[chosen.tool]]
        for layer in layers:
            if layer.activations is None:
                raise InputError(f"{chosen.layers}: {layer.name}: no activations; allowed: layers with their own")
            clip = chosen.clip and settings.clips(layer.name)
            seen.append(compare(layer.name, tool, convention, layer.weight, np.array(layer.activations), clip))
            print(seen[-1].row, flush=True)
        print(summary(seen))
        failed = failed or any(each.fault for each in seen)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
