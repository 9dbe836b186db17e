"""Captures the linear layers of a Hugging Face model, with the activations that a text sends into them.

``python -m awq_pycuda.capture model=FOLDER text=FILE out=layers.h5 tokens=512`` writes a file for ``inputs=file``.
The model may be a GGUF file, too. Works on the CPU and from local files alone. Needs what ``requirements-capture.txt``
names.
"""

import enum
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console
from rich.table import Table

from awq_pycuda.capturing.fault import Fault, one_line
from awq_pycuda.capturing.given import check_given, model_option, text_option
from awq_pycuda.capturing.loading import load
from awq_pycuda.capturing.text import find_around, hash_text, read_windows
from awq_pycuda.errors import InputError
from awq_pycuda.layers.files import LayerShape, describe_layers
from awq_pycuda.options import REQUIRED, SYNTAX, describe, member, nonempty, option, parse, refusal, serve, whole

if TYPE_CHECKING:
    from awq_pycuda.capturing.probing import Plan


class Dtype(enum.Enum):
    """Dtypes that a layer file may have."""

    float32 = np.float32
    float16 = np.float16


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the command line sets."""

    model: str = model_option()
    text: str = text_option()
    out: str = option(
        "FILE.h5",
        "file to write; an existing one is replaced, once the new one is whole",
        "a file name that ends in .h5 or .hdf5, in an existing folder that can be written",
        nonempty,
        REQUIRED,
    )
    tokens: int = option(
        "NUMBER",
        "rows of activations per layer; the model's own special tokens count, padding never occurs",
        "whole numbers of at least 1",
        whole(minimum=1),
        512,
    )
    dtype: Dtype = option(
        "NAME", "dtype of the file", ", ".join(dtype.name for dtype in Dtype), member(Dtype), Dtype.float32
    )
    include: str = option(
        "REGEX",
        "only the layers in whose module path this is found, such as include='attention|layer.0'",
        "a regular expression that finds the path of at least one linear layer",
        str,
        "",
    )


USAGE = f"""\
Usage: python -m awq_pycuda.capture model=FOLDER text=FILE out=FILE.h5 [key=value ...]

Runs a text through a local Hugging Face model on the CPU and writes the weight, the bias and the input activations
of every linear layer, in the order in which they run, to an HDF5 file for `awq_pycuda.run inputs=file`.

{describe(Options)}
{SYNTAX}
Needs torch and transformers, for GGUF files gguf and accelerate, too: pip install -r requirements-capture.txt
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command with its arguments (default: the process's); the exit code is returned.

    Bad input ends in one line on stderr and exit code 2, with nothing written.
    """
    return serve(sys.argv[1:] if arguments is None else arguments, USAGE, _work)


def _work(arguments: Sequence[str]) -> int:
    options, _ = parse(Options, arguments)
    _check_options(options)
    for line in capture(options):
        print(line, file=sys.stderr)
    _print_summary(Path(options.out))
    return 0


def capture(options: Options) -> list[str]:
    """Write the layer file; what is to be said about it is returned, line by line.

    That is: of which types the weights of a GGUF file were, windows shorter than the tokens asked for, what was left
    out with its share of the model's parameters, how many tokens reached each expert. Raises `InputError` where model
    and text do not yield what the options ask for.
    """
    try:
        return _capture(options)
    except Fault as fault:
        raise fault.worded(options) from fault


def _capture(options: Options) -> list[str]:
    text = Path(options.text)
    text_hash = hash_text(text)
    loaded = load(Path(options.model))
    # Only now: these modules need PyTorch, and `load` says what to do where it is missing.
    from awq_pycuda.capturing import probing, windows
    from awq_pycuda.capturing.writing import NothingLeft, model_name, write_layers

    model, tokenizer = loaded.model, loaded.tokenizer
    around = find_around(text, tokenizer)
    # A window need not be longer than what is asked for, but holds at least one token of the text.
    window = windows.find_window(model, tokenizer, max(options.tokens, len(around) + 1), len(around))
    ids = read_windows(text, tokenizer, around, options.tokens, window.length)
    windows.check_ids(model, tokenizer, ids)
    plan = probing.make_plan(model, windows.plain_ids(model, tokenizer), around, window.length)
    plan = _choose(options, plan)
    if plan.experts:
        # Rows that go into experts do not say of which tokens they are: the last window ends with the tokens asked for.
        ids[-1] = ids[-1][: options.tokens - sum(map(len, ids[:-1]))]
    attributes = {
        "model": model_name(Path(options.model)),
        "model_type": model.config.model_type,
        "text_sha256": text_hash,
        "tokens": options.tokens,
        "window": window.length,
    }
    try:
        return write_layers(
            Path(options.out), loaded, plan, ids, options.tokens, window, attributes, options.dtype.value
        ).said
    except NothingLeft as nothing:
        raise _none_left(options, str(nothing)) from nothing
    except OSError as error:
        raise _refuse("out", options.out, f"cannot be written ({one_line(error)})") from error


def _choose(options: Options, plan: "Plan") -> "Plan":
    """What of a plan the option `include` names; raises `InputError` where that is nothing."""
    names = [*plan.layers, *plan.left_out, *(expert.name for stack in plan.experts.values() for expert in stack)]
    if not any(re.search(options.include, name) for name in names):
        what = "finds no linear layer" if names else f"finds nothing, for {options.model} has no linear layers"
        raise _refuse("include", options.include, what)
    chosen = plan.choose(lambda name: re.search(options.include, name) is not None)
    if not chosen.order:
        raise _none_left(options, "; ".join(sorted(set(chosen.left_out.values()))))
    return chosen


def _none_left(options: Options, reasons: str) -> InputError:
    return _refuse("include", options.include, f"finds only layers that cannot be captured ({reasons})")


def _refuse(key: str, value: str, fault: str) -> InputError:
    return refusal(Options, key, value, fault)


def _check_options(options: Options) -> None:
    try:
        check_given(options.model, options.text)
    except Fault as fault:
        raise fault.worded(options) from fault
    out = Path(options.out)
    if out.suffix.lower() not in (".h5", ".hdf5"):
        raise _refuse("out", options.out, f"has the suffix {out.suffix!r}")
    if out.is_dir():
        raise _refuse("out", options.out, "is a folder")
    if not out.parent.is_dir():
        raise _refuse("out", options.out, f"the folder {out.parent} does not exist")
    if not os.access(out.parent, os.W_OK | os.X_OK):
        raise _refuse("out", options.out, f"the folder {out.parent} cannot be written")
    try:
        re.compile(options.include)
    except re.error as error:
        raise _refuse("include", options.include, f"is no regular expression ({error})") from error


def _tokens(layers: Sequence[LayerShape]) -> str:
    """How many tokens the layers have: experts differ."""
    counts = sorted({layer.tokens or 0 for layer in layers})
    return str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"


def _print_summary(out: Path) -> None:
    layers = describe_layers(out)
    tail = f"{len(layers)} layers, {_tokens(layers)} tokens, {out.stat().st_size / 1e6:.1f} MB: {out}"
    if not sys.stdout.isatty():
        for layer in layers:
            print(f"{layer.name} {layer.out_features}x{layer.in_features}")
        print(tail)
        return
    table = Table("layer", "out_features", "in_features")
    for layer in layers:
        table.add_row(layer.name, str(layer.out_features), str(layer.in_features))
    console = Console()
    console.print(table)
    console.print(tail, soft_wrap=True, markup=False, highlight=False)


if __name__ == "__main__":
    sys.exit(main())
