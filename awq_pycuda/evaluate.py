"""Evaluates what recipes of quantization do to a whole language model.

``python -m awq_pycuda.evaluate model=FOLDER text=FILE out=FOLDER`` quantizes the model's linear layers by each recipe,
runs held-out text through original and quantized model, and writes how far their predictions are apart. From local
files alone, on the CPU or a GPU. Needs what ``requirements-capture.txt`` names.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from awq_pycuda import signals
from awq_pycuda.backends.choose import why_no_cuda
from awq_pycuda.capturing.fault import Fault
from awq_pycuda.capturing.given import check_given, model_option, text_option
from awq_pycuda.capturing.loading import find_libraries
from awq_pycuda.console import make_console, next_command, print_line, progress
from awq_pycuda.errors import InputError, RunFailed
from awq_pycuda.options import REQUIRED, SYNTAX, describe, nonempty, one_of, option, parse, refusal, serve, whole

if TYPE_CHECKING:
    from awq_pycuda.evaluating.request import Request

_CHOICES = ("auto", "cpu", "cuda")
_UNTIL = ("logits", "block")


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the command line sets."""

    model: str = model_option()
    text: str = text_option()
    out: str = option(
        "FOLDER",
        "for evaluation.h5, the calibration and a folder per recipe; what is there and still holds is used again",
        "a folder, or the name of one in an existing folder, that can be written to",
        nonempty,
        REQUIRED,
    )
    recipes: str = option(
        "FILE",
        "what to evaluate: a YAML file of recipes, the name of one that comes along, or results of runs",
        "a YAML file, a name of conf/recipes, a results.h5 or a folder with some",
        nonempty,
        "default",
    )
    calibration: int = option(
        "NUMBER",
        "tokens of the text, from its first on, that recipes are searched on if they do not say how many",
        "whole numbers of at least 1",
        whole(minimum=1),
        512,
    )
    skip: int = option(
        "NUMBER", "tokens behind them that nothing runs on", "whole numbers of at least 0", whole(minimum=0), 0
    )
    tokens: int = option(
        "NUMBER",
        "tokens behind these to evaluate on",
        "whole numbers that make at least two windows",
        whole(minimum=1),
        4096,
    )
    window: int = option(
        "NUMBER",
        "the most tokens that run together, special ones counted; shorter where the model knows no longer ones",
        "whole numbers of at least 2",
        whole(minimum=2),
        512,
    )
    alone: str = option("RECIPE", "also try each layer alone by this recipe", "the name of one of the recipes", str, "")
    alone_until: str = option(
        "WORD",
        "how far its forwards go; block: to the end of the layer's block, whose error tells most and takes a tenth "
        "of the time",
        ", ".join(_UNTIL),
        one_of(*_UNTIL),
        "logits",
    )
    backend: str = option("NAME", "where recipes are searched", ", ".join(_CHOICES), one_of(*_CHOICES), "auto")
    device: str = option("NAME", "where the model runs", ", ".join(_CHOICES), one_of(*_CHOICES), "auto")
    threads: int = option(
        "NUMBER",
        "threads of the host, each with a window of its own; 0: all cores",
        "whole numbers of at least 0",
        whole(minimum=0),
        0,
    )


USAGE = f"""\
Usage: python -m awq_pycuda.evaluate model=FOLDER text=FILE out=FOLDER [key=value ...]

Quantizes the linear layers of a local causal language model by each of the recipes, all searched on one calibration,
and tells by a text behind that how far the model's predictions are from the original's: KL divergence in both
directions, perplexity, and how often both find the same token the likeliest, with intervals.

{describe(Options)}
{SYNTAX}
Exit codes: 0 done, 1 something failed, 2 bad input, 128 + number stopped by a signal; then, too, the file holds what
was finished. Needs torch and transformers, for GGUF files gguf and accelerate, too:
pip install -r requirements-capture.txt
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command with its arguments (default: the process's); returns the exit code, one of USAGE."""
    return serve(sys.argv[1:] if arguments is None else arguments, USAGE, _work)


def _work(arguments: Sequence[str]) -> int:
    options, _ = parse(Options, arguments)
    try:
        return _evaluate(options)
    except Fault as fault:
        raise fault.worded(options) from fault
    except RunFailed as failed:
        print(f"failed: {failed}", file=sys.stderr)
        return 1


def _evaluate(options: Options) -> int:
    check_given(options.model, options.text)
    _check_out(options)
    request = _request(options)
    find_libraries()
    # Only now: bad arguments are told at once, and the session needs PyTorch.
    from awq_pycuda.analysis.evaluations import evaluations_of
    from awq_pycuda.analysis.printing_evaluation import print_evaluation
    from awq_pycuda.evaluating.session import evaluate
    from awq_pycuda.results.evaluation_schema import FILE_NAME
    from awq_pycuda.results.evaluation_write import write_evaluation

    console = make_console()
    with signals.held():
        with progress(console) as on_progress:
            record = evaluate(request, lambda line: print_line(console, line), on_progress, signals.released())
        path = request.out / FILE_NAME
        request.out.mkdir(exist_ok=True)
        write_evaluation(path, record)
    print_evaluation(console, *evaluations_of([(path, record)]))
    print_line(console, f"results {path}")
    print_line(console, f"next: {next_command(request.out)}")
    if record.ended is None:
        return 0
    if isinstance(record.ended, RunFailed) and record.ended.interrupted:
        with signals.released():  # the signal that a run has told of
            pass
    if isinstance(record.ended, InputError | KeyboardInterrupt | Fault):
        raise record.ended
    print(f"failed: {record.root['error']}", file=sys.stderr)
    return 1


def _check_out(options: Options) -> None:
    out = Path(options.out)
    if os.path.lexists(out) and not out.is_dir():
        raise refusal(Options, "out", options.out, "is no folder")
    folder = out if out.is_dir() else out.parent
    try:
        with tempfile.TemporaryFile(dir=folder):  # root passes every permission check, so only trying tells
            pass
    except OSError as error:
        raise refusal(Options, "out", options.out, error.strerror or str(error)) from None


def _request(options: Options) -> Request:
    """What is to be evaluated, with all checked that can be told without the model."""
    from awq_pycuda.evaluating.recipes import parse as parse_recipes
    from awq_pycuda.evaluating.request import Request
    from awq_pycuda.parallel import host_threads, use_threads

    shared = [f"backend={options.backend}", *([f"threads={options.threads}"] if options.threads else [])]
    recipes = parse_recipes(options.recipes, options.calibration, shared)
    names = [recipe.name for recipe in recipes]
    if options.alone and options.alone not in names:
        raise InputError(f"alone={options.alone}: is none of the recipes; allowed: {', '.join(names)}")
    with use_threads(options.threads or None):
        workers = host_threads()
    return Request(
        model=Path(options.model),
        text=Path(options.text),
        out=Path(options.out),
        recipes=recipes,
        calibration=options.calibration,
        skip=options.skip,
        tokens=options.tokens,
        window=options.window,
        alone=options.alone,
        alone_to_logits=options.alone_until == "logits",
        device=_device(options),
        workers=workers,
        options=asdict(options),
    )


def _device(options: Options) -> str:
    """Where the model runs; raises `InputError` where it cannot run as asked."""
    if options.device == "cpu":
        return "cpu"
    try:
        import torch
    except ImportError:
        return "cpu"  # what loads the model says what is missing
    if torch.cuda.is_available():
        return "cuda"
    if options.device == "cuda":
        obstacle = why_no_cuda() or "PyTorch finds no GPU, or has no support for it"
        raise InputError(f"device=cuda: {obstacle}; allowed here: auto, cpu")
    return "cpu"


if __name__ == "__main__":
    sys.exit(main())
