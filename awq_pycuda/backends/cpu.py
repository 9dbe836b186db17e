"""The pipeline's stages in NumPy: for machines without a GPU, and in float64 the oracle of the others' tests."""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Self, cast

import numpy as np
import psutil
from numpy.typing import DTypeLike, NDArray

from awq_pycuda import philox
from awq_pycuda.backends.base import Layer, Mark
from awq_pycuda.backends.host_stages import HostStages
from awq_pycuda.layers.rows import StoredRows
from awq_pycuda.parallel import (
    SEARCH_TOKENS,
    host_threads,
    map_numbers,
    map_part_blocks,
    map_row_blocks,
    product,
    product_by_blocks,
    product_rows,
    scratch,
)
from awq_pycuda.quant.format import Format
from awq_pycuda.quant.quantized import Quantized, dequantize_rows, quantize, tensor_scales

Array = NDArray[Any]


class CpuBackend(HostStages[Array]):
    """NumPy on row blocks over host threads, matrix products through NumPy's BLAS: see `parallel.use_threads`.

    Args:
        dtype: float32 to run, float64 to be the oracle.
    """

    name = "cpu"

    def __init__(self, dtype: DTypeLike = np.float32) -> None:
        self.dtype = np.dtype(dtype)

    def device(self) -> dict[str, Any]:
        """Processor, cores used and memory of this machine."""
        return {
            "name": _processor_name(),
            "threads": host_threads(),
            "memory_bytes": psutil.virtual_memory().total,
        }

    def versions(self) -> dict[str, str]:
        """BLAS behind NumPy: it does the matrix products."""
        blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
        return {"blas": f"{blas['name']} {blas['version']}"}

    def available_bytes(self) -> None:
        """None: the arrays live in the host's memory."""

    def empty(self, shape: tuple[int, ...], dtype: DTypeLike | None = None) -> Array:
        """See `Backend.empty`."""
        return np.empty(shape, self.dtype if dtype is None else dtype)

    def empty_together(self, *shapes: tuple[int, ...]) -> list[Array]:
        """See `Backend.empty_together`."""
        return [self.empty(shape) for shape in shapes]

    def rows(self, handle: Array, rows: slice) -> Array:
        """See `Backend.rows`."""
        return handle[rows]

    def write(self, handle: Array, values: Array) -> None:
        """See `Backend.write`."""
        self.from_host(handle, values)

    def read(self, handle: Array) -> Array:
        """See `Backend.read`."""
        view = handle.view()
        view.flags.writeable = False
        return view

    def freeze(self, handle: Array) -> None:
        """See `Backend.freeze`."""
        handle.flags.writeable = False

    def stored(self, rows: StoredRows) -> Array:
        """See `Backend.stored`: the stages slice them as they do an array."""
        handle: Array = cast("Any", rows.opened())
        return handle

    def part(self, layer: Layer[Array], rows: slice) -> Layer[Array]:
        """See `Backend.part`."""
        x: Any = layer.x
        made = slice(rows.stop - rows.start)
        trial = replace(layer.trial, y=layer.trial.y[made], reference=layer.trial.reference[made])
        return replace(layer, x=x.part(rows), y=layer.y[made], out=layer.out[made], trial=trial, parts=None)

    def __enter__(self) -> Self:
        """Nothing to take."""
        return self

    def __exit__(self, *exc: object) -> None:
        """Nothing to give back: arrays go when their last handle goes."""

    def init(
        self,
        out: Array,
        seed: int,
        subsequence: int,
        row_gain: NDArray[np.float32] | None,
        col_gain: NDArray[np.float32] | None,
    ) -> None:
        """See `Backend.init`; always in float32 arithmetic, so that every backend starts from the same bits."""
        values = philox.uniform(seed, subsequence, out.size).reshape(out.shape)
        values *= np.float32(2)
        values -= np.float32(1)
        if row_gain is not None:
            values *= row_gain[:, None]
        if col_gain is not None:
            values *= col_gain
        out[...] = values

    def accum_stats(self, x: Array, abs_mean: Array, sq_mean: Array) -> None:
        """See `Backend.accum_stats`: sums in float64, as the kernel does."""

        def sums(block: slice) -> Array:
            part = np.abs(x[block]).astype(np.float64)
            return np.stack((part.sum(axis=0), np.einsum("mk,mk->k", part, part)))

        with np.errstate(over="ignore"):
            totals = np.sum(map_row_blocks(sums, x.shape), axis=0) / x.shape[0]
            abs_mean[...], sq_mean[...] = totals

    def find_abs_max(self, x: Array, abs_max: Array) -> None:
        """See `Backend.find_abs_max`."""
        np.max(map_row_blocks(lambda block: np.abs(x[block]).max(axis=0), x.shape), axis=0, out=abs_max)

    def quantize_awq(self, w: Array, s: Array, quantized: Quantized[Array]) -> None:
        """See `Backend.quantize_awq`."""
        quantize(w, s, quantized)

    def dequantize_tiled(self, x: Array, quantized: Quantized[Array], inv_s: Array, y: Array) -> None:
        """See `Backend.dequantize_tiled`: weights are dequantized once, if they can be, where they are multiplied."""
        x, tokens = _loaded(x)
        if y.shape[1] < tokens:
            weights = np.empty(quantized.codes.shape, self.dtype)
            map_row_blocks(lambda block: self._weights(quantized, inv_s, block, weights[block]), weights.shape)
            self._product(x, weights, y, tokens)
            return

        def of_block(block: slice) -> Array:
            weights = scratch((block.stop - block.start, x.shape[1]), self.dtype)
            self._weights(quantized, inv_s, block, weights)
            return weights

        with np.errstate(over="ignore", invalid="ignore"):
            product_by_blocks(x, of_block, y)

    def _weights(self, quantized: Quantized[Array], inv_s: Array, block: slice, out: Array) -> None:
        """The dequantized weights of a block of rows, (rows, K)."""
        dequantize_rows(quantized, block, out, inv_s)

    def on_host(self, handle: Array) -> Array:
        """See `HostStages.on_host`: it is there already."""
        return handle

    def from_host(self, handle: Array, values: Array) -> None:
        """See `HostStages.from_host`."""
        np.copyto(handle, values, casting="same_kind")

    def relu(self, y: Array, bias: Array | None, out: Array) -> None:
        """See `Backend.relu`."""

        def rectify(block: slice) -> None:
            if bias is None:
                np.maximum(y[block], 0, out=out[block])
            else:
                np.add(y[block], bias, out=out[block])
                np.maximum(out[block], 0, out=out[block])

        map_row_blocks(rectify, y.shape)

    def matmul_reference(self, x: Array, w: Array, y: Array) -> None:
        """See `Backend.matmul_reference`."""
        x, tokens = _loaded(x)
        self._product(x, w, y, tokens)

    def _product(self, x: Array, w: Array, y: Array, tokens: int) -> None:
        # An overflow shows in the values, as on a GPU; the pipeline refuses it by name.
        with np.errstate(over="ignore", invalid="ignore"):
            product(x, w, y, tokens)

    def error_sums(self, reference: Array, value: Array) -> tuple[float, float]:
        """See `Backend.error_sums`."""
        return self.error_sums_of_parts([(reference, value)], reference.size)

    def error_sums_of_parts(self, parts: Iterable[tuple[Array, Array]], outputs: int) -> tuple[float, float]:
        """See `Backend.error_sums_of_parts`: to the bit the sums of the whole arrays."""
        with np.errstate(invalid="ignore"):  # inf − inf: the sums are not finite, and that is the answer
            signal, noise = np.sum(map_part_blocks(self._error_sums, parts, outputs), axis=0)
        return float(signal), float(noise)

    def _error_sums(self, reference: Array, value: Array) -> Array:
        """`error_sums` of a block, (2,)."""
        exact = reference.astype(np.float64)
        error = exact - value
        return np.array([np.vdot(exact, exact), np.vdot(error, error)])

    def _output_sums(self, layer: Layer[Array], scales: Array) -> NDArray[np.float64]:
        """Σ of `(X·(Ŵ/s − W)ᵀ)²` for each candidate.

        The product of the difference instead of the difference of two products, and a block of it at a time: nothing
        of all rows, or of more than `SEARCH_TOKENS`, is ever in memory.
        """
        w, form = layer.w, layer.quantized.format
        rows, channels = w.shape
        size = product_rows(rows)
        blocks = -(-rows // size)
        inverse = 1 / scales
        with np.errstate(over="ignore"):
            of_tensor = tensor_scales(w, scales, form)
        sums = [0.0] * (len(scales) * blocks)
        for x in _parts_for_search(layer):

            def noise(number: int, x: Array = x, before: Sequence[float] = sums) -> float:
                candidate, index = divmod(number, blocks)
                block = w[index * size : (index + 1) * size]
                memory = scratch((len(block) * (channels + min(len(x), SEARCH_TOKENS)),), self.dtype)
                off = memory[: block.size].reshape(block.shape)
                self._differences(block, scales[candidate], inverse[candidate], form, of_tensor[candidate], off)
                total = before[number]
                for start in range(0, len(x), SEARCH_TOKENS):
                    tokens = x[start : start + SEARCH_TOKENS]
                    made = memory[block.size :][: len(tokens) * len(block)].reshape(len(tokens), len(block))
                    np.matmul(tokens, off.T, out=made)
                    total += self._squares(made)
                return total

            with np.errstate(over="ignore", invalid="ignore"):
                sums = map_numbers(noise, len(sums))
        errors: NDArray[np.float64] = np.array(sums).reshape(len(scales), blocks).sum(axis=1)
        return errors

    def _differences(
        self, w: Array, s: Array, inv_s: Array, form: Format, tensor_scale: np.floating[Any], out: Array
    ) -> None:
        """What a block of weights differs by once it is quantized and dequantized: (rows, K)."""
        np.multiply(w, s, out=out)
        steps, zeros = form.fit(form.parts(np.abs(out) if form.is_odd else out), tensor_scale)
        form.round(out, steps, zeros)
        form.dequantize(out, steps, zeros, out, inv_s)
        out -= w

    def _squares(self, y: Array) -> float:
        """Σ y² in float64, over an array of one block."""
        exact = y.astype(np.float64)
        return float(np.vdot(exact, exact))

    def mark(self) -> Mark:
        """See `Backend.mark`."""
        return Mark(time.perf_counter())

    def synchronize(self) -> None:
        """Nothing to do: NumPy returns when it is done."""

    def gpu_ms(self, start: Mark, end: Mark) -> float:
        """NaN: there is no stream."""
        return math.nan


def _loaded(x: Any) -> tuple[Array, int]:
    """Activations as an array, and how many tokens those have that they are a part of."""
    return (x.loaded(), x.whole) if isinstance(x, StoredRows) else (x, len(x))


def _parts_for_search(layer: Layer[Array]) -> Iterator[Array]:
    """The activations of a layer, in whole steps of the search where they stay in their file."""
    if layer.parts is None:
        yield layer.x
        return
    size = -(-layer.parts[0].stop // SEARCH_TOKENS) * SEARCH_TOKENS
    for start in range(0, len(layer.x), size):
        yield layer.x[start : start + size]


def _processor_name() -> str:
    """The processor's model name as Linux tells it; elsewhere what Python knows of it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
