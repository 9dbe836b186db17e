"""Figures of merit where the pipeline's tests do not reach: no signal, no noise, groups of a row."""

import math

import numpy as np
import pytest

from awq_pycuda.quant.format import Format
from awq_pycuda.quant.metrics import lost, saturated_fraction, sqnr_db
from awq_pycuda.quant.quantized import Quantized


@pytest.mark.parametrize(
    ("signal", "noise", "expected"),
    [(100.0, 1.0, 20.0), (1.0, 1.0, 0.0), (5.0, 0.0, math.inf), (1e-300, 0.0, math.inf)],
)
def test_sqnr(signal, noise, expected):
    assert sqnr_db(signal, noise) == expected


@pytest.mark.parametrize("noise", [0.0, 2.0])
def test_without_signal_there_is_no_sqnr(noise):
    assert math.isnan(sqnr_db(0.0, noise))


@pytest.mark.parametrize("groups", [1, 3, 12])
def test_what_is_lost_and_saturated_of_groups(groups):
    rng = np.random.default_rng(0)
    w, s = rng.uniform(-1, 1, (5, 12)).astype(np.float32), rng.uniform(0.5, 2, 12).astype(np.float32)
    scale_b = rng.uniform(0.001, 0.01, (5, groups)).astype(np.float32)
    wq = rng.integers(-127, 128, (5, 12), np.int8)
    wq[0, :4] = 127, -127, 126, -126
    exact = wq.astype(np.float64) * np.repeat(scale_b, 12 // groups, axis=1) / s
    quantized = Quantized(scale_b, Format(12 // groups), codes=wq)
    sq_mean = rng.uniform(0, 3, 12).astype(np.float32)
    found = lost(w, quantized, s, sq_mean)
    squares = (exact - w) ** 2 * sq_mean
    assert found.weight_mse == pytest.approx(np.mean((exact - w) ** 2), rel=1e-12)
    np.testing.assert_allclose(found.by_channel, squares.sum(axis=0), rtol=1e-12)
    np.testing.assert_allclose(found.by_row, squares.sum(axis=1), rtol=1e-12)
    assert saturated_fraction(quantized) == np.mean(np.abs(wq.astype(int)) == 127)
