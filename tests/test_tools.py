"""Each tool's way of choosing scales, by a float64 transcription of what that tool does: see docs/mathematics.md."""

import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from awq_pycuda.choices import ConventionChoice, Formula
from awq_pycuda.engine.spec import spec_of
from awq_pycuda.library import quantize
from awq_pycuda.quant import search
from awq_pycuda.quant.conventions import CONVENTIONS
from awq_pycuda.quant.format import Format

RNG = np.random.default_rng(23)
TOOLS = ["llm_awq", "autoawq", "llm_compressor", "torchao", "gptqmodel"]
SIZE = 8


def layer(dead=2):
    x = RNG.standard_normal((40, 24)) * RNG.lognormal(sigma=1.5, size=24)
    x[:, :dead] = 0
    w = RNG.standard_normal((12, 24)) * RNG.lognormal(sigma=0.5, size=24)
    return w.astype(np.float32), x.astype(np.float32)


def twentieths():
    return [index / 20 for index in range(20)]


def tries(tool, duo=None):
    """Ratio and whether duo, in the order that the tool tries them; `duo` is llm-compressor's setting."""
    if tool in ("llm_awq", "torchao"):
        return [(ratio, False) for ratio in twentieths()]
    if tool in ("autoawq", "gptqmodel"):
        return [(ratio, True) for ratio in twentieths()]
    if duo == "both":
        return [(index / 9, which) for index in range(10) for which in (False, True)]
    if duo is False:
        return [(index / 19, False) for index in range(20)]
    return [(0.0, False), *((index / 18, True) for index in range(19))]


def tool_scales(x_mean, w_mean, ratio, duo):
    s = x_mean**ratio
    if duo:
        s = s / (w_mean ** (1 - ratio) + 1e-4)
    s = np.maximum(s, 1e-4)
    return s / math.sqrt(s.max() * s.min())


def means(w, x):
    groups = np.abs(w.astype(np.float64)).reshape(len(w), -1, SIZE)
    normalised = groups / (groups.max(axis=2, keepdims=True) + 1e-6)
    return np.abs(x.astype(np.float64)).mean(axis=0), normalised.reshape(w.shape).mean(axis=0)


def min_max(group, bits):
    """llm-awq and AutoAWQ with zero points: the range is not widened to include 0."""
    most = 2**bits - 1
    step = max(group.max() - group.min(), 1e-5) / most
    zero = min(max(-np.round(group.min() / step), 0), most)
    return (np.clip(np.round(group / step) + zero, 0, most) - zero) * step


def absolute(group, bits):
    """The same without: the lowest code never occurs."""
    step = max(np.abs(group).max(), 1e-5) / (2 ** (bits - 1) - 1)
    return np.clip(np.round(group / step), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * step


def compressed(group, bits, symmetric=False):
    """compressed-tensors: signed codes."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    if symmetric:
        step = np.abs(group).max() / ((2**bits - 1) / 2) or np.finfo(np.float32).eps
        return np.round(np.clip(group / step, low, high)) * step
    least, most = min(group.min(), 0), max(group.max(), 0)
    step = (most - least) / (2**bits - 1) or np.finfo(np.float32).eps
    zero = np.round(np.clip(low - least / step, low, high))
    return (np.clip(np.round(group / step + zero), low, high) - zero) * step


def tinygemm(group, bits):
    """torchao: a float zero point, which is what the code in the middle stands for."""
    middle = 2 ** (bits - 1)
    step = max((group.max() - group.min()) / (2**bits - 1), 1e-6)
    zero = group.min() + middle * step
    codes = np.clip(np.round((group - (zero - middle * step)) / step), 0, 2**bits - 1)
    return (codes - middle) * step + zero


QUANTIZERS = {
    "llm_awq": min_max,
    "autoawq": min_max,
    "llm_compressor": compressed,
    "torchao": tinygemm,
    "gptqmodel": absolute,
}


OTHERS = {
    "llm_awq": absolute,
    "autoawq": absolute,
    "llm_compressor": partial(compressed, symmetric=True),
    "gptqmodel": min_max,
}


def dequantized(w, s, quantizer):
    scaled = (w * s).reshape(len(w), -1, SIZE)
    return np.array([[quantizer(group, 4) for group in row] for row in scaled]).reshape(w.shape) / s


def convention(tool, **fields):
    named = CONVENTIONS[ConventionChoice[tool]]
    return replace(named, quantizer=replace(named.quantizer, bits=4, group_size=SIZE), **fields)


@pytest.mark.parametrize("tool", TOOLS)
def test_scales_and_their_order_are_the_tool_s(tool):
    w, x = layer()
    chosen = convention(tool)
    x_mean, w_mean = means(w, x)
    of_weights = search.weight_means([w], chosen.quantizer) if chosen.asks_weights else None
    found = search.candidates(chosen, x_mean, of_weights)
    expected = np.array([tool_scales(x_mean, w_mean, *each) for each in tries(tool)])
    rtn_added = tool in ("autoawq", "gptqmodel")  # of whose own candidates none is RTN
    assert chosen.grid.rtn == 0
    assert (found[0] == 1).all()
    np.testing.assert_allclose(found[1:] if rtn_added else found, expected, rtol=1e-10)


@pytest.mark.parametrize("duo", [False, True, "both"])
def test_llm_compressor_has_another_grid_with_each_formula(compose, duo):
    formula = {False: "plain", True: "duo", "both": "both"}[duo]
    chosen = spec_of(compose("convention=llm_compressor", f"search.formula={formula}")).convention
    assert chosen.formula is Formula[formula]
    found = [(each.gamma, each.duo) for each in chosen.grid.candidates]
    assert found == tries("llm_compressor", duo)
    assert len(found) == 20


@pytest.mark.parametrize("tool", TOOLS)
def test_a_layer_is_quantized_as_the_tool_would(tool):
    """Errors of every candidate, the one chosen, and the weights that come of it."""
    w, x = layer()
    found = quantize(w, x, convention=replace(convention(tool), clip=None), backend="cpu")
    x_mean, w_mean = means(w, x)
    candidates = [tool_scales(x_mean, w_mean, *each) for each in tries(tool)]
    w = w.astype(np.float64)
    if tool in ("autoawq", "gptqmodel"):
        candidates.insert(0, np.ones(24))
    exact, given = x.astype(np.float64) @ w.T, x.astype(np.float64)
    trials = [dequantized(w, s, QUANTIZERS[tool]) for s in candidates]
    errors = np.array([np.mean((exact - given @ trial.T) ** 2) for trial in trials])
    np.testing.assert_allclose(found.error, errors, rtol=2e-3)
    assert found.search.chosen == int(np.argmin(errors))
    s = candidates[found.search.chosen]
    np.testing.assert_allclose(found.dequantize() * s, trials[found.search.chosen] * s, rtol=1e-4, atol=1e-5)
    assert found.search.error_chosen <= found.search.error_rtn
    clipped = quantize(w, x, convention=convention(tool), backend="cpu")
    assert np.array_equal(clipped.s, found.s)
    assert np.array_equal(clipped.codes, found.codes) == (tool not in ("llm_awq", "autoawq", "gptqmodel"))


@pytest.mark.parametrize("tool", OTHERS)
def test_without_a_convention_s_symmetry_it_has_the_tool_s_other_quantizer(compose, tool):
    symmetric = f"quant.symmetric={tool != 'gptqmodel'}"
    chosen = spec_of(compose(f"convention={tool}", "quant.bits=4", f"quant.group_size={SIZE}", symmetric)).convention
    w, _ = layer()
    found = quantize(w, format=chosen.quantizer, backend="cpu").dequantize()
    # In float32, as a tool whose model is: the largest magnitude of a group of llm-compressor's lies at a tie.
    np.testing.assert_allclose(found, dequantized(w, np.ones(24, np.float32), OTHERS[tool]), rtol=1e-6, atol=1e-7)


def test_duo_at_gamma_0_is_the_weights_alone_and_not_rtn():
    chosen = convention("autoawq")
    of_weights = np.array([0.1, 0.4, 0.2])
    found = search.candidates(chosen, np.array([5.0, 0.0, 7.0]), of_weights)
    inverse = 1 / (of_weights + 1e-4)
    np.testing.assert_allclose(found[1], inverse / math.sqrt(inverse.max() * inverse.min()), rtol=1e-12)
    assert (found[0] == 1).all()


def test_dead_channels_and_columns_of_zeros_have_the_tool_s_scales():
    """By hand: powers 1e-4 (dead), 0.5 / (1 + 1e-4) and 0.5 / 1e-4 (no weights), over the root of the outer two."""
    found = search.candidates(convention("autoawq", gammas=(0.5,)), np.array([0.0, 0.25, 0.25]), np.array([1.0, 1, 0]))
    power = np.array([1e-4, 0.5 / (1 + 1e-4), 0.5 / 1e-4])
    np.testing.assert_allclose(found[1], power / math.sqrt(1e-4 * 0.5 / 1e-4), rtol=1e-12)


def test_no_product_of_the_largest_and_smallest_overflows():
    """√(max·min) of powers of 1e38 would be inf in float32, where llm-awq's search ends with NaN."""
    found = search.candidates(convention("llm_awq", gammas=(1.0,)), np.array([1e38, 3e38], np.float32))
    np.testing.assert_allclose(found[1], [3**-0.5, 3**0.5], rtol=1e-6)
    wide = search.candidates(convention("llm_awq", gammas=(10.0,)), np.array([1e-3, 1e30], np.float32))
    assert (np.isfinite(wide) & (wide > 0)).all()


def test_an_all_positive_group_saturates_where_the_tool_s_does():
    w = np.full((1, SIZE), 5, np.float32) + np.linspace(0, 1, SIZE, dtype=np.float32)
    of_tool = {tool: quantize(w, convention=convention(tool), backend="cpu").dequantize() for tool in TOOLS}
    np.testing.assert_allclose(of_tool["llm_awq"], np.ones((1, SIZE)), rtol=1e-6)
    assert np.abs(of_tool["llm_compressor"] - w).max() < 0.21  # half of 6 / 15
    assert np.abs(of_tool["torchao"] - w).max() < 0.04  # half of 1 / 15
    whole = replace(convention("llm_awq").quantizer, include_zero=True)
    assert np.abs(quantize(w, format=whole, backend="cpu").dequantize() - w).max() < 0.21


def test_groups_of_zeros_have_the_tool_s_step():
    w = np.zeros((1, SIZE), np.float32)
    steps = {tool: quantize(w, convention=convention(tool), backend="cpu").steps[0, 0] for tool in TOOLS}
    epsilon = np.finfo(np.float32).eps
    expected = {
        "llm_awq": 1e-5 / 15,
        "autoawq": 1e-5 / 15,
        "llm_compressor": epsilon,
        "torchao": 1e-6,
        "gptqmodel": 1e-5 / 7,
    }
    assert steps == pytest.approx(expected, rel=1e-6)
    assert Format(SIZE) != convention("llm_awq").quantizer


@pytest.mark.parametrize("tool", TOOLS)
def test_a_run_of_each_holds_before_the_oracle(cli, tool):
    small = ("n=64", "tokens=40", "layers=2", "inputs=outliers", "timing=once", "backend=cpu")
    code, out, err = cli(f"convention={tool}", *small, "quant=int4_g128", "quant.group_size=24", "verify=true")
    assert code == 0, err
    assert ("weights" in out) == (tool in ("llm_awq", "autoawq", "gptqmodel"))  # which clip: a stage of its own
