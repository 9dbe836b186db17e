"""The CPU backend with compiled loops: NumPy's stages, blocks and order of sums, in a fraction of the time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from awq_pycuda.backends import loops
from awq_pycuda.backends.base import Layer
from awq_pycuda.backends.cpu import CpuBackend
from awq_pycuda.parallel import map_row_blocks
from awq_pycuda.quant.format import Format
from awq_pycuda.quant.quantized import Quantized
from awq_pycuda.quant.search import block_errors, diag_errors

Array = NDArray[Any]


def _groups(form: Format, channels: int) -> tuple[int, np.float32]:
    """What the loops ask of a format: input channels of a group, largest code."""
    return form.size(channels), np.float32(form.largest)


def _summed(add: Callable[[slice, NDArray[np.float64]], None], shape: tuple[int, int], sums: tuple[int, ...]) -> Any:
    """What `add` has added up over all blocks of rows, in their order."""

    def of_block(block: slice) -> NDArray[np.float64]:
        found = np.zeros(sums)
        add(block, found)
        return found

    return np.sum(map_row_blocks(of_block, shape), axis=0)


class CompiledCpuBackend(CpuBackend):
    """In float32; products and random numbers, and the formats that are not plain, are those of `CpuBackend`."""

    def versions(self) -> dict[str, str]:
        """Those of `CpuBackend`, and the compiler's."""
        return {**super().versions(), "numba": numba.__version__}

    def accum_stats(self, x: Array, abs_mean: Array, sq_mean: Array) -> None:
        """See `Backend.accum_stats`."""
        totals = _summed(lambda block, sums: loops.add_statistics(x[block], sums), x.shape, (2, x.shape[1]))
        with np.errstate(over="ignore"):
            abs_mean[...], sq_mean[...] = totals / x.shape[0]

    def find_abs_max(self, x: Array, abs_max: Array) -> None:
        """See `Backend.find_abs_max`."""

        def of_block(block: slice) -> NDArray[np.int32]:
            found = np.zeros(x.shape[1], np.int32)
            loops.raise_to_magnitudes(x[block], found)
            return found

        np.max(map_row_blocks(of_block, x.shape), axis=0, out=abs_max.view(np.int32))

    def compute_scale_b(self, w: Array, s: Array, quantized: Quantized[Array]) -> None:
        """See `Backend.compute_scale_b`."""
        if not quantized.format.is_plain:
            super().compute_scale_b(w, s, quantized)
            return
        size, largest = _groups(quantized.format, w.shape[1])
        map_row_blocks(lambda block: loops.steps(w[block], s, size, largest, quantized.steps[block]), w.shape)

    def quantize_awq(self, w: Array, s: Array, quantized: Quantized[Array]) -> None:
        """See `Backend.quantize_awq`."""
        if not quantized.format.is_plain:
            super().quantize_awq(w, s, quantized)
            return
        size, largest = _groups(quantized.format, w.shape[1])
        steps, codes = quantized.steps, quantized.codes
        map_row_blocks(lambda block: loops.codes(w[block], s, steps[block], size, largest, codes[block]), w.shape)

    def relu(self, y: Array, bias: Array | None, out: Array) -> None:
        """See `Backend.relu`."""
        if bias is None:
            map_row_blocks(lambda block: loops.rectify(y[block], out[block]), y.shape)
        else:
            map_row_blocks(lambda block: loops.rectify_biased(y[block], bias, out[block]), y.shape)

    def _error_sums(self, reference: Array, value: Array) -> Array:
        sums = np.zeros(2)
        loops.add_error_sums(reference, value, sums)
        return sums

    def _diag_errors(self, layer: Layer[Array], scales: Array, sq_mean: Array) -> NDArray[np.float64]:
        def of_block(w: Array, scales: Array, weights: Array, form: Format, of_tensor: Array) -> NDArray[np.float64]:
            if not form.is_plain:
                return block_errors(w, scales, weights, form, of_tensor)
            errors = np.zeros(len(scales))
            loops.add_diag_errors(w, scales, weights, *_groups(form, w.shape[1]), errors)
            return errors

        return diag_errors(layer.w, scales, sq_mean, layer.quantized.format, of_block)

    def _weights(self, quantized: Quantized[Array], inv_s: Array, block: slice, out: Array) -> None:
        if quantized.zero_points is not None:
            super()._weights(quantized, inv_s, block, out)
            return
        size, _ = _groups(quantized.format, out.shape[1])
        loops.weights(quantized.codes[block], inv_s, quantized.steps[block], size, out)

    def _differences(
        self, w: Array, s: Array, inv_s: Array, form: Format, tensor_scale: np.floating[Any], out: Array
    ) -> None:
        if not form.is_plain:
            super()._differences(w, s, inv_s, form, tensor_scale, out)
            return
        loops.differences(w, s, inv_s, *_groups(form, w.shape[1]), out)

    def _squares(self, y: Array) -> float:
        total = np.zeros(1)
        loops.add_squares(y, total)
        return float(total[0])
