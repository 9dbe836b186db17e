"""Managed arrays: one address for host and device, prefetched to whichever side needs the data next."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import pycuda.driver as cuda
from cuda.bindings import driver
from numpy.typing import DTypeLike, NDArray

from awq_pycuda.backends.cuda.device import Gpu

_ALIGNMENT = 256  # of the arrays of one allocation: as the driver aligns allocations


class Allocation(Protocol):
    """Memory with a side on the host and one on the device, and what brings its data to either."""

    memory: NDArray[np.uint8]
    pointer: int

    def to_device(self, stream: cuda.Stream) -> None: ...

    def to_host(self, stream: cuda.Stream) -> None: ...

    def freeze(self) -> None: ...


class _Managed:
    """One managed allocation and the side or sides on which its pages lie."""

    def __init__(self, gpu: Gpu, nbytes: int) -> None:
        # The default mem_flags=0 is refused by the driver.
        flags = cuda.mem_attach_flags.GLOBAL
        self.memory: NDArray[np.uint8] = cuda.managed_empty(nbytes, np.uint8, mem_flags=flags)
        self.pointer: int = self.memory.ctypes.data
        self._gpu = gpu
        self._frozen = False
        self._on_device = False
        self._on_host = False

    def to_device(self, stream: cuda.Stream) -> None:
        if not self._on_device:
            self._prefetch(driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE, stream)
            self._on_device = True
        self._on_host = self._on_host and self._frozen

    def to_host(self, stream: cuda.Stream) -> None:
        if not self._on_host:
            self._prefetch(driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_HOST, stream)
            self._on_host = True
            self._on_device = self._on_device and self._frozen
        stream.synchronize()

    def freeze(self) -> None:
        if self._gpu.concurrent_managed_access:
            advice = driver.CUmem_advise.CU_MEM_ADVISE_SET_READ_MOSTLY
            place = _location(driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE)
            _check(driver.cuMemAdvise(self.pointer, self.memory.nbytes, advice, place))
            self._frozen = True

    def _prefetch(self, side: driver.CUmemLocationType, stream: cuda.Stream) -> None:
        if self._gpu.concurrent_managed_access:
            _check(driver.cuMemPrefetchAsync(self.pointer, self.memory.nbytes, _location(side), 0, stream.handle))


class ManagedArray:
    """A C-contiguous array in a managed allocation, which it may share with others: they move together.

    `pointer` is valid on both sides. Touching the data on the side where it does not lie works too, but page by page.
    Whoever brings another kind of allocation keeps its two sides alike.
    """

    def __init__(self, allocation: Allocation, offset: int, shape: tuple[int, ...], dtype: DTypeLike) -> None:
        self.shape = shape
        self.dtype = np.dtype(dtype)
        self.pointer = allocation.pointer + offset
        nbytes = math.prod(shape) * self.dtype.itemsize
        self.array: NDArray[Any] = allocation.memory[offset : offset + nbytes].view(self.dtype).reshape(shape)
        self._allocation = allocation

    def to_device(self, stream: cuda.Stream) -> None:
        """Orders the data onto the device, where it does not lie there yet; a kernel may write it next."""
        self._allocation.to_device(stream)

    def to_host(self, stream: cuda.Stream) -> None:
        """Brings the data to the host and waits for it and for all work before it."""
        self._allocation.to_host(stream)

    def freeze(self) -> None:
        """Says that nobody writes the allocation any more, so that the driver keeps a copy on either side."""
        self._allocation.freeze()

    def rows(self, rows: slice) -> ManagedArray:
        """These rows of a matrix, from one to another: in the same allocation, with which they move."""
        start, stop, _ = rows.indices(self.shape[0])
        offset = self.pointer - self._allocation.pointer + start * self.array.strides[0]
        return ManagedArray(self._allocation, offset, (stop - start, *self.shape[1:]), self.dtype)

    def free(self) -> None:
        """Lets go of the memory, which goes with the last of its arrays; this one must not be used again."""
        del self.array, self._allocation


def allocate(gpu: Gpu, shapes: Sequence[tuple[int, ...]], dtype: DTypeLike) -> list[ManagedArray]:
    """Arrays of these shapes in one managed allocation.

    A prefetch has a price of its own, however little it moves: small arrays that the same side needs next should share
    one.
    """
    sizes = [math.prod(shape) * np.dtype(dtype).itemsize for shape in shapes]
    offsets = [0, *itertools.accumulate(-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes)]
    allocation = _Managed(gpu, offsets[-1])
    return [ManagedArray(allocation, offset, shape, dtype) for offset, shape in zip(offsets, shapes, strict=False)]


def _location(side: driver.CUmemLocationType) -> driver.CUmemLocation:
    location = driver.CUmemLocation()
    location.type = side
    location.id = 0  # the one device of this process; ignored for the host
    return location


def _check(result: tuple[driver.CUresult, ...]) -> None:
    if result[0] != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"CUDA: {result[0].name} while placing managed memory")
