"""Clock, power, temperature and what holds the clock down, by NVML; sampled beside times, never within them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pynvml


class Conditions:
    """What NVML tells of one device.

    Args:
        pci_bus_id: of the device; NVML counts devices in its own order.
    """

    def __init__(self, pci_bus_id: str) -> None:
        self._device: Any = None
        try:
            pynvml.nvmlInit()
            self._device = pynvml.nvmlDeviceGetHandleByPciBusId(pci_bus_id)
        except pynvml.NVMLError:  # a container may lack it: times are taken without
            return

    def now(self) -> dict[str, float]:
        """By the names of the result file: MHz, W, degrees Celsius, and NVML's bits; without what it does not tell."""
        if self._device is None:
            return {}
        asked: dict[str, Callable[[], Any]] = {
            "sm_clock": lambda: pynvml.nvmlDeviceGetClockInfo(self._device, pynvml.NVML_CLOCK_SM),
            "power": lambda: pynvml.nvmlDeviceGetPowerUsage(self._device) / 1e3,
            "temperature": lambda: pynvml.nvmlDeviceGetTemperature(self._device, pynvml.NVML_TEMPERATURE_GPU),
            "throttle_reasons": lambda: pynvml.nvmlDeviceGetCurrentClocksThrottleReasons(self._device),
        }
        found: dict[str, float] = {}
        for name, ask in asked.items():
            try:
                found[name] = float(ask())
            except pynvml.NVMLError:  # not every device tells everything
                continue
        return found
