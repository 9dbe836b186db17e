"""Philox against published vectors and cuRAND's layout."""

import numpy as np
import pytest
from conftest import same_bits

from awq_pycuda import philox
from awq_pycuda.parallel import use_threads


# Known-answer vectors of philox4x32-10 from the Random123 distribution.
@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0] * 4, (0, 0), [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, (0xFFFFFFFF, 0xFFFFFFFF), [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            (0xA4093822, 0x299F31D0),
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_known_answers(counter, key, expected):
    words = philox.philox4x32(tuple(np.array([word], np.uint64) for word in counter), key)
    assert [int(word[0]) for word in words] == expected


def test_layout_is_key_counter_subsequence_and_lane():
    seed, subsequence = 0x0123456789ABCDEF, 5
    words = philox.random_words(seed, subsequence, first=7, count=2)
    counter = tuple(np.array([word], np.uint64) for word in (8, 0, subsequence, 0))
    lanes = philox.philox4x32(counter, (0x89ABCDEF, 0x01234567))
    assert words[4:].tolist() == [int(lane[0]) for lane in lanes]


@pytest.mark.parametrize("index", [0, 1, 6, 65_535, 65_536, 65_538, 131_075, 199_999])
def test_element_i_is_lane_i_mod_4_of_counter_i_div_4(index):
    seed, subsequence = 9, 2
    counter = tuple(np.array([word], np.uint64) for word in (index // 4, 0, subsequence, 0))
    word = philox.philox4x32(counter, (seed, 0))[index % 4][0]
    expected = np.float32(word) * np.float32(2**-32) + np.float32(2**-33)
    assert philox.uniform(seed, subsequence, 200_000)[index] == expected


def test_words_become_floats_as_curand_makes_them(monkeypatch):
    """`x * 2^-32 + 2^-33`: never 0, and the half step shows in small words alone."""
    words = np.array([0, 1, 255, 2**32 - 1], np.uint32)
    monkeypatch.setattr(philox, "random_words", lambda seed, subsequence, first, count: words)
    assert philox.uniform(0, 0, 4).tolist() == [2**-33, 1.5 * 2**-32, 255.5 * 2**-32, 1]


@pytest.mark.parametrize("count", [1, 3, 4, 5, 65_536, 65_537, 300_001])
def test_any_count_is_a_prefix_of_the_same_sequence(count):
    whole = philox.uniform(3, 1, 300_004)
    assert philox.uniform(3, 1, count).tobytes() == whole[:count].tobytes()


def test_threads_do_not_change_the_numbers():
    found = []
    for threads in (1, 5):
        with use_threads(threads):
            found.append(philox.uniform(1, 0, 400_000))
    assert same_bits(*found)


def test_uniform_is_half_open_from_above_and_uniform():
    values = philox.uniform(0, 0, 1 << 20)
    assert values.dtype == np.float32
    assert values.min() > 0
    assert values.max() <= 1
    assert abs(values.mean() - 0.5) < 1e-3
    assert np.histogram(values, bins=16, range=(0, 1))[0].std() < 400


def test_seed_and_subsequence_matter():
    draws = {philox.uniform(seed, sub, 8).tobytes() for seed in (0, 1, 2**32, 2**64 - 1) for sub in (0, 1, 2**32)}
    assert len(draws) == 12
