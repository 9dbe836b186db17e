"""Stands for PyCUDA, and for what the CUDA backend builds on it: memory, modules and launches, on the host.

A device's address is the address of the NumPy array that holds the data between launches.
"""

from __future__ import annotations

import atexit
import itertools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

import numpy as np

from awq_pycuda.kernels import variant
from awq_pycuda.paths import resource_dir
from host_cuda.build import Builder, Source
from host_cuda.device import HostDevice, Launch

T = TypeVar("T")

_arrays: dict[int, np.ndarray | None] = {0: None}  # all that kernels can be given, by address
_places = itertools.count(-1, -1)  # what stands for the addresses of parts of arrays


class ManagedArray:
    """An array of its own: the address sanitizer sees an access beyond its end."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype) -> None:
        self.array = np.full(shape, 0, dtype)
        self.array.view(np.uint8)[...] = 0xFF
        self.shape, self.dtype, self.pointer = self.array.shape, self.array.dtype, self.array.ctypes.data
        _arrays[self.pointer] = self.array

    def rows(self, rows: slice) -> ManagedArray:
        """See `memory.ManagedArray.rows`; to kernels an array of its own, also where the rows begin with the first."""
        found = copy(self)
        found.array = self.array[rows]
        found.shape, found.pointer = found.array.shape, next(_places)
        _arrays[found.pointer] = found.array
        return found

    def to_device(self, stream: Stream) -> None: ...

    def to_host(self, stream: Stream) -> None:
        stream.synchronize()

    def freeze(self) -> None: ...

    def free(self) -> None:
        del _arrays[self.pointer], self.array


def allocate(gpu: Gpu, shapes: Sequence[tuple[int, ...]], dtype: np.dtype) -> list[ManagedArray]:
    return [ManagedArray(shape, dtype) for shape in shapes]


@dataclass
class Gpu:
    """The device and the folder of the sources that it compiles."""

    device: HostDevice
    sources: Path
    modules = frozenset()  # none is kept: see `load`
    multiprocessors = 1  # so that a kernel which strides over its work soon has to
    limits = variant.Device((9, 0), 227 << 10, 80 << 30)

    @contextmanager
    def current(self) -> Iterator[None]:
        yield

    def conditions(self) -> dict[str, float]:
        return {"sm_clock": 1000.0, "throttle_reasons": 0.0}


@lru_cache(maxsize=1)
def host_device() -> HostDevice:
    """This process's device; what it compiles goes when the process ends."""
    folder = tempfile.TemporaryDirectory(prefix="host_cuda-")
    device = HostDevice(Builder(Path(folder.name)))
    atexit.register(folder.cleanup)
    atexit.register(device.close)
    return device


def open_gpu() -> Gpu:
    return Gpu(host_device(), resource_dir("cuda"))


@dataclass
class Function:
    """A kernel of a module; prepared, it is called as PyCUDA's are."""

    gpu: Gpu
    source: Source
    entry: str

    def set_attribute(self, attribute: str, value: int) -> None: ...

    def prepare(self, types: str) -> Function:
        self.types = types
        return self

    def prepared_async_call(self, grid, block, stream, *arguments, shared_size=0) -> None:
        def launch() -> None:
            values = [
                (code, _arrays[value] if code == "P" else value)
                for code, value in zip(self.types, arguments, strict=True)
            ]
            self.gpu.device.launch(self.source, self.entry, Launch((*grid, 1), block, shared_size), values)

        stream.take(launch)


@dataclass
class Module:
    gpu: Gpu
    source: Source

    def get_function(self, entry: str) -> Function:
        return Function(self.gpu, self.source, entry)


SourceModule = Module


def load(gpu: Gpu, sources: Sequence[variant.Source]) -> list[Module]:
    """Nothing is compiled before it is launched."""
    return [Module(gpu, Source(gpu.sources / source.file, source.macros)) for source in sources]


def toolchain() -> None: ...


class Stream:
    """Work is done as it is taken; within a capture it is kept."""

    captured: list[Callable[[], None]] | None = None

    def take(self, work: Callable[[], None]) -> None:
        work() if self.captured is None else self.captured.append(work)

    def synchronize(self) -> None:
        assert self.captured is None, "a capture forbids it"


class Event:
    """PyCUDA's, and that of a graph, which is recorded as it is made."""

    def __init__(self, stream: Stream | None = None) -> None:
        self.passed = 0  # how often
        if stream is not None:
            self.record(stream)

    def record(self, stream: Stream) -> None:
        def passes() -> None:
            self.passed += 1

        stream.take(passes)

    def time_till(self, end: Event) -> float:
        assert self.passed
        assert end.passed == self.passed
        return 0.0

    def free(self) -> None: ...


class GraphError(RuntimeError): ...


@dataclass
class Graph:
    """What a stream has kept."""

    captured: list[Callable[[], None]]

    def launch(self, stream: Stream) -> None:
        for work in self.captured:
            stream.take(work)

    def free(self) -> None:
        self.captured.clear()


def capture(stream: Stream, work: Callable[[], T], overlapping: bool) -> tuple[Graph, T]:
    stream.captured = kept = []
    try:
        return Graph(kept), work()
    finally:
        stream.captured = None


class function_attribute:  # noqa: N801  # PyCUDA's name
    MAX_DYNAMIC_SHARED_SIZE_BYTES = "shared"


def memset_d32_async(pointer: int, value: int, count: int, stream: Stream) -> None:
    def fill() -> None:
        _arrays[pointer].reshape(-1).view(np.uint32)[:count] = value

    stream.take(fill)


def memcpy_dtoh_async(to: np.ndarray, pointer: int, stream: Stream) -> None:
    to.view(np.uint8).reshape(-1)[:] = _arrays[pointer].view(np.uint8).reshape(-1)[: to.nbytes]
