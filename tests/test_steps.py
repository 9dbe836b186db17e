"""The grid that every stage shares."""

import numpy as np
import pytest

from awq_pycuda.steps import grouped, step_size


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_step_is_the_largest_magnitude_over_127(dtype):
    amax = np.array([127, 254, 0, 1e-3], dtype)
    step = step_size(amax)
    assert step.dtype == dtype
    assert step[:3].tolist() == [1, 2, 1]
    assert step[3] == amax[3] / dtype(127)
    assert amax[2] == 0  # the argument is left as it is


def test_a_step_that_underflows_is_the_smallest_positive_number():
    smallest = np.finfo(np.float32).smallest_subnormal
    assert step_size(np.array([smallest, smallest * 126], np.float32)).tolist() == [smallest, smallest]


def test_groups_are_consecutive_channels_of_a_row():
    matrix = np.arange(12).reshape(2, 6)
    assert grouped(matrix, None).tolist() == [[[0, 1, 2, 3, 4, 5]], [[6, 7, 8, 9, 10, 11]]]
    assert grouped(matrix, 2).tolist() == [[[0, 1], [2, 3], [4, 5]], [[6, 7], [8, 9], [10, 11]]]
    assert np.shares_memory(grouped(matrix, 3), matrix)
