"""Every kind of format by kernels: NumPy's steps, zero points and codes bit for bit, and what is made with them."""

import dataclasses

import numpy as np
import pytest
from conftest import make_backend, same_bits
from test_backends import poisoned, put
from test_device_search import convention, layer_of, same_but_for_a_last_bit, searched
from test_formats import FORMATS, MXFP4, NVFP4, quantized
from test_pipeline import Kept

from awq_pycuda.backends.choose import settle_variants
from awq_pycuda.choices import Divisor, Objective, StepDtype, ZeroOrder, ZeroPoint, ZeroStep
from awq_pycuda.engine.verify import frobenius_error, relative_error
from awq_pycuda.errors import InputError
from awq_pycuda.kernels import table
from awq_pycuda.kernels.variant import Device
from awq_pycuda.quant import for_kernels
from awq_pycuda.quant.format import Format
from awq_pycuda.quant.quantized import dequantize, steps_of
from awq_pycuda.quant.search import candidates

GPU = pytest.mark.gpu
HALVES = (StepDtype.fp16, StepDtype.bf16)
FLOAT = {"symmetric": False, "include_zero": False, "zero_point": ZeroPoint.float}
ALL = [
    *FORMATS,
    *(Format(7, 4, symmetric=False, step_dtype=dtype, zero_point=kind) for dtype in HALVES for kind in ZeroPoint),
    *(Format(5, 4, zero_step=ZeroStep.epsilon, step_dtype=dtype) for dtype in (StepDtype.fp32, *HALVES)),
    dataclasses.replace(NVFP4, zero_step=ZeroStep.epsilon),
    Format(7, 4, least_range=1e-3, step_dtype=StepDtype.fp16),
    Format(5, 4, least_step=1e-3),
]
# One of each kind that searches and products tell apart.
KINDS = {
    "half range": Format(10, 4, divisor=Divisor.half_range),
    "fp16 steps": Format(10, 4, step_dtype=StepDtype.fp16),
    "zero points": Format(10, 4, symmetric=False, include_zero=False),
    "shifted first": Format(None, 3, symmetric=False, zero_order=ZeroOrder.shift_first),
    "float zero points": Format(10, 4, **FLOAT, step_dtype=StepDtype.bf16),
    "nvfp4": NVFP4,
    "mxfp4": dataclasses.replace(MXFP4, step_dtype=StepDtype.e8m0_up),
}


def special_rows(rows, channels):
    """Zeros, one sign, constant, denormal, small, large, whole and half numbers; the rest as they come."""
    random = np.random.default_rng([3, rows, channels])
    w = random.normal(size=(rows, channels)).astype(np.float32)
    w[0], w[1], w[2], w[3] = 0, np.abs(w[1]), -np.abs(w[2]), 0.25
    w[4] *= 1e-41
    w[5] *= 1e-3
    w[6] = random.integers(-8, 8, channels) / 2
    w[7] *= 300
    return w, random.uniform(0.3, 3, channels).astype(np.float32)


def on_device(backend, w, s, form):
    """Steps, zero points and codes as the stages leave them, by name."""
    like = quantized(w, s, form)
    given = like.map(lambda values: poisoned(backend, values.shape, values.dtype))
    handles = put(backend, w), put(backend, s), given
    backend.compute_scale_b(*handles)
    backend.quantize_awq(*handles)
    return like.arrays, {name: backend.read(handle).copy() for name, handle in given.arrays.items()}


@pytest.mark.parametrize("form", ALL, ids=str)
@pytest.mark.parametrize(
    ("name", "shape"), [("host", (9, 37)), *(pytest.param("cuda", each, marks=GPU) for each in ((9, 37), (300, 1028)))]
)
def test_steps_zero_points_and_codes_are_numpy_s(name, shape, form):
    w, s = special_rows(*shape)
    with make_backend(name, compute_scale_b="any", quantize_awq="any") as backend:
        expected, found = on_device(backend, w, s, form)
        ones = on_device(backend, w, np.ones_like(s), form)  # which leave ties where they are
    for exact, device in ((expected, found), ones):
        for part, values in exact.items():
            assert same_bits(device[part], values), part


def test_the_formats_that_others_do_not_take_go_to_the_kernels_that_take_all():
    for form, names in ((Format(), ["integers", "any"]), (NVFP4, ["any"]), (KINDS["fp16 steps"], ["any"])):
        values = {"in_features": 64, "out_features": 9, **for_kernels.values(form, 64)}
        for stage in ("compute_scale_b", "quantize_awq"):
            able = [each.name for each in table.candidates(stage) if each.obstacle(each.complete(values)) is None]
            assert able == names


def exact_errors(spec, s, form):
    """What the two objectives are for scales and the codes that NumPy makes with them, in float64."""
    w, x = spec.weight.astype(np.float64), spec.activations.astype(np.float64)
    given = quantized(spec.weight, s, form)
    scale = s.astype(np.float64)
    wrong = dequantize(given, None, np.float64) / scale - w
    diag = np.sum(np.square(x).mean(axis=0) * np.square(wrong).sum(axis=0))
    return {Objective.diag: diag, Objective.output: np.mean((x @ wrong.T) ** 2)}


@pytest.mark.parametrize("objective", Objective)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("name", "shape"), [("host", (9, 37)), *(pytest.param("cuda", each, marks=GPU) for each in ((9, 37), (300, 1028)))]
)
def test_the_searches_find_the_errors_of_these_codes(name, shape, kind, objective, worst):
    spec, form = layer_of(*shape, dead=[5], tokens=20), KINDS[kind]
    chosen = dataclasses.replace(convention(7, objective=objective), quantizer=form)
    error, s, inv_s, steps = searched(make_backend(name), spec, chosen)
    scales = candidates(chosen, np.abs(spec.activations.astype(np.float64)).mean(axis=0).astype(np.float32))
    exact = np.array([exact_errors(spec, each, form)[objective] for each in scales])
    worst(f"{name} {table.SEARCHES[objective.name]} of any format", relative_error(error, exact), 1e-5)
    assert same_but_for_a_last_bit(s, scales[np.argmin(exact)])
    assert same_bits(inv_s, 1 / s)
    assert same_bits(steps, steps_of(spec.weight, s, form).steps)


@GPU
@pytest.mark.parametrize("objective", Objective)
@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_curve_is_the_host_s(kind, objective, worst):
    spec = layer_of(130, 260, dead=[7], tokens=50)
    chosen = convention(9, objective=objective)
    chosen = dataclasses.replace(chosen, quantizer=KINDS[kind])
    first, second = (searched(make_backend("cuda"), spec, chosen) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert same_bits(one, other)
    host = searched(make_backend("cuda", search_on_host=True, dequantizeTiled="blocked"), spec, chosen)
    assert np.argmin(first[0]) == np.argmin(host[0])
    worst(f"cuda search_{objective.name} of any format beside the host's", relative_error(first[0], host[0]), 1e-4)


def with_zeros(tokens, out_features, in_features, form):
    random = np.random.default_rng([7, tokens, out_features, in_features])
    w = random.normal(size=(out_features, in_features)).astype(np.float32) + np.float32(0.7)
    x = random.normal(size=(tokens, in_features)).astype(np.float32)
    return x, quantized(w, np.ones(in_features, np.float32), form), random.uniform(0.2, 4, in_features).astype("f4")


ASYMMETRIC = {"symmetric": False}
ZEROS = [Format(None, 4, **ASYMMETRIC), Format(5, 8, **ASYMMETRIC), Format(24, 4, **FLOAT), Format(None, 3, **FLOAT)]


@pytest.mark.parametrize("form", ZEROS, ids=str)
@pytest.mark.parametrize(
    ("name", "tile"), [("host", 7), *(pytest.param("cuda", tile, marks=GPU) for tile in (1, 7, 8, 16, 17, 32))]
)
def test_products_know_zero_points(name, tile, form, worst):
    with make_backend(name, tile, form, dequantizeTiled="auto") as backend:
        for shape in ((33, 30, 41), (1, 1, 1), (7, 130, 65)) if name == "cuda" else ((33, 30, 41),):
            x, given, inv_s = with_zeros(*shape, form)
            handles = given.map(lambda values: put(backend, values, values.dtype))
            for activations in (x, np.eye(shape[2], dtype=np.float32)):
                y = poisoned(backend, (len(activations), shape[1]))
                backend.dequantize_tiled(put(backend, activations), handles, put(backend, inv_s), y)
                weights = dequantize(given, inv_s.astype(np.float64), np.float64)
                error = frobenius_error(backend.read(y), activations.astype(np.float64) @ weights.T)
                worst(f"{name} blocked product with zero points", error, 1e-5)


def test_products_that_know_no_zero_points_say_so():
    h100, form = Device((9, 0), 227 * 1024, 80 << 30), Format(32, 4, symmetric=False)
    settled, (told,) = settle_variants({"dequantizeTiled": "auto"}, 16, form, h100)
    assert settled == {"dequantizeTiled": "blocked"}
    assert told.startswith("matmul.kernel blocked (auto: digits takes no zero points; digits_mma takes no zero points)")
    for name in ("tiled", "digits"):
        with pytest.raises(InputError, match=f"^matmul.kernel={name}: takes no zero points; allowed here: blocked$"):
            settle_variants({"dequantizeTiled": name}, 16, form, h100)
    assert settle_variants({"dequantizeTiled": "auto"}, 16, NVFP4, h100)[0] == {"dequantizeTiled": "blocked"}
    assert settle_variants({"dequantizeTiled": "auto"}, 16, MXFP4, h100)[0] == {"dequantizeTiled": "digits"}


QUANT = {
    "nvfp4": ("quant=nvfp4",),
    "mxfp4": ("quant=mxfp4",),
    "zero points": ("quant=int4_g128", "quant.symmetric=false", "quant.group_size=17"),
    "float zero points": ("quant.bits=4", "quant.symmetric=false", "quant.zero_point=float", "quant.step_dtype=bf16"),
}


@GPU
@pytest.mark.parametrize("search", ["search=diag", "search=output", "search.where=host"])
@pytest.mark.parametrize("kind", QUANT)
def test_sanitize_every_format(compose, kind, search):
    small = ("n=78", "tokens=45", "layers=2", "inputs=outliers", "timing=once", "save=full", "search.formula=both")
    config = compose(*small, search, *QUANT[kind])
    kept = Kept("cuda", config)
    assert all(np.isfinite(y).all() for y in kept.y)
    for layer, w in zip(kept.layers, kept.w, strict=True):
        for part, values in quantized(w, layer.search.s, layer.quantized.format).arrays.items():
            assert same_bits(layer.quantized.arrays[part], values), part
