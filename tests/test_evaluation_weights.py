"""The weights that a result file stands for, made again of the layers: those of the run itself, to the bit."""

import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
from result_files import editing

from awq_pycuda import library
from awq_pycuda.backends.cpu import CpuBackend
from awq_pycuda.config_text import from_yaml
from awq_pycuda.engine.execution import store
from awq_pycuda.engine.spec import convention_of
from awq_pycuda.errors import InputError, RunFailed
from awq_pycuda.evaluating import quantized
from awq_pycuda.evaluating.calibration import Calibration
from awq_pycuda.evaluating.quantized import made
from awq_pycuda.evaluating.recipes import Recipe, parse
from awq_pycuda.layers.files import load_layers, stored_weights
from awq_pycuda.layers.inputs import file_sha256
from awq_pycuda.layers.writer import LayerWriter
from awq_pycuda.quant.quantized import Quantized, dequantize
from awq_pycuda.results.reader import read
from awq_pycuda.results.scales import read_scales
from awq_pycuda.signals import Stopped, stoppable

SHAPES = {"q_proj": (12, 40), "k_proj": (8, 40), "o_proj": (40, 24), "up_proj": (16, 40)}
FORMATS = {
    "int8": ["quant=per_row"],
    "int4_row": ["quant=int4_row"],
    "int4_g": ["quant=int4_g128", "quant.group_size=16"],
    "int3": ["quant.bits=3", "quant.group_size=12"],
    "nvfp4": ["quant=nvfp4"],
    "mxfp4": ["quant=mxfp4"],
    "zeros": ["quant.bits=4", "quant.group_size=16", "convention=llm_awq", "clip=none"],
    "shifted": ["quant.bits=4", "quant.group_size=16", "convention=llm_compressor"],
    "half_steps": ["quant.bits=4", "quant.group_size=8", "convention=autoawq", "quant.step_dtype=fp16", "clip=none"],
    "float_zeros": ["quant.bits=4", "quant.group_size=8", "convention=torchao", "quant.step_dtype=bf16"],
}
OTHERS = {
    "clip": ["quant.bits=4", "quant.group_size=16", "convention=llm_awq"],
    "clip_nvfp4": ["quant=nvfp4", "clip=groups"],
    "clip_rows": ["quant=int4_row", "clip=groups"],
    "joint": ["quant.bits=3", "quant.group_size=16", "clip=joint"],
    "shared": ["quant=int4_row", "share=inputs"],
    "output": ["quant=int4_row", "search=output"],
}


def write_layers(path: Path, seed: int = 0) -> Path:
    random = np.random.default_rng(seed)
    with LayerWriter(path) as writer:
        first = None
        for name, (rows, columns) in SHAPES.items():
            weight = random.standard_normal((rows, columns)).astype(np.float32)
            layer = writer.add(f"block.{name}", weight, tokens=32)
            if first is None or columns != 40:
                x = (random.standard_normal((32, columns)) * random.lognormal(0, 1, columns)).astype(np.float32)
                writer.append(layer, x)
                first = first or (layer, x)
            else:
                writer.append(layer, first[1], first[0])
    return path


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Calibration:
    path = write_layers(tmp_path_factory.mktemp("calibration") / "calibration.h5")
    return Calibration(path, file_sha256(path), 32, [], False, stored_weights(path))


@pytest.fixture(scope="module")
def recipes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Recipe]:
    of_layers = {name: [*given, "share=layers"] for name, given in FORMATS.items()}
    lines = [f"{name}: {[*given, 'save=full']}" for name, given in (of_layers | OTHERS).items()]
    path = tmp_path_factory.mktemp("recipes") / "recipes.yaml"
    path.write_text("\n".join(lines).replace("'", '"'))
    return {recipe.name: recipe for recipe in parse(str(path), 32, ["backend=cpu", "threads=1"])}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("results")


@pytest.mark.parametrize("name", FORMATS | OTHERS)
def test_weights_are_those_of_the_codes_that_the_run_had(name, recipes, calibration, results):
    found = made(recipes[name], calibration, results)
    scales = read_scales(found.results, len(SHAPES))
    with h5py.File(found.results) as file:
        form = convention_of(from_yaml(file.attrs["config"])).quantizer
        packed = [next(iter(file[f"layers/{number:03d}/weights"].values()))[()] for number in range(len(SHAPES))]
    for path, each, stored in zip(calibration.weights, scales, packed, strict=True):
        codes = form.unpack(stored, len(each.s))
        whole = Quantized(each.steps, form, each.zero_points, each.tensor_scale, codes=codes)
        np.testing.assert_array_equal(found.weight(path), dequantize(whole, 1 / each.s))
        assert found.weight(path).dtype == np.float32
        if name.startswith("clip") and not path.endswith(("q_proj", "k_proj")):
            assert each.ratio.min() < 1, "the case shows nothing"


@pytest.mark.parametrize("name", FORMATS)
def test_weights_are_those_of_quantize(name, recipes, calibration, results):
    found = made(recipes[name], calibration, results)
    convention = convention_of(recipes[name].config)
    for layer in load_layers(calibration.path):
        alone = library.quantize(layer.weight, layer.activations, convention=convention, backend="cpu")
        np.testing.assert_array_equal(found.weight(layer.name), alone.dequantize())


def test_a_run_is_made_once_for_a_config_and_a_calibration(recipes, calibration, tmp_path):
    first = made(recipes["int8"], calibration, tmp_path)
    written = first.results.read_bytes()
    again = made(recipes["int8"], calibration, tmp_path)
    assert first.search_s > 0
    assert again.search_s == 0
    assert again.results.read_bytes() == written
    assert again.config_hash == first.config_hash
    # Where the layer file lies and how many threads there are changes nothing that a run finds.
    elsewhere = Path(shutil.copy(calibration.path, tmp_path / "calibration.h5"))
    moved = replace(calibration, path=elsewhere, weights=stored_weights(elsewhere))
    with_threads = replace(recipes["int8"], config=replace(recipes["int8"].config, threads=2))
    assert made(with_threads, moved, tmp_path).search_s == 0


@pytest.mark.parametrize("stale", ["config", "calibration", "failed", "damaged"])
def test_a_run_is_made_again_where_its_file_does_not_fit(stale, recipes, calibration, tmp_path):
    first = made(recipes["int8"], calibration, tmp_path)
    recipe, given = recipes["int8"], calibration
    if stale == "config":
        recipe = replace(recipe, config=replace(recipe.config, gammas=[0.0, 0.3]))
    elif stale == "calibration":
        path = write_layers(tmp_path / "calibration.h5", seed=1)
        given = replace(calibration, path=path, sha256=file_sha256(path), weights=stored_weights(path))
    elif stale == "failed":
        with editing(first.results) as file:
            file.attrs.update({"status": "failed", "error": "stopped"})
    else:
        first.results.write_bytes(first.results.read_bytes()[:-5000])
    again = made(recipe, given, tmp_path)
    assert again.search_s > 0
    np.testing.assert_array_equal(again.weight("block.o_proj"), made(recipe, given, tmp_path).weight("block.o_proj"))
    assert made(recipe, given, tmp_path).search_s == 0


def test_a_run_that_fails_says_so_and_leaves_its_file(recipes, calibration, tmp_path, monkeypatch):
    def fail(*_: object) -> None:
        raise FloatingPointError("too large")

    monkeypatch.setattr(CpuBackend, "quantize_awq", fail)
    with pytest.raises(RunFailed, match="too large"):
        made(recipes["int8"], calibration, tmp_path)
    assert (tmp_path / "int8" / "results.h5").is_file()
    monkeypatch.undo()
    assert made(recipes["int8"], calibration, tmp_path).search_s > 0


def test_a_fault_of_a_run_names_the_recipe(recipes, calibration, tmp_path):
    recipe = replace(recipes["int8"], config=replace(recipes["int8"].config, tokens=33))
    with pytest.raises(InputError, match=r"^recipes: int8: tokens=33: .* at most 32 tokens.* allowed are 1 to 32$"):
        made(recipe, calibration, tmp_path)
    assert not any(tmp_path.iterdir())


def test_sizes_count_codes_steps_and_zero_points_in_their_types(recipes, calibration, results):
    shape = 40 * 24  # of o_proj
    expected = {
        "int8": 8 * shape + 32 * 40,
        "int4_g": 4 * shape + 32 * 40 * 2,
        "int3": 3 * shape + 32 * 40 * 2,
        "nvfp4": 4 * shape + 8 * 40 * 2 + 32,
        "mxfp4": 4 * shape + 8 * 40,
        "zeros": 4 * shape + (32 + 4) * 40 * 2,
        "half_steps": 4 * shape + (16 + 4) * 40 * 3,
        "float_zeros": 4 * shape + (16 + 16) * 40 * 3,
    }
    for name, bits in expected.items():
        figures = made(recipes[name], calibration, results).layers["block.o_proj"]
        assert figures.bits == bits / shape, name
        assert figures.bytes == -(-bits // 8), name


def test_figures_are_those_of_the_run(recipes, calibration, results):
    found = made(recipes["int4_g"], calibration, results)
    whole = read(found.results)
    assert list(found.layers) == [f"block.{name}" for name in SHAPES]
    for layer in whole.layers:
        figures = found.layers[layer.name]
        assert figures.output_sqnr_db == layer.metrics["output_sqnr_db"]
        assert figures.rtn_output_sqnr_db == layer.metrics["rtn_output_sqnr_db"]
        assert figures.gamma == layer.gamma_chosen


def test_a_mixture_has_each_layer_of_its_recipe(recipes, calibration, results):
    parts = {name: recipes[name] for name in ("int8", "int3")}
    mixture = (("block.q_proj", "int3"), ("k_proj|o_proj", "original"), (".*", "int8"))
    found = made(Recipe("mixed", mixture=mixture, parts=parts), calibration, results)
    alone = {name: made(recipe, calibration, results) for name, recipe in parts.items()}
    assert found.mixture == {
        "block.q_proj": "int3",
        "block.k_proj": "original",
        "block.o_proj": "original",
        "block.up_proj": "int8",
    }
    assert list(found.layers) == ["block.q_proj", "block.up_proj"]
    assert found.weight("block.k_proj") is None
    np.testing.assert_array_equal(found.weight("block.q_proj"), alone["int3"].weight("block.q_proj"))
    np.testing.assert_array_equal(found.weight("block.up_proj"), alone["int8"].weight("block.up_proj"))
    assert found.layers["block.up_proj"] == alone["int8"].layers["block.up_proj"]
    other = made(Recipe("mixed", mixture=mixture[2:], parts=parts), calibration, results)
    assert len({found.config_hash, other.config_hash, alone["int8"].config_hash}) == 3


def test_results_of_other_weights_are_refused(recipes, calibration, results, tmp_path):
    made(recipes["int4_g"], calibration, tmp_path / "study")
    (recipe,) = parse(str(tmp_path / "study"), 32)
    found = made(recipe, calibration, tmp_path)
    np.testing.assert_array_equal(
        found.weight("block.o_proj"), made(recipes["int4_g"], calibration, results).weight("block.o_proj")
    )
    path = write_layers(tmp_path / "other.h5", seed=1)
    other = replace(calibration, path=path, weights=stored_weights(path))
    with pytest.raises(InputError, match=r"results\.h5: layer block\.q_proj: its steps are those of other weights"):
        made(recipe, other, tmp_path)


@pytest.mark.parametrize("part", ["scales/scale_b", "scales/zero_point", "scales/s"])
def test_a_file_without_a_part_of_a_layer_is_refused(part, recipes, calibration, tmp_path):
    made(recipes["zeros"], calibration, tmp_path / "study")
    (recipe,) = parse(str(tmp_path / "study"), 32)
    with editing(recipe.stored.path) as file:
        values = file[f"layers/000/{part}"][1:]
        del file[f"layers/000/{part}"]
        if part == "scales/zero_point":
            file[f"layers/000/{part}"] = values
    with pytest.raises(InputError, match=rf"^recipes={recipe.stored.path}: .*{part}.*; allowed: a whole result file$"):
        made(recipe, calibration, tmp_path)


def test_a_signal_waits_for_the_file_of_a_run(recipes, calibration, tmp_path, monkeypatch):
    def store_and_stop(*given: object) -> Path:
        os.kill(os.getpid(), signal.SIGTERM)
        return store(*given)

    monkeypatch.setattr(quantized, "store", store_and_stop)
    with stoppable(), pytest.raises(Stopped, match="SIGTERM"):
        made(recipes["int8"], calibration, tmp_path)
    assert made(recipes["int8"], calibration, tmp_path).search_s == 0


def test_a_signal_ends_a_run_whose_file_says_so(recipes, calibration, tmp_path):
    def stop(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    with stoppable(), pytest.raises(RunFailed, match="interrupted by SIGTERM") as failed:
        made(recipes["int8"], calibration, tmp_path, stop)
    assert failed.value.interrupted
    assert made(recipes["int8"], calibration, tmp_path).search_s > 0
