"""A convention's record says what is done: every value has what computes it, and any other value is refused."""

import itertools
import math

import numpy as np
import pytest

from awq_pycuda.backends.cpu import CpuBackend
from awq_pycuda.choices import ConventionChoice, Formula, Normalization, Objective, Share, Statistic, Ties
from awq_pycuda.engine.arrays import allocate
from awq_pycuda.engine.exact_scales import WEIGHTS, exact_scales, exact_weight_means
from awq_pycuda.engine.spec import spec_of
from awq_pycuda.engine.stages import STAGES
from awq_pycuda.engine.verify import exact_statistics
from awq_pycuda.errors import InputError
from awq_pycuda.layers.inputs import LayerSpec
from awq_pycuda.quant import search
from awq_pycuda.quant.conventions import CONVENTIONS, Candidate, Convention
from awq_pycuda.quant.format import Format

RNG = np.random.default_rng(11)
CLAMP = "(low, high), low from 1e-09 to 1, high from 1 to 1e+09"
POWER = "a number above 0, at most 1"
EXPONENTS = "at least one number from 0 to 10"


def members(kind):
    return ", ".join(map(str, kind))


REFUSED = [
    ("statistic", "abs_max", members(Statistic)),
    ("statistic", None, members(Statistic)),
    ("floor", 0, "a finite number above 0"),
    ("floor", -1e-8, "a finite number above 0"),
    ("floor", math.nan, "a finite number above 0"),
    ("floor", 10**400, "a finite number above 0"),
    ("floor", "1e-8", "a finite number above 0"),
    ("gammas", (), EXPONENTS),
    ("gammas", (0.5, math.nan), EXPONENTS),
    ("gammas", (0.5, -1), EXPONENTS),
    ("gammas", 0.5, EXPONENTS),
    ("betas", (), EXPONENTS),
    ("betas", (11,), EXPONENTS),
    ("formula", "duo", members(Formula)),
    ("normalization", "mean", members(Normalization)),
    ("clamp", (8.0, 1 / 8), CLAMP),
    ("clamp", (0, 8), CLAMP),
    ("clamp", (-1 / 8, 8), CLAMP),
    ("clamp", (math.nan, 8), CLAMP),
    ("clamp", (1 / 8, math.inf), CLAMP),
    ("clamp", (2, 8), CLAMP),
    ("clamp", (0.5,), CLAMP),
    ("clamp", 8, CLAMP),
    ("least_power", 0, POWER),
    ("least_power", -1e-4, POWER),
    ("least_power", 2, POWER),
    ("least_power", math.nan, POWER),
    ("identity", 1, "True, False"),
    ("ties", "first", members(Ties)),
    ("objective", "diag", members(Objective)),
    ("quantizer", "int8", "a Format"),
    ("clip", "search", "None, a Clipping"),
    ("share", "inputs", members(Share)),
]


@pytest.mark.parametrize(("name", "value", "allowed"), REFUSED)
def test_what_nothing_computes_is_refused_by_field_value_and_what_is_allowed(name, value, allowed):
    with pytest.raises(InputError) as refused:
        Convention(**{name: value})
    assert str(refused.value) == f"{name}={value}: allowed: {allowed}"


def test_every_field_has_a_rule():
    assert set(Convention.__dataclass_fields__) == {name for name, _, _ in REFUSED}


def test_what_is_allowed_has_what_computes_it():
    assert set(search.NORMALIZATIONS) == set(Normalization)


@pytest.mark.parametrize("normalization", Normalization)
@pytest.mark.parametrize("formula", Formula)
@pytest.mark.parametrize("statistic", Statistic)
@pytest.mark.parametrize("limits", [{}, {"floor": 0.3, "clamp": (0.7, 1.2), "least_power": 0.5}])
def test_the_oracle_has_every_field_s_formula_too(statistic, formula, normalization, limits):
    convention = Convention(statistic=statistic, formula=formula, normalization=normalization, **limits)
    values = RNG.lognormal(size=40)
    of_weights = RNG.uniform(size=40)
    values[[3, 9]] = of_weights[[4, 9]] = 0
    given = {statistic.name: values, WEIGHTS: of_weights}
    exact = [exact_scales(given, each, convention) for each in convention.grid.candidates]
    found = search.candidates(convention, values, of_weights if convention.asks_weights else None)
    np.testing.assert_allclose(found, exact, rtol=1e-12)
    dead = np.zeros(40)
    found = search.candidates(convention, dead, of_weights if convention.asks_weights else None)
    given[statistic.name] = dead
    np.testing.assert_allclose(found, [exact_scales(given, each, convention) for each in convention.grid.candidates])


@pytest.mark.parametrize("size", [None, 5, 12])
def test_the_weights_statistic_is_by_group_the_last_one_full_or_not(size):
    w = RNG.standard_normal((7, 12)).astype(np.float32)
    w[:, 3], w[2] = 0, 0
    found = search.weight_means([w], Format(size))
    expected = np.zeros(12)
    for n, k in itertools.product(range(7), range(12)):
        start = k // (size or 12) * (size or 12)
        peak = max(abs(float(value)) for value in w[n, start : start + (size or 12)])
        expected[k] += abs(float(w[n, k])) / (peak + 1e-6) / 7
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    np.testing.assert_allclose(exact_weight_means([w], Format(size)), expected, rtol=1e-12)


def grid(**fields):
    return [tuple(each) for each in Convention(**fields).grid.candidates]


def test_every_formula_s_candidates_stand_in_order_and_rtn_is_one_of_them():
    none = pytest.approx(math.nan, nan_ok=True)
    assert grid(gammas=(0.0, 0.5)) == [(0, none, False), (0.5, none, False)]
    # With duo a gamma of 0 is no RTN, which therefore stands in front.
    assert grid(gammas=(0.0, 0.5), formula=Formula.duo) == [(0, none, False), (0, none, True), (0.5, none, True)]
    both = grid(gammas=(0.0, 0.5), formula=Formula.both)
    assert both == [(0, none, False), (0, none, True), (0.5, none, False), (0.5, none, True)]
    two = grid(gammas=(0.5, -0.0), betas=(1.0, 0.0, 1.0), formula=Formula.gamma_beta)
    assert two == [(0.5, 1, False), (0.5, 0, False), (0, 1, False), (0, 0, False)]
    assert grid(gammas=(1.0,), betas=(0.5,), formula=Formula.gamma_beta) == [(0, 0, False), (1, 0.5, False)]
    for formula in Formula:
        found = Convention(gammas=(0.5, 0.0), formula=formula).grid
        assert [each.is_rtn for each in found.candidates].count(True) == 1
        assert found.candidates[found.rtn].is_rtn
    assert Convention(gammas=(0.0,), formula=Formula.duo, identity=False).grid.rtn is None


def test_a_candidate_says_what_it_is():
    assert [str(each) for each in (Candidate(0.25), Candidate(0.0, duo=True), Candidate(1.0, 0.5))] == [
        "0.25",
        "0 duo",
        "1 0.5",
    ]


def test_ties_go_to_the_first_or_to_the_smaller_gamma():
    errors = np.array([2.0, 1.0, 1.0, 1.0])
    for ties, chosen in ((Ties.first, 1), (Ties.smaller_gamma, 3)):
        assert search.best(Convention(gammas=(1.0, 0.75, 0.5, 0.0), ties=ties), errors) == chosen
        assert search.best(Convention(ties=ties), np.array([np.nan, np.inf, 3.0, 3.0, 4.0])) == 2
    # RTN is in front, and of two with one gamma the first is taken.
    duo = Convention(gammas=(0.0,), formula=Formula.duo)
    assert search.best(duo, np.zeros(2)) == duo.grid.rtn == 0
    result = search.search_result(duo, np.array([3.0, 2.0]), np.ones(3))
    assert (result.chosen, result.error_chosen, result.error_rtn) == (1, 2, 3)


@pytest.mark.parametrize("formula", Formula)
@pytest.mark.parametrize("objective", Objective)
@pytest.mark.parametrize("statistic", Statistic)
def test_the_search_takes_formula_and_statistic_that_the_record_names(formula, objective, statistic):
    x = RNG.standard_normal((30, 12)).astype(np.float32) * np.linspace(0.1, 4, 12, dtype=np.float32)
    w = RNG.standard_normal((8, 12)).astype(np.float32)
    convention = Convention(
        statistic=statistic, formula=formula, objective=objective, normalization=Normalization.sqrt_max_min
    )
    with CpuBackend() as backend:
        (layer,) = allocate(backend, [LayerSpec("layer", 30, w, x)], convention).layers
        STAGES[0].call(backend, layer, convention)
        backend.compute_s(layer, convention)
    statistics = exact_statistics(x) | {WEIGHTS: exact_weight_means([w], Format())}
    chosen = search.best(convention, layer.error)
    expected = exact_scales(statistics, convention.grid.candidates[chosen], convention)
    np.testing.assert_allclose(layer.s, expected, rtol=1e-5)
    assert layer.error[chosen] <= layer.error[convention.grid.rtn]


@pytest.mark.parametrize("choice", ConventionChoice)
def test_the_command_s_convention_is_the_record(compose, choice):
    assert spec_of(compose(f"convention={choice.name}")).convention == CONVENTIONS[choice]
