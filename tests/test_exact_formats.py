"""The float64 oracle knows every format and convention: sound layers pass, planted faults are found and named."""

import dataclasses
import types

import numpy as np
import pytest
from conftest import COMPILED, make_backend
from hypothesis import given, settings
from hypothesis import strategies as st

from awq_pycuda.backends.cpu import CpuBackend
from awq_pycuda.choices import Divisor, Element, Objective, StepDtype, ZeroOrder, ZeroPoint, ZeroStep
from awq_pycuda.engine import evaluation
from awq_pycuda.engine.arrays import allocate
from awq_pycuda.engine.exact_curve import curve_error, exact_curve
from awq_pycuda.engine.exact_format import exact_codes, exact_steps
from awq_pycuda.engine.stages import stages_of
from awq_pycuda.engine.verify import TOLERANCES, check_layer, refuse_beyond_tolerance
from awq_pycuda.layers.inputs import LayerSpec
from awq_pycuda.parallel import use_threads
from awq_pycuda.quant import format, quantized, search, step_types
from awq_pycuda.quant.conventions import CONVENTIONS
from awq_pycuda.quant.format import Format

FP4 = {"bits": 4, "element": Element.e2m1}
HALF = {"divisor": Divisor.half_range, "zero_step": ZeroStep.epsilon}
ZERO = {"symmetric": False}
NARROW = {"symmetric": False, "include_zero": False}
FLOAT = {**NARROW, "zero_point": ZeroPoint.float, "least_step": 1e-6}
FORMATS = {
    "int8 row": Format(),
    "int8 g128": Format(128),
    "int4 g128": Format(128, 4),
    "int3 g32": Format(32, 3),
    "int2 g16": Format(16, 2),
    "int4 fp16": Format(128, 4, step_dtype=StepDtype.fp16),
    "int8 fp16": Format(16, 8, step_dtype=StepDtype.fp16),
    "half range": Format(128, 4, **HALF),
    "half range, int8 bf16": Format(None, 8, **HALF, step_dtype=StepDtype.bf16),
    "zero points": Format(128, 4, **ZERO),
    "zero points, int8": Format(None, 8, **ZERO),
    "zero points first": Format(64, 4, **ZERO, zero_order=ZeroOrder.shift_first, step_dtype=StepDtype.fp16),
    "narrow": Format(128, 4, **NARROW, least_range=1e-5),
    "narrow, int3 fp16": Format(64, 3, **NARROW, least_range=1e-5, step_dtype=StepDtype.fp16),
    "float zeros": Format(32, 4, **FLOAT),
    "float zeros bf16": Format(128, 4, **FLOAT, step_dtype=StepDtype.bf16),
    "float zeros, int8 fp16": Format(128, 8, **FLOAT, step_dtype=StepDtype.fp16),
    "nvfp4": Format(16, **FP4, step_dtype=StepDtype.e4m3),
    "nvfp4, epsilon": Format(16, **FP4, step_dtype=StepDtype.e4m3, zero_step=ZeroStep.epsilon),
    "mxfp4": Format(32, **FP4, step_dtype=StepDtype.e8m0),
    "mxfp4 up": Format(32, **FP4, step_dtype=StepDtype.e8m0_up),
    "fp4 row": Format(**FP4),
}


def normal(w, x):
    pass


def all_positive(w, x):
    w[...] = np.abs(w) + w.dtype.type(0.01)


def far_from_zero(w, x):
    w *= w.dtype.type(0.1)
    w += w.dtype.type(0.5)


def constant_groups(w, x):
    w[:, : w.shape[1] // 2] = 0.03
    w[0] = -0.02


def all_constant(w, x):
    w[...] = 0.03


def groups_of_zeros(w, x):
    w[0], w[1:, : w.shape[1] // 2] = 0, 0


def dead_channels(w, x):
    x[:, ::9] = 0
    w[:, ::9] *= 100


KINDS = (normal, all_positive, far_from_zero, constant_groups, all_constant, groups_of_zeros, dead_channels)


def layer_of(kind, rows, channels, tokens, seed=0):
    """(M, K) activations whose channels differ in size, and (N, K) weights."""
    random = np.random.default_rng([seed, rows, channels])
    w = (0.05 * random.normal(size=(rows, channels))).astype(np.float32)
    x = (random.normal(size=(tokens, channels)) * random.lognormal(0, 0.7, channels)).astype(np.float32)
    kind(w, x)
    return x, w


def run_layer(backend, convention, x, w):
    """What all stages make of a layer, as `check_layer` takes it."""
    spec = LayerSpec("layer", len(x), w, x)
    with use_threads(1), backend:
        (layer,) = allocate(backend, [spec], convention).layers
        for stage in stages_of(backend, convention):
            stage.call(backend, layer, convention)
        backend.dequantize_tiled(layer.x, layer.quantized, layer.inv_s, layer.y)
        result = evaluation.collect(backend, spec, layer, convention, keeps_codes=True)
        y, out = (backend.read(handle).copy() for handle in (layer.y, layer.out))
        held = None
        if layer.held is not None:
            held = tuple(backend.read(handle).copy() for handle in (layer.held.weights, layer.held.ratio))
    return {
        "x": x,
        "w": w,
        "bias": None,
        "abs_mean": result.abs_mean,
        "sq_mean": result.sq_mean,
        "found": result.search,
        "quantized": result.quantized,
        "y": y,
        "out": out,
        "held": held,
    }


def made(name, form):
    """A backend whose product takes the format."""
    return make_backend(name, 16, form, dequantizeTiled="auto")


def checked(convention, arrays):
    with use_threads(1):
        return check_layer(convention, **arrays)


def conventions(form, number=0):
    """One of the conventions, counted round, in this format, with every objective."""
    convention = list(CONVENTIONS.values())[number % len(CONVENTIONS)]
    for objective in Objective:
        yield dataclasses.replace(convention, gammas=(0.0, 0.5, 1.0), objective=objective, quantizer=form)


# Of the CPU both sets of loops.
ON = [pytest.param(("cpu", *COMPILED), id="cpu"), pytest.param(("cuda",), id="cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("backends", ON)
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_sound_layers_pass(name, kind, backends, worst):
    """Groups that 576 channels do not fill, and some that they do; few channels, so that little is averaged out.

    Every kind and nearly every format meets every convention.
    """
    form, number = FORMATS[name], list(FORMATS).index(name) + KINDS.index(kind)
    for shape in ((6, 576, 12), (3, 33, 5)):
        x, w = layer_of(kind, *shape)
        for convention in conventions(form, number):
            for backend in backends:
                arrays = run_layer(made(backend, form), convention, x, w)
                errors = checked(convention, arrays)
                unneeded = {"zero_points"} if form.symmetric else set()
                unneeded |= {"abs_max"} if convention.clip else {"abs_max", "clipped"}
                assert set(errors) == set(TOLERANCES) - unneeded
                for stage, error in errors.items():
                    worst(f"formats {stage}{' cuda' * (backend == 'cuda')}", error, TOLERANCES[stage])
                assert not arrays["found"].error_chosen > arrays["found"].error_rtn


@pytest.mark.parametrize("backends", ON)
@pytest.mark.parametrize("name", FORMATS)
def test_sound_layers_of_many_channels_pass(name, backends):
    form, (x, w) = FORMATS[name], layer_of(normal, 2, 11008, 3)
    for convention in conventions(form, list(FORMATS).index(name)):
        arrays = run_layer(made(backends[-1], form), convention, x, w)
        refuse_beyond_tolerance("layer", checked(convention, arrays))


@pytest.mark.parametrize("backends", ON)
@pytest.mark.parametrize("convention", CONVENTIONS.values(), ids=[each.name for each in CONVENTIONS])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_convention_in_its_own_format_passes(convention, kind, backends):
    form = dataclasses.replace(convention.quantizer, bits=4, group_size=128)
    convention = dataclasses.replace(convention, quantizer=form)
    arrays = run_layer(made(backends[0], form), convention, *layer_of(kind, 6, 576, 12))
    refuse_beyond_tolerance("layer", checked(convention, arrays))


def in_format(name, objective=Objective.diag):
    """The default convention in a format, and a sound layer of it."""
    convention = next(each for each in conventions(FORMATS[name]) if each.objective is objective)
    return convention, run_layer(CpuBackend(), convention, *layer_of(normal, 6, 576, 12))


def beyond(convention, arrays):
    errors = checked(convention, arrays)
    return {stage for stage, error in errors.items() if not error <= TOLERANCES[stage]}


@pytest.mark.parametrize("form", FORMATS.values(), ids=list(FORMATS))
def test_what_float32_leaves_open_of_a_curve_is_little(form):
    """Of the objective `output`, where the largest weight of each group lies at a tie, it is more."""
    for convention in conventions(form):
        arrays = run_layer(CpuBackend(), convention, *layer_of(normal, 6, 576, 12))
        ties = form.divisor is Divisor.half_range and convention.objective is Objective.output
        for factor in (1.3, 0.7) if ties else (1.01, 0.99):
            found = dataclasses.replace(arrays["found"], error=arrays["found"].error * factor)
            assert beyond(convention, arrays | {"found": found}) == {"error_curve"}


def test_codes_at_ties_may_all_go_the_other_way_in_an_output():
    w, x, ones = np.array([[-7.5, 0.4, -7.5, 0]]), np.array([[1, -2.5, 1, 1]]), np.ones((1, 4))
    curve = exact_curve([w], ones, x[0] ** 2, Format(2, 4, divisor=Divisor.half_range), x)
    for sevens in (0, 1, 2):  # in place of -8
        assert curve_error(np.array([float(sevens**2)]), curve) < 1e-9
    assert curve_error(np.array([4.1]), curve) > 1e-3


# What a run does in place of what it was asked for, and the stages that must tell. Codes are judged by the steps and
# zero points that they were made for, whatever these are.
CONFUSED = [
    ("half range", normal, {"divisor": Divisor.largest}, {"scale_b", "error_curve"}),
    ("half range", groups_of_zeros, {"zero_step": ZeroStep.one}, {"scale_b"}),
    ("narrow", normal, {"least_range": 1.0}, {"scale_b"}),
    ("int4 fp16", normal, {"step_dtype": StepDtype.fp32}, {"scale_b"}),
    ("half range, int8 bf16", normal, {"step_dtype": StepDtype.fp16}, {"scale_b"}),
    ("zero points", all_positive, {"include_zero": False}, {"scale_b", "error_curve"}),
    ("float zeros bf16", normal, {"step_dtype": StepDtype.fp32}, {"scale_b", "zero_points"}),
    ("mxfp4", normal, {"step_dtype": StepDtype.e8m0_up}, {"scale_b", "error_curve"}),
    ("mxfp4", normal, {"step_dtype": StepDtype.fp32}, {"scale_b", "error_curve"}),
    ("nvfp4", normal, {"step_dtype": StepDtype.fp16}, {"scale_b", "error_curve"}),
]


@pytest.mark.parametrize(("name", "kind", "instead", "stages"), CONFUSED)
def test_a_format_for_another_is_found(name, kind, instead, stages):
    asked, _ = in_format(name)
    done = dataclasses.replace(asked, quantizer=dataclasses.replace(asked.quantizer, **instead))
    arrays = run_layer(CpuBackend(), done, *layer_of(kind, 6, 576, 12))
    kept = arrays["quantized"].arrays
    if asked.quantizer.has_tensor_scale:
        kept["tensor_scale"] = exact_steps(arrays["w"], arrays["found"].s, asked.quantizer).tensor_scale
    arrays["quantized"] = quantized.Quantized(format=asked.quantizer, **kept)
    told = beyond(asked, arrays)
    assert stages <= told
    assert "codes_off_tie" not in told


def patched_fit(change):
    """`Format.fit` with something done to its zero points."""
    fit = Format.fit

    def changed(self, scaled, tensor_scale=1.0):
        steps, zeros = fit(self, scaled, tensor_scale)
        return steps, change(self, steps, zeros)

    return changed


def one_more(form, steps, zeros):
    return np.minimum(zeros + 1, form.largest) if form.zero_point is ZeroPoint.integer else zeros + steps / 2


def late_threshold(levels):
    """From 4 to 6 halfway at 4.5, not at 5."""
    levels[(np.abs(levels) > 4.5) & (np.abs(levels) < 5)] *= 1.2
    step_types.round_e2m1(levels)


def downwards(levels, out=None):
    return np.floor(levels, out=out)


FAULTS = [
    ("zero points", Format, "fit", patched_fit(one_more), {"zero_points", "error_curve"}),
    ("zero points first", Format, "fit", patched_fit(one_more), {"zero_points"}),
    ("narrow", Format, "fit", patched_fit(one_more), {"zero_points"}),
    ("float zeros", Format, "fit", patched_fit(one_more), {"zero_points"}),
    ("nvfp4", format, "rounded", lambda values, dtype: values, {"scale_b"}),
    ("float zeros, int8 fp16", format, "rounded", lambda values, dtype: values, {"scale_b", "zero_points"}),
    ("nvfp4", Format, "tensor_scale", lambda self, peak: np.ones_like(peak), {"scale_b", "error_curve"}),
    ("nvfp4", Format, "step_divisor", property(lambda self: 448 / 64), {"scale_b", "error_curve"}),
    ("int3 g32", Format, "step_divisor", property(lambda self: 4), {"scale_b", "error_curve"}),
    ("mxfp4", format, "round_e2m1", late_threshold, {"codes_off_tie", "error_curve"}),
    ("fp4 row", format, "round_e2m1", np.rint, {"codes_off_tie"}),
]


@pytest.mark.parametrize(("name", "owner", "attribute", "fault", "stages"), FAULTS)
def test_a_fault_in_a_formula_is_found(monkeypatch, name, owner, attribute, fault, stages):
    with monkeypatch.context() as patch:
        patch.setattr(owner, attribute, fault)
        convention, arrays = in_format(name)
    told = beyond(convention, arrays)
    assert stages <= told
    if "codes_off_tie" not in stages:
        assert "codes_off_tie" not in told


@pytest.mark.parametrize("form", FORMATS.values(), ids=list(FORMATS))
def test_one_code_that_is_not_the_nearest_is_found(form):
    convention = next(conventions(form))
    arrays = run_layer(CpuBackend(), convention, *layer_of(normal, 6, 576, 12))
    codes = arrays["quantized"].codes
    inside = np.argwhere((codes > form.least) & (codes < form.largest))
    places = np.unique(codes)
    for row, channel in inside[:: len(inside) // 7]:
        was = codes[row, channel]
        codes[row, channel] = places[places > was][0]
        assert "codes_off_tie" in beyond(convention, arrays)
        codes[row, channel] = was
    assert not beyond(convention, arrays)


@pytest.mark.parametrize("form", FORMATS.values(), ids=list(FORMATS))
def test_none_of_the_run_s_formulas_is_called(form, monkeypatch):
    for convention in conventions(form):
        with monkeypatch.context() as patch:
            arrays = run_layer(CpuBackend(), convention, *layer_of(normal, 3, 33, 5))
            for owner in (Format, format, quantized, search, step_types):
                for name, value in vars(owner).items():
                    if isinstance(value, types.FunctionType) and name not in ("size", "groups"):  # where groups lie
                        patch.setattr(owner, name, None)
            patch.setattr(Format, "step_divisor", None)
            assert not beyond(convention, arrays)


@pytest.mark.parametrize("form", FORMATS.values(), ids=list(FORMATS))
def test_the_oracle_and_the_run_in_float64_are_one(form):
    """Without float32's roundings nothing is left between them."""
    w = layer_of(normal, 6, 130, 5)[1].astype(np.float64)
    s = np.exp(np.random.default_rng(4).normal(size=130))
    own, exact = quantized.steps_of(w, s, form), exact_steps(w, s, form)
    for name, array in own.arrays.items():
        np.testing.assert_allclose(exact.arrays[name], array, rtol=1e-12)
    found = quantized.Quantized(format=form, **own.arrays, codes=np.empty(w.shape, np.int8))
    quantized.quantize(w, s, found)
    assert np.array_equal(exact_codes(w, s, exact, slice(None)), found.codes)


SMALL = st.tuples(st.integers(1, 6), st.integers(1, 70), st.integers(1, 9), st.integers(0, 2**32 - 1))


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(list(FORMATS)), st.sampled_from(KINDS), st.sampled_from(list(Objective)), SMALL)
def test_what_is_chosen_is_never_worse_than_rtn_and_scales_cancel(name, kind, objective, size):
    x, w = layer_of(kind, *size)
    for convention in conventions(FORMATS[name]):
        if convention.objective is not objective:
            continue
        arrays = run_layer(CpuBackend(), convention, x, w)
        found = arrays["found"]
        assert not found.error_chosen > found.error_rtn
        assert found.error_chosen == found.error.min()
        s, exact = found.s.astype(np.float64), x.astype(np.float64)
        product = (w * s) @ (exact * (1 / found.s)).T  # W·s · (x/s), with the inverse that a run multiplies by
        reach = np.abs(w) @ np.abs(exact).T
        assert (np.abs(product - w @ exact.T) <= 1e-7 * reach).all()
