"""Blocks of rows over a thread pool: NumPy releases the GIL, and the block order fixes every sum.

How many threads work on them is set in one place, `use_threads`, and read nowhere else than here.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from contextvars import Context, ContextVar, copy_context
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import DTypeLike, NDArray
from threadpoolctl import ThreadpoolController

T = TypeVar("T")

# Elements of a block. Smaller ones stay in a core's cache, but every NumPy call takes the interpreter lock to start,
# and with many threads short calls wait for one another: on 16 cores a search over 4096 x 4096 weights took 28 ms with
# the larger blocks and 81 ms with the smaller. So small arrays get at least a few blocks, large ones large blocks.
SMALLEST_BLOCK, LARGEST_BLOCK = 1 << 18, 1 << 20
BLOCKS = 16


# Rows of a block of a matrix product. The threads share a product by these rather than by those of the BLAS, which
# wait for one another at full speed and lose whole time slices to other processes. Square products on 16 cores, in ms,
# on the threads of OpenBLAS and in blocks of 64 to 256 rows: idle 3.0 and 1.7 for 512, 17.9 and 20.8 for 2048; beside
# 16 busy processes 24 and 4.1 for 512, 48 and 59 for 2048. On 2 cores beside 2 busy processes 24 and 7.4 for 512.
# There blocks of 64 rows cost small products up to 1.4 times the time of 128. tools/thread_load.py measures whole runs.
SMALLEST_PRODUCT, LARGEST_PRODUCT = 128, 256


@lru_cache(maxsize=1)
def _blas() -> Any:
    """What controls NumPy's BLAS, which came with NumPy: looking for it takes 1 ms, and every job is checked."""
    return ThreadpoolController().select(user_api="blas")


_threads: ContextVar[int | None] = ContextVar("threads", default=None)


@contextmanager
def use_threads(threads: int | None) -> Iterator[None]:
    """Within it, all that works in blocks has so many host threads, and NumPy's BLAS has one.

    The number holds for the caller and for what the pool's threads do for it; other threads of the process keep their
    own. The BLAS is the whole process's.

    Args:
        threads: None for all cores that the process may use now, by affinity and by CPU quota.
    """
    token = _threads.set(_cores() if threads is None else threads)
    try:
        with _blas().limit(limits=1):
            yield
    finally:
        _threads.reset(token)


def host_threads() -> int:
    """As many as `use_threads` has set; outside of it as many as there are cores to be had."""
    threads = _threads.get()
    return _cores() if threads is None else threads


def _cores() -> int:
    # The affinity mask knows cpusets and taskset; macOS and Windows have none.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))
    return cores if quota is None else max(1, min(cores, math.ceil(quota)))


@lru_cache(maxsize=1)
def cpu_quota(membership: Path, mount: Path) -> float | None:
    """How many cores' worth of time the control groups give this process; None without a limit.

    Containers are limited so (`docker run --cpus`), jobs of batch systems and services, and the affinity shows nothing
    of it: a thread beyond the quota only makes all of them stop until the next period.

    Args:
        membership: the process's groups, as in /proc/self/cgroup.
        mount: where the groups are mounted.
    """
    quotas = []
    try:
        lines = membership.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None  # no Linux
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        root = mount / "cpu" if controllers else mount  # version 1, or 2 of the control groups
        group = root / path.lstrip("/")
        # In a container the mount may begin at its own group: what is not there has no limit to tell.
        for folder in (group, *(parent for parent in group.parents if parent.is_relative_to(root))):
            with suppress(OSError, ValueError):  # "max" and -1 are no limit
                names = ("cpu.cfs_quota_us", "cpu.cfs_period_us") if controllers else ("cpu.max",)
                text = " ".join((folder / name).read_text(encoding="ascii") for name in names)
                quota, period = (int(part) for part in text.split())
                if quota > 0:
                    quotas.append(quota / period)
    return min(quotas, default=None)


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


def working_elements(shape: Sequence[int]) -> int:
    """Elements of the blocks of a (rows, row_elements) array that `map_row_blocks` has at work at one time."""
    rows, row_elements = shape
    return min(rows, _block_rows(shape) * host_threads()) * row_elements


def map_row_blocks(work: Callable[[slice], T], shape: Sequence[int]) -> list[T]:
    """Calls `work` on consecutive slices of the rows of a (rows, row_elements) array; returns its results in order.

    The slices depend on the shape alone, never on the number of threads, so that sums over the results are the same on
    every machine. The caller's `np.errstate` holds in every thread.
    """
    return _map_blocks(work, shape[0], _block_rows(shape))


def map_part_blocks(work: Callable[..., T], parts: Iterable[tuple[NDArray[Any], ...]], elements: int) -> list[T]:
    """`map_row_blocks` over (rows, row_elements) arrays that come in parts: the blocks are those of the whole arrays.

    Args:
        work: gets the same block of each array.
        parts: consecutive rows of every array, as many of each; they are not kept once the next ones are asked for.
        elements: of each whole array.
    """
    seen = 0
    begun: tuple[NDArray[Any], ...] = ()  # the rows of a block that goes on in the next part
    found: list[T] = []
    for part in parts:
        rows, columns = part[0].shape
        size = _block_rows((elements // columns, columns))
        start = 0
        seen += rows
        ends = seen == elements // columns
        if begun:
            start = min(size - len(begun[0]), rows)
            begun = tuple(np.concatenate((old, new[:start])) for old, new in zip(begun, part, strict=True))
            if len(begun[0]) < size and not ends:
                continue
            found.append(work(*begun))
        stop = rows if ends else rows - (rows - start) % size
        rest = tuple(each[start:stop] for each in part)

        def of_block(block: slice, rest: tuple[NDArray[Any], ...] = rest) -> T:
            return work(*(each[block] for each in rest))

        found += _map_blocks(of_block, stop - start, size)
        begun = tuple(each[stop:].copy() for each in part) if stop < rows else ()
    return found


def map_numbers(work: Callable[[int], T], count: int) -> list[T]:
    """Calls `work` on every number below `count`; returns its results in order. See `map_row_blocks`."""
    return _map_blocks(lambda one: work(one.start), count, 1)


# Tokens that the search for the output's error multiplies at a time.
SEARCH_TOKENS = 4096


def product_rows(rows: int) -> int:
    """How many of so many rows a product takes at a time."""
    return min(max(rows // BLOCKS, SMALLEST_PRODUCT), LARGEST_PRODUCT)


def product_part(rows: int, columns: int) -> int:
    """Of how many rows a part of a product of so many rows and columns is a multiple, so that it has the same bits."""
    return rows if columns >= rows else product_rows(rows)


def product(x: NDArray[Any], w: NDArray[Any], out: NDArray[Any], rows: int | None = None) -> None:
    """`out = x · wᵀ` for x (M, K), w (N, K) and out (M, N) of one dtype, by blocks that depend on the shape alone.

    Within `use_threads` the BLAS has one thread: then every bit is the same for any number of threads.

    Args:
        x: read only.
        w: read only.
        out: written.
        rows: of all of x where this is a part of it, see `product_part`.
    """
    rows = x.shape[0] if rows is None else rows
    if w.shape[0] >= rows:
        product_by_blocks(x, lambda block: w[block], out)
        return

    def rows_of_x(block: slice) -> None:
        np.matmul(x[block], w.T, out=out[block])

    _map_blocks(rows_of_x, x.shape[0], product_rows(rows))


def product_by_blocks(x: NDArray[Any], w: Callable[[slice], NDArray[Any]], out: NDArray[Any]) -> None:
    """The same product, by blocks of the rows of w, each called for once: it may be a `scratch` of the thread."""

    def rows_of_w(block: slice) -> None:
        np.matmul(x, w(block).T, out=out[:, block])

    _map_blocks(rows_of_w, out.shape[1], product_rows(out.shape[1]))


def _map_blocks(work: Callable[[slice], T], rows: int, size: int) -> list[T]:
    blocks = [slice(start, min(start + size, rows)) for start in range(0, rows, size)]
    count = min(host_threads(), len(blocks))
    if count <= 1:
        return [work(block) for block in blocks]
    # The pool's threads reach `work`, and the arrays that it uses, through this list alone: they hold their tasks a
    # moment longer than the caller waits, and the last hold on memory of a GPU must not be theirs.
    works = [work]

    def call(context: Context, block: slice) -> T:
        return context.run(works[0], block)

    futures = [_pool(count).submit(call, copy_context(), block) for block in blocks]
    try:
        return [future.result() for future in futures]
    finally:
        # After an error or a signal, too, no thread works on any more: the caller is about to give its arrays back.
        for future in futures:
            future.cancel()
        wait(futures)
        works.clear()
