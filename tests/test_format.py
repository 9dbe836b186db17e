"""Formats: steps, codes and what they stand for, whatever the groups."""

import numpy as np
import pytest
from conftest import same_bits

from awq_pycuda.errors import InputError
from awq_pycuda.parallel import use_threads
from awq_pycuda.quant.format import Format
from awq_pycuda.quant.quantized import Quantized, dequantize, quantize, steps_of

RNG = np.random.default_rng(5)
# Of 7 channels: all in one group, full groups only, a last group that is not full, and one that is larger than the row.
SIZES = [None, 7, 1, 3, 5, 9]


def by_channel(steps, size, channels):
    """(rows, groups) steps as (rows, channels)."""
    return np.repeat(steps, size or channels, axis=1)[:, :channels]


def pieces(size, channels):
    return [slice(start, start + (size or channels)) for start in range(0, channels, size or channels)]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_step_is_the_largest_magnitude_over_127(dtype):
    magnitude = np.array([[127, 1], [3, 254], [0, 0], [1e-3, 0]], dtype)
    steps, _ = Format().fit(Format().parts(magnitude))
    assert steps.dtype == dtype
    assert steps[:3].tolist() == [[1], [2], [1]]
    assert steps[3] == magnitude[3, 0] / dtype(127)
    assert magnitude[2].tolist() == [0, 0]  # the argument is left as it is


def test_a_step_that_underflows_is_the_smallest_positive_number():
    smallest = np.finfo(np.float32).smallest_subnormal
    denormal = np.array([[smallest], [smallest * 126]], np.float32)
    assert Format().fit(Format().parts(denormal))[0].tolist() == [[smallest], [smallest]]


@pytest.mark.parametrize("size", SIZES)
def test_groups_are_consecutive_channels_of_a_row(size):
    matrix = np.arange(14.0).reshape(2, 7)
    form = Format(size)
    seen = [(groups, part) for groups, part in form.parts(matrix)]
    assert sum(groups.stop - groups.start for groups, _ in seen) == form.groups(7) == len(pieces(size, 7))
    found = [part[:, index].tolist() for _, part in seen for index in range(part.shape[1])]
    assert found == [matrix[:, piece].tolist() for piece in pieces(size, 7)]
    assert all(np.shares_memory(part, matrix) for _, part in seen)


@pytest.mark.parametrize("size", SIZES)
def test_steps_codes_and_weights_of_every_group(size):
    w, s = RNG.uniform(-1, 1, (5, 7)).astype(np.float32), RNG.uniform(0.2, 3, 7).astype(np.float32)
    w[2] = 0
    form, scaled = Format(size), w * s
    steps = steps_of(w, s, form).steps
    largest = np.stack([np.abs(scaled[:, piece]).max(axis=1) for piece in pieces(size, 7)], axis=1)
    assert np.array_equal(steps, np.where(largest == 0, 1, largest / np.float32(127)))
    quantized = Quantized(steps, form, codes=np.empty((5, 7), form.code_dtype))
    quantize(w, s, quantized)
    of_channel = by_channel(steps, size, 7)
    assert np.array_equal(quantized.codes, np.rint(scaled / of_channel))
    assert np.array_equal(dequantize(quantized), quantized.codes * of_channel)
    factor = 1 / s
    assert np.array_equal(dequantize(quantized, factor), quantized.codes * factor * of_channel)
    exact = dequantize(quantized, 1 / s.astype(np.float64), np.float64)
    assert exact.dtype == np.float64
    assert np.abs(exact - w).max() <= 0.51 * (of_channel / s).max()
    assert np.array_equal(form.unpack(form.pack(quantized.codes), 7), quantized.codes)


def test_codes_steps_and_format_travel_as_one():
    whole = Quantized(np.ones((2, 1)), Format(), codes=np.zeros((2, 3)))
    changed = whole.map(lambda array: array + 1)
    assert (changed.format, changed.zero_points) == (Format(), None)
    assert (changed.steps.tolist(), changed.codes.tolist()) == ([[2], [2]], [[1, 1, 1]] * 2)
    assert list(whole.without_codes.map(np.negative).arrays) == ["steps"]


def test_zero_points_that_no_format_has_are_refused():
    with pytest.raises(InputError, match=r"^zero_points: given; allowed: None"):
        Quantized(np.ones((2, 1)), Format(), np.zeros((2, 1)), codes=np.zeros((2, 3)))


@pytest.mark.parametrize("size", SIZES)
def test_weighted_errors_of_every_group(size):
    magnitude = RNG.uniform(0, 1, (4, 7)).astype(np.float32)
    weights = RNG.uniform(0, 1, 7).astype(np.float32)
    form = Format(size)
    steps = by_channel(form.fit(form.parts(magnitude))[0], size, 7)
    levels = magnitude / steps
    exact = ((np.rint(levels) - levels).astype(np.float64) ** 2 * weights * steps.astype(np.float64) ** 2).sum()
    scaled, work = magnitude.copy(), np.empty_like(magnitude)
    found = form.weighted_errors(scaled, form.parts(scaled), work, form.parts(weights[None, :]))
    assert found == pytest.approx(exact, rel=1e-6)


def test_threads_do_not_change_a_bit():
    w, s = RNG.uniform(-1, 1, (3000, 400)).astype(np.float32), RNG.uniform(0.2, 3, 400).astype(np.float32)
    found = []
    for threads in (1, 5):
        with use_threads(threads):
            found.append(steps_of(w, s, Format(7)).steps)
    assert same_bits(*found)
