"""The process that runs a sweep's jobs one after the other: `python -m awq_pycuda.sweeps.worker FD`, for `isolation`.

It alone touches the GPU. What it is asked and answers are pickled objects over one socket; it ends with its parent.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from filelock import FileLock

from awq_pycuda.backends.base import Backend
from awq_pycuda.config import Config
from awq_pycuda.engine.execution import RunFailed, attempt, describe, store, validate
from awq_pycuda.errors import InputError
from awq_pycuda.layers.inputs import unchanged_file
from awq_pycuda.signals import STOPPING, stoppable
from awq_pycuda.spread import Spread
from awq_pycuda.summary import removed_from
from awq_pycuda.sweeps.study import Job, Outcome, Started, State, claim, is_complete, job_folder


@dataclass(frozen=True)
class Finished:
    """The answer to a `Job`. `usable`: whether this process can run another one."""

    outcome: Outcome
    usable: bool


@dataclass(frozen=True)
class Question:
    """Asks what speaks against some configs; `cwd` is the folder that their relative paths start from."""

    configs: Sequence[Config]
    cwd: Path


@dataclass(frozen=True)
class Checked:
    """The answer to one config of a `Question`: what speaks against it, None if nothing; where it would run."""

    refusal: str | None
    backend: str = ""
    device: str = ""


def run_job(job: Job, tell: Callable[[Started], None]) -> Finished:
    """Runs a job, or says why not: it is complete, another sweep is at it, or it is refused."""
    begin = time.perf_counter()
    try:
        os.chdir(job.cwd)
        with unchanged_file(job.config):  # or another file's results would stand in this one's folder
            run = validate(job.config)
            folder = job_folder(job.cwd / job.study, job.config, *_names(run.backend))
        with claim(folder) as ours:
            if not ours:
                return Finished(Outcome("elsewhere", folder=folder), usable=True)
            if is_complete(folder):
                return Finished(Outcome("skipped", folder=folder), usable=True)
            with run.at_work() as backend:
                origin = describe(run, job.overrides, job.config_yaml)
                tell(Started(folder, origin))
                with _alone_on(backend):
                    record = attempt(run, origin, interruptible=_unblocked_interrupts())
            store(folder, run.spec, record)
    except RunFailed as error:
        state: State = "interrupted" if error.interrupted else "failed"
        return Finished(Outcome(state, str(error), folder, time.perf_counter() - begin), _is_usable(run.backend))
    except (InputError, OSError) as error:
        return Finished(Outcome("failed", str(error)), usable=True)
    figures = (Spread.of(record.timings.pipeline_ms), Spread.of(map(removed_from, record.layers)))
    return Finished(Outcome("complete", "", folder, time.perf_counter() - begin, *figures), usable=True)


def checked(question: Question) -> list[Checked]:
    """What `validate` says of each config."""
    os.chdir(question.cwd)

    def check(config: Config) -> Checked:
        try:
            return Checked(None, *_names(validate(config).backend))
        except InputError as error:
            return Checked(str(error))

    return [check(config) for config in question.configs]


def _names(backend: Backend[Any]) -> tuple[str, str]:
    return backend.name, str(backend.device()["name"])


def _alone_on(backend: Backend[Any]) -> AbstractContextManager[Any]:
    """Holds the machine's lock of the GPU, so that the timings of two sweeps on it never overlap."""
    gpu = backend.device().get("pci_bus_id")
    return nullcontext() if gpu is None else FileLock(lock_folder() / f"{gpu}.lock")


def lock_folder() -> Path:
    """This user's folder on this machine for the locks of its GPUs."""
    folder = Path(tempfile.gettempdir()) / f"awq_pycuda-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def _is_usable(backend: Backend[Any]) -> bool:
    """Whether the device still answers; a fault in a kernel spoils the context of its process for good."""
    try:
        with backend:
            backend.synchronize()
    except Exception:
        return False
    return True


@contextmanager
def _unblocked_interrupts() -> Iterator[None]:
    """Within it a signal ends the job, also one that came before; outside, files are being written."""
    with stoppable():
        before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
        try:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _receive(connection: Connection, requests: SimpleQueue[Any], busy: threading.Event) -> None:
    """Passes on what the parent sends; when the parent is gone, ends this process, whatever it is doing."""
    while True:
        try:
            requests.put(connection.recv())
        except (EOFError, OSError):
            if busy.is_set():
                os._exit(1)
            requests.put(None)
            return


def main() -> None:
    """Serves one request after the other until the parent closes the socket."""
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # Slurm's word that time is nearly up; the parent minds it
    faulthandler.enable()
    connection = Connection(int(sys.argv[1]))
    requests: SimpleQueue[Any] = SimpleQueue()
    busy = threading.Event()
    threading.Thread(target=_receive, args=(connection, requests, busy), daemon=True).start()
    while (request := requests.get()) is not None:
        busy.set()
        connection.send(run_job(request, connection.send) if isinstance(request, Job) else checked(request))
        busy.clear()


if __name__ == "__main__":
    # Through the module's own name: what it sends is unpickled elsewhere.
    from awq_pycuda.sweeps.worker import main as serve

    serve()
