"""Codes as they are stored: no bit more than the format has."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

_E2M1 = np.array([0, 1, 2, 3, 4, 6, 8, 12], np.int8)  # twice the magnitude that the lower three bits stand for
_OF_E2M1: NDArray[np.uint8] = np.searchsorted(_E2M1, np.arange(13)).astype(np.uint8)
_SIGN = np.uint8(8)
AT_ONCE = 1 << 18  # numbers that are taken apart together: a byte for each bit


def pack(numbers: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """(N, K) whole numbers below 2^bits as (N, ceil(K·bits / 8)) bytes: number k of a row begins at bit k·bits.

    The lowest bit comes first; what is left of a row's last byte is 0. A row begins with a byte of its own.
    """
    rows, count = numbers.shape
    packed = np.empty((rows, -(-count * bits // 8)), np.uint8)
    for block in _row_blocks(rows, count):
        single = np.unpackbits(numbers[block, :, None], axis=2, count=bits, bitorder="little")
        packed[block] = np.packbits(single.reshape(len(single), -1), axis=1, bitorder="little")
    return packed


def unpack(packed: NDArray[np.uint8], bits: int, count: int) -> NDArray[np.uint8]:
    """The `count` numbers of each row that `pack` has packed."""
    numbers = np.empty((len(packed), count), np.uint8)
    for block in _row_blocks(*numbers.shape):
        single = np.unpackbits(packed[block], axis=1, count=count * bits, bitorder="little")
        numbers[block] = np.packbits(single.reshape(len(single), count, bits), axis=2, bitorder="little")[:, :, 0]
    return numbers


def _row_blocks(rows: int, count: int) -> Iterator[slice]:
    """Rows of so many numbers, in blocks."""
    step = max(1, AT_ONCE // max(1, count))
    return (slice(start, start + step) for start in range(0, rows, step))


def e2m1_nibbles(codes: NDArray[Any]) -> NDArray[np.uint8]:
    """Twice the numbers of E2M1 as what stands for them: sign, two bits of exponent, one of mantissa."""
    nibbles: NDArray[np.uint8] = _OF_E2M1[np.abs(codes)]
    nibbles[codes < 0] |= _SIGN
    return nibbles


def e2m1_codes(nibbles: NDArray[np.uint8]) -> NDArray[np.int8]:
    """Back from `e2m1_nibbles`."""
    codes: NDArray[np.int8] = _E2M1[nibbles & ~_SIGN]
    codes[(nibbles & _SIGN) != 0] *= -1
    return codes
