"""Parts of the analysis that fail alone: named with the reason, and left out, so that the others are written."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Failure:
    """A figure or a part of the report that could not be made, and why, in one line."""

    part: str
    reason: str


@contextmanager
def left_out(part: str, failures: list[Failure]) -> Iterator[None]:
    """Adds the part to `failures` if the block fails.

    Raises:
        OSError: nothing can be written, or no process started: that is no fault of one part.
    """
    try:
        yield
    except OSError:
        raise
    except Exception as error:  # whatever a figure makes of results that no test has thought of
        reason = " ".join(str(error).split())
        failures.append(Failure(part, f"{type(error).__name__}: {reason}" if reason else type(error).__name__))


def attempt(part: str, failures: list[Failure], make: Callable[[], T], otherwise: T) -> T:
    """What `make` gives, or `otherwise`, with the part added to `failures`, where it fails; see `left_out`."""
    with left_out(part, failures):
        return make()
    return otherwise
