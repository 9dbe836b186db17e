"""Gives jobs to worker processes, one for each GPU: kept while healthy, replaced when not, and their death told."""

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
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
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
        self.connection = Connection(ours.detach())
        self.interrupted = False
        self._deadline: threading.Timer | None = None

    def is_alive(self) -> bool:
        """Whether the process runs."""
        return self._process.poll() is None

    def send(self, request: Any) -> None:
        """Sends a request; where the process has ended, `receive` tells so."""
        with suppress(OSError):
            self.connection.send(request)

    def receive(self) -> Any:
        """Waits for the next message.

        Raises:
            WorkerDied: the process ended first.
            KeyboardInterrupt: a signal came; the worker is of no more use.
        """
        try:
            return self.connection.recv()
        except (EOFError, OSError):
            raise WorkerDied(self._cause_of_death()) from None

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
        if self._deadline is not None:
            self._deadline.cancel()
        self.connection.close()
        self._process.wait()
        self._errors.close()


class _Host:
    """A worker of this process, and the GPU that it has among several."""

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
        """One of several GPUs; where others have chosen them all, one that is shared. None leaves it open."""
        visible = visible_gpus()
        if len(visible) < 2:
            return None
        return self.reserved() or visible[os.getpid() % len(visible)]

    def reserved(self) -> str | None:
        """One of several GPUs that nobody else has chosen, this one's own from now on; None where there is none."""
        if self._gpu_lock is not None:
            return Path(self._gpu_lock.lock_file).stem.removeprefix("chosen-")
        for gpu in visible_gpus():
            lock = FileLock(lock_folder() / f"chosen-{gpu}.lock")
            try:
                lock.acquire(timeout=0)
            except Timeout:
                continue
            self._gpu_lock = lock
            return gpu
        return None

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
_more: list[_Host] = []  # each with a GPU of its own


@atexit.register
def _close_at_exit() -> None:
    # Workers take a moment to go; a signal has nothing left to stop then, and would be told as a traceback.
    ignore()
    _close_all()


def _close_all() -> None:
    for host in (_host, *_more):
        host.close()


def use_every_gpu() -> None:
    """From now on jobs are given to a worker on each GPU that this process sees and no other has chosen."""
    if len(visible_gpus()) < 2 or _more:
        return
    _host.close()  # it may be on any of them
    if _host.reserved() is None:
        return
    while (more := _Host()).reserved() is not None:
        _more.append(more)


def use_one_worker() -> None:
    """Undoes `use_every_gpu`."""
    for host in _more:
        host.close()
        host.release_gpu()
    _more.clear()


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
    """What speaks against each config on this machine, and where it would run: `validate`, shared among the workers.

    Raises:
        WorkerDied: it could not be found out.
        KeyboardInterrupt: a signal.
    """
    hosts = [_host, *_more][: len(configs)]
    shares = [configs[index :: len(hosts)] for index in range(len(hosts))]
    try:
        workers = [host.worker(configs[0]) for host in hosts]
        for worker, share in zip(workers, shares, strict=True):
            worker.send(Question(share, Path.cwd()))
        answers: list[list[Checked]] = [worker.receive() for worker in workers]
    except (KeyboardInterrupt, WorkerDied):
        _close_all()  # the others may be about to answer
        raise
    return [answers[index % len(hosts)][index // len(hosts)] for index in range(len(configs))]


def close_worker() -> None:
    """Ends this process's workers and leaves their GPUs to others: this process will run no jobs."""
    use_one_worker()
    _host.close()
    _host.release_gpu()


@dataclass
class _Running:
    """A job that a worker has been given."""

    host: _Host
    worker: Worker
    started: list[Started] = field(default_factory=list)

    def outcome(self) -> Outcome | None:
        """Waits for the worker's next message; what became of the job, where that is what it tells."""
        try:
            message: Started | Finished = self.worker.receive()
        except WorkerDied as death:
            return self.ended(_outcome_of_death(str(death), self.started), usable=False)
        if isinstance(message, Started):
            self.started.append(message)
            return None
        return self.ended(message.outcome, message.usable)

    def given_up(self, error: Exception) -> Outcome:
        """Ends the worker in the middle of the job."""
        self.host.close()
        return self.ended(_outcome_of_death(f"{type(error).__name__}: {error}", self.started), usable=False)

    def ended(self, outcome: Outcome, usable: bool) -> Outcome:
        """What became of the job; a worker that is of no more use goes."""
        if not usable or self.worker.interrupted:
            self.host.close()
        return replace(outcome, stop=self.worker.interrupted)


def run_isolated(job: Job) -> Outcome:
    """Runs a job in the worker. Whatever happens there comes back as an outcome, and is in the job's result file."""
    running = _Running(_host, _host.worker(job.config))
    try:
        # Raised here, a signal could fall between two messages and leave the worker alone with the job.
        with stoppable(running.worker.interrupt, held=True):
            running.worker.send(job)
            while (outcome := running.outcome()) is None:
                pass
    except Exception as error:
        # Raised in the middle by a signal handler of a launcher's, such as submitit's when Slurm's time is up.
        return running.given_up(error)
    return outcome


def run_all(jobs: Iterable[Job], on_started: Callable[[int], None], on_ended: Callable[[int, Outcome], None]) -> None:
    """Runs jobs in the workers, in their order, each as soon as a worker is free, until a signal comes.

    While the workers are at work the next job is made ready.

    Args:
        jobs: each is asked for when its turn is near.
        on_started: told the number of a job that a worker is given.
        on_ended: told the number of a job and what became of it, as `run_isolated` returns it.
    """
    hosts = [_host, *_more]
    at_work: dict[Connection, tuple[int, _Running]] = {}

    def interrupt(number: signal.Signals) -> None:
        for _, running in at_work.values():
            running.worker.interrupt(number)

    upcoming = enumerate(jobs)
    with stoppable(interrupt, held=True) as stop:
        following = next(upcoming, None)
        while at_work or (following and stop.number is None):
            busy = [running.host for _, running in at_work.values()]
            idle = [host for host in hosts if host not in busy]
            if idle and following and stop.number is None:
                number, job = following
                worker = idle[0].worker(job.config)
                at_work[worker.connection] = number, _Running(idle[0], worker)
                if stop.number is not None:  # it came before `interrupt` knew of this worker, or was its first
                    del at_work[worker.connection]
                    idle[0].close()
                    continue
                on_started(number)
                worker.send(job)
                following = next(upcoming, None)
                continue
            for connection in wait([*at_work]):
                assert isinstance(connection, Connection)
                number, running = at_work[connection]
                if (outcome := running.outcome()) is not None:
                    del at_work[connection]
                    on_ended(number, outcome)


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
