"""The pipeline's stages as CUDA kernels through PyCUDA, on managed memory; one launcher per kernel."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from importlib.metadata import version
from typing import Any, Self

import numpy as np
import pycuda.driver as cuda
from numpy.typing import DTypeLike, NDArray

from awq_pycuda.backends.base import Mark
from awq_pycuda.backends.cuda.device import open_gpu
from awq_pycuda.backends.cuda.jit import Source, load, toolchain
from awq_pycuda.backends.cuda.memory import ManagedArray, allocate
from awq_pycuda.backends.host_stages import HostStages
from awq_pycuda.config import MatmulKernel, StatsKernel
from awq_pycuda.quant.format import Quantized

_THREADS = 256  # of the kernels that walk an index space
_BLOCKS_PER_MULTIPROCESSOR = 32  # enough to fill the card; such kernels stride over the rest
_ERROR_BLOCKS = 1024  # fixed, so that error_sums adds up in the same order on every device

# These repeat constants of cuda/stats.cu, cuda/matmul_blocked.cu and cuda/reference.cu.
_STATS_CHANNELS, _STATS_WARPS, _STATS_ROWS = 32, 8, 64
_BLOCKED_MICRO = 4
_REFERENCE_TILE, _REFERENCE_SIDE = 16, 64

_MAX_SIDE = 2**31 - 256  # the products count rows, columns and channels with int, a tile beyond the end

# File and argument types (struct module: P pointer, Q 64-bit size, i int) of every kernel but the products.
_KERNELS = {
    "init": ("init.cu", "PQQQQPP"),
    "accum_stats": ("stats.cu", "PPPQQ"),
    "finish_stats": ("stats.cu", "PPPPQQQ"),
    "accum_stats_atomic": ("stats.cu", "PPPQQ"),
    "finish_stats_atomic": ("stats.cu", "PPQQ"),
    "quantize_awq": ("quantize.cu", "PPPPQQQ"),
    "relu": ("relu.cu", "PPPQQ"),
    "matmul_reference": ("reference.cu", "PPPiii"),
    "error_sums": ("reference.cu", "PPPQ"),
}


class CudaBackend(HostStages[ManagedArray]):
    """Kernels in one stream over managed arrays.

    Args:
        tile: TILE of the product's kernel.
        stats: which `accum_stats`.
        matmul: which variant of `dequantizeTiled`.
        threads: host threads of the stages that run on the host; None for all cores.
    """

    name = "cuda"

    def __init__(
        self,
        tile: int,
        stats: StatsKernel = StatsKernel.deterministic,
        matmul: MatmulKernel = MatmulKernel.tiled,
        threads: int | None = None,
    ) -> None:
        self.tile = tile
        self.threads = threads
        self.stats = stats
        self._product_source = Source(f"matmul_{matmul.name}.cu", (("TILE", tile),))
        self._product_side = tile * (_BLOCKED_MICRO if matmul is MatmulKernel.blocked else 1)
        self._gpu = open_gpu()
        toolchain()  # a missing nvcc is bad set-up: said before any work, not at the first launch
        self._functions: dict[str, Any] = {}
        self._arrays: list[ManagedArray] = []
        self._workspace: cuda.DeviceAllocation | None = None
        self._workspace_bytes = 0
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        """Makes the context current and opens a stream; kernels compile at the first launch."""
        with ExitStack() as stack:
            stack.enter_context(self._gpu.current())
            # Fails on a device that an earlier fault has made unusable: the context must be popped again then.
            self.stream = cuda.Stream()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        """Frees everything while the context is still current, then gives it back."""
        for array in self._arrays:
            array.free()
        self._arrays.clear()
        self._workspace, self._workspace_bytes = None, 0
        del self.stream
        self._stack.close()

    def device(self) -> dict[str, Any]:
        """See `Backend.device`."""
        return self._gpu.describe()

    def versions(self) -> dict[str, str]:
        """PyCUDA, cuda-bindings and nvcc."""
        return {
            "pycuda": version("pycuda"),
            "cuda-bindings": version("cuda-bindings"),
            "nvcc": toolchain().version,
        }

    def available_bytes(self) -> int:
        """See `Backend.available_bytes`."""
        free, _ = cuda.mem_get_info()
        return int(free)

    def empty(self, shape: tuple[int, ...], dtype: DTypeLike | None = None) -> ManagedArray:
        """See `Backend.empty`."""
        return self._allocate([shape], np.float32 if dtype is None else dtype)[0]

    def empty_together(self, *shapes: tuple[int, ...]) -> list[ManagedArray]:
        """See `Backend.empty_together`: one managed allocation."""
        return self._allocate(shapes, np.float32)

    def _allocate(self, shapes: Sequence[tuple[int, ...]], dtype: DTypeLike) -> list[ManagedArray]:
        arrays = allocate(self._gpu, shapes, dtype)
        self._arrays += arrays
        return arrays

    def write(self, handle: ManagedArray, values: NDArray[Any]) -> None:
        """See `Backend.write`."""
        handle.to_host(self.stream)
        np.copyto(handle.array, values, casting="same_kind")

    def read(self, handle: ManagedArray) -> NDArray[Any]:
        """See `Backend.read`."""
        handle.to_host(self.stream)
        view = handle.array.view()
        view.flags.writeable = False
        return view

    def freeze(self, handle: ManagedArray) -> None:
        """See `Backend.freeze`."""
        handle.freeze()

    def init(
        self,
        out: ManagedArray,
        seed: int,
        subsequence: int,
        row_gain: NDArray[np.float32] | None,
        col_gain: NDArray[np.float32] | None,
    ) -> None:
        """See `Backend.init`."""
        rows, cols = out.shape
        _expect("out", out, (rows, cols))
        gains = []
        for gain, size in ((row_gain, rows), (col_gain, cols)):
            if gain is None:
                gains.append(0)
                continue
            handle = self.empty((size,))
            self.write(handle, gain)
            gains.append(self._on_device(handle))
        quads = -(-rows * cols // 4)
        self._walk("init", quads, self._on_device(out), rows, cols, seed, subsequence, *gains)

    def accum_stats(self, x: ManagedArray, abs_mean: ManagedArray, sq_mean: ManagedArray) -> None:
        """See `Backend.accum_stats`; with `stats=atomic` the last bits change from run to run."""
        tokens, in_features = x.shape
        _expect("x", x, (tokens, in_features))
        _expect("abs_mean", abs_mean, (in_features,))
        _expect("sq_mean", sq_mean, (in_features,))
        means = self._on_device(abs_mean), self._on_device(sq_mean)
        if self.stats is StatsKernel.atomic:
            for pointer in means:
                cuda.memset_d32_async(pointer, 0, in_features, self.stream)
            self._walk("accum_stats_atomic", tokens * in_features, self._on_device(x), *means, tokens, in_features)
            self._walk("finish_stats_atomic", in_features, *means, tokens, in_features)
            return
        chunks = -(-tokens // _STATS_ROWS)
        partial_bytes = 8 * chunks * in_features
        partial_abs = self._scratch(2 * partial_bytes)
        partials = partial_abs, partial_abs + partial_bytes
        self._launch(
            "accum_stats",
            chunks * -(-in_features // _STATS_CHANNELS),
            (_STATS_CHANNELS, _STATS_WARPS, 1),
            self._on_device(x),
            *partials,
            tokens,
            in_features,
        )
        self._walk("finish_stats", in_features, *partials, *means, chunks, tokens, in_features)

    def quantize_awq(self, w: ManagedArray, s: ManagedArray, quantized: Quantized[ManagedArray]) -> None:
        """See `Backend.quantize_awq`."""
        out_features, in_features = w.shape
        group_size = _expect_quantized(quantized, s, out_features, in_features)
        _expect("w", w, (out_features, in_features))
        self._walk(
            "quantize_awq",
            -(-out_features * in_features // 4),
            self._on_device(w),
            self._on_device(s),
            self._on_device(quantized.steps),
            self._on_device(quantized.codes),
            out_features,
            in_features,
            group_size,
        )

    def dequantize_tiled(
        self, x: ManagedArray, quantized: Quantized[ManagedArray], inv_s: ManagedArray, y: ManagedArray
    ) -> None:
        """See `Backend.dequantize_tiled`."""
        (tokens, in_features), (out_features, _) = x.shape, quantized.codes.shape
        group_size = _expect_quantized(quantized, inv_s, out_features, in_features)
        _expect("x", x, (tokens, in_features))
        _expect("y", y, (tokens, out_features))
        self._launch(
            "dequantizeTiled",
            _tiles(tokens, out_features, in_features, self._product_side),
            (self.tile, self.tile, 1),
            self._on_device(x),
            self._on_device(quantized.codes),
            self._on_device(inv_s),
            self._on_device(quantized.steps),
            self._on_device(y),
            tokens,
            out_features,
            in_features,
            group_size,
        )

    def on_host(self, handle: ManagedArray) -> NDArray[Any]:
        """See `HostStages.on_host`."""
        return self.read(handle)

    def from_host(self, handle: ManagedArray, values: NDArray[Any]) -> None:
        """See `HostStages.from_host`."""
        self.write(handle, values)

    def relu(self, y: ManagedArray, bias: ManagedArray | None, out: ManagedArray) -> None:
        """See `Backend.relu`."""
        tokens, out_features = y.shape
        _expect("y", y, (tokens, out_features))
        _expect("out", out, (tokens, out_features))
        if bias is not None:
            _expect("bias", bias, (out_features,))
        bias_pointer = 0 if bias is None else self._on_device(bias)
        work = -(-tokens * out_features // 4)
        self._walk("relu", work, self._on_device(y), bias_pointer, self._on_device(out), tokens, out_features)

    def matmul_reference(self, x: ManagedArray, w: ManagedArray, y: ManagedArray) -> None:
        """See `Backend.matmul_reference`: sums in float64."""
        (tokens, in_features), (out_features, _) = x.shape, w.shape
        _expect("x", x, (tokens, in_features))
        _expect("w", w, (out_features, in_features))
        _expect("y", y, (tokens, out_features))
        self._launch(
            "matmul_reference",
            _tiles(tokens, out_features, in_features, _REFERENCE_SIDE),
            (_REFERENCE_TILE, _REFERENCE_TILE, 1),
            self._on_device(x),
            self._on_device(w),
            self._on_device(y),
            tokens,
            out_features,
            in_features,
        )

    def error_sums(self, reference: ManagedArray, value: ManagedArray) -> tuple[float, float]:
        """See `Backend.error_sums`."""
        _expect("reference", reference, reference.shape)
        _expect("value", value, reference.shape)
        partial = np.empty((_ERROR_BLOCKS, 2), np.float64)
        scratch = self._scratch(partial.nbytes)
        count = reference.array.size
        arguments = self._on_device(reference), self._on_device(value), scratch, count
        self._launch("error_sums", _ERROR_BLOCKS, (_THREADS, 1, 1), *arguments)
        cuda.memcpy_dtoh_async(partial, scratch, self.stream)
        self.stream.synchronize()
        signal, noise = partial.sum(axis=0)
        return float(signal), float(noise)

    def mark(self) -> Mark:
        """See `Backend.mark`."""
        event = cuda.Event()
        event.record(self.stream)
        return Mark(time.perf_counter(), event)

    def synchronize(self) -> None:
        """See `Backend.synchronize`."""
        self.stream.synchronize()

    def gpu_ms(self, start: Mark, end: Mark) -> float:
        """See `Backend.gpu_ms`."""
        return float(start.event.time_till(end.event))

    def _on_device(self, handle: ManagedArray) -> int:
        """The address of an array that a kernel is about to read or write, ordered onto the device."""
        handle.to_device(self.stream)
        return handle.pointer

    def _scratch(self, nbytes: int) -> int:
        """Device memory that only kernels see; valid until the next call."""
        if self._workspace is None or self._workspace_bytes < nbytes:
            self._workspace = cuda.mem_alloc(nbytes)
            self._workspace_bytes = nbytes
        return int(self._workspace)

    def _walk(self, kernel: str, work: int, *arguments: int) -> None:
        """Launches a kernel that strides over `work` items."""
        blocks = min(-(-work // _THREADS), _BLOCKS_PER_MULTIPROCESSOR * self._gpu.multiprocessors)
        self._launch(kernel, blocks, (_THREADS, 1, 1), *arguments)

    def _launch(self, kernel: str, blocks: int, block: tuple[int, int, int], *arguments: int) -> None:
        if not self._functions:
            self._load()
        self._functions[kernel].prepared_async_call((blocks, 1), block, self.stream, *arguments)

    def _load(self) -> None:
        files = sorted({file for file, _ in _KERNELS.values()})
        product, *modules = load(self._gpu, [self._product_source, *(Source(file) for file in files)])
        by_file = dict(zip(files, modules, strict=True))
        for kernel, (file, types) in _KERNELS.items():
            self._functions[kernel] = by_file[file].get_function(kernel).prepare(types)
        self._functions["dequantizeTiled"] = product.get_function("dequantizeTiled").prepare("PPPPPiiii")


def _tiles(rows: int, columns: int, inner: int, side: int) -> int:
    """Blocks of side x side outputs that cover a rows x columns product; one grid dimension, which may be large."""
    blocks = -(-rows // side) * -(-columns // side)
    if max(rows, columns, inner, blocks) > _MAX_SIDE:
        raise ValueError(
            f"a product of {rows} x {inner} and {inner} x {columns} is too large; allowed: up to {_MAX_SIDE}"
        )
    return blocks


def _expect(name: str, handle: ManagedArray, shape: tuple[int, ...], dtype: DTypeLike = np.float32) -> None:
    """Refuses an array that a kernel would misread."""
    if handle.shape != shape or handle.dtype != np.dtype(dtype) or not handle.array.flags.c_contiguous:
        raise ValueError(
            f"{name} is {handle.dtype}{handle.shape}; the kernel needs {np.dtype(dtype)}{shape}, contiguous"
        )


def _expect_quantized(
    quantized: Quantized[ManagedArray], channel_scale: ManagedArray, out_features: int, in_features: int
) -> int:
    """Checks codes, channel scales and steps against each other; returns the channels of a full group."""
    form = quantized.format
    _expect("codes", quantized.codes, (out_features, in_features), form.code_dtype)
    _expect("the channel scale", channel_scale, (in_features,))
    _expect("steps", quantized.steps, (out_features, form.groups(in_features)))
    return form.size(in_features)
