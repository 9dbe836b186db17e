"""The scale search against a direct float64 transcription of its definition."""

import numpy as np
import pytest
from conftest import same_bits
from hypothesis import given, settings
from hypothesis import strategies as st

from awq_pycuda.choices import ConventionChoice, Normalization
from awq_pycuda.engine.spec import spec_of
from awq_pycuda.parallel import use_threads
from awq_pycuda.quant.conventions import CONVENTIONS, Convention
from awq_pycuda.quant.format import Format
from awq_pycuda.quant.search import best, candidates, diag_errors, refuse_overflow, search_result
from awq_pycuda.quant.tools import MAX_GAMMA

RNG = np.random.default_rng(7)


def layer(rows, channels, tokens=50, outliers=0):
    w = RNG.uniform(-1, 1, (rows, channels)).astype(np.float32)
    x = RNG.uniform(-1, 1, (tokens, channels)).astype(np.float32)
    x[:, :outliers] *= 50
    return w, np.abs(x).mean(axis=0), np.square(x).mean(axis=0)


def candidate_scales(abs_mean, gammas, normalization):
    return candidates(Convention(gammas=tuple(gammas), normalization=normalization, identity=False), abs_mean)


def definition(w, s, sq_mean, group_size):
    """E(γ) as the design writes it, element by element in float64."""
    w, s, sq_mean = w.astype(np.float64), s.astype(np.float64), sq_mean.astype(np.float64)
    total = 0.0
    for n in range(w.shape[0]):
        for start in range(0, w.shape[1], group_size):
            part = slice(start, start + group_size)
            scaled = w[n, part] * s[part]
            step = np.abs(scaled).max() / 127 or 1.0
            codes = np.clip(np.rint(scaled / step), -127, 127)
            total += np.sum(sq_mean[part] / s[part] ** 2 * (codes * step - scaled) ** 2)
    return total


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("rows", "channels", "group_size"), [(1, 1, None), (7, 7, 7), (33, 130, 13), (300, 64, None)])
def test_diag_error_is_its_definition(rows, channels, group_size, dtype):
    w, abs_mean, sq_mean = layer(rows, channels)
    w, sq_mean = w.astype(dtype), sq_mean.astype(dtype)
    scales = candidate_scales(abs_mean.astype(dtype), np.array([0, 0.5, 1]), Normalization.mean)
    expected = [definition(w, s, sq_mean, group_size or channels) for s in scales]
    np.testing.assert_allclose(diag_errors(w, scales, sq_mean, Format(group_size)), expected, rtol=2e-4, atol=1e-12)


def test_threads_do_not_change_a_bit():
    w, abs_mean, sq_mean = layer(2000, 600)
    scales = candidate_scales(abs_mean, np.array([0, 0.5]), Normalization.mean)
    found = []
    for threads in (1, 7):
        with use_threads(threads):
            found.append(diag_errors(w, scales, sq_mean, Format()))
    assert same_bits(*found)


def test_gamma_0_is_exactly_1():
    for normalization in Normalization:
        scales = candidate_scales(np.array([1e-9, 0.3, 1e9], np.float32), np.array([0.0]), normalization)
        assert scales.tolist() == [[1, 1, 1]]


def test_normalizations_against_their_formulas():
    abs_mean = np.array([0.1, 0.5, 1, 2, 40])
    powers = abs_mean**0.5
    by_mean = candidate_scales(abs_mean, np.array([0.5]), Normalization.mean)[0]
    np.testing.assert_allclose(by_mean, np.clip(powers / powers.mean(), 1 / 8, 8), rtol=1e-12)
    reference = candidate_scales(abs_mean, np.array([0.5]), Normalization.sqrt_max_min)[0]
    np.testing.assert_allclose(reference, powers / np.sqrt(powers.max() * powers.min()), rtol=1e-12)


def test_clamps_and_floors_are_the_contract_s():
    one = np.array([1.0])
    # Of 16 channels one is huge: 16 times the mean, clamped to 8; the others fall below 1/8.
    assert candidate_scales(np.array([1e6] + [1.0] * 15), one, Normalization.mean)[0].tolist() == [8] + [1 / 8] * 15
    # A live channel's abs_mean counts as at least 1e-8.
    for normalization in Normalization:
        gamma = np.array([0.1])
        tiny, floor = (candidate_scales(np.array([x, 1.0]), gamma, normalization) for x in (1e-9, 1e-8))
        assert np.array_equal(tiny, floor)
        assert not np.array_equal(floor, candidate_scales(np.array([1e-7, 1.0]), gamma, normalization))
    # The reference's powers count as at least 1e-4: sqrt(1e4 * 1e-4) = 1.
    reference = candidate_scales(np.array([1e-6, 1e4]), one, Normalization.sqrt_max_min)[0]
    np.testing.assert_allclose(reference, [1e-4, 1e4], rtol=1e-12)
    # Far apart as they may be, W·s and 1/s must stay within float32.
    extremes = candidate_scales(np.array([1e-3, 1e18]), np.array([10.0]), Normalization.sqrt_max_min)[0]
    assert extremes.tolist() == [1e-9, 1e9]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(0, 2.0**59, width=32), min_size=1, max_size=9),
    st.floats(0, MAX_GAMMA),
    st.sampled_from(list(Normalization)),
)
def test_scales_are_finite_and_positive_for_any_statistics_and_gamma(abs_mean, gamma, normalization):
    scales = candidate_scales(np.array(abs_mean, np.float32), np.array([gamma]), normalization)
    assert np.isfinite(scales).all()
    assert (scales > 0).all()
    assert np.isfinite(1 / scales).all()


@pytest.mark.parametrize(
    ("gammas", "expected"),
    [
        ([0.5, 1], [0, 0.5, 1]),
        ([0, 1], [0, 1]),
        ([1, 0.5, 0], [1, 0.5, 0]),
        ([0.2], [0, 0.2]),
        ([0.5, 0.5, 0], [0.5, 0]),
        ([-0.0, 0.0, 1, 1.0], [0, 1]),
    ],
)
def test_rtn_is_always_in_the_race(gammas, expected):
    grid = Convention(gammas=tuple(gammas)).grid.gamma
    assert grid.tolist() == expected
    assert not np.signbit(grid).any()


def test_without_the_identity_rtn_is_only_in_the_race_if_asked_for():
    assert Convention(gammas=(0.5, 1.0), identity=False).grid.gamma.tolist() == [0.5, 1]


def search(errors, gammas):
    return search_result(Convention(gammas=tuple(gammas)), np.array(errors, float), np.ones(3, np.float32))


def test_lowest_error_wins_and_ties_go_to_the_smaller_gamma():
    result = search([3, 1, 1, 2], [0, 0.75, 0.25, 1])
    assert result.gamma_chosen == 0.25
    assert (result.error_chosen, result.error_rtn) == (1, 3)
    assert search([2, 2, 2], [0.5, 0, 1]).gamma_chosen == 0
    assert search([3, 1, 2], [0.5, 1, 0]).error_rtn == 2


def test_a_candidate_that_overflows_never_wins():
    w, _, sq_mean = layer(4, 6)
    w[0, 0] = 3e38
    scales = np.stack([np.ones(6), np.full(6, 8)]).astype(np.float32)
    errors = diag_errors(w, scales, sq_mean, Format())
    assert np.isfinite(errors[0])
    assert errors[1] == np.inf
    assert search(errors, [0, 1]).gamma_chosen == 0


def test_the_chosen_error_never_exceeds_rtn():
    convention = Convention(gammas=(0.25, 0.5, 2.0))
    for outliers in (0, 3):
        w, abs_mean, sq_mean = layer(40, 64, outliers=outliers)
        scales = candidates(convention, abs_mean)
        errors = diag_errors(w, scales, sq_mean, Format())
        result = search_result(convention, errors, scales[best(convention, errors)])
        assert result.error_chosen <= result.error_rtn
    assert result.gamma_chosen > 0  # with salient channels AWQ pays


def test_overflowed_statistics_are_named():
    with pytest.raises(FloatingPointError, match="input channel 1 overflow"):
        refuse_overflow(np.ones(2), np.array([1, np.inf]))
    with pytest.raises(FloatingPointError, match="input channel 0 overflow"):
        refuse_overflow(np.array([np.nan, 1]), np.ones(2))
    refuse_overflow(np.ones(2), np.ones(2))


# --- dead channels ------------------------------------------------------------------------------------------------

GRID = (0.0, 0.25, 0.5, 1.0)


def test_a_dead_channel_steers_no_other():
    abs_mean = RNG.uniform(0.1, 2, 12)
    with_dead = np.insert(abs_mean, [0, 5, 12], 0)
    for normalization in Normalization:
        convention = Convention(gammas=GRID, normalization=normalization)
        alone, beside = candidates(convention, abs_mean), candidates(convention, with_dead)
        dead = with_dead == 0
        ratio = beside[:, ~dead] / alone
        # `mean` does not see them; the reference divides by √(max · min), and its least is theirs: all scales alike.
        if normalization is Normalization.mean:
            assert np.array_equal(beside[:, ~dead], alone)
        np.testing.assert_allclose(ratio, ratio[:, :1].repeat(12, axis=1), rtol=1e-12)
        assert (beside[0] == 1).all()
        assert (beside[1:, dead] < beside[1:, ~dead].min(axis=1, keepdims=True)).all()


def test_the_scale_of_a_dead_channel_is_1e4_of_a_power_over_the_mean():
    abs_mean = np.array([0.0, 0.5, 1.5, 4.0])
    s = candidates(Convention(gammas=(1.0,), identity=False), abs_mean)[0]
    np.testing.assert_allclose(s, [1e-4 / 2, 0.25, 0.75, 2], rtol=1e-12)
    # Where the others are as small, it is at the lower clamp, never above it.
    s = candidates(Convention(gammas=(1.0,), identity=False), abs_mean * 1e-7)[0]
    np.testing.assert_allclose(s, [1 / 8, 0.25, 0.75, 2], rtol=1e-12)


def test_without_any_live_channel_every_scale_is_1():
    for normalization in Normalization:
        scales = candidates(Convention(gammas=GRID, normalization=normalization), np.zeros(5, np.float32))
        assert scales.tolist() == [[1.0] * 5] * 4


@pytest.mark.parametrize("normalization", Normalization)
def test_weights_that_nothing_reaches_set_no_step(normalization):
    """8 of 128 channels are dead, and their weights 100 times larger than the others."""
    x = RNG.standard_normal((256, 128))
    w = RNG.standard_normal((96, 128))
    x[:, :8] = 0
    w[:, :8] *= 100
    convention = Convention(normalization=normalization)
    scales = candidates(convention, np.abs(x).mean(axis=0))
    errors = diag_errors(w, scales, np.square(x).mean(axis=0), Format())
    without = diag_errors(w[:, 8:], np.ones((1, 120)), np.square(x[:, 8:]).mean(axis=0), Format())
    assert errors[0] > 500 * without[0]
    # As if these channels were not there: the best scales of the others save a little more.
    assert errors.min() < 1.05 * without[0]
    if normalization is Normalization.mean:  # only its scales have this clamp
        clamped = scales.copy()
        clamped[1:, :8] = convention.clamp[0]
        assert diag_errors(w, clamped, np.square(x).mean(axis=0), Format()).min() > 10 * errors.min()


def test_a_config_s_keys_override_the_convention(compose):
    chosen = spec_of(compose()).convention
    assert chosen == CONVENTIONS[ConventionChoice.day58]
    overrides = ("search=output", "search.normalization=sqrt_max_min", "gammas=[0.5]", "quant.group_size=32")
    chosen = spec_of(compose(*overrides)).convention
    assert (chosen.objective.name, chosen.normalization.name) == ("output", "sqrt_max_min")
    assert (chosen.grid.gamma.tolist(), chosen.quantizer) == ([0, 0.5], Format(32))
    assert (chosen.floor, chosen.clamp, chosen.least_power) == (1e-8, (1 / 8, 8), 1e-4)
