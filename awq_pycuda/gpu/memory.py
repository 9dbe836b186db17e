"""Managed arrays: one address for host and device, prefetched to whichever side needs the data next."""

from __future__ import annotations

from typing import Any

import numpy as np
import pycuda.driver as cuda
from cuda.bindings import driver
from numpy.typing import DTypeLike, NDArray

from awq_pycuda.gpu.device import Gpu


class ManagedArray:
    """A C-contiguous managed array and the side or sides on which its pages lie.

    `pointer` is valid on both sides. Touching the data on the side where it does not lie works too, but page by page.
    """

    def __init__(self, gpu: Gpu, shape: tuple[int, ...], dtype: DTypeLike) -> None:
        # The default mem_flags=0 is refused by the driver.
        self.array: NDArray[Any] = cuda.managed_empty(shape, dtype, mem_flags=cuda.mem_attach_flags.GLOBAL)
        self.pointer: int = self.array.ctypes.data
        self.shape = shape
        self.dtype = np.dtype(dtype)
        self._gpu = gpu
        self._frozen = False
        self._on_device = False
        self._on_host = False

    def to_device(self, stream: cuda.Stream) -> None:
        """Orders the data onto the device, where it does not lie there yet; a kernel may write it next."""
        if not self._on_device:
            self._prefetch(driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE, stream)
            self._on_device = True
        self._on_host = self._on_host and self._frozen

    def to_host(self, stream: cuda.Stream) -> None:
        """Brings the data to the host and waits for it and for all work before it."""
        if not self._on_host:
            self._prefetch(driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_HOST, stream)
            self._on_host = True
            self._on_device = self._on_device and self._frozen
        stream.synchronize()

    def freeze(self) -> None:
        """Says that nobody writes the array any more, so that the driver keeps a copy on either side."""
        if self._gpu.concurrent_managed_access:
            advice = driver.CUmem_advise.CU_MEM_ADVISE_SET_READ_MOSTLY
            place = _location(driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE)
            _check(driver.cuMemAdvise(self.pointer, self.array.nbytes, advice, place))
            self._frozen = True

    def free(self) -> None:
        """Gives the memory back; the array must not be used again."""
        del self.array

    def _prefetch(self, side: driver.CUmemLocationType, stream: cuda.Stream) -> None:
        if self._gpu.concurrent_managed_access:
            _check(driver.cuMemPrefetchAsync(self.pointer, self.array.nbytes, _location(side), 0, stream.handle))


def _location(side: driver.CUmemLocationType) -> driver.CUmemLocation:
    location = driver.CUmemLocation()
    location.type = side
    location.id = 0  # the one device of this process; ignored for the host
    return location


def _check(result: tuple[driver.CUresult, ...]) -> None:
    if result[0] != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"CUDA: {result[0].name} while placing managed memory")
