"""`export=...`: a run leaves its layers as a checkpoint, or says before any work that it cannot."""

import json
from pathlib import Path

import h5py
import numpy as np
import pytest
from conftest import files_under, same_bits
from test_results import result_path

import awq_pycuda
from awq_pycuda.config import Config, FileInputs, QuantConfig, TimingConfig
from awq_pycuda.errors import InputError, RunFailed
from awq_pycuda.layers.writer import LayerWriter
from awq_pycuda.results.reader import read

SMALL = ("backend=cpu", "n=32", "layers=2", "timing=once", "inputs=outliers")
INT4 = ("quant=int4_g128", "quant.group_size=16")
ONCE = TimingConfig(warmup=0, repeats=1)


def test_a_run_leaves_its_layers_beside_its_results(cli):
    code, out, err = cli(*SMALL, *INT4, "export=compressed_tensors", "save=full")
    assert (code, err) == (0, "")
    path = Path(result_path(out))
    assert f"checkpoint {path.parent / 'checkpoint'}\n" in out
    assert files_under(path.parent) == [
        "checkpoint",
        "checkpoint/config.json",
        "checkpoint/model.safetensors",
        "results.h5",
    ]
    found, stored = awq_pycuda.read_checkpoint(path.parent / "checkpoint"), read(path).layers
    assert list(found) == ["000", "001"]
    with h5py.File(path) as file:
        for (name, layer), of_results in zip(found.items(), stored, strict=True):
            scales = file[f"layers/{name}/scales"]
            assert same_bits(layer.quantized.steps, scales["scale_b"][...])
            assert same_bits(layer.act_pre_scale, 1 / scales["s"][...])
            packed = file[f"layers/{name}/weights/Wq_packed"][...]
            assert np.array_equal(layer.quantized.format.pack(layer.quantized.codes), packed)
            assert of_results.name == name


def test_results_have_the_codes_only_where_they_are_saved(cli):
    files = []
    for export in ("none", "awq"):
        code, out, err = cli(*SMALL, *INT4, "quant.step_dtype=fp16", f"export={export}")
        assert (code, err) == (0, "")
        assert ("checkpoint" in out) is (export == "awq")
        with h5py.File(result_path(out)) as file:
            files.append(sorted(file["layers/000"]))
            assert file.attrs["status"] == "complete"
    assert files[0] == files[1]
    assert "weights" not in files[0]


def test_layers_keep_their_names_and_biases(tmp_path):
    random = np.random.default_rng(0)
    bias = random.normal(size=16).astype(np.float32)
    with LayerWriter(tmp_path / "layers.h5") as file:
        for name, of_layer in (("encoder.0.query", bias), ("encoder.0.key", None)):
            layer = file.add(name, random.normal(size=(16, 32)), of_layer, tokens=8)
            file.append(layer, random.normal(size=(8, 32)))
    quant = QuantConfig(group_size=16, bits=4, symmetric=False, step_dtype="fp16")
    config = Config(
        inputs=FileInputs(path=str(tmp_path / "layers.h5")),
        layers=None,
        backend="cpu",
        gammas=[0],
        quant=quant,
        timing=ONCE,
        export="awq",
    )
    awq_pycuda.run_pipeline(config, tmp_path / "run")
    found = awq_pycuda.read_checkpoint(tmp_path / "run" / "checkpoint")
    assert list(found) == ["encoder.0.key", "encoder.0.query"]
    assert same_bits(found["encoder.0.query"].bias, bias)
    assert found["encoder.0.key"].bias is None
    assert all(layer.act_pre_scale is None for layer in found.values())  # gamma 0 alone: nothing to do to inputs


def test_a_sweep_leaves_one_for_each_job(cli):
    code, out, err = cli("-m", *SMALL, "quant.bits=3,8", "export=compressed_tensors", "study=bits")
    assert code == 0, out + err
    bits = []
    for config in sorted(Path("outputs/bits").glob("*/checkpoint/config.json")):
        (group,) = json.loads(config.read_text())["quantization_config"]["config_groups"].values()
        bits.append(group["weights"]["num_bits"])
        assert (config.parent.parent / "results.h5").exists()
    assert sorted(bits) == [3, 8]


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (("export=awq",), "error: export=awq: has no place for quant.bits=8; allowed: 4 bits, "),
        (("export=awq", *INT4), "error: export=awq: has no place for quant.step_dtype=fp32; allowed: "),
        (("export=compressed_tensors", "quant.group_size=20"), "has no place for 32 in_features in groups of 20 "),
        (("export=gguf",), "error: export=gguf: allowed: none, awq, compressed_tensors"),
    ],
)
def test_what_cannot_be_exported_ends_before_any_work(cli, overrides, told):
    code, out, err = cli(*SMALL, *overrides)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert told in err
    assert files_under(Path.cwd()) == []


def test_a_run_whose_checkpoint_cannot_be_written_has_failed(tmp_path, monkeypatch):
    config = Config(n=16, layers=1, backend="cpu", timing=ONCE, export="compressed_tensors")
    (tmp_path / "checkpoint").write_text("in the way")
    with pytest.raises(RunFailed, match=r"checkpoint cannot be written: .*File exists.*\(1 of 1 layers finished"):
        awq_pycuda.run_pipeline(config, tmp_path)
    with h5py.File(tmp_path / "results.h5") as file:
        assert file.attrs["status"] == "failed"
        assert "output_mse" in file["layers/000/metrics"].attrs


def test_without_a_folder_there_is_no_export():
    with pytest.raises(InputError, match=r"^export=awq: without a folder there is no checkpoint; allowed: none$"):
        awq_pycuda.run_pipeline(Config(n=16, export="awq"))


def test_layers_quantized_one_by_one(tmp_path):
    random = np.random.default_rng(1)
    w, x = random.normal(size=(24, 64)), random.normal(size=(50, 64)) * np.where(np.arange(64) < 3, 30, 1)
    layer = awq_pycuda.quantize(w, x, format=awq_pycuda.Format(32, 4), backend="cpu")
    folder = awq_pycuda.write_checkpoint(tmp_path / "new", {"block.fc": layer})
    found = awq_pycuda.read_checkpoint(folder)
    assert same_bits(found["block.fc"].dequantize(), layer.dequantize())
    assert files_under(awq_pycuda.write_checkpoint(tmp_path / "again", found)) == files_under(folder)
    assert (tmp_path / "again/model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    for target in ("none", "gguf"):
        with pytest.raises(InputError, match=rf"^target={target}: allowed: awq, compressed_tensors$"):
            awq_pycuda.write_checkpoint(tmp_path / "other", {"block.fc": layer}, target)
    with pytest.raises(InputError, match=r"^export=awq: has no place for quant\.step_dtype=fp32; allowed"):
        awq_pycuda.write_checkpoint(tmp_path / "other", {"block.fc": layer}, "awq")
