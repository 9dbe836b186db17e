"""Checkpoints: what is written is read back to the bit, what a target cannot hold is refused before any work."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
from checkpoint_layers import AUTOAWQ, COMPRESSED_TENSORS, MXFP4, NVFP4, layer
from conftest import same_bits

from awq_pycuda.checkpoints import autoawq, folders, tensors
from awq_pycuda.checkpoints.folders import CheckpointLayer, read, refuse_misfit, write
from awq_pycuda.choices import Element, StepDtype, ZeroPoint
from awq_pycuda.config import Export
from awq_pycuda.errors import InputError
from awq_pycuda.quant.format import Format
from awq_pycuda.quant.quantized import Quantized
from awq_pycuda.quant.step_types import rounded, smallest

CASES = [
    *(pytest.param(Export.awq, form, id=f"awq {name}") for name, form in AUTOAWQ.items()),
    *(pytest.param(Export.compressed_tensors, form, id=name) for name, form in COMPRESSED_TENSORS.items()),
]


@pytest.mark.parametrize(("target", "form"), CASES)
def test_what_is_written_is_read_back(tmp_path, target, form):
    layers = {"block.0.q": layer(form), "block.0.k": layer(form, 8, seed=1)}
    layers["plain"] = replace(layers["block.0.k"], act_pre_scale=None, bias=None)
    assert write(tmp_path / "new", target, layers) == tmp_path / "new"
    found = read(tmp_path / "new")
    assert found.keys() == layers.keys()
    for name, given in layers.items():
        back = found[name]
        assert back.quantized.arrays.keys() == given.quantized.arrays.keys()
        for kind, array in given.quantized.arrays.items():
            assert back.quantized.arrays[kind].dtype == array.dtype
            assert np.array_equal(back.quantized.arrays[kind], array), kind
        assert same_bits(back.dequantize(), given.dequantize())
        for kind in ("act_pre_scale", "bias"):
            ours, theirs = getattr(given, kind), getattr(back, kind)
            assert (ours is None) is (theirs is None)
            assert ours is None or same_bits(ours, theirs)
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["config.json", "model.safetensors"]


def test_a_word_of_autoawq_s():
    """The word of these codes is that of AutoAWQ's own `WQLinear_GEMM.from_linear`."""
    codes = (np.array([[2, 9, 6, 8, 7, 10, 1, 12]], np.int8) - np.int8(8)).T
    form = Format(1, 4, symmetric=False, step_dtype=StepDtype.fp16)
    steps = np.arange(1, 9, dtype=np.float32)[:, None]
    packed = autoawq.TARGET.pack(Quantized(steps, form, codes[::-1].astype(np.float32), codes=codes))
    assert packed["qweight"].bits.view(np.uint32).tolist() == [[0xCA891762]]
    assert packed["qzeros"].bits.view(np.uint32).tolist() == [[0x267198AC]]
    assert packed["scales"].bits.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8]]
    symmetric = replace(form, symmetric=True)
    assert autoawq.TARGET.pack(Quantized(steps, symmetric, codes=codes))["qzeros"].bits.view(np.uint32) == 0x88888888


def test_scales_of_1_leave_nothing_to_be_done_to_inputs():
    given = layer(Format(32, 4))
    ones = np.ones(96, np.float32)
    assert CheckpointLayer.scaled(given.quantized, ones).act_pre_scale is None
    scaled = CheckpointLayer.scaled(given.quantized, ones * 4)
    assert scaled.act_pre_scale.tolist() == [0.25] * 96
    assert np.array_equal(scaled.dequantize() * 4, CheckpointLayer(given.quantized).dequantize())


@pytest.mark.parametrize("dtype", list(StepDtype), ids=lambda dtype: dtype.name)
def test_numbers_of_every_type_are_stored_to_the_bit(dtype):
    powers = dtype in (StepDtype.e8m0, StepDtype.e8m0_up)
    draw = np.random.default_rng(0).uniform(-8, 8, 500)
    steps = np.exp2(np.rint(draw) if powers else draw).astype(np.float32)
    steps = np.append(steps, np.float32([1, smallest(dtype, np.dtype(np.float32)), 448, 2.0**-9]))
    steps = np.exp2(np.rint(np.log2(steps))) if powers else rounded(steps, dtype)
    stored = tensors.encode(steps, dtype)
    assert same_bits(tensors.floats(stored), steps)
    if dtype is not StepDtype.fp32:
        with pytest.raises(InputError, match=f"^steps: .* is no number of {dtype.name}"):
            tensors.encode(np.float32([1, 1.0001]), dtype)
        with pytest.raises(InputError, match=f"^steps: .* is no number of {dtype.name}"):
            tensors.encode(np.float32([2.0**128 * 0.9999999]), dtype)


ROWS = [("a", (16, 96))]
REFUSED = {
    "bits": (Export.awq, Format(32, 3, step_dtype=StepDtype.fp16), ROWS, "quant.bits=3"),
    "rows": (Export.awq, Format(None, 4, step_dtype=StepDtype.fp16), ROWS, "quant.group_size=null"),
    "fp32": (Export.awq, Format(32, 4), ROWS, "quant.step_dtype=fp32"),
    "fp4": (Export.awq, NVFP4, ROWS, "quant.element=e2m1"),
    "words": (Export.awq, AUTOAWQ["symmetric"], [("a", (8, 96)), ("b", (9, 96))], r"9 out_features \(layer b\)"),
    "ragged": (Export.awq, AUTOAWQ["symmetric"], [("a", (8, 48))], r"48 in_features in groups of 32 \(layer a\)"),
    "wide": (Export.compressed_tensors, Format(128, 4), ROWS, r"96 in_features in groups of 128 \(layer a\)"),
    "mxfp4": (Export.compressed_tensors, MXFP4, [("a", (8, 48))], "48 in_features in groups of 32"),
    "group": (Export.compressed_tensors, replace(NVFP4, group_size=32), ROWS, "quant.group_size=32 with e4m3 steps"),
    "all": (Export.compressed_tensors, replace(MXFP4, group_size=None), ROWS, "quant.group_size=null with e8m0 steps"),
    "steps": (
        Export.compressed_tensors,
        Format(16, 4, element=Element.e2m1),
        ROWS,
        "quant.element=e2m1 with quant.step_dtype=fp32",
    ),
    "least step": (
        Export.compressed_tensors,
        Format(32, 4, step_dtype=StepDtype.bf16, least_step=1e-6),
        ROWS,
        "quant.least_step=1e-06, which bf16 does not have",
    ),
}
for target in (Export.awq, Export.compressed_tensors):
    floats = Format(32, 4, symmetric=False, zero_point=ZeroPoint.float, step_dtype=StepDtype.fp16)
    REFUSED[f"float zeros of {target.name}"] = (target, floats, ROWS, "quant.zero_point=float")


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_target_has_no_place_for_is_refused(case):
    target, form, layers, misfit = REFUSED[case]
    holds = folders._TARGETS[target].holds
    with pytest.raises(InputError, match=rf"^export={target.name}: has no place for {misfit}.*; allowed: .*$") as told:
        refuse_misfit(target, form, layers)
    assert str(told.value).endswith(f"allowed: {holds}")


def test_layers_of_one_name_or_of_two_formats_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"^export=awq: 2 layers are named a; allowed: a name for each$"):
        refuse_misfit(Export.awq, AUTOAWQ["symmetric"], ROWS * 2)
    layers = {"a": layer(Format(None, 4)), "b": layer(Format(None, 3))}
    with pytest.raises(InputError, match=r"^layers: are of 2 formats; allowed: one$"):
        write(tmp_path / "new", Export.compressed_tensors, layers)
    assert not (tmp_path / "new").exists()


def test_steps_that_the_target_would_round_are_refused(tmp_path):
    given = layer(AUTOAWQ["symmetric"]).quantized
    for form, name in ((given, "fp16"), (layer(NVFP4).quantized, "e4m3")):
        off = replace(form, steps=form.steps * np.float32(1.0001))
        with pytest.raises(InputError, match=rf"^steps: .*{name}"):
            write(tmp_path, Export.compressed_tensors, {"a": CheckpointLayer(off)})
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_is_there_whole_or_not_at_all(tmp_path, monkeypatch):
    def full_disk(path, text, **_):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_text", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path, Export.compressed_tensors, {"a": layer(Format(None, 4))})
    assert list(tmp_path.iterdir()) == []


def changed(folder, **changes):
    """A checkpoint whose section says something else."""
    path = folder / "config.json"
    section = json.loads(path.read_text())["quantization_config"]
    path.write_text(json.dumps({"quantization_config": section | changes}))


FAULTS = {
    "method": (Export.awq, {"quant_method": "gptq"}, "quant_method=gptq: allowed: awq, compressed-tensors"),
    "bits": (Export.awq, {"bits": 8}, "layer a: bits=8: allowed: 4"),
    "version": (Export.awq, {"version": "gemv"}, "layer a: version=gemv: allowed: gemm"),
    "group": (Export.awq, {"group_size": 36}, "layer a: group_size=36: allowed: what divides the 96 in_features"),
    "groups": (Export.awq, {"group_size": 16}, r"layer a: scales: has shape \(3, 40\); allowed: \(6, 40\)"),
    "symmetric": (Export.awq, {"zero_point": False}, "layer a: qzeros: hold others than 8"),
    "format": (
        Export.compressed_tensors,
        {"format": "marlin-24"},
        "layer a: format=marlin-24: allowed: pack-quantized",
    ),
    "schemes": (Export.compressed_tensors, {"config_groups": {}}, "layer a: config_groups: allowed: one group"),
    "scheme": (Export.compressed_tensors, {"config_groups": {"a": 1}}, "layer a: config_groups: has no weights"),
    "weights": (
        Export.compressed_tensors,
        {"config_groups": {"a": {"weights": {"num_bits": 9, "type": "int"}}}},
        "layer a: weights=.*: allowed: integers of 2 to 8 bits",
    ),
    "strategy": (
        Export.compressed_tensors,
        {"config_groups": {"a": {"weights": {"num_bits": 4, "type": "int", "strategy": "block"}}}},
        "layer a: weights=.*: allowed: strategy channel, or group",
    ),
    "shape": (
        Export.compressed_tensors,
        {"config_groups": {"a": {"weights": {"num_bits": 4, "type": "int", "strategy": "channel"}}}},
        r"layer a: weight_scale: has shape \(40, 3\); allowed: \(40, 1\)",
    ),
}


@pytest.mark.parametrize("case", FAULTS)
def test_a_section_that_does_not_fit_is_told(tmp_path, case):
    target, changes, told = FAULTS[case]
    form = AUTOAWQ["zero points"]
    write(tmp_path, target, {"a": layer(form)})
    changed(tmp_path, **changes)
    with pytest.raises(InputError, match=rf"^{re.escape(str(tmp_path))}.*: {told}"):
        read(tmp_path)


def test_files_that_are_no_checkpoint_are_told(tmp_path):
    with pytest.raises(InputError, match=r"config\.json: .*No such file.*; allowed: the config of a quantized model$"):
        read(tmp_path)
    config = tmp_path / "config.json"
    for text in ("{", "[]", '{"quantization_config": null}'):
        config.write_text(text)
        with pytest.raises(InputError, match=r"config\.json: .*; allowed: the config of a quantized model$"):
            read(tmp_path)
    write(tmp_path, Export.awq, {"a": layer(AUTOAWQ["symmetric"])})
    (tmp_path / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(InputError, match=r"model\.safetensors: .*; allowed: a whole safetensors file$"):
        read(tmp_path)


def test_tensors_of_other_modules_are_passed_over(tmp_path):
    given = layer(Format(None, 4))
    write(tmp_path, Export.compressed_tensors, {"a": given})
    path = tmp_path / "model.safetensors"
    stored = tensors.read(path) | {"norm.weight": tensors.of(np.ones(3, np.float32))}
    path.write_bytes(tensors.to_bytes(stored))
    assert list(read(tmp_path)) == ["a"]
    del stored["a.weight_shape"]
    path.write_bytes(tensors.to_bytes(stored))
    with pytest.raises(InputError, match=r"layer a: weight_shape: is missing; allowed: a tensor of 1 dimensions$"):
        read(tmp_path)
