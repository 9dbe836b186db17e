"""The whole pipeline on every backend: what must hold of its results, whatever the shapes and values."""

import numpy as np
import pytest
from conftest import BACKENDS, make_backend, same_bits

from awq_pycuda import philox
from awq_pycuda.backends.choose import no_device_search
from awq_pycuda.config import Config
from awq_pycuda.engine import verify
from awq_pycuda.engine.arrays import sharing
from awq_pycuda.engine.exact_format import code_errors
from awq_pycuda.engine.pipeline import Pipeline
from awq_pycuda.engine.spec import spec_of
from awq_pycuda.engine.stages import stages_of
from awq_pycuda.layers import inputs

QUICK = ("timing=once", "save=full")


class Kept:
    """A finished run and copies of every array that it touched; it searches on the device where kernels can."""

    def __init__(self, name: str, config: Config) -> None:
        self.name = name
        spec = spec_of(config)
        form = spec.convention.quantizer
        shares = any(len(sharing(spec.layers, index, spec.convention)) > 1 for index in range(len(spec.layers)))
        on_host = no_device_search(spec.convention, shares) is not None
        with make_backend(name, spec.tile, form, on_host, **spec.variants) as backend:
            pipeline = Pipeline(backend, spec)
            pipeline.run()
            self.layers, self.timings, self.stages = (
                pipeline.layers,
                pipeline.timings,
                stages_of(backend, spec.convention),
            )
            self.x = [backend.read(arrays.x).copy() for arrays in pipeline.handles.layers]
            self.w = [backend.read(arrays.w).copy() for arrays in pipeline.handles.layers]
            self.y = [product(backend, arrays) for arrays in pipeline.handles.layers]


def product(backend, layer):
    """What relu is of: a pass does not keep it."""
    backend.dequantize_tiled(layer.x, layer.quantized, layer.inv_s, layer.y)
    return backend.read(layer.y).copy()


@pytest.fixture(params=BACKENDS)
def run(request, compose):
    return lambda *overrides: Kept(request.param, compose(*QUICK, *overrides))


RAGGED = [
    ("n=1",),
    ("n=7",),
    ("n=1000", "layers=2"),
    ("n=1025", "layers=2", "tokens=65"),
    ("tokens=77", "n=130"),
    ("tokens=1", "n=33"),
    ("n=48", "quant.group_size=12"),
    ("n=48", "quant.group_size=1"),
    ("n=50", "quant.group_size=16", "inputs=outliers"),
    ("n=33", "quant.group_size=128", "search=output"),
    ("n=64", "search=output", "inputs=outliers"),
    ("n=64", "search.normalization=sqrt_max_min", "inputs=outliers"),
    ("n=40", "search.statistic=abs_max", "inputs=outliers"),
    ("n=64", "layers=12", "inputs.weight_scale=he"),
    ("n=96", "inputs=outliers", "inputs.channels=0.05", "gammas=[0.3,0.6]"),
    ("n=65", "stats=atomic"),
]


@pytest.mark.parametrize("overrides", RAGGED, ids=" ".join)
@pytest.mark.parametrize("tile", [4, 8, 16, 32])
def test_every_stage_agrees_with_the_oracle(run, overrides, tile, worst):
    kept = run("verify=true", f"tile={tile}", *overrides)  # raises beyond the oracle's tolerance
    for layer, x in zip(kept.layers, kept.x, strict=True):
        assert set(layer.verify) == set(verify.TOLERANCES) - {"zero_points", "clipped"}
        for stage, error in layer.verify.items():
            worst(f"pipeline {stage}", error, verify.TOLERANCES[stage])
        assert layer.search.error_chosen <= layer.search.error_rtn
        # Behind ReLU a chain of single channels may be without any signal, and then has no SQNR.
        sqnr = {"output_sqnr_db", "rtn_output_sqnr_db", "max_output_sqnr_db"}
        assert {key for key, value in layer.metrics.items() if np.isnan(value)} == (set() if x.any() else sqnr)


@pytest.mark.parametrize("matmul", ["tiled", "blocked"])
def test_gamma_0_is_rtn_bit_for_bit(run, matmul):
    kept = run("n=100", "gamma_grid=rtn", f"matmul={matmul}")
    for layer, w in zip(kept.layers, kept.w, strict=True):
        step = np.abs(w).max(axis=1) / np.float32(127)
        assert layer.search.gamma.tolist() == [0]
        assert layer.search.s.tolist() == [1] * 100
        assert same_bits(layer.quantized.steps[:, 0], step)
        assert np.array_equal(layer.quantized.codes, np.rint(w / step[:, None]))
        assert layer.metrics["output_mse"] == layer.metrics["rtn_output_mse"]
        assert layer.metrics["output_sqnr_db"] == layer.metrics["rtn_output_sqnr_db"]


def test_gamma_changes_the_codes(run):
    # A grid always holds 0; with salient channels another gamma wins, and its codes are not RTN's.
    rtn = run("n=256", "layers=1", "inputs=outliers", "gamma_grid=rtn").layers[0]
    awq = run("n=256", "layers=1", "inputs=outliers", "gammas=[0.2]").layers[0]
    assert awq.search.gamma_chosen == 0.2
    changed = awq.quantized.codes != rtn.quantized.codes
    assert np.count_nonzero(changed) > changed.size / 10
    assert awq.metrics["output_mse"] < awq.metrics["rtn_output_mse"]
    assert awq.metrics["rtn_output_mse"] == rtn.metrics["output_mse"]


def test_two_runs_are_bit_identical_with_measured_passes_and_without(run):
    given = ("n=130", "tokens=77", "inputs=outliers", "gamma_grid=awq20")
    first, second = (run(*given, f"timing.repeats={repeats}") for repeats in (1, 0))
    for a, b, y, z in zip(first.layers, second.layers, first.y, second.y, strict=True):
        assert same_bits(y, z)
        assert same_bits(a.quantized.codes, b.quantized.codes)
        assert same_bits(a.abs_mean, b.abs_mean)
        assert same_bits(a.sq_mean, b.sq_mean)
        assert same_bits(a.search.error, b.search.error)
        assert same_bits(a.quantized.steps, b.quantized.steps)
        assert a.metrics == b.metrics
    assert second.timings.pipeline_ms.size == 0
    assert second.timings.cold_ms > 0


def test_x_is_subsequence_0_and_weights_of_layer_l_are_l_plus_1(run):
    kept = run("n=24", "tokens=10", "layers=2", "seed=7")
    drawn = [philox.uniform(7, sub, 24 * rows).reshape(rows, 24) for sub, rows in ((0, 10), (1, 24), (2, 24))]
    for array, u in zip((kept.x[0], *kept.w), drawn, strict=True):
        assert same_bits(array, np.float32(2) * u - np.float32(1))


def test_he_weights_have_their_bound(run):
    unit, he = (run("n=24", "layers=1", f"inputs.weight_scale={scale}").w[0] for scale in ("unit", "he"))
    assert same_bits(he, unit * np.float32(np.sqrt(6 / 24)))


def test_outliers_make_channels_salient_in_every_layer(run):
    plain, salient = (run("n=200", "layers=3", f"inputs={kind}") for kind in ("synthetic", "outliers"))
    gain = (salient.x[0] / plain.x[0]).mean(axis=0)
    assert np.count_nonzero(gain > 1.01) == 2  # 1 % of 200
    assert (gain[gain > 1.01] > 9.9).all()
    assert gain.max() < 101
    for layer in range(1, 3):
        rows = np.flatnonzero((salient.w[layer - 1] / plain.w[layer - 1]).mean(axis=1) > 1.01)
        assert len(rows) == 2
        assert salient.x[layer][:, rows].max() > 5 * np.median(salient.x[layer].max(axis=0))
    assert same_bits(salient.w[2], plain.w[2])  # no layer follows
    assert run("n=5", "layers=1", "inputs=outliers").x[0].max() > 5  # at least one channel, however few there are


def test_salient_factors_are_log_uniform_and_every_layer_has_channels_of_its_own():
    gains = [inputs.Salient(0, layer, 0.1, 10, 1000).gains(20_000) for layer in range(2)]
    for gain in gains:
        salient = gain[gain != 1]
        assert salient.size == 2000
        # Of a log-uniform factor from 10 to 1000 half are below 100, with a standard error of 1.1 %.
        assert abs(np.mean(salient < 100) - 0.5) < 0.05
    both = np.count_nonzero((gains[0] != 1) & (gains[1] != 1))
    assert both < 400  # 10 % of 10 % are expected: 200


def test_a_seed_changes_everything_and_0_is_a_seed(run):
    drawn = [run("n=16", "layers=1", f"seed={seed}").w[0].tobytes() for seed in (0, 1, 2**64 - 1)]
    assert len(set(drawn)) == 3


def test_layers_chain_through_relu(run):
    kept = run("n=40", "layers=3")
    for y, x in zip(kept.y, kept.x[1:], strict=False):
        assert np.array_equal(x, np.maximum(y, 0))


def test_timings_have_every_sample(run):
    kept = run("n=32", "layers=2", "timing.warmup=1", "timing.repeats=4")
    timings = kept.timings
    assert timings.gpu_ms.shape == timings.host_ms.shape == (2, len(kept.stages), 4)
    assert timings.pipeline_ms.shape == (4,)
    repeated = kept.name == "cuda"  # the host launches a pass as a whole, so no stage has a time of its own there
    assert np.isnan(timings.host_ms).all() if repeated else (timings.host_ms >= 0).all()
    assert (timings.pipeline_ms > 0).all()
    assert timings.cold_ms > 0
    samples = timings.gpu_ms if np.isfinite(timings.gpu_ms).all() else timings.host_ms
    # The stages lie end to end inside the pass, so that their sum is the pass.
    np.testing.assert_allclose(samples.sum(axis=(0, 1)), timings.pipeline_ms, rtol=0.05, atol=0.3)


# --- inputs=file --------------------------------------------------------------------------------------------------


def layer_file(folder, **tensors):
    path = folder / "layers.npz"
    np.savez(path, **{name.replace("__", "."): np.asarray(values, np.float32) for name, values in tensors.items()})
    return ("inputs=file", f"inputs.path={path}")


def random(*shape, seed=5):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_rectangular_layers_with_bias_and_activations_of_their_own(run, tmp_path):
    tensors = {
        "000__weight": random(50, 30),
        "000__activations": random(21, 30),
        "000__bias": random(50),
        "001__weight": random(17, 50, seed=6),
        "002__weight": random(90, 64, seed=7),
        "002__activations": random(9, 64, seed=8),
    }
    source = layer_file(tmp_path, **tensors)
    before = (tmp_path / "layers.npz").read_bytes()
    kept = run("verify=true", *source)
    assert same_bits(kept.x[0], tensors["000__activations"])
    for w, name in zip(kept.w, ("000__weight", "001__weight", "002__weight"), strict=True):
        assert same_bits(w, tensors[name])
    assert np.array_equal(kept.x[1], np.maximum(kept.y[0] + tensors["000__bias"], 0))
    assert same_bits(kept.x[2], tensors["002__activations"])
    assert (tmp_path / "layers.npz").read_bytes() == before
    # A layer with activations of its own starts the chain anew.
    for index, propagates in ((0, False), (1, True), (2, False)):
        metrics = kept.layers[index].metrics
        assert (metrics["propagated_output_mse"] != metrics["output_mse"]) == propagates


def test_layers_and_tokens_select_the_first(run, tmp_path):
    weights = {f"{i:03d}__weight": random(8, 8, seed=i) for i in range(4)}
    kept = run(*layer_file(tmp_path, **{"000__activations": random(10, 8)}, **weights), "layers=2", "tokens=3")
    assert len(kept.layers) == 2
    assert kept.x[0].shape == (3, 8)


def scaled_and_back(w, s):
    """Weights from int8 with a step per row, in float64."""
    step = np.abs(w * s).max(axis=1, keepdims=True) / 127
    return np.rint(w * s / step) * step / s


def exact_metrics(kept, biases, own_activations):
    """Every metric of every layer, in plain float64 from the run's inputs, codes and scales."""
    chain = None
    for layer, x, w, bias, own in zip(kept.layers, kept.x, kept.w, biases, own_activations, strict=True):
        x, w = x.astype(np.float64), w.astype(np.float64)
        rtn, by_max = (scaled_and_back(w, s) for s in (np.ones(w.shape[1]), layer.by_max.s.astype(np.float64)))
        dequantized = layer.quantized.codes / layer.search.s.astype(np.float64) * layer.quantized.steps
        y, quantized = x @ w.T, x @ dequantized.T
        exact = (x if own or chain is None else chain) @ w.T
        chain = np.maximum(exact + bias, 0)
        yield {
            "output_mse": np.mean((y - quantized) ** 2),
            "output_sqnr_db": 10 * np.log10(np.sum(y**2) / np.sum((y - quantized) ** 2)),
            "rtn_output_mse": np.mean((y - x @ rtn.T) ** 2),
            "rtn_output_sqnr_db": 10 * np.log10(np.sum(y**2) / np.sum((y - x @ rtn.T) ** 2)),
            "max_output_mse": np.mean((y - x @ by_max.T) ** 2),
            "max_output_sqnr_db": 10 * np.log10(np.sum(y**2) / np.sum((y - x @ by_max.T) ** 2)),
            "weight_mse": np.mean((dequantized - w) ** 2),
            "saturated_fraction": np.mean(np.abs(layer.quantized.codes) == 127),
            "propagated_output_mse": np.mean((exact - quantized) ** 2),
        }


@pytest.mark.parametrize("search", ["diag", "output"])
def test_metrics_are_their_definitions(run, tmp_path, search):
    x = random(60, 40) * np.where(np.arange(40) < 2, 30, 1)
    biases = [random(50, seed=1), random(33, seed=2), random(20, seed=3)]
    tensors = {"000__weight": random(50, 40), "001__weight": random(33, 50), "002__weight": random(20, 33)}
    tensors |= {f"00{i}__bias": bias for i, bias in enumerate(biases)}
    kept = run(f"search={search}", "gammas=[0.1,0.2,0.4]", *layer_file(tmp_path, **{"000__activations": x}, **tensors))
    assert kept.layers[0].search.gamma_chosen > 0
    for layer, exact in zip(kept.layers, exact_metrics(kept, biases, [True, False, False]), strict=True):
        assert layer.metrics == pytest.approx(exact, rel=2e-3)
        assert layer.objective == search
        if search == "output":
            # One product, of the difference: nearer to the definition than the difference of two products.
            assert layer.search.error_chosen == pytest.approx(exact["output_mse"], rel=1e-5)
            assert layer.search.error_rtn == pytest.approx(exact["rtn_output_mse"], rel=1e-5)


def test_the_output_objective_is_the_true_error_at_every_gamma(run):
    """Forced to each gamma in turn by a grid of two, the layer's own output_mse must be what the curve says."""
    overrides = ("n=64", "layers=1", "inputs=outliers", "inputs.channels=0.05", "search=output")
    curve = run(*overrides, "gammas=[0,0.1,0.2]").layers[0].search
    assert len(set(curve.error)) == 3
    for gamma, error in zip(curve.gamma, curve.error, strict=True):
        layer = run(*overrides, f"gammas=[{gamma}]").layers[0]
        assert layer.search.error[layer.search.gamma == gamma] == error


SPECIAL = {
    "zero row": lambda w, x: w.__setitem__(3, 0),
    "zero channel of the weights": lambda w, x: w.__setitem__((slice(None), 4), 0),
    "zero channel of the activations": lambda w, x: x.__setitem__((slice(None), 4), 0),
    "constant rows": lambda w, x: w.__setitem__(slice(0, 3), 0.5),
    "one huge weight": lambda w, x: w.__setitem__((2, 2), 1e30),
    "one huge activation": lambda w, x: x.__setitem__((2, 2), 1e15),
    "denormal weights": lambda w, x: w.__setitem__(slice(None), w * np.float32(1e-40)),
    "denormal activations": lambda w, x: x.__setitem__(slice(None), x * np.float32(1e-40)),
    "all zero": lambda w, x: (w.__setitem__(slice(None), 0), x.__setitem__(slice(None), 0)),
}


@pytest.mark.parametrize("case", SPECIAL)
def test_special_values(run, tmp_path, case):
    w, x = random(24, 40), random(30, 40, seed=9)
    SPECIAL[case](w, x)
    kept = run(*layer_file(tmp_path, **{"000__weight": w, "000__activations": x}))
    (layer,) = kept.layers
    assert np.isfinite(kept.y[0]).all()
    assert np.isfinite(layer.search.error[layer.search.gamma == 0]).all()
    assert layer.search.error_chosen <= layer.search.error_rtn
    assert code_errors(layer.quantized, w, layer.search.s) == (0, 0)
    dequantized = layer.quantized.codes.astype(np.float64) / layer.search.s * layer.quantized.steps
    exact = x.astype(np.float64) @ dequantized.T
    assert verify.frobenius_error(kept.y[0], exact) <= (1e-5 if "denormal" not in case else 1e-2)
    if case == "zero row":
        assert layer.quantized.steps[3] == 1
        assert not kept.y[0][:, 3].any()


@pytest.mark.parametrize("search", ["diag", "output"])
def test_a_candidate_that_overflows_loses_quietly(run, tmp_path, search):
    w, x = random(24, 40), random(30, 40, seed=9) * np.float32(1e-8)
    w[2, 2], x[:, 2] = 9e36, 1  # its scale is 100 at γ = 1
    source = layer_file(tmp_path, **{"000__weight": w, "000__activations": x})
    (layer,) = run(f"search={search}", "search.normalization=sqrt_max_min", "gammas=[0,1]", *source).layers
    assert layer.search.error[1] == np.inf
    assert np.isfinite(layer.search.error[0])
    assert layer.search.gamma_chosen == 0


def test_overflow_of_the_last_output_is_a_failure(run, tmp_path):
    w, x = np.full((4, 64), 9e36), np.full((3, 64), 9e17)
    with pytest.raises(FloatingPointError, match="the output overflows float32"):
        run(*layer_file(tmp_path, **{"000__weight": w, "000__activations": x}))


def test_overflow_in_a_deep_chain_is_named(run):
    with pytest.raises(FloatingPointError, match=r"layer \d+ \(0\d\d\): the activations of input channel \d+ overflow"):
        run("n=256", "tokens=4", "layers=32", "inputs.weight_scale=unit")
