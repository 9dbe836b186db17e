"""The harness from Python: without Hydra, the same as the command."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import same_bits
from omegaconf import OmegaConf
from test_results import result_path

import awq_pycuda
from awq_pycuda.choices import Objective
from awq_pycuda.config import (
    Config,
    FileInputs,
    OutlierInputs,
    QuantConfig,
    SearchConfig,
    TimingConfig,
    settled,
)
from awq_pycuda.config_text import plain
from awq_pycuda.errors import InputError, RunFailed
from awq_pycuda.library import QuantizedLayer, quantize, run_pipeline
from awq_pycuda.quant.conventions import Convention
from awq_pycuda.quant.format import Format
from awq_pycuda.results.reader import read

RNG = np.random.default_rng(2)
ONCE = TimingConfig(warmup=0, repeats=1)


def layer(out_features=48, in_features=40, tokens=60):
    x = RNG.standard_normal((tokens, in_features)) * np.where(np.arange(in_features) < 3, 30, 1)
    return RNG.standard_normal((out_features, in_features)).astype(np.float32), x.astype(np.float32)


def error(w, x, quantized):
    return np.mean((x @ w.T - x @ quantized.dequantize().T) ** 2)


def test_the_defaults_are_those_of_the_yaml(compose):
    composed, plain_config = plain(compose()), plain(settled(Config()))
    assert composed.pop("study").startswith("sweeps/")
    assert plain_config.pop("study") == "run"
    assert (composed.pop("tokens"), plain_config.pop("tokens")) == (1024, None)  # as many as n
    assert composed == plain_config
    for kind in ("outliers", "file"):
        overrides = (f"inputs={kind}", *(["inputs.path=x"] if kind == "file" else []))
        of_yaml = plain(compose(*overrides).inputs)
        assert of_yaml == plain(OutlierInputs() if kind == "outliers" else FileInputs(path="x"))


def test_a_run_is_the_command_s(cli, tmp_path):
    config = Config(n=24, layers=2, gammas=[0, 0.5], backend="cpu", inputs=OutlierInputs(), timing=ONCE)
    record = run_pipeline(config, tmp_path / "library")
    overrides = ("n=24", "layers=2", "gammas=[0,0.5]", "backend=cpu", "inputs=outliers", "timing=once")
    code, out, err = cli(*overrides)
    assert code == 0, err
    here, command = read(tmp_path / "library" / "results.h5"), read(Path(result_path(out)))
    assert len(record.layers) == 2
    for ours, theirs, of_record in zip(here.layers, command.layers, record.layers, strict=True):
        assert ours.metrics == theirs.metrics == of_record.metrics
        assert same_bits(ours.error, theirs.error)
    assert here.config["n"] == 24
    assert here.config["inputs.kind"] == "outliers"
    assert record.timings.gpu_ms.shape == (2, 6, 1)
    with pytest.raises(InputError, match=r"folder=.*holds the results\.h5 of another run"):
        run_pipeline(config, tmp_path / "library")


def test_a_run_writes_nothing_unless_told_where(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    run_pipeline(Config(n=8, tokens=3, layers=1, timing=ONCE))
    assert list(tmp_path.iterdir()) == []


def test_a_failed_run_raises_and_leaves_what_it_has(monkeypatch, tmp_path):
    def fail(*_):
        raise RuntimeError("planted")

    monkeypatch.setattr("awq_pycuda.backends.cpu.CpuBackend.relu", fail)
    config = Config(n=8, layers=1, timing=ONCE, backend="cpu")
    with pytest.raises(RunFailed, match="planted"):
        run_pipeline(config)
    with pytest.raises(RunFailed, match=r"planted.*see .*results\.h5"):
        run_pipeline(config, tmp_path)
    assert read(tmp_path / "results.h5").root["status"] == "failed"


@pytest.mark.parametrize("size", [None, 8, 7])
def test_a_quantized_layer_is_what_a_run_makes_of_it(size):
    w, x = layer()
    found = quantize(w, x, format=Format(size), backend="cpu")
    assert isinstance(found, QuantizedLayer)
    assert found.codes.shape == (48, 40)
    assert found.codes.dtype == np.int8
    assert found.steps.shape == (48, Format(size).groups(40))
    assert (found.gamma_chosen > 0) == (found.error.min() < found.error[0])
    assert found.gamma.tolist() == [0, 0.25, 0.5, 0.75, 1]
    rtn = quantize(w, format=Format(size), backend="cpu")
    assert (rtn.s == 1).all()
    assert error(w, x, found) < error(w, x, rtn)
    assert np.abs(found.dequantize() - w).max() < 0.6 * (found.steps.max() / found.s.min())


def test_a_run_of_a_file_quantizes_as_the_library_does(tmp_path):
    w, x = layer()
    np.savez(tmp_path / "layers.npz", **{"000.weight": w, "000.activations": x})
    config = Config(
        layers=None,
        inputs=FileInputs(path=str(tmp_path / "layers.npz")),
        quant=QuantConfig(group_size=8),
        search=SearchConfig(objective="diag", normalization="mean"),
        save="full",
        backend="cpu",
        timing=ONCE,
    )
    (of_run,) = run_pipeline(config).layers
    found = quantize(w, x, format=Format(8), backend="cpu")
    assert same_bits(found.codes, of_run.quantized.codes)
    assert same_bits(found.s, of_run.search.s)
    assert same_bits(found.steps, of_run.quantized.steps)
    assert same_bits(found.error, of_run.search.error)


def test_a_convention_of_one_s_own():
    w, x = layer()
    fine = Convention(gammas=tuple(np.linspace(0, 1, 21)), quantizer=Format(20))
    found = quantize(w.tolist(), x.astype(np.float64), convention=fine, backend="cpu", threads=1)
    assert found.error.shape == (21,)
    assert found.format == Format(20)


def test_the_output_objective_and_a_race_without_rtn():
    w, x = layer()
    convention = Convention(gammas=(0.2, 0.4), identity=False, objective=Objective.output)
    found = quantize(w, x, convention=convention, backend="cpu")
    assert found.gamma.tolist() == [0.2, 0.4]
    assert found.error.min() == pytest.approx(error(w, x, found), rel=1e-3)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ((np.ones(3),), "w: has shape (3,); allowed: two dimensions, none of them 0"),
        ((np.ones((0, 4)),), "w: has shape (0, 4)"),
        (([["a"]],), "w: could not convert string to float: 'a'; allowed: a matrix of numbers"),
        ((np.ones((2, 3)), np.ones((5, 4))), "x: 4 channels; allowed: as many as w has, 3"),
        ((np.array([[np.nan]]),), "w: holds NaN or infinity; allowed: finite numbers within float32"),
        ((np.array([[1e39]]),), "w: holds NaN or infinity"),
    ],
)
def test_bad_arrays_are_one_line(arguments, line):
    with pytest.raises(InputError) as refused:
        quantize(*arguments, backend="cpu")
    assert str(refused.value).startswith(line)


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        ({"convention": "awq"}, "convention=awq: allowed: day58"),
        ({"backend": "gpu"}, "backend=gpu: allowed: auto, cuda, cpu"),
        ({"threads": 0}, "threads=0: allowed: null (all cores that the process may use) or"),
    ],
)
def test_bad_keys_are_one_line(keys, line):
    with pytest.raises(InputError) as refused:
        quantize(np.ones((2, 3)), **{"backend": "cpu"} | keys)
    assert str(refused.value).startswith(line)


def test_a_name_that_is_no_choice_is_refused():
    with pytest.raises(InputError, match=r"search\.objective=best: allowed: diag, output"):
        run_pipeline(Config(search=SearchConfig("best")))


def test_a_format_without_channels_is_refused():
    with pytest.raises(InputError, match="group_size=0: allowed: None"):
        Format(0)


def test_a_file_without_a_path_is_refused_by_name():
    with pytest.raises(InputError, match=r"inputs\.path: has no value; allowed: a layer file"):
        run_pipeline(Config(inputs=FileInputs(), layers=None))


def test_nothing_of_it_imports_hydra():
    script = (
        "import sys, numpy, awq_pycuda\n"
        "from awq_pycuda.config import TimingConfig\n"
        "awq_pycuda.run_pipeline(awq_pycuda.Config(n=8, layers=1, timing=TimingConfig(0, 1)))\n"
        "awq_pycuda.quantize(numpy.ones((2, 3)))\n"
        "print([name for name in sys.modules if name.partition('.')[0] == 'hydra'])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_the_package_offers_it_by_name():
    assert {"quantize", "run_pipeline", "Config", "Format"} <= set(dir(awq_pycuda))
    assert awq_pycuda.quantize is quantize
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = awq_pycuda.nothing


def test_the_stored_config_is_the_one_given(tmp_path):
    config = Config(n=8, tokens=3, layers=1, timing=ONCE)
    run_pipeline(config, tmp_path)
    stored = OmegaConf.to_container(OmegaConf.create(read(tmp_path / "results.h5").root["config"]))
    assert stored == plain(settled(config))
    assert (config.gammas, stored["gammas"]) == (None, [0, 0.25, 0.5, 0.75, 1])
    run_pipeline(replace(config, tokens=None), tmp_path / "as-many")
    assert read(tmp_path / "as-many" / "results.h5").config["tokens"] == 8
