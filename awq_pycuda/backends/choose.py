"""Which backend a run gets, and why."""

from __future__ import annotations

import ctypes
from typing import Any

from awq_pycuda.backends.base import Backend
from awq_pycuda.backends.cpu import CpuBackend
from awq_pycuda.config import BackendChoice, Config
from awq_pycuda.errors import InputError


def why_no_cuda() -> str | None:
    """Why CUDA cannot be used here, in a few words; None where it can. Creates no context."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "this machine has no NVIDIA driver (libcuda.so.1)"
    try:
        import cuda.bindings.driver  # noqa: F401  # prefetches managed memory
        import pycuda.driver as driver
    except ImportError as error:
        return f"PyCUDA or cuda-bindings cannot be imported ({error}); 'make setup-cuda' installs them"
    try:
        driver.init()
    except driver.Error as error:
        return f"the NVIDIA driver does not start ({error})"
    return None if driver.Device.count() else "the NVIDIA driver sees no device"


def choose_backend(config: Config) -> tuple[Backend[Any], str]:
    """The backend that the config asks for, not yet entered, and one line that says which it is and why.

    Raises:
        InputError: backend=cuda where CUDA cannot be used.
    """
    obstacle = None if config.backend is BackendChoice.cpu else why_no_cuda()
    if config.backend is BackendChoice.cuda and obstacle is not None:
        raise InputError(f"backend=cuda: {obstacle}; allowed here: auto, cpu")
    if config.backend is BackendChoice.cpu or obstacle is not None:
        reason = "as asked" if obstacle is None else f"auto: {obstacle}"
        return CpuBackend(threads=config.threads), f"backend cpu ({reason})"
    from awq_pycuda.backends.cuda.backend import CudaBackend

    backend = CudaBackend(config.tile, config.stats, config.matmul.kernel, config.threads)
    reason = "as asked" if config.backend is BackendChoice.cuda else "auto: a driver and a device are there"
    return backend, f"backend cuda ({reason}): {backend.device()['name']}"
