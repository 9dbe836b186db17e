"""What `run` does before it imports the rest of itself: signals, streams, and what can get ready meanwhile."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from contextlib import suppress

from awq_pycuda import signals, streams


def begin(arguments: Sequence[str]) -> None:
    """Makes the process safe to stop and to write, and begins what this command line will ask for.

    That is the workers of a sweep, or the GPU of a single run, unless it says `backend=cpu`; an experiment may say so,
    too, and then they were begun for nothing.
    """
    signals.exit_before_work()
    streams.prepare()
    gc.disable()  # what is imported stays, and to look for garbage in it takes 30 ms
    flags = [argument for argument in arguments if argument.startswith("-")]
    on_gpu = "backend=cpu" not in arguments
    if flags in (["-m"], ["--multirun"]) and not any("hydra/launcher" in argument for argument in arguments):
        from awq_pycuda.sweeps import hosts

        with suppress(OSError):  # such as no room for temporary files: met again, and told, where jobs are checked
            hosts.start(on_gpu)
    elif not flags and on_gpu:
        from awq_pycuda.backends.cuda import early

        early.begin()


def imported() -> None:
    """Garbage is looked for again, but never among what has been imported: at the end, too, that takes 50 ms."""
    gc.freeze()
    gc.enable()
