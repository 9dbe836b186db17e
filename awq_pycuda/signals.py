"""Ctrl-C, a terminal that closes and a polite kill are told alike: by a `Stopped` in the main thread."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def _leave(number: int, frame: FrameType | None) -> None:
    os.write(2, b"interrupted before any work\n")
    os._exit(128 + number)


_REPLACEABLE = (signal.SIG_DFL, signal.default_int_handler, _leave)


def exit_before_work() -> None:
    """Until a `stoppable`, a signal ends this process with one line: nothing has begun that could be lost."""
    for each in STOPPING:
        if signal.getsignal(each) in _REPLACEABLE:
            signal.signal(each, _leave)


class Stopped(KeyboardInterrupt):
    """A signal asked this process to stop; the message says which."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(f"interrupted by {number.name}")
        self.number = number


@dataclass
class Stop:
    """The first signal that asked this process to stop, None so far; `held`: it is noted, but not raised."""

    number: signal.Signals | None = None
    held: bool = False

    def exit_code(self, otherwise: int) -> int:
        """What shells give a command that the signal ended; `otherwise` where none came."""
        return otherwise if self.number is None else 128 + self.number


_current = Stop()  # of the innermost `stoppable`


@contextmanager
def stoppable(first: Callable[[signal.Signals], None] = lambda number: None) -> Iterator[Stop]:
    """Within it the first signal raises `Stopped` in the main thread; later ones change nothing.

    What is ignored stays so (`nohup`, a shell's background job), and what has another handler keeps it: launchers of
    sweeps have their own. In other threads than the main one it does nothing.

    Args:
        first: called before the exception is raised.
    """
    global _current
    outer, stop = _current, Stop()

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.number is None:
            stop.number = signal.Signals(number)
            first(stop.number)
            if not stop.held:
                raise Stopped(stop.number)

    in_main = threading.current_thread() is threading.main_thread()
    before = {each: signal.getsignal(each) for each in STOPPING}
    taken = [each for each in STOPPING if in_main and before[each] in _REPLACEABLE]
    if taken:
        _current = stop
    for each in taken:
        signal.signal(each, handle)
    try:
        yield stop
    finally:
        for each in taken:
            signal.signal(each, before[each])
        _current = outer


@contextmanager
def held() -> Iterator[None]:
    """Within it a signal waits for a `released`, so that files are written whole and told of."""
    _current.held = True
    try:
        yield
    finally:
        _current.held = False


@contextmanager
def released() -> Iterator[None]:
    """The part of a `held` block that a signal ends, also one that came before."""
    _current.held = False
    try:
        if _current.number is not None:
            raise Stopped(_current.number)
        yield
    finally:
        _current.held = True


def ignore() -> None:
    """From now on signals change nothing: this process is about to end."""
    for each in STOPPING:
        signal.signal(each, signal.SIG_IGN)
