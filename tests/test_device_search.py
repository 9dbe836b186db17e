"""The search for scales by kernels, against the search on the host and against float64."""

import dataclasses

import numpy as np
import pytest
from conftest import make_backend, same_bits

from awq_pycuda.backends.cpu import CpuBackend
from awq_pycuda.choices import Normalization, Objective, Statistic
from awq_pycuda.engine.arrays import allocate
from awq_pycuda.engine.stages import STAGES
from awq_pycuda.engine.verify import relative_error
from awq_pycuda.kernels import table
from awq_pycuda.layers.inputs import LayerSpec
from awq_pycuda.quant.conventions import Convention
from awq_pycuda.quant.format import Format
from awq_pycuda.quant.quantized import Quantized, dequantize, quantize, steps_of

STATISTICS = STAGES[0]
DEVICES = ["host", pytest.param("cuda", marks=pytest.mark.gpu)]  # host: the kernels, compiled for the CPU


def layer_of(out_features, in_features, dead=(), scale=1.0, tokens=13):
    """The same layer whichever tests ran before: a code at a rounding tie may go another way in float64."""
    random = np.random.default_rng([17, out_features, in_features, tokens])
    w = (random.normal(size=(out_features, in_features)) * scale).astype(np.float32)
    w[0] = 0
    x = (random.normal(size=(tokens, in_features)) * np.exp(random.normal(size=in_features))).astype(np.float32)
    x[:, list(dead)] = 0
    return LayerSpec("layer", tokens, w, x)


def convention(points, size=None, **more):
    grid = tuple(np.linspace(0, 1, points)) if points > 1 else (0.5,)
    return Convention(gammas=grid, quantizer=Format(size), **more)


def searched(backend, spec, chosen):
    """The curve, the scales, their reciprocals and the steps, as the stages leave them."""
    with backend:
        (layer,) = allocate(backend, [spec], chosen).layers
        STATISTICS.call(backend, layer, chosen)
        for handle in (layer.error, layer.s, layer.inv_s, layer.quantized.steps):
            backend.write(handle, np.full_like(backend.read(handle), np.nan))
        backend.compute_s(layer, chosen)
        backend.compute_scale_b(layer.w, layer.s, layer.quantized)
        return [backend.read(handle).copy() for handle in (layer.error, layer.s, layer.inv_s, layer.quantized.steps)]


# One chunk of candidates and several, ragged and not. What is marked gpu compiles more kernels, each of which takes
# seconds here.
SIZES = [
    ("narrow", 21, 260, None, 11),
    ("narrow", 9, 132, None, 6),
    ("rows", 70, 260, None, 11),
    ("rows", 9, 132, None, 22),
    ("groups", 33, 128, 128, 5),
    ("groups", 9, 576, 128, 10),
    ("any", 5, 37, None, 7),
    ("any", 6, 100, 10, 14),
    *(
        pytest.param(*sizes, marks=pytest.mark.gpu)
        for sizes in (
            ("groups", 20, 96, 32, 3),
            ("groups", 17, 192, 64, 20),
            ("any", 1, 1, None, 1),
            ("narrow", 1024, 1024, None, 5),
            ("narrow", 4101, 1020, None, 20),
            ("rows", 300, 1024, None, 20),
            ("rows", 4100, 1028, None, 5),
        )
    ),
]


def on_each(*cases):
    """The cases on every device; those that are marked gpu on none but CUDA."""
    for case in cases:
        marked = getattr(case, "marks", ())
        values = getattr(case, "values", case)
        if not marked:
            yield pytest.param("host", *values)
        yield pytest.param("cuda", *values, marks=pytest.mark.gpu)


def same_but_for_a_last_bit(s, expected):
    """Logarithms and powers of two libraries may differ in the last bit of a double."""
    return relative_error(s, expected) <= 2**-23


@pytest.mark.parametrize(("name", "variant", "out_features", "in_features", "size", "points"), [*on_each(*SIZES)])
@pytest.mark.parametrize("normalization", Normalization)
def test_the_device_finds_what_the_host_finds(
    name, variant, out_features, in_features, size, points, normalization, worst
):
    spec = layer_of(out_features, in_features, dead=range(3, in_features, 50))
    chosen = convention(points, size, normalization=normalization)
    error, s, inv_s, steps = searched(make_backend(name, search_diag=variant), spec, chosen)
    exact, host_s, *_ = searched(CpuBackend(), spec, chosen)
    worst(f"{name} search ({variant})", relative_error(error, exact), table.find("search_diag", variant).tolerance)
    assert same_but_for_a_last_bit(s, host_s)
    assert same_bits(inv_s, 1 / s)
    assert same_bits(steps, steps_of(spec.weight, s, chosen.quantizer).steps)


@pytest.mark.parametrize("name", DEVICES)
def test_the_largest_magnitudes_are_searched_where_they_are_the_statistic(name, worst):
    spec = layer_of(6, 100, dead=[7])
    by_mean, chosen = (convention(14, 10, statistic=statistic) for statistic in Statistic)
    error, s, *_ = searched(make_backend(name, search_diag="any"), spec, chosen)
    exact, host_s, *_ = searched(CpuBackend(), spec, chosen)
    worst(f"{name} search (any)", relative_error(error, exact), table.find("search_diag", "any").tolerance)
    assert same_but_for_a_last_bit(s, host_s)
    assert relative_error(s, searched(CpuBackend(), spec, by_mean)[1]) > 0.01


BY_VARIANT = [("narrow", None, 11), ("rows", None, 11), ("groups", 128, 5), ("any", 10, 7)]


@pytest.mark.parametrize("name", DEVICES)
@pytest.mark.parametrize(("variant", "size", "points"), BY_VARIANT)
@pytest.mark.parametrize("scale", [1e-41, 1e-25, 1e-12, 1e22, 1e37])
def test_weights_whose_squares_float_cannot_hold(name, variant, size, points, scale):
    spec, chosen = layer_of(9, 132, scale=scale), convention(points, size)
    error, s, _, steps = searched(make_backend(name, search_diag=variant), spec, chosen)
    exact, host_s, *_ = searched(CpuBackend(), spec, chosen)
    if 1e-40 < scale < 1e30:  # a denormal step has few bits, and the largest weights overflow where float64 does not
        oracle = dataclasses.replace(spec, weight=spec.weight.astype(np.float64))
        exact, *_ = searched(CpuBackend(np.float64), oracle, chosen)
    np.testing.assert_allclose(error, exact, rtol=1e-5)
    assert same_but_for_a_last_bit(s, host_s)
    assert same_bits(steps, steps_of(spec.weight, s, chosen.quantizer).steps)


@pytest.mark.parametrize("name", DEVICES)
@pytest.mark.parametrize(("variant", "size", "points"), BY_VARIANT)
def test_a_candidate_that_overflows_has_an_infinite_error(name, variant, size, points):
    spec = layer_of(4, 132)
    spec.weight[1, :32] = 3e38
    spec.activations[:, :2] *= 1000
    error, *_ = searched(make_backend(name, search_diag=variant), spec, convention(points, size))
    exact, *_ = searched(CpuBackend(), spec, convention(points, size))
    assert np.isfinite(exact).any()
    assert np.isinf(exact).any()
    assert np.array_equal(np.isinf(error), np.isinf(exact))
    assert not np.isnan(error).any()


@pytest.mark.parametrize("name", DEVICES)
@pytest.mark.parametrize(("variant", "size", "points"), BY_VARIANT)
def test_a_tie_goes_to_the_smaller_gamma(name, variant, size, points):
    spec = layer_of(5, 132)
    spec.weight[...] = 0  # nothing has an error
    error, s, _, steps = searched(make_backend(name, search_diag=variant), spec, convention(points, size))
    assert (error == 0).all()
    assert (s == 1).all()
    assert (steps == 1).all()


@pytest.mark.parametrize("name", DEVICES)
def test_channels_without_a_signal_alone(name):
    spec = layer_of(5, 132, dead=range(132))
    for normalization in Normalization:
        chosen = convention(11, normalization=normalization)
        for found, expected in zip(
            searched(make_backend(name), spec, chosen), searched(CpuBackend(), spec, chosen), strict=True
        ):
            assert same_bits(found, expected)


@pytest.mark.parametrize("name", DEVICES)
@pytest.mark.parametrize("size", [None, 10])
def test_the_error_of_the_output_is_that_of_its_scales(name, size):
    """One candidate at a time, since a last bit of its scales may move one code, and that its error by more."""
    spec = layer_of(21, 96, dead=[5])
    errors = []
    for gamma in (0.0, 0.3, 1.0):
        alone = Convention(gammas=(gamma,), identity=False, objective=Objective.output, quantizer=Format(size))
        error, s, inv_s, steps = searched(make_backend(name), spec, alone)
        assert same_bits(inv_s, 1 / s)
        assert same_bits(steps, steps_of(spec.weight, s, alone.quantizer).steps)
        codes = Quantized(codes=np.empty(spec.weight.shape, np.int8), steps=steps, format=alone.quantizer)
        quantize(spec.weight, s, codes)
        wrong = dequantize(codes, 1 / s.astype(np.float64), np.float64) - spec.weight
        np.testing.assert_allclose(error, np.mean((spec.activations @ wrong.T) ** 2), rtol=1e-5)
        errors.append(error[0])
    together = convention(5, size, objective=Objective.output, identity=True)
    together = dataclasses.replace(together, gammas=(0.0, 0.3, 1.0))
    error, s, *_ = searched(make_backend(name), spec, together)
    assert error.tolist() == errors
    assert same_but_for_a_last_bit(s, searched(CpuBackend(), spec, together)[1])


@pytest.mark.parametrize("name", DEVICES)
@pytest.mark.parametrize("objective", Objective)
def test_two_searches_leave_the_same_bits(name, objective):
    spec = layer_of(20, 132)
    first, second = (searched(make_backend(name), spec, convention(11, objective=objective)) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert same_bits(one, other)


@pytest.mark.parametrize("name", DEVICES)
@pytest.mark.parametrize("objective", Objective)
def test_no_value_of_a_search_comes_to_the_host(name, objective, monkeypatch):
    backend, spec, chosen = make_backend(name), layer_of(9, 132), convention(11, objective=objective)
    with backend:
        (layer,) = allocate(backend, [spec], chosen).layers
        backend.accum_stats(layer.x, layer.abs_mean, layer.sq_mean)
        backend.compute_s(layer, chosen)  # the convention's numbers go to the device once
        for access in ("read", "write", "on_host", "from_host"):
            monkeypatch.setattr(backend, access, lambda *arguments: pytest.fail("an access of the host"))
        backend.compute_s(layer, chosen)
        backend.compute_scale_b(layer.w, layer.s, layer.quantized)


@pytest.mark.parametrize("name", DEVICES)
@pytest.mark.parametrize(("variant", "size", "points"), BY_VARIANT)
def test_the_classic_mixed_flow_is_the_same_search(name, variant, size, points, worst):
    """Device and host side by side, on one backend; the host's steps and codes then go to the same kernels."""
    spec, chosen = layer_of(40, 132, dead=[7]), convention(points, size)
    device = searched(make_backend(name, search_diag=variant), spec, chosen)
    host = searched(make_backend(name, search_on_host=True), spec, chosen)
    worst(f"{name} search beside the host's", relative_error(device[0], host[0]), 1e-5)
    assert np.argmin(device[0]) == np.argmin(host[0])
    assert same_but_for_a_last_bit(device[1], host[1])
    np.testing.assert_allclose(device[3], host[3], rtol=2**-22)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("variant", "size", "points"),
    [
        *(("narrow", None, 11), ("narrow", None, 22), ("rows", None, 11), ("rows", None, 22)),
        *(("groups", 32, 5), ("groups", 128, 10), ("any", 10, 7)),
    ],
)
def test_sanitize_every_search(variant, size, points):
    """Small and ragged; `make sanitize` puts it under compute-sanitizer's four tools."""
    for objective in Objective:
        chosen = convention(points, size, objective=objective)
        error, *_ = searched(
            make_backend("cuda", search_diag=variant), layer_of(37, 132, dead=[7], scale=1e-25), chosen
        )
        assert np.isfinite(error).all()
