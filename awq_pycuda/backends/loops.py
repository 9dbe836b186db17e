"""The CPU's stages on a block of rows, as loops that Numba compiles: each weight is loaded once and kept in a register.

NumPy writes every intermediate value to memory and takes the interpreter lock for every operation, so that its threads
wait for one another; these loops take it once a block. They run on the threads of `parallel`, which fixes the blocks
by the shape: Numba's own threads, and what they need, are not used.

Nothing is reordered but sums (`_SUMS`): a row's in as many lanes as the processor has, the same ones on every call. All
else rounds as NumPy does: true division, ties to even, a product before the next. Codes, steps and weights are NumPy's
bit for bit.

Compiled once for a machine and kept on disk: in `__pycache__` beside this file, else in the user's cache folder, else
where NUMBA_CACHE_DIR says.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from numba import njit, types
from numpy.typing import NDArray

Array = NDArray[Any]
F = TypeVar("F", bound=Callable[..., Any])

_SUMS = {"reassoc", "contract", "nsz"}  # sums of a row in lanes, with fused multiply-adds
_LEAST = np.finfo(np.float32).smallest_subnormal
_ONE = np.float32(1)


def _given(dtype: Any, dimensions: int) -> Any:
    """The type of an array that is only read: whether it may be written to makes no second version."""
    return types.Array(dtype, dimensions, "C", readonly=True)


_F4, _F8, _I1, _INT = types.float32, types.float64, types.int8, types.int64
_ROWS, _ROW = _given(_F4, 2), _given(_F4, 1)


def _compiled(*arguments: Any, fastmath: Any = False) -> Callable[[F], F]:
    """Compiles a function of these arguments, or takes it from disk; it runs without the interpreter lock."""
    decorator: Callable[[F], F] = njit(
        [types.none(*arguments)], nogil=True, cache=True, error_model="numpy", fastmath=fastmath
    )
    return decorator


def _inlined(function: F) -> F:
    """Compiled into the functions that call it."""
    compiled: F = njit(nogil=True, error_model="numpy")(function)
    return compiled


@_inlined
def _bits(value: np.float32) -> np.int32:
    return np.float32(value).view(np.int32)


@_inlined
def _float(bits: np.int32) -> np.float32:
    return np.int32(bits).view(np.float32)


@_inlined
def _step(row: Array, s: Array, largest: np.float32) -> np.float32:
    """The step of a group: `max |row · s| / largest`, as `Format.steps` has it.

    The bits of positive floats are ordered as whole numbers are, with NaN above inf; of whole numbers the maximum can
    be taken in any order, and so in lanes.
    """
    top = np.int32(0)
    for k in range(row.size):
        top = max(top, _bits(abs(row[k] * s[k])))
    most = _float(top)
    return _ONE if most == 0 else max(most / largest, _LEAST)


@_compiled(_ROWS, types.Array(_F8, 2, "C"))
def add_statistics(x: Array, sums: Array) -> None:
    """Adds Σ |x| and Σ x² over the rows of (rows, K) activations to (2, K) float64."""
    for m in range(x.shape[0]):
        for k in range(x.shape[1]):
            value = np.float64(abs(x[m, k]))
            sums[0, k] += value
            sums[1, k] += value * value


@_compiled(_ROWS, types.Array(types.int32, 1, "C"))
def raise_to_magnitudes(x: Array, top: Array) -> None:
    """Raises (K,) bits of floats to those of the largest |x| over (rows, K) activations: see `_step`."""
    for m in range(x.shape[0]):
        for k in range(x.shape[1]):
            top[k] = max(top[k], _bits(abs(x[m, k])))


@_compiled(_ROWS, _ROWS, _ROWS, _INT, _F4, types.Array(_F8, 1, "C"), fastmath=_SUMS)
def add_diag_errors(w: Array, scales: Array, weights: Array, size: int, largest: np.float32, errors: Array) -> None:
    """Adds `Σ_n Σ_k weights[g, k] · (rint(U) - U)² · step²`, U = |W·s_g| / step, to the (G,) errors of candidates.

    Args:
        w: (rows, K).
        scales: (G, K).
        weights: (G, K).
        size: input channels of a group.
        largest: the largest code.
        errors: float64.
    """
    for n in range(w.shape[0]):
        for start in range(0, w.shape[1], size):
            part = slice(start, min(start + size, w.shape[1]))
            row = w[n, part]
            for g in range(scales.shape[0]):
                s, weight = scales[g, part], weights[g, part]
                step = _step(row, s, largest)
                total = np.float32(0)
                for k in range(row.size):
                    level = abs(row[k] * s[k]) / step
                    off = level - np.rint(level)
                    total += off * off * weight[k]
                errors[g] += np.float64(total) * (np.float64(step) * np.float64(step))


@_compiled(_ROWS, _ROW, _INT, _F4, types.Array(_F4, 2, "C"))
def steps(w: Array, s: Array, size: int, largest: np.float32, out: Array) -> None:
    """The steps of (rows, K) weights times (K,) scales, to (rows, groups)."""
    for n in range(w.shape[0]):
        for group in range(out.shape[1]):
            part = slice(group * size, min((group + 1) * size, w.shape[1]))
            out[n, group] = _step(w[n, part], s[part], largest)


@_inlined
def _code(scaled: np.float32, step: np.float32, largest: np.float32) -> np.float32:
    """`clip(rint(scaled / step))`; of NaN the least code."""
    level = np.rint(scaled / step)
    level = level if level > -largest else -largest
    return level if level < largest else largest


@_compiled(_ROWS, _ROW, _ROWS, _INT, _F4, types.Array(_I1, 2, "C"))
def codes(w: Array, s: Array, step: Array, size: int, largest: np.float32, out: Array) -> None:
    """The codes of (rows, K) weights times (K,) scales for (rows, groups) steps."""
    for n in range(w.shape[0]):
        for group in range(step.shape[1]):
            part = slice(group * size, min((group + 1) * size, w.shape[1]))
            row, scale, code = w[n, part], s[part], out[n, part]
            of_group = step[n, group]
            for k in range(row.size):
                code[k] = np.int8(_code(row[k] * scale[k], of_group, largest))


@_compiled(_given(_I1, 2), _ROW, _ROWS, _INT, types.Array(_F4, 2, "C"))
def weights(code: Array, inv_s: Array, step: Array, size: int, out: Array) -> None:
    """`code · inv_s · step`: (rows, K) codes, (K,) and (rows, groups) to (rows, K)."""
    for n in range(code.shape[0]):
        for group in range(step.shape[1]):
            part = slice(group * size, min((group + 1) * size, code.shape[1]))
            row, factor, weight = code[n, part], inv_s[part], out[n, part]
            of_group = step[n, group]
            for k in range(row.size):
                weight[k] = np.float32(row[k]) * factor[k] * of_group


@_compiled(_ROWS, _ROW, _ROW, _INT, _F4, types.Array(_F4, 2, "C"))
def differences(w: Array, s: Array, inv_s: Array, size: int, largest: np.float32, out: Array) -> None:
    """What quantization takes from the weights: `code · inv_s · step - W`, (rows, K) weights to (rows, K)."""
    for n in range(w.shape[0]):
        for start in range(0, w.shape[1], size):
            part = slice(start, min(start + size, w.shape[1]))
            row, scale, factor, off = w[n, part], s[part], inv_s[part], out[n, part]
            step = _step(row, scale, largest)
            for k in range(row.size):
                off[k] = _code(row[k] * scale[k], step, largest) * factor[k] * step - row[k]


@_compiled(_ROWS, types.Array(_F4, 2, "C"))
def rectify(y: Array, out: Array) -> None:
    """`max(y, 0)` of (rows, N); NaN stays NaN."""
    for m in range(y.shape[0]):
        for n in range(y.shape[1]):
            out[m, n] = np.float32(0) if y[m, n] < 0 else y[m, n]


@_compiled(_ROWS, _ROW, types.Array(_F4, 2, "C"))
def rectify_biased(y: Array, bias: Array, out: Array) -> None:
    """`max(y + bias, 0)` of (rows, N) and (N,); NaN stays NaN."""
    for m in range(y.shape[0]):
        for n in range(y.shape[1]):
            value = y[m, n] + bias[n]
            out[m, n] = np.float32(0) if value < 0 else value


@_compiled(_ROWS, _ROWS, types.Array(_F8, 1, "C"), fastmath=_SUMS)
def add_error_sums(reference: Array, value: Array, sums: Array) -> None:
    """Adds Σ reference² and Σ (reference - value)², in float64, to the two sums."""
    for m in range(reference.shape[0]):
        signal, noise = np.float64(0), np.float64(0)
        for n in range(reference.shape[1]):
            exact = np.float64(reference[m, n])
            error = exact - np.float64(value[m, n])
            signal += exact * exact
            noise += error * error
        sums[0] += signal
        sums[1] += noise


@_compiled(_ROWS, types.Array(_F8, 1, "C"), fastmath=_SUMS)
def add_squares(y: Array, sums: Array) -> None:
    """Adds Σ y², in float64, to the one sum."""
    for m in range(y.shape[0]):
        total = np.float64(0)
        for n in range(y.shape[1]):
            value = np.float64(y[m, n])
            total += value * value
        sums[0] += total
