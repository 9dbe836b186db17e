"""Locks between processes (`flock`): each ends with its process, however that ends."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class Lock:
    """A lock that this process holds; from `locked`."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor: int | None = descriptor

    def release(self) -> None:
        """Lets others have it; the file stays."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __del__(self) -> None:
        self.release()


def locked(path: Path, wait: bool = False) -> Lock | None:
    """The lock of this file, which is made if missing; None where another process or `Lock` has it and `wait` is False.

    Raises:
        OSError: the file cannot be made, or its file system has no locks.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        os.close(descriptor)
        return None
    except BaseException:
        os.close(descriptor)
        raise
    return Lock(descriptor)


@contextmanager
def holding(path: Path) -> Iterator[None]:
    """Within it this process alone holds the lock of this file; waits for it.

    Raises:
        OSError: as `locked`.
    """
    lock = locked(path, wait=True)
    assert lock is not None
    try:
        yield
    finally:
        lock.release()
