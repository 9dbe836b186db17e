"""The CPU's compiled loops beside NumPy's: codes, steps and weights bit for bit, sums as close as sums can be."""

import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, same_bits

from awq_pycuda.backends import choose
from awq_pycuda.backends.compiled import CompiledCpuBackend
from awq_pycuda.backends.cpu import CpuBackend
from awq_pycuda.choices import Objective
from awq_pycuda.config import BackendChoice, SearchPlace
from awq_pycuda.engine.arrays import as_layer, layer_arrays
from awq_pycuda.engine.stages import STAGES
from awq_pycuda.engine.verify import TOLERANCES, check_layer
from awq_pycuda.layers.inputs import LayerSpec
from awq_pycuda.parallel import use_threads
from awq_pycuda.quant.conventions import Convention
from awq_pycuda.quant.format import Format
from awq_pycuda.quant.quantized import Quantized
from awq_pycuda.quant.search import candidates, search_result

RNG = np.random.default_rng(17)
LEFT = ("abs_mean", "sq_mean", "error", "s", "inv_s", "y", "out")
# Ragged, one row, one channel, groups that do and do not fill a row, more rows than channels and the reverse.
SHAPES = [(1, 1, 1, None), (5, 7, 3, None), (33, 130, 77, 32), (70, 61, 257, 100), (9, 300, 1000, 7), (64, 2, 40, 1)]


def given(rows, channels, tokens):
    """Weights and activations with outliers, a dead channel where there are others, and a row of zeros."""
    w = RNG.standard_normal((rows, channels)).astype(np.float32)
    x = RNG.standard_normal((tokens, channels)).astype(np.float32)
    x[:, :: max(2, channels // 4)] *= 30
    if channels > 2:
        x[:, channels // 2] = 0
        w[:, channels // 2] *= 100
    if rows > 2:
        w[rows // 2] = 0
    return w, x


def passed(backend, w, x, convention, bias=None):
    """The layer after all stages, on arrays that held NaN and codes that no format has."""
    spec = LayerSpec("0", len(x), w, x, bias)
    with backend:
        made = {}
        for name, array in layer_arrays([spec], 0, convention).items():
            made[name] = backend.empty(array.shape, array.dtype)
            made[name].fill(-128 if made[name].dtype.kind == "i" else np.nan)
        for name, values in {"w": w, "x": x, "bias": bias}.items():
            if values is not None:
                backend.write(made[name], values)
                backend.freeze(made[name])
        layer = as_layer(made, convention.quantizer, spec.tokens * len(w))
        for stage in STAGES:
            stage.call(backend, layer, convention)
    return layer


def quantized_of(layer):
    return layer.quantized.steps, layer.quantized.codes


def searched_alike(one, other, rtol):
    """Whether two curves are the same, but for the last bits of their sums."""
    np.testing.assert_allclose(one.error, other.error, rtol=rtol)
    return np.argmin(one.error) == np.argmin(other.error)


@pytest.mark.parametrize("objective", [Objective.diag, Objective.output])
@pytest.mark.parametrize(("rows", "channels", "tokens", "size"), SHAPES)
def test_a_layer_is_numpy_s(rows, channels, tokens, size, objective):
    w, x = given(rows, channels, tokens)
    bias = RNG.standard_normal(rows).astype(np.float32) if rows % 2 else None
    convention = Convention(quantizer=Format(size), objective=objective)
    numpy, compiled = (passed(backend(), w, x, convention, bias) for backend in (CpuBackend, CompiledCpuBackend))
    np.testing.assert_allclose(compiled.abs_mean, numpy.abs_mean, rtol=1e-7)
    np.testing.assert_allclose(compiled.sq_mean, numpy.sq_mean, rtol=1e-7)
    assert searched_alike(compiled, numpy, 1e-6)
    if same_bits(compiled.s, numpy.s):  # statistics that differ in a last bit may move the scales by one
        assert all(map(same_bits, quantized_of(compiled), quantized_of(numpy)))
        assert same_bits(compiled.y, numpy.y)
        assert np.array_equal(compiled.out, numpy.out)
    errors = check_layer(
        convention,
        x=x,
        w=w,
        bias=bias,
        abs_mean=compiled.abs_mean,
        sq_mean=compiled.sq_mean,
        found=search_result(convention, compiled.error, compiled.s),
        quantized=compiled.quantized,
        y=compiled.y,
        out=compiled.out,
    )
    assert all(error <= TOLERANCES[name] for name, error in errors.items()), errors


@pytest.mark.parametrize("size", [None, 1, 5, 32, 100])
def test_steps_codes_and_weights_are_numpy_s_bit_for_bit(size):
    """With ties, denormals, a row of zeros, one with a huge weight, and steps that underflow."""
    w = RNG.uniform(-1, 1, (40, 70)).astype(np.float32)
    w[0] = np.arange(70) - np.float32(34.5)  # step 34.5 / 127: half way between codes
    w[1], w[2] = 0, np.float32(1e-45)
    w[3] *= np.float32(1e-40)
    w[4, 3] = np.float32(3e38)
    w[5] = np.rint(w[5] * 254) / 2
    w[5, 0] = 127
    form, s = Format(size), np.exp2(RNG.integers(-2, 3, 70)).astype(np.float32)
    s[3] = 1
    steps = np.full((2, 40, form.groups(70)), np.nan, np.float32)
    codes = np.full((2, 40, 70), -128, np.int8)
    weights = np.full((2, 40, 70), np.nan, np.float32)
    off = weights.copy()
    for index, backend in enumerate((CpuBackend(), CompiledCpuBackend())):
        found = Quantized(steps[index], form, codes=codes[index])
        backend.compute_scale_b(w, s, found)
        backend.quantize_awq(w, s, found)
        backend._weights(found, 1 / s, slice(0, 40), weights[index])
        backend._differences(w, s, 1 / s, form, np.float32(1), off[index])
    assert same_bits(*steps)
    assert same_bits(*codes)
    assert same_bits(*weights)
    assert np.array_equal(*off)
    assert np.array_equal(off[0], weights[0] - w)
    assert np.isfinite(off).all()


@pytest.mark.parametrize("objective", [Objective.diag, Objective.output])
def test_a_candidate_that_overflows_has_an_infinite_error(objective):
    w, x = given(12, 20, 30)
    w[3, 0] = 3e38
    convention = Convention(objective=objective, clamp=(1 / 8, 8.0), gammas=(0.0, 1.0))
    for backend in (CpuBackend(), CompiledCpuBackend()):
        with np.errstate(over="ignore", invalid="ignore"):
            layer = passed(backend, w, x, convention)
        assert layer.s.tolist() == [1] * 20
        assert layer.error[1] == np.inf


@pytest.mark.parametrize("objective", [Objective.diag, Objective.output])
@pytest.mark.parametrize("backend", [CpuBackend, CompiledCpuBackend])
def test_threads_do_not_change_a_bit(backend, objective):
    """Over several blocks of rows and of products."""
    w, x = given(900, 700, 300)
    convention = Convention(objective=objective, quantizer=Format(128), gammas=(0.0, 0.5, 1.0))
    found = []
    for threads in (1, 2, 3, 5):
        with use_threads(threads):
            found.append(passed(backend(), w, x, convention))
    for other in found[1:]:
        assert all(same_bits(getattr(found[0], name), getattr(other, name)) for name in LEFT)
        assert all(map(same_bits, quantized_of(found[0]), quantized_of(other)))


@pytest.mark.parametrize("backend", [CpuBackend, CompiledCpuBackend])
def test_the_output_error_is_that_of_its_definition(backend):
    """To 1e-5 of float64, for every candidate: channels that are dead, or 30 times larger, and a ReLU before."""
    w, x = given(300, 130, 90)
    x = np.maximum(x, 0)
    convention = Convention(objective=Objective.output)
    with use_threads(2):
        layer = passed(backend(), w, x, convention)
    exact = []
    for s in candidates(convention, layer.abs_mean):
        scaled = w * s
        steps = np.abs(scaled).max(axis=1, keepdims=True) / np.float32(127)
        steps[steps == 0] = 1
        off = np.rint(scaled / steps).astype(np.float64) * steps / s - w
        exact.append(np.square(x.astype(np.float64) @ off.T).mean())
    np.testing.assert_allclose(layer.error, exact, rtol=1e-5)


# --- which of the two a run gets ----------------------------------------------------------------------------------


def chosen(weights):
    backend, *_, reason = choose.choose_backend(BackendChoice.cpu, {}, 16, Convention(), SearchPlace.auto, weights)
    return type(backend), reason


def test_runs_that_are_large_enough_get_compiled_loops(monkeypatch):
    assert chosen(choose.COMPILED_FROM - 1) == (CpuBackend, "backend cpu (as asked)")
    assert chosen(choose.COMPILED_FROM) == (CompiledCpuBackend, "backend cpu (as asked); loops compiled by Numba")
    monkeypatch.setenv("NUMBA_DISABLE_JIT", "1")
    assert chosen(choose.COMPILED_FROM) == (
        CpuBackend,
        "backend cpu (as asked); loops in NumPy: NUMBA_DISABLE_JIT is set",
    )


def test_without_numba_the_loops_are_numpy_s(monkeypatch):
    monkeypatch.setitem(sys.modules, "numba", None)
    for name in ("loops", "compiled"):
        monkeypatch.delitem(sys.modules, f"awq_pycuda.backends.{name}")
        monkeypatch.delattr(f"awq_pycuda.backends.{name}")
    backend, reason = chosen(choose.COMPILED_FROM)
    assert backend is CpuBackend
    assert reason.startswith("backend cpu (as asked); loops in NumPy: Numba cannot be used (")


def test_numba_is_loaded_where_it_is_used_alone():
    script = (
        "import sys\n"
        "import awq_pycuda.run, awq_pycuda.bench, awq_pycuda.library, awq_pycuda.backends.choose as choose\n"
        "choose.cpu_backend(choose.COMPILED_FROM - 1)\n"
        "print(sorted(name for name in sys.modules if name.startswith('numba')))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == "[]\n"
