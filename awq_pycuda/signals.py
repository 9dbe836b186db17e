"""Ctrl-C, a terminal that closes and a polite kill are told alike: by a `Stopped` in the main thread."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def _leave(number: int, frame: FrameType | None) -> None:
    os.write(2, b"interrupted before any work\n")
    os._exit(128 + number)


def _note(number: int, frame: FrameType | None) -> None:
    global _noted
    _noted = _noted or signal.Signals(number)


def _handle(number: int, frame: FrameType | None) -> None:
    if _current.number is not None:
        return
    came = signal.Signals(number)
    level = _current
    while level.outer is not None:  # the outermost is not of a `stoppable`, and outlives them all
        level.number, level = level.number or came, level.outer
    _current.first(came)
    if not _current.held:
        raise Stopped(came)


_REPLACEABLE = (signal.SIG_DFL, signal.default_int_handler, _leave, _note, _handle)


def exit_before_work() -> None:
    """Until a `stoppable`, a signal ends this process with one line: nothing has begun that could be lost."""
    _replace_handlers(_leave)


def note_between_jobs() -> None:
    """Outside of every `stoppable`, a signal is only noted; the next one has it from its start.

    For the processes of a launcher that kills them all when one is gone.
    """
    _replace_handlers(_note)


def came_between_jobs() -> bool:
    """Whether `note_between_jobs` has anything to tell."""
    return _noted is not None


def _replace_handlers(handler: Callable[[int, FrameType | None], None]) -> dict[signal.Signals, Any]:
    """Sets the handler of each signal whose handler is ours or Python's; those that were there before.

    What is ignored stays so (`nohup`, a shell's background job), and what has another handler keeps it: launchers of
    sweeps have their own.
    """
    before = {each: signal.getsignal(each) for each in STOPPING}
    taken = {each: known for each, known in before.items() if known in _REPLACEABLE}
    for each in taken:
        signal.signal(each, handler)
    return taken


class Stopped(KeyboardInterrupt):
    """A signal asked this process to stop; the message says which."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(f"interrupted by {number.name}")
        self.number = number


@dataclass
class Stop:
    """The first signal that asked this process to stop, None so far.

    `held`: it is noted, but not raised. `first` is called before it is raised; `outer` is the `stoppable` around.
    """

    number: signal.Signals | None = None
    held: bool = False
    first: Callable[[signal.Signals], None] = lambda number: None
    outer: Stop | None = None

    def exit_code(self, otherwise: int) -> int:
        """What shells give a command that the signal ended; `otherwise` where none came."""
        return otherwise if self.number is None else 128 + self.number


_noted: signal.Signals | None = None  # by `_note`
_current = Stop()  # of the innermost `stoppable`; without one, of none


@contextmanager
def stoppable(first: Callable[[signal.Signals], None] = lambda number: None, held: bool = False) -> Iterator[Stop]:
    """Within it the first signal raises `Stopped` in the main thread; later ones change nothing.

    In other threads than the main one it does nothing, nor to signals that are ignored or have a handler of others'.

    Args:
        first: called with the signal when it comes (at once, if that was before); only the innermost one's is.
        held: nothing is raised.
    """
    global _current
    if threading.current_thread() is not threading.main_thread():
        yield Stop()
        return
    outer = _current
    _current = stop = Stop(held=held, first=first, outer=outer)
    taken = _replace_handlers(_handle)
    try:
        if _noted is not None and stop.number is None:
            _handle(_noted, None)
        yield stop
    finally:
        for each, handler in taken.items():
            signal.signal(each, handler)
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
def importing() -> Iterator[None]:
    """Within it a signal waits for the end: libraries crash where one is raised in the middle of their import."""
    before, _current.held = _current.held, True
    try:
        yield
    finally:
        _current.held = before
    if _current.number is not None and not before:
        raise Stopped(_current.number)


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
