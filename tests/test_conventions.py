"""A convention's record says what is done: every value has what computes it, and any other value is refused."""

import math
from typing import get_args

import numpy as np
import pytest

from awq_pycuda.backends.cpu import CpuBackend
from awq_pycuda.config import Normalization, Objective
from awq_pycuda.engine.arrays import allocate
from awq_pycuda.engine.verify import exact_scales
from awq_pycuda.errors import InputError
from awq_pycuda.layers.inputs import LayerSpec
from awq_pycuda.quant import search
from awq_pycuda.quant.conventions import Clip, Convention, Formula, Sharing, Statistic

RNG = np.random.default_rng(11)
CLAMP = "(low, high), low from 1e-09 to 1, high from 1 to 1e+09"
POWER = "a number above 0, at most 1"

REFUSED = [
    ("statistic", "sq_mean", "abs_mean"),
    ("statistic", None, "abs_mean"),
    ("floor", 0, "a finite number above 0"),
    ("floor", -1e-8, "a finite number above 0"),
    ("floor", math.nan, "a finite number above 0"),
    ("floor", 10**400, "a finite number above 0"),
    ("floor", "1e-8", "a finite number above 0"),
    ("gammas", (), "at least one number from 0 to 10"),
    ("gammas", (0.5, math.nan), "at least one number from 0 to 10"),
    ("gammas", (0.5, -1), "at least one number from 0 to 10"),
    ("gammas", 0.5, "at least one number from 0 to 10"),
    ("formula", "duo", "plain"),
    ("normalization", "mean", "Normalization.mean, Normalization.sqrt_max_min"),
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
    ("objective", "diag", "Objective.diag, Objective.output"),
    ("quantizer", "int8", "a Format"),
    ("clip", "search", "none"),
    ("sharing", "inputs", "none"),
]


@pytest.mark.parametrize(("name", "value", "allowed"), REFUSED)
def test_what_nothing_computes_is_refused_by_field_value_and_what_is_allowed(name, value, allowed):
    with pytest.raises(InputError) as refused:
        Convention(**{name: value})
    assert str(refused.value) == f"{name}={value}: allowed: {allowed}"


def test_every_field_has_a_rule():
    assert set(Convention.__dataclass_fields__) == {name for name, _, _ in REFUSED}


def test_what_is_allowed_has_what_computes_it():
    assert set(search.FORMULAS) == set(get_args(Formula))
    assert set(search.NORMALIZATIONS) == set(Normalization)
    assert get_args(Clip) == get_args(Sharing) == ("none",)  # which is to do nothing


@pytest.mark.parametrize("normalization", Normalization)
@pytest.mark.parametrize("formula", get_args(Formula))
@pytest.mark.parametrize("statistic", get_args(Statistic))
@pytest.mark.parametrize("limits", [{}, {"floor": 0.3, "clamp": (0.7, 1.2), "least_power": 0.5}])
def test_the_oracle_has_every_field_s_formula_too(statistic, formula, normalization, limits):
    convention = Convention(statistic=statistic, formula=formula, normalization=normalization, **limits)
    values = RNG.lognormal(size=40)
    values[[3, 9]] = 0
    exact = [exact_scales({statistic: values}, gamma, convention) for gamma in convention.grid]
    np.testing.assert_allclose(search.candidates(convention, values), exact, rtol=1e-12)


@pytest.mark.parametrize("objective", Objective)
def test_the_search_takes_the_statistic_and_the_formula_that_the_record_names(monkeypatch, objective):
    """Values that no record can have yet: what is computed must follow them all the same."""
    x = RNG.standard_normal((30, 12)).astype(np.float32) * np.linspace(0.1, 4, 12, dtype=np.float32)
    w = RNG.standard_normal((8, 12)).astype(np.float32)
    convention = Convention(gammas=(0.5,), identity=False, objective=objective)
    object.__setattr__(convention, "statistic", "sq_mean")
    object.__setattr__(convention, "formula", "half")
    monkeypatch.setitem(search.FORMULAS, "half", lambda logarithm, grid: search.FORMULAS["plain"](logarithm, grid / 2))
    with CpuBackend() as backend:
        (layer,) = allocate(backend, [LayerSpec("layer", 30, w, x)], convention).layers
        backend.accum_stats(layer.x, layer.abs_mean, layer.sq_mean)
        backend.compute_s(layer, convention)
    powers = np.square(x.astype(np.float64)).mean(axis=0) ** 0.25
    np.testing.assert_allclose(layer.s, np.clip(powers / powers.mean(), 1 / 8, 8), rtol=1e-5)
