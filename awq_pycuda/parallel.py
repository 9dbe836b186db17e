"""Row blocks over a thread pool: NumPy releases the GIL, and the block order fixes every sum."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
from numpy.typing import DTypeLike, NDArray

T = TypeVar("T")

# Elements of a block. Smaller ones stay in a core's cache, but every NumPy call takes the interpreter lock to start,
# and with many threads short calls wait for one another: on 16 cores a search over 4096 x 4096 weights took 28 ms with
# the larger blocks and 81 ms with the smaller. So small arrays get at least a few blocks, large ones large blocks.
SMALLEST_BLOCK, LARGEST_BLOCK = 1 << 18, 1 << 20
BLOCKS = 16


def host_threads(threads: int | None = None) -> int:
    """`threads`, or where None the number of cores that this process may use."""
    if threads is not None:
        return threads
    # The affinity mask knows containers and taskset; macOS and Windows have none.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@lru_cache(maxsize=4)
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="awq")


_own = threading.local()


def scratch(shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
    """An undefined array for a block's intermediate values, this thread's own until its next call.

    Kept from call to call: the page faults of fresh megabytes cost more than the arithmetic on them.
    """
    wanted = math.prod(shape) * np.dtype(dtype).itemsize
    if not hasattr(_own, "memory") or _own.memory.nbytes < wanted:
        _own.memory = np.empty(wanted, np.uint8)
    array: NDArray[Any] = _own.memory[:wanted].view(dtype).reshape(shape)
    return array


def _block_rows(shape: Sequence[int]) -> int:
    rows, row_elements = shape
    elements = min(max(rows * row_elements // BLOCKS, SMALLEST_BLOCK), LARGEST_BLOCK)
    return max(1, elements // max(1, row_elements))


def working_elements(shape: Sequence[int], threads: int | None = None) -> int:
    """Elements of the blocks of a (rows, row_elements) array that `map_row_blocks` has at work at one time."""
    rows, row_elements = shape
    return min(rows, _block_rows(shape) * host_threads(threads)) * row_elements


def map_row_blocks(work: Callable[[slice], T], shape: Sequence[int], threads: int | None = None) -> list[T]:
    """Calls `work` on consecutive slices of the rows of a (rows, row_elements) array; returns its results in order.

    The slices depend on the shape alone, never on the number of threads, so that sums over the results are the same on
    every machine. The caller's `np.errstate` holds in every thread.
    """
    rows, size = shape[0], _block_rows(shape)
    blocks = [slice(start, min(start + size, rows)) for start in range(0, rows, size)]
    count = min(host_threads(threads), len(blocks))
    if count <= 1:
        return [work(block) for block in blocks]
    contexts = [copy_context() for _ in blocks]
    return list(_pool(count).map(lambda context, block: context.run(work, block), contexts, blocks))
