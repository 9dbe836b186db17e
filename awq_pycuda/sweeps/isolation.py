"""Gives jobs to a worker process: kept while it is healthy, replaced when not, and its death told."""

from __future__ import annotations

import atexit
import ctypes
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from awq_pycuda.config import BackendChoice, Config
from awq_pycuda.results.status import read_status
from awq_pycuda.signals import STOPPING, ignore, stoppable
from awq_pycuda.sweeps.study import Job, Outcome, Started, store_death
from awq_pycuda.sweeps.worker import Checked, Finished, Question, lock_folder

_INTERRUPT_SECONDS = 30  # a worker that has not stopped by then is killed
_VISIBLE = "CUDA_VISIBLE_DEVICES"


class WorkerDied(RuntimeError):
    """The worker ended without an answer; the message says how."""


class Worker:
    """A worker process and the socket to it. `environment` is added to this process's own."""

    def __init__(self, environment: dict[str, str]) -> None:
        ours, its = socket.socketpair()
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  # closed by close()
        package = str(Path(__file__).resolve().parent.parent.parent)
        path = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
        # The worker inherits the mask, and so does every thread of its libraries, such as those that NumPy's BLAS makes
        # while it is imported: a signal that one of them took would be raised anywhere in the main thread.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
        try:
            with its:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "awq_pycuda.sweeps.worker", str(its.fileno())],
                    env=os.environ | {"PYTHONPATH": path} | environment,
                    pass_fds=[its.fileno()],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=self._errors,
                    process_group=0,  # what a terminal sends reaches this process alone, which passes it on once
                )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        self._connection = Connection(ours.detach())
        self.interrupted = False
        self._deadline: threading.Timer | None = None

    def is_alive(self) -> bool:
        """Whether the process runs."""
        return self._process.poll() is None

    def ask(self, request: Any, on_started: Callable[[Started], None] = lambda started: None) -> Any:
        """Sends a request and waits for its answer.

        Raises:
            WorkerDied: the process ended first.
            KeyboardInterrupt: a signal came; the worker is of no more use.
        """
        try:
            self._connection.send(request)
            while isinstance(answer := self._connection.recv(), Started):
                on_started(answer)
        except (EOFError, OSError):
            raise WorkerDied(self._cause_of_death()) from None
        finally:
            if self._deadline is not None:
                self._deadline.cancel()
        return answer

    def interrupt(self, number: signal.Signals) -> None:
        """Passes a signal on: a job answers soon what it has stored. The worker is of no more use."""
        self.interrupted = True
        self._process.send_signal(number)
        self._deadline = threading.Timer(_INTERRUPT_SECONDS, self._process.kill)
        self._deadline.daemon = True
        self._deadline.start()

    def _cause_of_death(self) -> str:
        code = self._process.wait()
        cause = f"exit code {code}" if code >= 0 else signal.Signals(-code).name
        if -code == signal.SIGKILL:
            cause += " (the system sends it when memory runs out)"
        self._errors.seek(0)
        last_words = self._errors.read()[-4096:].decode(errors="replace").strip()
        return f"the job's process ended by {cause}" + (f"\n{last_words}" if last_words else "")

    def close(self) -> None:
        """Ends the process: an idle one at its leisure, a busy one at once."""
        self._connection.close()
        self._process.wait()
        self._errors.close()


class _Host:
    """The one worker of this process."""

    def __init__(self) -> None:
        self._worker: Worker | None = None
        self._gpu_lock: FileLock | None = None

    def worker(self, config: Config) -> Worker:
        """The worker, started if there is none alive."""
        if self._worker is not None and not self._worker.is_alive():
            self.close()
        if self._worker is None:
            gpu = None if config.backend is BackendChoice.cpu else self._choose_gpu()
            self._worker = Worker({} if gpu is None else {_VISIBLE: gpu})
        return self._worker

    def _choose_gpu(self) -> str | None:
        """One of several GPUs for this process's workers, which no other process has chosen; None leaves it open."""
        visible = visible_gpus()
        if len(visible) < 2:
            return None
        if self._gpu_lock is not None:
            return Path(self._gpu_lock.lock_file).stem.removeprefix("chosen-")
        for gpu in visible:
            lock = FileLock(lock_folder() / f"chosen-{gpu}.lock")
            try:
                lock.acquire(timeout=0)
            except Timeout:
                continue
            self._gpu_lock = lock
            return gpu
        return visible[os.getpid() % len(visible)]

    def close(self) -> None:
        """Ends the worker; the next one gets the same GPU."""
        if self._worker is not None:
            self._worker.close()
            self._worker = None

    def release_gpu(self) -> None:
        """Lets another process choose this one's GPU."""
        if self._gpu_lock is not None:
            self._gpu_lock.release()
            self._gpu_lock = None


_host = _Host()


@atexit.register
def _close_at_exit() -> None:
    # The worker takes a moment to go; a signal has nothing left to stop then, and would be told as a traceback.
    ignore()
    _host.close()


def visible_gpus() -> list[str]:
    """The GPUs that a worker could use, as CUDA_VISIBLE_DEVICES names them. Creates no context."""
    if (given := os.environ.get(_VISIBLE)) is not None:
        return [gpu for gpu in given.split(",") if gpu and not gpu.startswith("-")]
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return []
    count = ctypes.c_int()
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return []
    return [str(index) for index in range(count.value)]


def checked(configs: Sequence[Config]) -> list[Checked]:
    """What speaks against each config on this machine, and where it would run: `validate`, in a worker.

    Raises:
        WorkerDied: it could not be found out.
        KeyboardInterrupt: a signal.
    """
    try:
        answer: list[Checked] = _host.worker(configs[0]).ask(Question(list(configs), Path.cwd()))
    except KeyboardInterrupt:
        _host.close()
        raise
    return answer


def close_worker() -> None:
    """Ends this process's worker and leaves its GPU to others: this process will run no jobs."""
    _host.close()
    _host.release_gpu()


def run_isolated(job: Job) -> Outcome:
    """Runs a job in the worker. Whatever happens there comes back as an outcome, and is in the job's result file."""
    started: list[Started] = []
    worker = _host.worker(job.config)
    try:
        # Raised here, a signal could fall between two messages and leave the worker alone with the job.
        with stoppable(worker.interrupt, held=True):
            finished: Finished = worker.ask(job, started.append)
        outcome, usable = finished.outcome, finished.usable and not worker.interrupted
    except WorkerDied as death:
        outcome, usable = _outcome_of_death(str(death), started), False
    except Exception as error:
        # Raised in the middle by a signal handler of a launcher's, such as submitit's when Slurm's time is up.
        _host.close()
        outcome, usable = _outcome_of_death(f"{type(error).__name__}: {error}", started), False
    if not usable:
        _host.close()
    return replace(outcome, stop=worker.interrupted)


def _outcome_of_death(reason: str, started: Sequence[Started]) -> Outcome:
    if not started:
        return Outcome("failed", reason)
    folder, origin = started[0].folder, started[0].origin
    try:
        store_death(folder, origin, reason)
    except OSError as error:
        return Outcome("failed", f"{reason}\n{error}", folder)
    status, _ = read_status(folder) or ("failed", "")
    return Outcome("complete" if status == "complete" else "failed", reason, folder)
