"""Tokens that nothing is chosen by: what a run tells of them, against NumPy on the very codes of the run."""

import re

import h5py
import numpy as np
import pytest
from conftest import BACKENDS, make_backend

from awq_pycuda.engine.pipeline import Pipeline
from awq_pycuda.engine.spec import spec_of
from awq_pycuda.quant.quantized import Quantized, dequantize, quantize, steps_of

METRICS = ("held_out_output_mse", "held_out_output_sqnr_db", "held_out_rtn_output_mse", "held_out_rtn_output_sqnr_db")


def layer_file(path, random):
    """A chain of two layers, the second with a bias, and one with activations of its own."""
    shapes = {"000": (20, 30), "001": (12, 20), "002": (9, 25)}
    with h5py.File(path, "w") as file:
        for name, shape in shapes.items():
            file[f"layers/{name}/weight"] = random.normal(size=shape).astype(np.float32)
        file["layers/001/bias"] = random.normal(size=12).astype(np.float32)
        for name, tokens in (("000", 40), ("002", 16)):
            x = random.normal(size=(tokens, shapes[name][1])) * random.lognormal(0, 1, shapes[name][1])
            file[f"layers/{name}/activations"] = x.astype(np.float32)


def error(x, w, weights):
    exact = x @ w.T
    noise = ((exact - x @ weights.T) ** 2).mean()
    return noise, 10 * np.log10((exact**2).mean() / noise)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("asked", [("quant=int4_row",), ("quant.group_size=8", "search=output")], ids=" ".join)
def test_errors_on_held_out_tokens(compose, tmp_path, backend, asked):
    path = tmp_path / "a.h5"
    layer_file(path, np.random.default_rng(6))
    given = ("inputs=file", f"inputs.path={path}", "save=full", "timing=once", *asked)
    spec = spec_of(compose(*given, "inputs.holdout=0.25"))
    form = spec.convention.quantizer
    with make_backend(backend, spec.tile, form, **spec.variants) as machine:
        pipeline = Pipeline(machine, spec)
        pipeline.run()
    with h5py.File(path) as file:
        layers = [{name: node[()] for name, node in layer.items()} for layer in file["layers"].values()]
    x, kept = None, (30, 30, 12)
    for found, layer, calibration in zip(pipeline.layers, layers, kept, strict=True):
        if "activations" in layer:
            x = layer["activations"][calibration:].astype(np.float64)
            np.testing.assert_allclose(
                found.abs_mean, np.abs(layer["activations"][:calibration]).mean(axis=0), rtol=1e-5
            )
        assert found.tokens == calibration
        w, s = layer["weight"], found.search.s
        rtn = np.ones_like(s)
        plain = Quantized(format=form, **steps_of(w, rtn, form).arrays, codes=np.empty(w.shape, np.int8))
        quantize(w, rtn, plain)
        weights = dequantize(found.quantized, 1 / s.astype(np.float64), np.float64)
        exact = [*error(x, w, weights), *error(x, w, dequantize(plain, None, np.float64))]
        assert [found.metrics[name] for name in METRICS] == pytest.approx(exact, rel=1e-4)
        x = np.maximum(x @ weights.T + layer.get("bias", 0), 0)


def test_without_them_there_are_no_such_figures(cli, tmp_path):
    code, out, _ = cli("n=16", "layers=1", "backend=cpu", f"hydra.run.dir={tmp_path}")
    assert (code, "held out" in out) == (0, False)
    with h5py.File(tmp_path / "results.h5") as file:
        assert not set(METRICS) & set(file["layers/000/metrics"].attrs)


def test_the_summary_and_the_file_tell_of_them(cli, tmp_path):
    code, out, err = cli(
        "n=32", "layers=2", "inputs=outliers", "inputs.holdout=0.25", "quant.bits=3", "backend=cpu",
        f"hydra.run.dir={tmp_path}",
    )  # fmt: skip
    assert (code, err) == (0, "")
    with h5py.File(tmp_path / "results.h5") as file:
        metrics = file["layers/000/metrics"].attrs
        assert set(METRICS) < set(metrics)
        removed = 100 * (1 - metrics["held_out_output_mse"] / metrics["held_out_rtn_output_mse"])
        assert file["layers/000"].attrs["tokens"] == 24
    assert re.search(rf"^ 000 .* {removed:.1f} %\s*$", out, re.M)
    assert "error removed  held out" in out
    assert "fewer than" not in out
