"""Every stage of every backend against float64 NumPy; the same tests for NumPy, kernels on the CPU, and (gpu) CUDA."""

import itertools

import numpy as np
import pytest
from conftest import COMPILED, STAGE_BACKENDS, make_backend, same_bits
from host_cuda.build import not_run

from awq_pycuda import philox
from awq_pycuda.backends.base import Layer
from awq_pycuda.choices import ConventionChoice
from awq_pycuda.engine.exact_format import code_errors
from awq_pycuda.engine.stages import stages_of
from awq_pycuda.engine.verify import frobenius_error, relative_error
from awq_pycuda.kernels import table
from awq_pycuda.paths import resource_dir
from awq_pycuda.quant.conventions import CONVENTIONS
from awq_pycuda.quant.format import Format
from awq_pycuda.quant.quantized import Quantized

RNG = np.random.default_rng(11)
PER_ROW = Format()
SHAPES = [(1, 1), (7, 7), (77, 130), (130, 77), (1000, 33), (65, 1025)]


def put(backend, values, dtype=np.float32):
    handle = backend.empty(values.shape, dtype)
    backend.write(handle, np.asarray(values, dtype))
    return handle


def poisoned(backend, shape, dtype=np.float32):
    """An output array that shows what was not written."""
    return put(backend, np.full(shape, 99 if np.dtype(dtype).kind == "i" else np.nan, dtype), dtype)


def uniform(*shape):
    return RNG.uniform(-1, 1, shape).astype(np.float32)


# --- init ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [*SHAPES, (3, 5)])
@pytest.mark.parametrize(("seed", "subsequence"), [(0, 0), (42, 3), (2**64 - 1, 2**32 + 1)])
def test_init_is_philox_bit_for_bit(backend, shape, seed, subsequence):
    out = poisoned(backend, shape)
    backend.init(out, seed, subsequence, None, None)
    u = philox.uniform(seed, subsequence, shape[0] * shape[1]).reshape(shape)
    assert same_bits(backend.read(out), np.float32(2) * u - np.float32(1))


def test_init_gains_round_once_each(backend):
    row_gain, col_gain = RNG.uniform(1, 100, 13).astype(np.float32), RNG.uniform(1, 100, 9).astype(np.float32)
    out = poisoned(backend, (13, 9))
    backend.init(out, 5, 1, row_gain, col_gain)
    u = philox.uniform(5, 1, 13 * 9).reshape(13, 9)
    assert same_bits(backend.read(out), (np.float32(2) * u - np.float32(1)) * row_gain[:, None] * col_gain)


# --- accum_stats --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stats", table.variants("accum_stats"))
@pytest.mark.parametrize("name", STAGE_BACKENDS)
@pytest.mark.parametrize("shape", [*SHAPES, (4096, 64)])
def test_stats(name, shape, stats, worst):
    x = uniform(*shape) * np.logspace(-3, 3, shape[1], dtype=np.float32)
    most = table.find("accum_stats", stats if name not in ("cpu", *COMPILED) else "deterministic").tolerance
    with make_backend(name, accum_stats=stats) as backend:
        means = poisoned(backend, shape[1:]), poisoned(backend, shape[1:])
        backend.accum_stats(put(backend, x), *means)
        exact = x.astype(np.float64)
        worst(f"{name} abs_mean ({stats})", relative_error(backend.read(means[0]), np.abs(exact).mean(0)), most)
        worst(f"{name} sq_mean ({stats})", relative_error(backend.read(means[1]), np.square(exact).mean(0)), most)


def test_stats_of_special_channels(backend):
    x = np.zeros((130, 4), np.float32)
    x[:, 1] = 1e-40  # denormal
    x[:, 2] = -3  # constant
    x[77, 3] = 1e18  # one huge outlier
    means = poisoned(backend, (4,)), poisoned(backend, (4,))
    backend.accum_stats(put(backend, x), *means)
    exact = x.astype(np.float64)
    # A denormal has few bits: 1e-40 is a multiple of 2^-149, so the mean may be off by one such unit.
    np.testing.assert_allclose(backend.read(means[0]), np.abs(exact).mean(0), rtol=1e-6, atol=1.5e-45)
    np.testing.assert_allclose(backend.read(means[1]), np.square(exact).mean(0), rtol=1e-6, atol=1.5e-45)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_largest_magnitude_is_exact(backend, shape):
    x = uniform(*shape) * np.logspace(-3, 3, shape[1], dtype=np.float32)
    x[:, 0] = -1e-45  # the smallest denormal
    x[:, -1] = -0.0
    x[shape[0] // 2, shape[1] // 2] = np.inf
    found = poisoned(backend, shape[1:])
    backend.find_abs_max(put(backend, x), found)
    assert same_bits(backend.read(found), np.abs(x).max(0))
    x[0, shape[1] // 2] = np.nan
    backend.find_abs_max(put(backend, x), found)
    assert np.flatnonzero(np.isnan(backend.read(found))).tolist() == [shape[1] // 2]


# --- quantize_awq -------------------------------------------------------------------------------------------------


def quantized(backend, w, s, steps, form=PER_ROW):
    codes = poisoned(backend, w.shape, np.int8)
    given = Quantized(put(backend, steps), form, codes=codes)
    backend.quantize_awq(put(backend, w), put(backend, s), given)
    return Quantized(steps, form, codes=backend.read(codes).copy())


def largest_over_127(scaled, form):
    """The step of every group, the last one full or not."""
    starts = np.arange(0, scaled.shape[1], form.size(scaled.shape[1]))
    return np.maximum.reduceat(np.abs(scaled), starts, axis=1) / np.float32(127)


GROUPED = [((9, 24), 4), ((5, 15), 3), ((9, 24), 9), ((5, 15), 4), ((7, 28), 12), ((33, 257), 128), ((3, 8), 100)]
WIDE = [((3, 5200), size) for size in (None, 16, 32, 48, 128)]  # several loads of a thread on their way
# A last group of few channels, after each of the loads that are on their way together.
ENDS = [((2, 1024 * loads + 4), size) for loads in (1, 2, 3, 4) for size in (16, 64, 128)]


@pytest.mark.parametrize(("shape", "size"), [*((shape, None) for shape in SHAPES), *GROUPED, *WIDE, *ENDS])
def test_codes(backend, shape, size):
    w, s = uniform(*shape), RNG.uniform(0.2, 4, shape[1]).astype(np.float32)
    steps = largest_over_127(w * s, Format(size))
    found = quantized(backend, w, s, steps, Format(size))
    assert code_errors(found, w, s) == (0, 0)
    assert np.abs(found.codes).max() == 127


@pytest.mark.parametrize(("shape", "size"), [*(((33, 24), size) for size in (None, 8, 3, 7, 50)), *WIDE, *ENDS])
def test_steps(backend, shape, size):
    w, s = uniform(*shape), RNG.uniform(0.2, 4, shape[1]).astype(np.float32)
    form = Format(size)
    steps, codes = poisoned(backend, (shape[0], form.groups(shape[1]))), poisoned(backend, w.shape, np.int8)
    found = Quantized(steps, form, codes=codes)
    backend.compute_scale_b(put(backend, w), put(backend, s), found)
    assert same_bits(backend.read(found.steps), largest_over_127(w * s, form))


def test_ties_go_to_even_and_the_range_is_symmetric(backend):
    levels = np.array([[0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5, 127.5, 200, -128, -300, -0.0]], np.float32)
    found = quantized(backend, levels, np.ones(12, np.float32), np.ones((1, 1), np.float32))
    assert found.codes.tolist() == [[0, 2, 2, 0, -2, -2, 126, 127, 127, -127, -127, 0]]


def test_codes_of_special_rows(backend):
    w = np.zeros((4, 8), np.float32)
    w[1] = 0.25  # constant
    w[2] = np.arange(1, 9) * np.float32(1e-45)  # denormals
    w[3, 5] = 1e37  # one huge outlier
    steps = np.array([[1], [0.25 / 127], [1e-45], [1e37 / 127]], np.float32)
    codes = quantized(backend, w, np.ones(8, np.float32), steps).codes
    assert codes[0].tolist() == [0] * 8
    assert codes[1].tolist() == [127] * 8
    assert codes[2].tolist() == np.rint(w[2] / steps[2]).tolist()
    assert codes[3].tolist() == [0, 0, 0, 0, 0, 127, 0, 0]


# --- dequantizeTiled ----------------------------------------------------------------------------------------------

PRODUCTS = [(1, 1, 1), (7, 7, 7), (77, 130, 65), (33, 257, 100), (130, 1, 31), (1, 70, 1025)]  # tokens, out, in


def multiplied(backend, x, codes, inv_s, steps, form=PER_ROW):
    y = poisoned(backend, (x.shape[0], codes.shape[0]))
    given = Quantized(put(backend, steps), form, codes=put(backend, codes, np.int8))
    backend.dequantize_tiled(put(backend, x), given, put(backend, inv_s), y)
    return backend.read(y).copy()


def products():
    """Every variant and tile; on the host neither means anything, so each backend there has one case."""
    cases = [pytest.param(name, {}, id=name) for name in ("cpu", *COMPILED)]
    for variant in table.variants("dequantizeTiled").values():
        tile = variant.parameters.get("TILE")
        compiled = (16,) if tile is None else tile.compiled
        for side in compiled if tile is None else sorted({*compiled, *(1, 3, 8, 31)} & {*tile.allowed}):
            options = {"dequantizeTiled": variant.name, "tile": side}
            cases.append(pytest.param("cuda", options, id=f"cuda-{variant.name}-{side}", marks=pytest.mark.gpu))
            if side in compiled and variant.file not in not_run(resource_dir("cuda")):
                cases.append(pytest.param("host", options, id=f"host-{variant.name}-{side}"))
    return cases


@pytest.mark.parametrize(("name", "options"), products())
def test_product(name, options, worst):
    with make_backend(name, **options) as backend:
        variant = table.find("dequantizeTiled", options.get("dequantizeTiled"))
        sizes = (None, 5, 24 if variant.group_multiple == 1 else 2 * variant.group_multiple, 2000)
        for (tokens, out_features, in_features), size in itertools.product(PRODUCTS, sizes):
            x, inv_s = uniform(tokens, in_features), RNG.uniform(0.2, 4, in_features).astype(np.float32)
            wq = RNG.integers(-127, 128, (out_features, in_features), np.int8)
            form = Format(size)
            steps = RNG.uniform(0.001, 0.01, (out_features, form.groups(in_features))).astype(np.float32)
            of_channel = np.repeat(steps, form.size(in_features), axis=1)[:, :in_features]
            exact = x.astype(np.float64) @ (wq * inv_s.astype(np.float64) * of_channel).T
            if form.groups(in_features) > 1 and size % variant.group_multiple:
                with pytest.raises(ValueError, match=f"takes groups of a multiple of {variant.group_multiple} input"):
                    multiplied(backend, x, wq, inv_s, steps, form)
                continue
            y = multiplied(backend, x, wq, inv_s, steps, form)
            worst(f"{name} {variant.name} product", frobenius_error(y, exact), variant.tolerance)


def with_relu(backend, x, quantized, inv_s, bias):
    """What a pass makes of handles of a layer: its product, and its relu."""
    shape = (x.shape[0], quantized.codes.shape[0])
    y, out = poisoned(backend, shape), poisoned(backend, shape)
    unused = dict.fromkeys(("w", "abs_mean", "sq_mean", "abs_max", "error", "s", "trial", "searched"))
    layer = Layer(x=x, bias=bias, inv_s=inv_s, quantized=quantized, y=y, out=out, outputs=0, **unused)
    for stage in stages_of(backend, CONVENTIONS[ConventionChoice.day58])[4:]:
        stage.call(backend, layer, None)
    return backend.read(out).copy()


@pytest.mark.parametrize(("name", "options"), products())
def test_a_product_with_relu_is_relu_of_the_product(name, options):
    x, wq, inv_s = uniform(77, 65), RNG.integers(-127, 128, (130, 65), np.int8), np.ones(65, np.float32)
    x[3:9, 5] *= 3000  # rows with a fourth digit
    x[50, 2] = np.nan
    for size, bias in ((None, uniform(130) * 20), (32, None)):
        steps = RNG.uniform(0.001, 0.01, (130, Format(size).groups(65))).astype(np.float32)
        with make_backend(name, **options) as backend:
            y = multiplied(backend, x, wq, inv_s, steps, Format(size))
            quantized = Quantized(put(backend, steps), Format(size), codes=put(backend, wq, np.int8))
            handles = put(backend, x), quantized, put(backend, inv_s), None if bias is None else put(backend, bias)
            out = with_relu(backend, *handles)
            assert ("relu" in backend.within) == (bool(options) and options["dequantizeTiled"] != "tiled")
        assert np.array_equal(out, np.maximum(y if bias is None else y + bias, 0), equal_nan=True)
        assert np.isnan(out[50]).all()


# Factors of the activations and of the steps, and the error allowed: a denormal number has few bits of its own.
FAR = {
    "huge steps": (1e-8, 7e34, 1e-5),
    "tiny steps": (1e8, 1e-36, 1e-5),
    "huge activations": (1e30, 1e-3, 1e-5),
    "tiny activations": (1e-30, 1e3, 1e-5),
    "denormal activations": (1e-40, 1e3, 1e-3),
}


@pytest.mark.parametrize("case", FAR)
@pytest.mark.parametrize(("name", "options"), products())
def test_nothing_leaves_the_range_of_float_on_the_way_to_an_output_within_it(name, options, case):
    of_x, of_steps, allowed = FAR[case]
    with make_backend(name, **options) as backend:
        for size in (None, 32):
            form = Format(size)
            x, ones = uniform(9, 70) * np.float32(of_x), np.ones(70, np.float32)
            wq = RNG.integers(-127, 128, (21, 70), np.int8)
            steps = RNG.uniform(0.5, 2, (21, form.groups(70))).astype(np.float32) * np.float32(of_steps)
            of_channel = np.repeat(steps, form.size(70), axis=1)[:, :70].astype(np.float64)
            y = multiplied(backend, x, wq, ones, steps, form)
            assert frobenius_error(y, x.astype(np.float64) @ (wq * of_channel).T) <= allowed


@pytest.mark.parametrize(("name", "options"), products())
def test_integers_and_powers_of_two_multiply_exactly(name, options):
    x = RNG.integers(-8, 9, (77, 130)).astype(np.float32)
    wq = RNG.integers(-127, 128, (65, 130), np.int8)
    inv_s = np.exp2(RNG.integers(-2, 3, 130)).astype(np.float32)
    scale_b = np.exp2(RNG.integers(-6, 0, (65, 1))).astype(np.float32)
    exact = x.astype(np.float64) @ (wq * inv_s.astype(np.float64) * scale_b.astype(np.float64)).T
    with make_backend(name, **options) as backend:
        assert np.array_equal(multiplied(backend, x, wq, inv_s, scale_b), exact)


@pytest.mark.parametrize(("name", "options"), products())
def test_identity_activations_read_the_weights_back(name, options):
    wq = RNG.integers(-127, 128, (41, 67), np.int8)
    inv_s = RNG.uniform(0.1, 9, 67).astype(np.float32)
    if "digits" in options.get("dequantizeTiled", ""):  # they round a sum in the end, the others term by term
        inv_s = np.exp2(np.rint(np.log2(inv_s)))
    scale_b = RNG.uniform(1e-3, 1, (41, 1)).astype(np.float32)
    with make_backend(name, **options) as backend:
        y = multiplied(backend, np.eye(67, dtype=np.float32), wq, inv_s, scale_b)
    assert np.array_equal(y, ((wq.astype(np.float32) * inv_s) * scale_b).T)


# --- relu and the measures ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 1), (7, 9), (64, 128)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_relu(backend, shape, with_bias):
    y, bias = uniform(*shape), uniform(shape[1])
    out = poisoned(backend, shape)
    backend.relu(put(backend, y), put(backend, bias) if with_bias else None, out)
    assert np.array_equal(backend.read(out), np.maximum(y + bias if with_bias else y, 0))


def test_relu_keeps_nan(backend):
    out = put(backend, np.zeros((1, 4), np.float32))
    backend.relu(put(backend, np.array([[np.nan, -1, 2, np.inf]], np.float32)), None, out)
    values = backend.read(out)[0]
    assert np.isnan(values[0])
    assert values[1:].tolist() == [0, 2, np.inf]


@pytest.mark.parametrize(("tokens", "out_features", "in_features"), PRODUCTS)
def test_reference_product(backend, tokens, out_features, in_features, worst):
    x, w = uniform(tokens, in_features), uniform(out_features, in_features)
    y = poisoned(backend, (tokens, out_features))
    backend.matmul_reference(put(backend, x), put(backend, w), y)
    exact = x.astype(np.float64) @ w.astype(np.float64).T
    most = table.find("matmul_reference").tolerance
    worst(f"{backend.name} reference product", frobenius_error(backend.read(y), exact), most)


@pytest.mark.parametrize("shape", [(1, 1), (7, 9), (1000, 1025)])
def test_error_sums(backend, shape):
    a, b = uniform(*shape), uniform(*shape)
    sums = backend.error_sums(put(backend, a), put(backend, b))
    exact = a.astype(np.float64)
    most = table.find("error_sums").tolerance
    np.testing.assert_allclose(sums, (np.sum(exact**2), np.sum((exact - b) ** 2)), rtol=most)
