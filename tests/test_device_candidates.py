"""Every formula of candidates by kernels: the weights' statistic, the scales, the curve and what is chosen."""

import dataclasses

import numpy as np
import pytest
from conftest import make_backend, same_bits
from test_device_search import DEVICES, layer_of, same_but_for_a_last_bit, searched

from awq_pycuda.backends.cpu import CpuBackend
from awq_pycuda.choices import Formula, Normalization, Objective, Ties
from awq_pycuda.engine.arrays import allocate
from awq_pycuda.engine.exact_scales import WEIGHTS, exact_scales, exact_weight_means
from awq_pycuda.engine.verify import relative_error
from awq_pycuda.kernels import table
from awq_pycuda.quant.conventions import Candidate, Convention
from awq_pycuda.quant.format import Format
from awq_pycuda.quant.search import best, weight_means

GPU = pytest.mark.gpu


def odd_layer(out_features=9, in_features=37, tokens=20):
    """Dead channels, a column of zeros, both in one; a group and a row of zeros, one of one sign, a constant one."""
    spec = layer_of(out_features, in_features, dead=[3, 5, 11], tokens=tokens)
    w = spec.weight
    w[:, 5], w[:, 7], w[1, :10], w[2], w[3] = 0, 0, 0, np.abs(w[2]), 0.25
    return spec


def of_weights(backend, w, size):
    """What the kernels leave of the weights."""
    with backend:
        handle, found = backend._written(w), backend._written(np.full(w.shape[1], np.nan))
        backend._run("weight_means", w=handle, weight_mean=found, group_size=Format(size).size(w.shape[1]))
        return backend.read(found).copy()


@pytest.mark.parametrize(
    ("name", "shape", "size"),
    [
        *(("host", (9, 37), size) for size in (None, 10, 16)),
        ("host", (150, 36), 8),  # two chunks of rows; two lanes to a group
        ("host", (5, 260), None),
        *(
            pytest.param("cuda", shape, size, marks=GPU)
            for shape in ((1, 1), (9, 37), (4100, 1028), (300, 11008))
            for size in (None, 16, 128, 30)
        ),
    ],
)
def test_the_weights_statistic_is_the_host_s(name, shape, size, worst):
    w = layer_of(*shape).weight
    w[:, 0], w[0] = 0, 0
    found = of_weights(make_backend(name), w, size)
    worst(
        f"{name} weight_means",
        relative_error(found, weight_means([w], Format(size))),
        table.find("weight_means").tolerance,
    )
    assert found[0] == 0
    assert same_bits(found, of_weights(make_backend(name), w, size))


NARROW = {"floor": 0.3, "clamp": (0.7, 1.2), "least_power": 0.5}


@pytest.mark.parametrize(
    ("name", "limits"),
    [("host", NARROW), pytest.param("cuda", {}, marks=GPU), pytest.param("cuda", NARROW, marks=GPU)],
)
@pytest.mark.parametrize("normalization", Normalization)
def test_the_scales_of_every_candidate_are_the_oracle_s(name, normalization, limits):
    """Each alone, so that it is chosen."""
    rule = Convention(
        gammas=(0,),
        normalization=normalization,
        objective=Objective.output,
        identity=False,
        quantizer=Format(10),
        **limits,
    )
    formulas = (Formula.plain, Formula.duo, Formula.gamma_beta)
    every = [(formula, gamma, 0.5) for formula in formulas for gamma in (0, 0.7)]
    every += [(Formula.duo, 1, 0.5), (Formula.gamma_beta, 0.7, 0)]
    with make_backend(name) as backend:
        for spec in (odd_layer(), layer_of(3, 37, dead=range(37))):
            (layer,) = allocate(backend, [spec], rule).layers
            backend.accum_stats(layer.x, layer.abs_mean, layer.sq_mean)
            statistics = {
                "abs_mean": backend.read(layer.abs_mean).astype(np.float64),
                WEIGHTS: exact_weight_means([spec.weight], rule.quantizer),
            }
            for formula, gamma, beta in every:
                alone = dataclasses.replace(rule, formula=formula, gammas=(gamma,), betas=(beta,))
                backend.compute_s(layer, alone)
                (candidate,) = alone.grid.candidates
                found = backend.read(layer.s)
                assert same_but_for_a_last_bit(found, exact_scales(statistics, candidate, alone)), candidate
                assert same_bits(backend.read(layer.inv_s), 1 / found)


# 7 or 14 candidates each, in chunks of 7.
GRIDS = {
    Formula.duo: {"gammas": (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)},
    Formula.both: {"gammas": (0.0, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0)},
    Formula.gamma_beta: {"gammas": (0.0, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0), "betas": (0.0, 0.6)},
}


@pytest.mark.parametrize("name", DEVICES)
@pytest.mark.parametrize("objective", Objective)
@pytest.mark.parametrize("formula", GRIDS)
def test_the_curve_and_the_choice_are_the_host_s(name, formula, objective, worst):
    chosen, spec = Convention(formula=formula, objective=objective, quantizer=Format(10), **GRIDS[formula]), odd_layer()
    error, s, inv_s, _ = found = searched(make_backend(name), spec, chosen)
    exact, host_s, *_ = searched(CpuBackend(), spec, chosen)
    worst(f"{name} search_{objective.name} by weights, beside the host's", relative_error(error, exact), 1e-4)
    assert best(chosen, error) == best(chosen, exact)
    assert same_but_for_a_last_bit(s, host_s)
    assert same_bits(inv_s, 1 / s)
    if formula is Formula.gamma_beta:
        again = searched(make_backend(name), spec, chosen)
        assert all(same_bits(one, other) for one, other in zip(found, again, strict=True))


@pytest.mark.parametrize("name", DEVICES)
@pytest.mark.parametrize("ties", Ties)
def test_of_candidates_with_one_error_the_host_s_is_chosen(name, ties):
    """Several with one gamma, in no order; the squares of the activations are too small for float32."""
    spec = layer_of(4, 37)
    spec.activations[...] *= 1e-30
    grid = {"gammas": (0.75, 0.25, 1.0, 0.25, 0.5, 0.3, 0.9, 0.6), "betas": (1.0, 0.5)}
    chosen = Convention(formula=Formula.gamma_beta, ties=ties, floor=1e-40, identity=False, **grid)
    error, s, *_ = searched(make_backend(name), spec, chosen)
    assert (error == 0).all()
    statistics = {"abs_mean": np.abs(spec.activations.astype(np.float64)).mean(axis=0)}
    statistics[WEIGHTS] = exact_weight_means([spec.weight], chosen.quantizer)
    first = Candidate(0.25 if ties is Ties.smaller_gamma else 0.75, 1.0)
    assert same_but_for_a_last_bit(s, exact_scales(statistics, first, chosen))


@GPU
@pytest.mark.parametrize("formula", GRIDS)
@pytest.mark.parametrize(
    ("variant", "shape", "size"),
    [
        *(("narrow", (40, 576), None), ("rows", (130, 1028), None), ("groups", (130, 1024), 128)),
        *(("any", (30, 129), 16), ("digits", (256, 512), 128), ("digits_mma", (256, 512), None)),
    ],
)
def test_every_search_takes_them(variant, shape, size, formula):
    objective = Objective.output if "digits" in variant else Objective.diag
    chosen = Convention(formula=formula, objective=objective, quantizer=Format(size), **GRIDS[formula])
    spec = layer_of(*shape, dead=[7], tokens=256)
    error, s, *_ = searched(make_backend("cuda", **{table.SEARCHES[objective.name]: variant}), spec, chosen)
    exact, host_s, *_ = searched(CpuBackend(), spec, chosen)
    np.testing.assert_allclose(error, exact, rtol=1e-4)
    assert best(chosen, error) == best(chosen, exact)
    assert same_but_for_a_last_bit(s, host_s)


@pytest.mark.parametrize("name", DEVICES)
def test_no_value_of_a_search_by_weights_comes_to_the_host(name, monkeypatch):
    backend, spec = make_backend(name), odd_layer()
    chosen = Convention(formula=Formula.both, quantizer=Format(10), **GRIDS[Formula.both])
    with backend:
        (layer,) = allocate(backend, [spec], chosen).layers
        backend.accum_stats(layer.x, layer.abs_mean, layer.sq_mean)
        backend.compute_s(layer, chosen)  # the convention's numbers go to the device once
        for access in ("read", "write", "on_host", "from_host"):
            monkeypatch.setattr(backend, access, lambda *arguments: pytest.fail("an access of the host"))
        backend.compute_s(layer, chosen)
