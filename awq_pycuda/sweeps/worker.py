"""The process that runs a sweep's jobs one after the other: `python -m awq_pycuda.sweeps.worker FD cuda`, for `hosts`.

It alone touches the GPU. What it is asked and answers are pickled objects over one socket; it ends with its parent.
"""

from __future__ import annotations

import sys

if __name__ == "__main__":
    # Through the module's own name: what it sends is unpickled elsewhere. Before the imports below, see `ahead`.
    import gc

    gc.disable()
    if sys.argv[2] == "cuda":
        from awq_pycuda.backends.cuda import early

        early.begin()
    from awq_pycuda.sweeps.worker import main as serve

    gc.freeze()
    gc.enable()
    serve()
    sys.exit()

import faulthandler
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any

from awq_pycuda import provenance
from awq_pycuda.backends.base import Backend
from awq_pycuda.backends.choose import open_cuda
from awq_pycuda.config import Config
from awq_pycuda.engine.execution import FreeMemory, attempt, describe, store, validate
from awq_pycuda.errors import InputError, RunFailed
from awq_pycuda.layers.inputs import unchanged_file
from awq_pycuda.locks import holding
from awq_pycuda.signals import STOPPING, stoppable
from awq_pycuda.spread import Spread, removed_by
from awq_pycuda.sweeps.hosts import lock_folder
from awq_pycuda.sweeps.messages import Checked, Finished, Job, Outcome, Question, Started, State
from awq_pycuda.sweeps.study import claim, is_complete, job_folder


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
    figures = (Spread.of(record.timings.pipeline_ms), Spread.of(removed_by(layer.metrics) for layer in record.layers))
    return Finished(Outcome("complete", "", folder, time.perf_counter() - begin, *figures), usable=True)


def checked(question: Question) -> list[Checked]:
    """What `validate` says of each config."""
    os.chdir(question.cwd)

    free = FreeMemory()

    def check(config: Config) -> Checked:
        try:
            return Checked(None, *_names(validate(config, free).backend))
        except InputError as error:
            return Checked(str(error))

    return [check(config) for config in question.configs]


def _names(backend: Backend[Any]) -> tuple[str, str]:
    return backend.name, str(backend.device()["name"])


def _alone_on(backend: Backend[Any]) -> AbstractContextManager[Any]:
    """Holds the machine's lock of the GPU, so that the timings of two sweeps on it never overlap."""
    gpu = backend.device().get("pci_bus_id")
    return nullcontext() if gpu is None else holding(lock_folder() / f"{gpu}.lock")


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
    if sys.argv[2] == "cuda":
        open_cuda()
    provenance.versions()  # the first job would look for them
    provenance.git_state()
    while (request := requests.get()) is not None:
        busy.set()
        connection.send(run_job(request, connection.send) if isinstance(request, Job) else checked(request))
        busy.clear()
