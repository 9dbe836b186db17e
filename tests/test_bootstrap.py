"""Intervals over windows: what they hold, and that nothing but the windows and the seed has a say in them."""

import math

import numpy as np
import pytest

from awq_pycuda.bootstrap import Bootstrap


def test_a_mean_counts_tokens_and_not_windows():
    bootstrap = Bootstrap([1, 3])
    assert bootstrap.mean([8.0, 4.0]) == 5
    assert bootstrap.mean([[8.0, 4.0], [0.0, 1.0]]).tolist() == [5, 0.75]


def test_an_interval_holds_the_mean_of_normal_windows_as_often_as_it_says():
    drawn = np.random.default_rng(1).normal(3, 1, (400, 40))
    low, high = Bootstrap(np.full(40, 7), resamples=1000).interval(drawn)
    held = np.mean((low < 3) & (high > 3))
    assert 0.91 < held < 0.98  # 0.95, less what percentiles of 40 windows lose
    assert np.median(high - low) == pytest.approx(2 * 1.96 / math.sqrt(40), rel=0.08)


def test_pairs_are_compared_on_the_same_resamples():
    a = np.random.default_rng(2).exponential(1, 12)
    bootstrap = Bootstrap(np.full(12, 5), seed=4)
    low, high = bootstrap.interval(a + 0.25 - a)
    assert (low, high) == (pytest.approx(0.25, rel=1e-12), pytest.approx(0.25, rel=1e-12))


def test_the_seed_alone_decides():
    values = np.random.default_rng(3).exponential(1, (2, 9))
    tokens = np.arange(1, 10)
    both = Bootstrap(tokens, seed=5).interval(values)
    one = Bootstrap(tokens, seed=5).interval(values[1])
    assert (both[0][1], both[1][1]) == one
    assert Bootstrap(tokens, seed=6).interval(values[1]) != one


def test_an_interval_of_a_function_of_the_mean():
    values = np.random.default_rng(3).exponential(1, 9)
    bootstrap = Bootstrap(np.full(9, 2))
    plain, perplexity = bootstrap.interval(values), bootstrap.interval(values, np.exp)
    assert perplexity == pytest.approx(np.exp(plain), rel=1e-3)  # between two resamples they differ by a little


def test_a_single_window_has_no_interval():
    bootstrap = Bootstrap([512])
    assert bootstrap.mean([2.5]) == 2.5
    assert np.isnan(bootstrap.interval([2.5])).all()
