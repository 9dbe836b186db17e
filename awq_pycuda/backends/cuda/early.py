"""What takes longest of a GPU's start, begun while Python imports: the primary context, and the questions to nvcc.

By ctypes, which lets other threads run meanwhile; PyCUDA does not, and is itself among what is imported.
"""

from __future__ import annotations

import ctypes
import signal
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache

from awq_pycuda.backends.cuda.toolchain import Toolchain, find_toolchain
from awq_pycuda.signals import STOPPING

_context: Future[int | None] | None = None
_kit: Future[Toolchain] | None = None


def begin() -> None:
    """Begins, where the machine has a driver. Says nothing of what fails: whoever asks for it meets it again."""
    global _context, _kit
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return
    pool = ThreadPoolExecutor(2)
    # Signals are the main thread's to take: its threads inherit the mask.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        _context = pool.submit(_retain, driver)
        _kit = pool.submit(find_toolchain)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    pool.shutdown(wait=False)


def _retain(driver: ctypes.CDLL) -> int | None:
    """The device 0 whose primary context is there from now on; None where it cannot be had."""
    device, context = ctypes.c_int(), ctypes.c_void_p()
    calls: Sequence[tuple[str, tuple[object, ...]]] = (
        ("cuInit", (0,)),
        ("cuDeviceGet", (ctypes.byref(device), 0)),
        ("cuDevicePrimaryCtxRetain", (ctypes.byref(context), device)),
    )
    fine = all(getattr(driver, name)(*arguments) == 0 for name, arguments in calls)
    return device.value if fine else None


def hand_over() -> None:
    """Gives back the context that `begin` has made: whoever uses it has retained it, too, by now."""
    global _context
    if _context is not None and (device := _context.result()) is not None:
        ctypes.CDLL("libcuda.so.1").cuDevicePrimaryCtxRelease_v2(device)
    _context = None


@lru_cache(maxsize=1)
def toolchain() -> Toolchain:
    """This process's nvcc, see `find_toolchain`."""
    return find_toolchain() if _kit is None else _kit.result()
