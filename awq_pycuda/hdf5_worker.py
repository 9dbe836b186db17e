"""Reads HDF5 files in processes of their own, because damage can make the HDF5 library loop for ever.

A file whose strings were overwritten with zeros, as after a power cut, is enough. Each worker limits its own computing
time per file and its memory; one that ends is replaced, and the file that it was reading is the culprit. Reading in
parallel comes with it. Workers stay for the next call and end with the process that started them.

No library's pool does this. `concurrent.futures` and loky 3.7 give up all that is queued when a worker dies: 79 of 300
files, of which 3 loop. pebble 5.2 names the culprit, but its time-outs are of the clock on the wall, so the limits
below would stay; a worker that is killed while it waits for work fails every file; and its workers import the caller's
script, which so runs again and ends in an error where nothing guards it. 1,000 files, 50 of them damaged, took it
12.7 s of computing, against 10.7 s here.
"""

from __future__ import annotations

import atexit
import contextlib
import math
import os
import resource
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any

import psutil

from awq_pycuda.hdf5 import UnreadableError

CPU_SECONDS = 2  # computing time for one file; a usual one takes 0.005
_BYTES_PER_SECOND = 4 << 20  # one second more for so much of a file: its layers may be many
_MOST_SECONDS = 30
_MEMORY = 2 << 30  # bytes beyond what the process has before it reads
_MEMORY_PER_BYTE = 4  # and beyond that, of a file's own
_FILES_PER_WORKER = 100  # starting a worker takes as long as reading about so many
_BATCH = 20  # files that a worker is sent at once, so that it never waits for the next
_READY = "ready"

Call = tuple[Any, ...]


class _Worker:
    """A process that answers each call with what it gives, or with the reason why the file cannot be read."""

    def __init__(self) -> None:
        self.ready = False
        self.batch: deque[int] = deque()
        self.connection, theirs = Pipe()
        code = f"import sys; sys.path[:] = {sys.path!r}; from {__name__} import serve; "
        self.process = subprocess.Popen(
            [sys.executable, "-c", f"{code} serve({theirs.fileno()}, {CPU_SECONDS})"],
            pass_fds=[theirs.fileno()],
            start_new_session=True,  # Ctrl-C is for the process that started this one
        )
        theirs.close()

    def end(self) -> int:
        """Waits for the process, which ends when its pipe does; its exit code, negative for a signal."""
        self.connection.close()
        return self.process.wait()


_idle: list[_Worker] = []


@atexit.register
def _end_idle() -> None:
    while _idle:
        _idle.pop().end()


def ask(calls: Sequence[Call]) -> list[Any]:
    """What each call gives, made in a worker, or the `UnreadableError` of its file.

    Args:
        calls: a function of a module, the file that it reads, and its further arguments.

    Raises:
        OSError: no worker can be started.
    """
    outcomes: list[Any] = [None] * len(calls)
    left = deque(range(len(calls)))
    busy: list[_Worker] = []
    try:
        while left or busy:
            while left and len(busy) < min(os.cpu_count() or 1, -(-len(calls) // _FILES_PER_WORKER)):
                busy.append(_take_worker())
                _send_batch(busy[-1], calls, left)
            answered = wait([worker.connection for worker in busy])
            for worker in [worker for worker in busy if worker.connection in answered]:
                try:
                    answer = worker.connection.recv()
                except (EOFError, OSError):
                    busy.remove(worker)
                    reason = _why_it_ended(worker)
                    if worker.batch:
                        outcomes[worker.batch.popleft()] = UnreadableError(reason)
                    left.extendleft(reversed(worker.batch))
                    continue
                if not worker.ready:  # its first word says so
                    worker.ready = True
                    continue
                outcomes[worker.batch.popleft()] = answer
                if not worker.batch and left:
                    _send_batch(worker, calls, left)
                elif not worker.batch:
                    busy.remove(worker)
                    _idle.append(worker)
    finally:
        for worker in busy:  # only where something interrupted this
            worker.process.kill()
            worker.end()
    return outcomes


def _take_worker() -> _Worker:
    while _idle:
        worker = _idle.pop()
        if worker.process.poll() is None:
            return worker
        worker.end()
    return _Worker()


def _send_batch(worker: _Worker, calls: Sequence[Call], left: deque[int]) -> None:
    worker.batch = deque(left.popleft() for _ in range(min(_BATCH, len(left))))
    # The worker stays in the folder in which it was started.
    batch = [(call[0], Path(os.path.abspath(call[1])), *call[2:]) for call in map(calls.__getitem__, worker.batch)]
    try:
        worker.connection.send(batch)
    except OSError:  # it ended before, by no fault of these files; waiting for its answer will tell
        left.extendleft(reversed(worker.batch))
        worker.batch.clear()


def _why_it_ended(worker: _Worker) -> str:
    code = worker.end()
    if not worker.ready:
        raise OSError(f"the process that reads HDF5 files ended at its start with exit code {code}")
    if code == -signal.SIGXCPU:
        return "damaged HDF5 file: the HDF5 library found no end of it"
    died = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    return f"damaged HDF5 file: the HDF5 library crashed on it ({died})"


def serve(descriptor: int, cpu_seconds: int) -> None:
    """The worker: takes lists of calls from the pipe until it is closed, and answers each in turn."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    process = psutil.Process()
    with Connection(descriptor) as connection:
        connection.send(_READY)
        while True:
            for which in (resource.RLIMIT_CPU, resource.RLIMIT_AS):
                _limit(which, None)  # a function's module is imported as it is received
            try:
                batch = connection.recv()
            except EOFError:
                return
            memory = process.memory_info().vms + _MEMORY
            for function, path, *arguments in batch:
                size = _size(path)
                seconds = cpu_seconds + min(size / _BYTES_PER_SECOND, _MOST_SECONDS)
                _limit(resource.RLIMIT_CPU, math.ceil(time.process_time() + seconds))
                _limit(resource.RLIMIT_AS, memory + _MEMORY_PER_BYTE * size)
                try:
                    connection.send(function(path, *arguments))
                except UnreadableError as error:
                    connection.send(error)


def _size(path: Path) -> int:
    with contextlib.suppress(OSError):
        return os.path.getsize(path)
    return 0


def _limit(which: int, soft: int | None) -> None:
    """Sets a limit, as far as the hard one allows; None: to that."""
    hard = resource.getrlimit(which)[1]
    resource.setrlimit(
        which, (hard if soft is None else soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard)
    )
