"""Files that appear whole or not at all: written under a temporary name beside their own, flushed and renamed."""

from __future__ import annotations

import fcntl
import glob
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A new, empty file beside `path` that takes its name when the block ends; nothing is left where it raises.

    What processes that were killed have left of the same file is removed.

    Raises:
        OSError: the folder cannot be written to, or has no room.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    descriptor = _create_locked(temporary)
    try:
        remove_left(path)
        yield temporary
        os.fsync(descriptor)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
        os.close(descriptor)


def remove_left(path: Path) -> None:
    """Removes the temporary files of `path` whose processes have ended.

    Their lock tells, not the process's number in their name: that may be of another machine, or used again.
    """
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        with suppress(OSError):  # its process lives; or it is gone, of another user, or on a file system without locks
            descriptor = os.open(left, os.O_RDWR | os.O_NONBLOCK)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                left.unlink()
            finally:
                os.close(descriptor)


def _create_locked(path: Path) -> int:
    """Creates an empty file, held by a lock until its descriptor is closed or the process ends."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            with suppress(OSError):  # where a file system has no locks, nothing is removed either
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            # Between the two calls the file may have been taken for one that was left, and removed.
            if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
                os.ftruncate(descriptor, 0)
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
