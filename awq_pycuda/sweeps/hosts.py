"""The worker processes of a sweep, one for each GPU, and which process gets which GPU.

Imports little, so that the workers are on their way before the command itself has imported the rest.
"""

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
from contextlib import suppress
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from awq_pycuda.locks import Lock, locked
from awq_pycuda.signals import STOPPING, ignore

_INTERRUPT_SECONDS = 30  # a worker that has not stopped by then is killed
_VISIBLE = "CUDA_VISIBLE_DEVICES"
_NOT_SUPPORTED = 3  # NVML: the GPU is of a kind that cannot be divided


class WorkerDied(RuntimeError):
    """The worker ended without an answer; the message says how."""


class Worker:
    """A worker process and the socket to it.

    Args:
        on_gpu: whether it is to have the GPU ready before it is asked for anything.
        environment: added to this process's own.
    """

    def __init__(self, on_gpu: bool, environment: dict[str, str]) -> None:
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
                    [sys.executable, "-m", "awq_pycuda.sweeps.worker", str(its.fileno()), "cuda" if on_gpu else "cpu"],
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
        self._asked = False
        self._deadline: threading.Timer | None = None

    def is_of_use(self) -> bool:
        """Whether the process runs and can be asked."""
        return not self.connection.closed and self._process.poll() is None

    def send(self, request: Any) -> None:
        """Sends a request; where the process has ended, `receive` tells so."""
        self._asked = True
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

    def dismiss(self) -> None:
        """Asks for nothing more: the process begins to end, an idle one at its leisure, a busy one at once."""
        if self._deadline is not None:
            self._deadline.cancel()
        self.connection.close()
        if not self._asked:  # it may still be importing, and has nothing to lose
            self._process.kill()

    def close(self) -> None:
        """Ends the process, see `dismiss`, and waits for that."""
        self.dismiss()
        self._process.wait()
        self._errors.close()


class Host:
    """A worker of this process, and the GPU that it has among several."""

    def __init__(self) -> None:
        self._worker: Worker | None = None
        self._gpu: str | None = None  # its own
        self._lock: Lock | None = None

    def worker(self, on_gpu: bool) -> Worker:
        """The worker, started if there is none of use; `on_gpu`: whether it will need a GPU."""
        if self._worker is not None and not self._worker.is_of_use():
            self.close()
        if self._worker is None:
            gpu = self._choose_gpu() if on_gpu else None
            self._worker = Worker(on_gpu, {} if gpu is None else {_VISIBLE: gpu})
        return self._worker

    def _choose_gpu(self) -> str | None:
        """One of several GPUs; where others have chosen them all, one that is shared. None leaves it open."""
        visible = visible_gpus()
        if len(visible) < 2:
            return None
        return self.reserved() or visible[os.getpid() % len(visible)]

    def reserved(self) -> str | None:
        """One of several GPUs that nobody else has chosen, this one's own from now on; None where there is none."""
        if self._gpu is None:
            for gpu in visible_gpus():
                if lock := locked(lock_folder() / f"chosen-{gpu}.lock"):
                    self._gpu, self._lock = gpu, lock
                    break
        return self._gpu

    def dismiss(self) -> None:
        """Lets the worker begin to end."""
        if self._worker is not None:
            self._worker.dismiss()

    def close(self) -> None:
        """Ends the worker; the next one gets the same GPU."""
        if self._worker is not None:
            self._worker.close()
            self._worker = None

    def release_gpu(self) -> None:
        """Lets another process choose this one's GPU."""
        if self._lock is not None:
            self._lock.release()
        self._gpu = self._lock = None


_first = Host()
_more: list[Host] = []  # each with a GPU of its own


def first() -> Host:
    """The host that this process always has."""
    return _first


def every() -> list[Host]:
    """All hosts of this process: the first, and one more for each further GPU that it uses."""
    return [_first, *_more]


@atexit.register
def _close_at_exit() -> None:
    # Workers take a moment to go; a signal has nothing left to stop then, and would be told as a traceback.
    ignore()
    close_workers()


def close_workers() -> None:
    """Ends every worker; each host keeps its GPU."""
    for host in every():
        host.dismiss()
    for host in every():
        host.close()


def use_every_gpu() -> None:
    """From now on jobs are given to a worker on each GPU that this process sees and no other has chosen."""
    if len(visible_gpus()) < 2 or _more:
        return
    _first.close()  # it may be on any of them
    if _first.reserved() is None:
        return
    while (more := Host()).reserved() is not None:
        _more.append(more)


def use_one_worker() -> None:
    """Undoes `use_every_gpu`."""
    for host in _more.copy():
        _give_up(host)


def leave() -> None:
    """Ends this process's workers and leaves their GPUs to others: this process will run no jobs."""
    for host in every():
        _give_up(host)


def _give_up(host: Host) -> None:
    host.close()
    host.release_gpu()
    if host in _more:
        _more.remove(host)


def start(on_gpu: bool) -> None:
    """Starts the workers that a sweep is going to have, so that they get ready while its jobs are planned."""
    if on_gpu:
        use_every_gpu()
    for host in every():
        host.worker(on_gpu)


def visible_gpus() -> list[str]:
    """The GPUs that a worker could use, as CUDA_VISIBLE_DEVICES names them. Creates no context."""
    if (given := os.environ.get(_VISIBLE)) is not None:
        return [gpu for gpu in given.split(",") if gpu and not gpu.startswith("-")]
    return [str(index) for index in range(_count_gpus())]


@cache
def _count_gpus() -> int:
    """How many there are for CUDA. NVML tells it in 20 ms, and CUDA takes 0.1 s and more for each that it can see."""
    with suppress(OSError):
        nvml, count = ctypes.CDLL("libnvidia-ml.so.1"), ctypes.c_uint()
        known = nvml.nvmlInit_v2() == 0 and nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)) == 0
        if known and not any(_may_be_divided(nvml, index) for index in range(count.value)):
            return count.value
    with suppress(OSError):
        driver, devices = ctypes.CDLL("libcuda.so.1"), ctypes.c_int()
        if driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(devices)) == 0:
            return devices.value
    return 0


def _may_be_divided(nvml: ctypes.CDLL, index: int) -> bool:
    """Whether a GPU's instances (MIG) may be what CUDA counts instead."""
    device, mode, pending = ctypes.c_void_p(), ctypes.c_uint(), ctypes.c_uint()
    if nvml.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(device)) != 0:
        return True
    answer = nvml.nvmlDeviceGetMigMode(device, ctypes.byref(mode), ctypes.byref(pending))
    return bool(answer != _NOT_SUPPORTED and (answer != 0 or mode.value != 0))


def lock_folder() -> Path:
    """This user's folder on this machine for the locks of its GPUs."""
    folder = Path(tempfile.gettempdir()) / f"awq_pycuda-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder
