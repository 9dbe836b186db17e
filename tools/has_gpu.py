"""Exits with 0 where there is an NVIDIA driver and at least one device, asked of the driver itself; else with 1."""

import ctypes
import sys


def has_gpu() -> bool:
    """Whether CUDA could run here; needs neither a toolkit nor PyCUDA."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    count = ctypes.c_int()
    return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0


if __name__ == "__main__":
    sys.exit(not has_gpu())
