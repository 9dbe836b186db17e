"""The oracle check must find a fault planted in any stage."""

import dataclasses
import types

import numpy as np
import pytest
from test_pipeline import Kept

from awq_pycuda.engine import verify
from awq_pycuda.engine.exact_curve import curve_error, exact_curve
from awq_pycuda.engine.exact_format import code_errors
from awq_pycuda.quant import format, search
from awq_pycuda.quant.conventions import Convention
from awq_pycuda.quant.format import Format
from awq_pycuda.quant.quantized import Quantized


@pytest.fixture(params=["diag", "output"])
def layer(request, compose):
    """A sound layer as `check_layer` takes it: what was searched, and keyword arguments."""
    search = f"search={request.param}"
    config = compose(
        search, "n=40", "tokens=30", "layers=1", "inputs=outliers", "gammas=[0.2]", "timing=once", "save=full"
    )
    kept = Kept("cpu", config)
    (result,) = kept.layers
    arrays = {name: getattr(result, name).copy() for name in ("abs_mean", "sq_mean")}
    bias = np.linspace(-1, 1, 40, dtype=np.float32)
    arrays["quantized"] = result.quantized.map(np.copy)
    arrays["abs_max"] = np.abs(kept.x[0]).max(axis=0)
    arrays |= {"x": kept.x[0], "w": kept.w[0], "y": kept.y[0], "bias": bias, "found": result.search}
    return Convention(gammas=(0.2,), objective=config.search.objective), arrays | {
        "out": np.maximum(kept.y[0] + bias, 0)
    }


def test_a_sound_layer_passes(layer):
    convention, arrays = layer
    worst = verify.check_layer(convention, **arrays)
    assert set(worst) == set(verify.TOLERANCES) - {"zero_points", "clipped"}  # which there are none of
    verify.refuse_beyond_tolerance("000", worst)


def test_none_of_the_run_s_formulas_is_called(layer, monkeypatch):
    convention, arrays = layer
    expected = verify.check_layer(convention, **arrays)
    for owner in (Format, format, search):
        for name, value in vars(owner).items():
            if isinstance(value, types.FunctionType) and name not in ("size", "groups"):  # where groups lie
                monkeypatch.setattr(owner, name, None)
    assert verify.check_layer(convention, **arrays) == expected


def set_code(arrays, change):
    codes = arrays["quantized"].codes
    codes[0, 0] = change(codes[0, 0])


FAULTS = {
    "abs_mean": lambda a: a["abs_mean"].__imul__(1.0001),
    "sq_mean": lambda a: a["sq_mean"].__imul__(1.0001),
    "abs_max": lambda a: a["abs_max"].__imul__(1 - np.float32(2**-24)),
    "scale_b": lambda a: a["quantized"].steps.__imul__(1.0001),
    "codes_off_tie": lambda a: set_code(a, lambda code: code - 1 if code > 0 else code + 1),
    "codes_off_by_more_than_1": lambda a: set_code(a, lambda code: -code),
    "output": lambda a: a["y"].__setitem__((0, 0), a["y"][0, 0] + 1),
    "relu": lambda a: a["out"].__setitem__((0, 0), -1),
    "s": lambda a: a.update(found=dataclasses.replace(a["found"], s=a["found"].s * np.float32(1.0001))),
    "error_curve": lambda a: a.update(found=dataclasses.replace(a["found"], error=a["found"].error * 1.001)),
}


def test_a_fault_is_planted_in_every_stage():
    assert set(FAULTS) == set(verify.TOLERANCES) - {
        "zero_points",
        "clipped",
    }  # see test_exact_formats.py, test_clipping.py


@pytest.mark.parametrize("stage", FAULTS)
def test_a_planted_fault_is_found_and_named(layer, stage):
    convention, arrays = layer
    FAULTS[stage](arrays)
    worst = verify.check_layer(convention, **arrays)
    assert worst[stage] > verify.TOLERANCES[stage]
    with pytest.raises(verify.VerificationError, match=f"layer 000 .*{stage}"):
        verify.refuse_beyond_tolerance("000", worst)


def test_sound_layers_of_few_channels_pass(compose):
    """What rounding leaves of their error curve is little beside float32's own errors."""
    for objective in ("diag", "output"):
        config = compose("n=3", "layers=3", "timing=once", "verify=true", f"search={objective}")
        for config.seed in range(20):
            assert len(Kept("cpu", config).layers) == 3


def test_the_exact_curve_of_outputs_is_the_mean_of_squared_differences():
    random = np.random.default_rng(4)
    w, x, s = random.uniform(-1, 1, (5, 7)), random.normal(size=(6, 7)), np.linspace(0.5, 2, 7)
    steps = np.abs(w * s).max(axis=1, keepdims=True) / 127
    output = x @ (np.rint(w * s / steps) * steps / s).T
    low, high, units = exact_curve([w], s[None, :], np.square(x).mean(axis=0), Format(), x)
    assert low == high
    np.testing.assert_allclose(low, np.mean((x @ w.T - output) ** 2), rtol=1e-12)
    np.testing.assert_allclose(units**2, np.mean((x**2 / s**2) @ np.broadcast_to(steps**2, w.shape).T), rtol=1e-12)


def test_a_curve_without_errors_leaves_no_room_for_any():
    w, scales, ones, zeros = np.zeros((2, 4)), np.ones((2, 4)), np.ones(4), np.zeros(4)
    for weights, sq_mean in ((w, ones), (w + 1, zeros)):
        assert curve_error(np.zeros(2), exact_curve([weights], scales, sq_mean, Format())) == 0
        assert curve_error(np.array([0, 1e-9]), exact_curve([weights], scales, sq_mean, Format())) > 1
    assert np.isnan(curve_error(np.array([np.nan, 0]), exact_curve([w + 1], scales, ones, Format())))


@pytest.mark.parametrize("side", [-1, 1])
def test_a_code_at_a_tie_may_go_either_way_in_an_output(side):
    """It changes the sign of what rounding takes, and so how that meets the rounding of another channel."""
    w, x, ones = np.array([[127.0, 2.5 + side * 1e-6, 3.3]]), np.array([[0.0, 1.0, 1.0]]), np.ones((1, 3))
    curve = exact_curve([w], ones, x[0] ** 2, Format(), x)
    ways = [(code - 2.5 + (3 - 3.3)) ** 2 for code in (2, 3)]
    assert curve_error(np.array([ways[side > 0]]), curve) < 1e-5
    assert curve_error(np.array([ways[side < 0]]), curve) < 1e-5
    assert curve_error(np.array([1.1 * max(ways)]), curve) > 1e-2
    w[0, 1] = 2.7  # far from a tie: the other way is a fault
    assert curve_error(np.array([1.0]), exact_curve([w], ones, x[0] ** 2, Format(), x)) > 0.1


def test_sound_layers_of_outliers_with_codes_at_ties_pass(compose):
    config = compose(
        "n=1024", "layers=2", "tokens=256", "timing=once", "verify=true", "search=output", "inputs=outliers"
    )
    config.quant.group_size = 128
    assert len(Kept("cpu", config).layers) == 2


def test_nan_is_beyond_every_tolerance():
    with pytest.raises(verify.VerificationError, match="output nan"):
        verify.refuse_beyond_tolerance("000", {"output": float("nan")})


def test_relative_error_is_strict_at_0_and_lenient_only_for_denormals():
    assert verify.relative_error(np.array([1.5, 0.0]), np.array([1.0, 0.0])) == 0.5
    assert verify.relative_error(np.array([1e-45], np.float32), np.array([0.0])) == np.inf
    assert verify.relative_error(np.array([1e-45], np.float32), np.array([2e-45])) < 1e-5
    assert verify.relative_error(np.array([1.001e-37]), np.array([1e-37])) > 9e-4


def test_near_a_tie_one_off_is_allowed_and_two_are_not():
    w, s = np.array([[2.5004, 2.6]], np.float32), np.ones(2, np.float32)
    for codes, errors in (([2, 3], (0, 0)), ([3, 2], (1, 0)), ([1, 3], (1, 1))):
        quantized = Quantized(np.ones((1, 1), np.float32), Format(), codes=np.array([codes], np.int8))
        assert code_errors(quantized, w, s) == errors


def test_the_oracle_knows_a_last_group_that_is_not_full():
    w, s = np.random.default_rng(3).uniform(-1, 1, (4, 7)), np.linspace(0.5, 2, 7)
    form = Format(3)
    parts = (slice(3), slice(3, 6), slice(6, 7))
    steps = np.stack([np.abs(w * s)[:, part].max(axis=1) / 127 for part in parts], axis=1)
    codes = np.rint(w * s / np.repeat(steps, [3, 3, 1], axis=1)).astype(np.int8)
    quantized = Quantized(steps, form, codes=codes)
    assert code_errors(quantized, w, s) == (0, 0)
    error = np.sum((quantized.codes * np.repeat(steps, [3, 3, 1], axis=1) - w * s) ** 2 @ (1 / s**2))
    assert curve_error(np.array([error]), exact_curve([w], s[None, :], np.ones(7), form)) < 1e-12
    quantized.codes[0, 6] -= np.sign(quantized.codes[0, 6])
    assert code_errors(quantized, w, s) == (1, 0)
