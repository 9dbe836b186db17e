"""Checkpoints in compressed-tensors' own hands: its config, its decompressor, its converter of AutoAWQ's layout."""

import json

import numpy as np
import pytest
import torch
from checkpoint_layers import AUTOAWQ, COMPRESSED_TENSORS, layer
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.format import infer_module_format
from compressed_tensors.entrypoints.convert import AutoAWQConverter, convert_checkpoint
from compressed_tensors.quantization import QuantizationConfig
from conftest import same_bits
from safetensors.torch import load_file

from awq_pycuda.checkpoints.folders import CheckpointLayer, read, write
from awq_pycuda.config import Export

ODD = 21  # above 8: release 0.20.0 cannot unpack zero points of 4 bits that fill one word alone


def decompressed(folder, names):
    """What compressed-tensors makes of each layer, and the scheme that it did it by."""
    config = QuantizationConfig.model_validate(json.loads((folder / "config.json").read_text())["quantization_config"])
    (scheme,) = config.config_groups.values()
    stored = load_file(folder / "model.safetensors")
    compressor = BaseCompressor.get_value_from_registry(config.format)
    found = {}
    for name in names:
        parts = {key.removeprefix(f"{name}."): value for key, value in stored.items() if key.startswith(f"{name}.")}
        if config.format == "pack-quantized":  # whose arithmetic is in the dtype of the steps
            parts["weight_scale"] = parts["weight_scale"].float()
        found[name] = compressor.decompress(parts, scheme)["weight"]
    return found, scheme, config


@pytest.mark.parametrize("name", COMPRESSED_TENSORS)
def test_its_decompressor_makes_the_same_weights(tmp_path, name):
    layers = {"block.q": layer(COMPRESSED_TENSORS[name]), "block.k": layer(COMPRESSED_TENSORS[name], ODD, seed=1)}
    write(tmp_path, Export.compressed_tensors, layers)
    found, scheme, config = decompressed(tmp_path, layers)
    for layer_name, given in layers.items():
        ours = torch.from_numpy(CheckpointLayer(given.quantized).dequantize())
        # It has FP4 in bf16.
        assert torch.equal(found[layer_name], ours.to(found[layer_name].dtype))
        assert found[layer_name].dtype == (torch.bfloat16 if given.quantized.format.is_e2m1 else torch.float32)
    assert scheme.targets == ["block.q", "block.k"]
    assert infer_module_format(torch.nn.Linear, scheme).value == config.format == scheme.format


@pytest.mark.parametrize("name", AUTOAWQ)
def test_its_converter_reads_autoawq_s_layout(tmp_path, name):
    layers = {"block.q": layer(AUTOAWQ[name]), "block.k": layer(AUTOAWQ[name], 16, seed=1)}
    write(tmp_path / "awq", Export.awq, layers)
    section = json.loads((tmp_path / "awq/config.json").read_text())["quantization_config"]
    convert_checkpoint(tmp_path / "awq", tmp_path / "new", AutoAWQConverter.from_autoawq_config(section))
    found, _, _ = decompressed(tmp_path / "new", layers)
    again = read(tmp_path / "new")
    for layer_name, given in layers.items():
        assert same_bits(found[layer_name].numpy(), CheckpointLayer(given.quantized).dequantize())
        for kind, array in given.quantized.arrays.items():
            assert np.array_equal(again[layer_name].quantized.arrays[kind], array), kind
        assert same_bits(again[layer_name].act_pre_scale, given.act_pre_scale)
