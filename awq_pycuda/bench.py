"""`python -m awq_pycuda.bench`: every kernel against the limits of this machine, and against its peers."""

from __future__ import annotations

import os
import re
import shlex
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

from awq_pycuda import signals
from awq_pycuda.console import make_console, print_line, progress
from awq_pycuda.errors import InputError
from awq_pycuda.kernels import table
from awq_pycuda.kernels.launches import ONLY
from awq_pycuda.kernels.work import WORK
from awq_pycuda.options import (
    SYNTAX,
    describe,
    nonempty,
    one_of,
    option,
    parse,
    positive,
    refusal,
    serve,
    share,
    shown,
    whole,
    words,
)

if TYPE_CHECKING:  # NumPy and what stands on it take a moment to import; --help and bad input do without
    from awq_pycuda.benchmarks.goals import Goal
    from awq_pycuda.benchmarks.places import Place
    from awq_pycuda.benchmarks.plan import Plan
    from awq_pycuda.benchmarks.shapes import Shape

GOALS = "goals"
CASES = ("kernels", "pass", "llama7b", GOALS)
BACKENDS = ("auto", "cuda", "cpu")
PEERS = ("auto", "none", "eager", "compiled", "libraries")
# As the rows have them: those of the table of kernels, where a search runs or its weights lie, and NumPy's and Numba's.
VARIANTS = (
    *dict.fromkeys(variant.name for variant in table.VARIANTS if variant.name != ONLY),
    *("device", "host", "search on the host", "weights on the device", "weights from the host", "numpy", "numba"),
)
_OF_LAYERS = ("kernels", "variants", "shapes", "points", "group_size", "tile", "layers")  # keys that goals say, too
_COPIES = 4  # of the arrays on a GPU: one for each variant of a stage, and those of the peers
_SHAPE = re.compile(r"([1-9][0-9]{0,6})(?:x([1-9][0-9]{0,6})x([1-9][0-9]{0,6}))?")


def _shapes(given: str) -> tuple[str, ...]:
    found = tuple(dict.fromkeys(given.split(",")))
    for each in found:
        if not _SHAPE.fullmatch(each):
            raise ValueError(f"{each!r} is none" if given else "is missing")
    return found


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """What the command line sets."""

    case: tuple[str, ...] = option(
        "WORDS",
        "what to measure: kernels, each alone; pass, a whole pass; llama7b, the search of such a model's layers; "
        "goals, by itself: every figure of one GPU that was set out to be reached",
        " or ".join(CASES),
        words(*CASES),
        ("kernels",),
    )
    kernels: tuple[str, ...] = option(
        "STAGES",
        "the stages whose kernels are measured, in every variant; none given: all",
        ", ".join(WORK),
        words(*WORK),
        (),
    )
    variants: tuple[str, ...] = option(
        "WORDS",
        "of stages with variants of these names those alone, as of the product and the search; none given: all",
        ", ".join(VARIANTS),
        words(*VARIANTS),
        (),
    )
    shapes: tuple[str, ...] = option(
        "SIZES",
        "layers to measure: N for N x N with N tokens, or OUTxINxTOKENS",
        "sizes such as 1024,4096x4096x512",
        _shapes,
        ("1024",),
    )
    points: int = option("COUNT", "candidates that the search compares", "a whole number from 1", whole(1), 5)
    group_size: int = option(
        "COUNT", "input channels of a group; 0: all of a row", "a whole number from 0", whole(0), 0
    )
    tile: int = option("COUNT", "the tile of those products that have one", "a whole number from 1", whole(1), 16)
    layers: int = option("COUNT", "layers of a pass", "a whole number from 1", whole(1), 3)
    seed: int = option("NUMBER", "of the inputs", "a whole number from 0", whole(0), 0)
    backend: str = option("NAME", "where to measure", ", ".join(BACKENDS), one_of(*BACKENDS), "auto")
    peers: tuple[str, ...] = option(
        "WORDS",
        "what to compare with, by PyTorch where it is installed; auto: all on a GPU, eager on the CPU; libraries: "
        "cuBLAS alone",
        ", ".join(PEERS),
        words(*PEERS),
        ("auto",),
    )
    noise: float = option(
        "SHARE",
        "certain enough: half of the median's 95 % interval, as a share of the median",
        "a number from 0 to below 1",
        share,
        0.01,
    )
    seconds: float = option(
        "SECONDS", "time limit for all that computes the same, on one shape", "a number above 0", positive, 1.0
    )
    out: str = option(
        "FILE",
        "HDF5 file to write; pictures lie beside it",
        "a path in a folder that can be written to, where no file is",
        nonempty,
        "bench.h5",
    )


USAGE = f"""\
Usage: python -m awq_pycuda.bench [key=value ...]

Measures what the machine can do at most (read, write, copy, arithmetic), then every kernel: verified against float64
on fresh inputs with poisoned outputs, timed with a cold and a warm cache in turn with its peers, and told as a share of
its own limit. Writes every sample, with clock, power and temperature where a GPU tells them, and a roofline picture.
`python -m awq_pycuda.analyze compare A B` compares two such files.

{describe(BenchOptions)}
{SYNTAX}
Exit codes: 0 done, 1 anything of ours is wrong or faster than can be, or writing failed, 2 bad input, 128 + number
stopped by a signal; then, too, the file holds what was measured.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command with its arguments (default: the process's); returns the exit code, one of USAGE."""
    return serve(sys.argv[1:] if arguments is None else arguments, USAGE, _work)


def _work(arguments: Sequence[str]) -> int:
    options, _ = parse(BenchOptions, arguments)
    out = Path(options.out)
    if os.path.lexists(out):
        raise refusal(BenchOptions, "out", out, "is there already")
    try:
        with tempfile.TemporaryFile(dir=out.parent):  # root passes every permission check, so only trying tells
            pass
    except OSError as error:
        raise refusal(BenchOptions, "out", out, error.strerror or str(error)) from None
    import psutil

    from awq_pycuda.analysis.figures_bench import write_roofline
    from awq_pycuda.benchmarks import printing
    from awq_pycuda.benchmarks.goals import reached
    from awq_pycuda.benchmarks.peers import Peers
    from awq_pycuda.benchmarks.plan import host_bytes, layer_bytes
    from awq_pycuda.benchmarks.session import measure
    from awq_pycuda.limits import refuse_beyond_memory
    from awq_pycuda.results.bench_write import write_bench

    plan, goals = _plan(options)
    key = f"case={GOALS}" if goals else f"shapes={','.join(options.shapes)}"
    on_host = host_bytes(plan) + layer_bytes(plan)
    refuse_beyond_memory(key, on_host, psutil.virtual_memory().available, "host's memory")
    place, reason = _place(options)
    peers = Peers(_wanted(options.peers, place.torch_device), place.torch_device)
    console = make_console()
    print_line(console, reason)
    with signals.held():
        with place:
            if (free := place.free_bytes()) is not None:
                refuse_beyond_memory(key, _COPIES * layer_bytes(plan), free, "GPU's memory")
            with progress(console) as on_progress:
                record = measure(place, peers, plan, on_progress, signals.released())
        record = replace(record, goals=reached(goals, record.rows))
        write_bench(out, record)
    pictures = write_roofline(record, out)
    printing.print_record(console, record)
    print_line(console, f"results {out}")
    for picture in pictures:
        print_line(console, f"picture {picture}")
    print_line(console, f"next: python -m awq_pycuda.analyze compare {shlex.quote(str(out))} OTHER.h5")
    if record.stopped is not None:
        raise record.stopped
    return int(printing.ours_failed(record))


def _plan(options: BenchOptions) -> tuple[Plan, Sequence[Goal]]:
    """What to measure, and for which goals."""
    from awq_pycuda.benchmarks import goals
    from awq_pycuda.benchmarks.plan import Plan, parts_of

    rest = (options.seed, options.noise, options.seconds)
    if GOALS in options.case:
        _refuse_beside_goals(options)
        return Plan(goals.parts_for(goals.GOALS), goals.LAYERS, *rest), goals.GOALS
    shapes = tuple(_shape(each, options) for each in options.shapes)
    parts = parts_of(options.case, shapes, options.kernels or tuple(WORK), options.variants)
    return Plan(parts, options.layers, *rest), ()


def _refuse_beside_goals(options: BenchOptions) -> None:
    """Goals say by themselves what is measured, so that whatever else says it is refused."""
    if options.case != (GOALS,):
        raise refusal(BenchOptions, "case", ",".join(options.case), f"{GOALS} stands by itself")
    for each in fields(BenchOptions):
        value = getattr(options, each.name)
        if each.name in _OF_LAYERS and value != each.default:
            raise InputError(
                f"{each.name}={shown(value)}: case={GOALS} has its own; allowed: with case={', '.join(CASES[:-1])}"
            )


def _shape(text: str, options: BenchOptions) -> Shape:
    from awq_pycuda.benchmarks.shapes import Shape

    found = _SHAPE.fullmatch(text)
    assert found is not None
    out_features, in_features, tokens = (int(side or found[1]) for side in found.groups())
    if "pass" in options.case and options.layers > 1 and out_features != in_features:
        raise refusal(BenchOptions, "shapes", text, f"layers={options.layers} of a chain must be square")
    return Shape(tokens, out_features, in_features, options.points, options.group_size or None)


def _place(options: BenchOptions) -> tuple[Place, str]:
    """The machine to measure, not entered, and one line that says which it is and why."""
    from awq_pycuda.backends.choose import why_no_cuda
    from awq_pycuda.benchmarks.places import CpuPlace

    obstacle = None if options.backend == "cpu" else why_no_cuda()
    if options.backend == "cuda" and obstacle is not None:
        raise InputError(f"backend=cuda: {obstacle}; allowed here: auto, cpu")
    if options.backend == "cpu" or obstacle is not None:
        if GOALS in options.case:
            raise InputError(
                f"case={GOALS}: is of a GPU ({obstacle or 'backend=cpu'}); allowed here: {', '.join(CASES[:-1])}"
            )
        return CpuPlace(), f"backend cpu ({'as asked' if obstacle is None else f'auto: {obstacle}'})"
    from awq_pycuda.benchmarks.cuda_place import CudaPlace

    place = CudaPlace(options.tile)
    return place, f"backend cuda: {place.backend.device()['name']}"


def _wanted(given: Sequence[str], device: str) -> list[str]:
    """The peers to look for."""
    if "none" in given:
        return []
    if "auto" in given:
        return ["eager"] if device == "cpu" else [each for each in PEERS if each not in ("auto", "none")]
    return list(given)


if __name__ == "__main__":
    sys.exit(main())
