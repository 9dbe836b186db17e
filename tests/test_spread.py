"""The one definition of a run's figures: medians, quartiles, what is none, and their texts."""

import math

import numpy as np
import pytest

from awq_pycuda.spread import Spread, error_removed, milliseconds, milliseconds_range, percent, percent_range

INF, NAN = math.inf, math.nan


@pytest.mark.parametrize("values", [[3.0], [1.0, 2.0], [5.0, 1.0, 9.0], list(np.random.default_rng(0).random(36))])
def test_quartiles_are_numpy_s(values):
    spread = Spread.of(values)
    assert [spread.low, spread.median, spread.high] == pytest.approx(np.quantile(values, [0.25, 0.5, 0.75]))
    assert spread.count == len(values)


def test_what_is_none_counts_nowhere_and_infinity_counts():
    assert Spread.of([NAN, 1.0, NAN, 3.0]) == Spread.of([1.0, 3.0])
    assert Spread.of([1.0, INF, INF, INF]) == Spread(INF, INF, INF, 4)
    assert Spread.of([-INF, 1.0, 2.0]).median == 1
    nothing = Spread.of([NAN, NAN])
    assert nothing.count == 0
    assert all(map(math.isnan, (nothing.low, nothing.median, nothing.high, nothing.noise)))


@pytest.mark.parametrize(
    ("awq", "rtn", "share", "shown"),
    [(1.0, 2.0, 0.5, "50.0 %"), (2.0, 2.0, 0.0, "0.0 %"), (3.0, 2.0, -0.5, "-50.0 %"), (0.0, 1e-30, 1.0, "100.0 %")],
)
def test_error_removed_is_against_rtn(awq, rtn, share, shown):
    assert error_removed(awq, rtn) == share
    assert percent(error_removed(awq, rtn)) == shown


@pytest.mark.parametrize(("awq", "rtn"), [(0.0, 0.0), (1.0, 0.0), (NAN, NAN)])
def test_where_rtn_leaves_no_error_none_is_removed(awq, rtn):
    assert math.isnan(error_removed(awq, rtn))
    assert percent(error_removed(awq, rtn)) == "-"


def test_noise_is_the_interquartile_range_by_the_median():
    assert Spread.of([8.0, 10.0, 12.0]).noise == pytest.approx(0.2)
    assert math.isnan(Spread.of([8.0]).noise)
    assert math.isnan(Spread.of([0.0, 0.0]).noise)


def test_texts():
    assert [milliseconds(value) for value in (0.1234, 2.419, 99.99, 364.04, NAN)] == [
        *("0.123", "2.42", "99.99", "364.0", "-")
    ]
    assert milliseconds_range(Spread.of([2.0, 3.0, 4.0])) == "2.50 to 3.50"
    assert milliseconds_range(Spread.of([2.0])) == "-"
    assert percent_range(Spread.of([0.0, 0.5, 1.0])) == "25.0 to 75.0 %"
    assert percent_range(Spread.of([])) == "-"
