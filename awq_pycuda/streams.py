"""What every command asks of stdin, stdout and stderr before it writes a word."""

from __future__ import annotations

import io
import os
import sys


def prepare() -> None:
    r"""Makes the streams of this process safe to write to, whatever they are.

    Where one is closed, its number must not go to files and sockets of ours; and what an encoding lacks, such as a
    folder's ü in ASCII, is written as \xfc instead of ending the command.
    """
    while (null := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(null)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def drop_unwritten() -> None:
    """Lets go of what stdout has not taken: Python would try again when it ends, and exit with 120."""
    if sys.stdout is None:  # closed before Python began
        return
    try:
        sys.stdout.flush()
    except OSError:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)
