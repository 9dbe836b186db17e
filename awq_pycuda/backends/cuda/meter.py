"""Times launches on a stream by events: behind a cache emptied by reading, or right after the same launch."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, NamedTuple, Self

import numpy as np
import pycuda.driver as cuda
from cuda.bindings import driver

from awq_pycuda.backends.cuda.device import Gpu
from awq_pycuda.backends.cuda.jit import load
from awq_pycuda.kernels import bench_table
from awq_pycuda.kernels.variant import Variant

_TIMES_THE_CACHE = 5  # the two halves of an H100's L2 each keep lines of their own
_LEAST_FLUSH = 256 << 20
_BUSY_FIRST, _BUSY_LEAST, _BUSY_MOST = 500e-6, 100e-6, 20e-3  # seconds
_KEPT = 0.7  # of what a launch has taken before, where it is faster now
_WAITS = 2  # samples late in a row: it waits for the device
_ONE = int(np.float32(1).view(np.uint32))


class Timed(NamedTuple):
    """Microseconds between the events around a launch, and whether the stream had to wait for the launch."""

    us: float
    late: bool


class Meter:
    """A stream, a buffer to empty the cache by, and the kernels of `bench_table`.

    Attributes:
        stream: on which everything that is timed must run.
        cache_bytes: of the L2.
        flush: how it is emptied, in a few words.
    """

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu
        self.cache_bytes = int(gpu.describe()["l2_bytes"])
        self._count = max(_LEAST_FLUSH, _TIMES_THE_CACHE * self.cache_bytes) // 16 * 4
        self.flush = f"reads {4 * self._count >> 20} MB; the L2 has {self.cache_bytes >> 20} MB"
        self._launches: dict[Any, tuple[float, int]] = {}  # seconds on the host, and how often late in a row

    def __enter__(self) -> Self:
        """Makes the context current, loads the kernels and fills the buffer with ones."""
        with ExitStack() as stack:
            stack.enter_context(self._gpu.current())
            self.stream = cuda.Stream()
            self.variants = [each for each in bench_table.VARIANTS if each.obstacle({}, self._gpu.limits) is None]
            modules = load(self._gpu, [each.source({}) for each in self.variants])
            self._modules = dict(zip(((each.stage, each.name) for each in self.variants), modules, strict=True))
            self._buffer, self._out = self.ones(self._count), cuda.mem_alloc(16)
            (reader,) = (each for each in self.variants if each.stage == "read")
            (spin,) = (each for each in self.variants if each.stage == "spin")
            self._read = self.call(reader, int(self._buffer), int(self._out), self._count)
            self._spin = spin
            self._reader = reader
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        """Frees the buffer while the context is still current, then gives it back."""
        del self._read, self._buffer, self._out, self.stream
        self._launches.clear()
        self._stack.close()

    def ones(self, count: int) -> cuda.DeviceAllocation:
        """`count` floats of 1 on the device."""
        made = cuda.mem_alloc(4 * count)
        cuda.memset_d32(made, _ONE, count)
        return made

    def call(self, variant: Variant, *arguments: Any) -> Callable[[], None]:
        """A launch of one of `bench_table`'s kernels, ready to be repeated; arrays by their addresses."""
        (kernel,) = variant.kernels
        function = self._modules[variant.stage, variant.name].get_function(kernel.entry)
        shared = kernel.shared_bytes({})
        if shared:
            function.set_attribute(cuda.function_attribute.MAX_DYNAMIC_SHARED_SIZE_BYTES, shared)
        function.prepare("".join(argument.code for argument in kernel.arguments))
        grid = (kernel.grid({"multiprocessors": self._gpu.multiprocessors}), 1)
        block, stream = kernel.threads({}), self.stream
        return lambda: function.prepared_async_call(grid, block, stream, *arguments, shared_size=shared)

    def reader(self, nbytes: int) -> Callable[[], None]:
        """A launch that reads so many bytes of the buffer."""
        return self.call(self._reader, int(self._buffer), int(self._out), nbytes // 16 * 4)

    def empty_cache(self) -> None:
        """Reads the whole buffer. What a kernel has asked the L2 to keep is let go of first."""
        driver.cuCtxResetPersistingL2Cache()
        self._read()

    def time(self, launch: Callable[[], object], cold: bool) -> Timed:
        """Times one launch between two events, once all of it is done.

        The stream is kept busy until the launch is on its way, so that the time of launching is in no sample: by the
        flush, and by a kernel that spins for twice as long as this launch took the host before. What waits for the
        device or works on the host comes late for all that. From then on the stream is not kept busy for it, or its
        work on the host would be hidden; its time is that of host and device, and it is told.
        """
        if cold:
            self.empty_cache()
        else:
            launch()
        key = (launch, cold)
        took, late = self._launches.get(key, (_BUSY_FIRST, 0))
        if late < _WAITS:
            self.call(self._spin, round(1e9 * min(_BUSY_MOST, _BUSY_LEAST + 2 * took)))()
        else:
            self.stream.synchronize()
        begin, end = cuda.Event(), cuda.Event()
        begin.record(self.stream)
        start = time.perf_counter()
        launch()
        now = time.perf_counter() - start
        idle = begin.query()
        end.record(self.stream)
        end.synchronize()
        self._launches[key] = max(now, _KEPT * took), late + 1 if idle else 0
        return Timed(1e3 * begin.time_till(end), idle)
