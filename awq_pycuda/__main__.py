"""`python -m awq_pycuda`: which commands there are, one line each."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from awq_pycuda import __version__
from awq_pycuda.errors import InputError
from awq_pycuda.options import serve

# By command: its usual arguments, and what it does.
COMMANDS = {
    "run": ("tile=32 layers=6", "one run, into a results.h5"),
    "run -m": ("tile=8,16 n=512,1024", "a sweep: a run per combination"),
    "capture": ("model=DIR text=FILE out=FILE.h5", "a real model's layers into a file"),
    "analyze": ("PATH...", "tables, figures and a page"),
    "analyze compare": ("A B", "what changed from A to B"),
    "evaluate": ("model=DIR text=FILE out=DIR", "recipes on a whole language model"),
    "bench": ("shapes=1024", "kernels against limits and peers"),
}


def usage() -> str:
    """The text of `--help`: a line per command."""
    lines = [(f"python -m awq_pycuda.{command} {arguments}", does) for command, (arguments, does) in COMMANDS.items()]
    width = max(len(line) for line, _ in lines)
    listed = "\n".join(f"  {line:{width}}  {does}" for line, does in lines)
    return (
        f"awq_pycuda {__version__}: experiments with Activation-aware Weight Quantization\n\n{listed}\n\n"
        "Each takes --help and --version. Where the package is installed, each is a command of its own, too:\n"
        "awq-pycuda-run for awq_pycuda.run.\n"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the list whatever the arguments (default: the process's), none being allowed; returns the exit code."""
    return serve(sys.argv[1:] if arguments is None else arguments, usage(), _work)


def _work(arguments: Sequence[str]) -> int:
    if arguments:
        names = dict.fromkeys(f"python -m awq_pycuda.{command.split()[0]}" for command in COMMANDS)
        raise InputError(f"{' '.join(arguments)}: is no option; allowed: --help, --version, or {', '.join(names)}")
    print(usage(), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
