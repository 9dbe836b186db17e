"""The baseline of max|x|: what a run tells of it, against float64 on the inputs of the run itself."""

from dataclasses import replace

import h5py
import numpy as np
import pytest
from conftest import BACKENDS, same_bits
from test_held_out import error, layer_file
from test_pipeline import QUICK, Kept

from awq_pycuda.backends.cpu import CpuBackend
from awq_pycuda.backends.host_stages import HostStages
from awq_pycuda.choices import Objective, Statistic
from awq_pycuda.engine.exact_curve import CURVE_TOLERANCE, curve_error, exact_curve
from awq_pycuda.engine.exact_scales import exact_scales
from awq_pycuda.engine.pipeline import Pipeline
from awq_pycuda.engine.spec import spec_of
from awq_pycuda.engine.verify import exact_statistics, relative_error
from awq_pycuda.quant.quantized import Quantized, dequantize, quantize, steps_of
from awq_pycuda.quant.search import best

ASKED = [
    (),
    ("search=output", "quant.group_size=8", "clip=joint"),
    ("search.normalization=sqrt_max_min", "quant=int4_row", "quant.symmetric=false"),
]


def plain_weights(w, s, form):
    """The weights that the codes of `w·s` stand for, in float64."""
    made = Quantized(format=form, **steps_of(w, s, form).arrays, codes=np.empty(w.shape, form.code_dtype))
    quantize(w, s, made)
    return dequantize(made, 1 / s.astype(np.float64), np.float64)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("asked", ASKED, ids=" ".join)
def test_its_curve_and_its_errors(compose, tmp_path, backend, asked, worst):
    path = tmp_path / "a.h5"
    layer_file(path, np.random.default_rng(6))
    given = ("inputs=file", f"inputs.path={path}", "save=full", "timing=once", "inputs.holdout=0.25", *asked)
    config = compose(*given)
    kept = Kept(backend, config)
    convention = replace(spec_of(config).convention, statistic=Statistic.abs_max, clip=None)
    form, held_out = convention.quantizer, None
    with h5py.File(path) as file:
        layers = [{name: node[()] for name, node in layer.items()} for layer in file["layers"].values()]
    for found, layer, x, w in zip(kept.layers, layers, kept.x, kept.w, strict=True):
        statistics = exact_statistics(x)
        assert same_bits(found.abs_max, np.abs(x).max(axis=0))
        scales = np.array([exact_scales(statistics, each, convention) for each in convention.grid.candidates])
        activations = x.astype(np.float64) if convention.objective is Objective.output else None
        curve = exact_curve([w], scales, statistics["sq_mean"], form, activations)
        worst(f"{backend} curve by max|x|", curve_error(found.by_max.error, curve), CURVE_TOLERANCE)
        assert found.by_max.chosen == best(convention, found.by_max.error)
        s = found.by_max.s
        assert relative_error(s, scales[found.by_max.chosen]) <= 1e-5
        weights = plain_weights(w, s, form)
        metrics = [found.metrics[f"max_output_{name}"] for name in ("mse", "sqnr_db")]
        assert metrics == pytest.approx(error(x.astype(np.float64), w, weights), rel=1e-4)
        if "activations" in layer:
            held_out = layer["activations"][len(x) :].astype(np.float64)
        metrics = [found.metrics[f"held_out_max_output_{name}"] for name in ("mse", "sqnr_db")]
        assert metrics == pytest.approx(error(held_out, w, weights), rel=1e-4)
        own = dequantize(found.quantized, 1 / found.search.s.astype(np.float64), np.float64)
        held_out = np.maximum(held_out @ own.T + layer.get("bias", 0), 0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_else_is_the_same_without_it(compose, backend):
    asked = (*QUICK, "n=40", "layers=2", "inputs=outliers", "inputs.holdout=0.25", "search=output")
    by_default, without = (Kept(backend, compose(*asked, *more)) for more in ((), ("baselines=rtn",)))
    for layer, other in zip(by_default.layers, without.layers, strict=True):
        assert (other.by_max, other.abs_max) == (None, None)
        assert same_bits(layer.search.error, other.search.error)
        assert same_bits(layer.quantized.codes, other.quantized.codes)
        own = {name: value for name, value in layer.metrics.items() if not name.startswith(("max_", "held_out_max_"))}
        assert own == other.metrics
        assert len(own) + 4 == len(layer.metrics)


@pytest.mark.parametrize("backend", BACKENDS)
def test_of_a_run_that_scales_by_max_itself_it_is_the_same(compose, backend):
    kept = Kept(backend, compose(*QUICK, "n=40", "inputs=outliers", "search.statistic=abs_max"))
    for layer in kept.layers:
        assert same_bits(layer.by_max.error, layer.search.error)
        assert same_bits(layer.by_max.s, layer.search.s)
        assert layer.metrics["max_output_mse"] == layer.metrics["output_mse"]


class OnTrials(CpuBackend):
    """A backend that searches by the output on the layers' trials, as one with kernels does on the host."""

    _output_sums = HostStages._output_sums


def test_layers_that_share_scales_keep_their_own_errors(compose, tmp_path):
    """What the search of the first one leaves where the others have theirs, too, is not what it is judged by."""
    random = np.random.default_rng(3)
    x = (random.normal(size=(20, 12)) * random.lognormal(size=12)).astype(np.float32)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        for index in range(3):
            file[f"layers/{index:03d}/weight"] = random.normal(size=(8, 12)).astype(np.float32) * 4**index
        file["layers/000/activations"] = x
        for index in (1, 2):
            file[f"layers/{index:03d}"].attrs["activations_of"] = "000"
    spec = spec_of(
        compose("inputs=file", f"inputs.path={tmp_path / 'a.h5'}", "share=inputs", "search=output", "timing=once")
    )
    found = []
    for backend in (OnTrials(), CpuBackend()):
        with backend:
            pipeline = Pipeline(backend, spec)
            pipeline.run()
        found.append([layer.metrics for layer in pipeline.layers])
    for own, expected in zip(*found, strict=True):
        assert own == pytest.approx(expected, rel=1e-4)
