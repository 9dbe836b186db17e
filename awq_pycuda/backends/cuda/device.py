"""The GPU of this process: one primary context and its compiled modules, shared by every run of a sweep."""

from __future__ import annotations

import atexit
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, cached_property, lru_cache
from typing import Any

import pycuda.driver as cuda

from awq_pycuda.backends.cuda import early
from awq_pycuda.backends.cuda.conditions import Conditions
from awq_pycuda.kernels.variant import Device

_ATTRIBUTES = cuda.device_attribute


class Gpu:
    """Device 0 (CUDA_VISIBLE_DEVICES chooses which that is) and its primary context."""

    def __init__(self) -> None:
        cuda.init()
        self.device = cuda.Device(0)
        self.context = self.device.retain_primary_context()
        early.hand_over()
        self.modules: dict[Any, Any] = {}
        self._conditions = Conditions(self.device.pci_bus_id())

    @contextmanager
    def current(self) -> Iterator[None]:
        """Makes the context current: the only place that pushes and pops it."""
        self.context.push()
        try:
            yield
        finally:
            cuda.Context.pop()

    @cached_property
    def limits(self) -> Device:
        """What decides which kernels can run."""
        shared_bytes = self.device.get_attribute(_ATTRIBUTES.MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)
        return Device(self.device.compute_capability(), int(shared_bytes), int(self.device.total_memory()))

    @property
    def multiprocessors(self) -> int:
        """How many multiprocessors the device has."""
        return int(self.device.get_attribute(_ATTRIBUTES.MULTIPROCESSOR_COUNT))

    @property
    def concurrent_managed_access(self) -> bool:
        """Whether host and device may touch managed memory at once; without it nothing can be prefetched."""
        return bool(self.device.get_attribute(_ATTRIBUTES.CONCURRENT_MANAGED_ACCESS))

    @cache  # noqa: B019  # a process has one GPU
    def describe(self) -> dict[str, Any]:
        """Name, capability, sizes, clocks (the device's limits, not its present ones) and driver; JSON-ready."""
        attribute = self.device.get_attribute
        driver = cuda.get_driver_version()
        return {
            "name": self.device.name(),
            "capability": "{}.{}".format(*self.device.compute_capability()),
            "memory_bytes": self.device.total_memory(),
            "multiprocessors": self.multiprocessors,
            "l2_bytes": attribute(_ATTRIBUTES.L2_CACHE_SIZE),
            "clock_khz": attribute(_ATTRIBUTES.CLOCK_RATE),
            "memory_clock_khz": attribute(_ATTRIBUTES.MEMORY_CLOCK_RATE),
            "memory_bus_bits": attribute(_ATTRIBUTES.GLOBAL_MEMORY_BUS_WIDTH),
            "pci_bus_id": self.device.pci_bus_id(),
            "driver_cuda": f"{driver // 1000}.{driver % 1000 // 10}",
        }

    def conditions(self) -> dict[str, float]:
        """Clock, power, temperature and what holds the clock down, now; see `Conditions`."""
        return self._conditions.now()

    def close(self) -> None:
        """Unloads the modules and releases the context."""
        with self.current():
            self.modules.clear()
        self.context.detach()


@lru_cache(maxsize=1)
def open_gpu() -> Gpu:
    """This process's GPU; the same one at every call, closed when the process ends."""
    gpu = Gpu()
    atexit.register(gpu.close)
    return gpu
