"""Which backend a run gets, and why."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import Any

from awq_pycuda.backends.base import Backend
from awq_pycuda.backends.cpu import CpuBackend
from awq_pycuda.config import BackendChoice
from awq_pycuda.errors import InputError
from awq_pycuda.kernels import table
from awq_pycuda.kernels.variant import Device


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


def refuse_variants(choices: Mapping[str, str], tile: int, group_size: int | None, device: Device) -> None:
    """Refuses what a chosen kernel cannot do on this device, or with this tile and these groups on any.

    Raises:
        InputError: the first such kernel, and which ones can.
    """
    values = {"TILE": tile}
    if group_size is not None:
        values["group_size"] = group_size
    for stage, name in choices.items():
        obstacles = {each.name: each.obstacle(values, device) for each in table.variants(stage).values()}
        if obstacles[name] is not None:
            able = [each for each, obstacle in obstacles.items() if obstacle is None]
            allowed = ", ".join(able) or "backend=cpu"
            raise InputError(f"{table.KEYS[stage]}={name}: {obstacles[name]}; allowed here: {allowed}")


def choose_backend(
    wanted: BackendChoice, variants: Mapping[str, str], tile: int, group_size: int | None
) -> tuple[Backend[Any], str]:
    """The backend asked for, not yet entered, and one line that says which it is and why.

    Args:
        wanted: by the user.
        variants: the kernel of each stage that has several, by the stage's name.
        tile: of the kernels that leave theirs to the config.
        group_size: of the format, which not every kernel takes.

    Raises:
        InputError: backend=cuda where CUDA cannot be used, or a kernel that cannot do what it is chosen for.
    """
    obstacle = None if wanted is BackendChoice.cpu else why_no_cuda()
    if wanted is BackendChoice.cuda and obstacle is not None:
        raise InputError(f"backend=cuda: {obstacle}; allowed here: auto, cpu")
    if wanted is BackendChoice.cpu or obstacle is not None:
        reason = "as asked" if obstacle is None else f"auto: {obstacle}"
        return CpuBackend(), f"backend cpu ({reason})"
    from awq_pycuda.backends.cuda.backend import CudaBackend

    backend = CudaBackend({"TILE": tile}, variants)
    refuse_variants(variants, tile, group_size, backend.limits)
    reason = "as asked" if wanted is BackendChoice.cuda else "auto: a driver and a device are there"
    return backend, f"backend cuda ({reason}): {backend.device()['name']}"
