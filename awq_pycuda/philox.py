"""Philox4x32-10 in NumPy, in the counter layout of cuRAND's `curand_init` + `curand_uniform4`.

Source: Salmon, Moraes, Dror, Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3" (SC'11); layout and conversion to
float as the cuRAND device API documents them. Key = seed; counter words 0, 1 = block of four elements; words 2, 3 =
subsequence.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from awq_pycuda.parallel import map_row_blocks

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)
_ROUNDS = 10
_TWO_POW_MINUS_32 = np.float32(2.0**-32)
_TWO_POW_MINUS_33 = np.float32(2.0**-33)
_CHUNK = 1 << 14  # counters at a time: the four uint64 words and their products stay in cache


def philox4x32(counter: tuple[NDArray[np.uint64], ...], key: tuple[int, int]) -> tuple[NDArray[np.uint64], ...]:
    """Ten Philox rounds.

    Args:
        counter: four arrays of one shape, each word below 2^32 in uint64.
        key: two words below 2^32.

    Returns:
        The four output words, shaped and typed as the counter.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        p0 = c0 * _MULTIPLIERS[0]
        p1 = c2 * _MULTIPLIERS[1]
        c0 = (p1 >> _SHIFT) ^ c1 ^ np.uint64(k0)
        c1 = p1 & _LOW
        c2 = (p0 >> _SHIFT) ^ c3 ^ np.uint64(k1)
        c3 = p0 & _LOW
        k0, k1 = (k0 + _WEYL[0]) & 0xFFFFFFFF, (k1 + _WEYL[1]) & 0xFFFFFFFF
    return c0, c1, c2, c3


def random_words(seed: int, subsequence: int, first: int, count: int) -> NDArray[np.uint32]:
    """The words of counters `first` to `first + count - 1`: shape (4 * count,), uint32."""
    index = np.arange(first, first + count, dtype=np.uint64)
    high = np.full_like(index, subsequence)
    words = philox4x32((index & _LOW, index >> _SHIFT, high & _LOW, high >> _SHIFT), (seed & 0xFFFFFFFF, seed >> 32))
    return np.stack(words, axis=1).astype(np.uint32).reshape(-1)


def uniform(seed: int, subsequence: int, count: int) -> NDArray[np.float32]:
    """What `curand_uniform4` gives: shape (count,), float32 in (0, 1]; element i is lane i % 4 of counter i / 4."""
    out = np.empty(count, np.float32)

    def fill(chunks: slice) -> None:
        for chunk in range(chunks.start, chunks.stop):
            start = chunk * 4 * _CHUNK
            part = out[start : start + 4 * _CHUNK]
            words = random_words(seed, subsequence, chunk * _CHUNK, -(-part.size // 4))[: part.size]
            np.multiply(words.astype(np.float32), _TWO_POW_MINUS_32, out=part)
            part += _TWO_POW_MINUS_33

    map_row_blocks(fill, (-(-count // (4 * _CHUNK)), 4 * _CHUNK))
    return out
