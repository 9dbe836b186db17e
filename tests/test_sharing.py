"""One s for all layers of one input: what a search of one layer that has all of their rows finds."""

import itertools
import re
from dataclasses import replace

import h5py
import numpy as np
import pytest
from conftest import COMPILED, make_backend, same_bits
from test_device_search import DEVICES, convention, layer_of

from awq_pycuda.analysis.explain import explain
from awq_pycuda.backends.choose import no_device_search
from awq_pycuda.choices import ConventionChoice, Element, Objective, Share, StepDtype
from awq_pycuda.config import settled
from awq_pycuda.engine.arrays import allocate, kept_bytes
from awq_pycuda.engine.memory import search_sizes
from awq_pycuda.engine.pipeline import Pipeline
from awq_pycuda.engine.spec import spec_of
from awq_pycuda.engine.stages import UP_TO_CODES
from awq_pycuda.layers.writer import LayerWriter
from awq_pycuda.library import read_checkpoint
from awq_pycuda.quant.conventions import CONVENTIONS, Convention
from awq_pycuda.quant.format import Format

# Two inputs in turn, each with layers of several sizes, and a layer of its own: name, rows, input.
LAYERS = (("q", 6, "a"), ("gate", 7, "b"), ("k", 3, "a"), ("o", 5, "c"), ("up", 4, "b"), ("v", 9, "a"))
GROUPS = {"a": (0, 2, 5), "b": (1, 4), "c": (3,)}
CHANNELS = {"a": 20, "b": 12, "c": 6}


@pytest.fixture(scope="module")
def given():
    """Weights by layer, and activations by input, a few channels of which are large and one is dead."""
    random = np.random.default_rng(8)
    weights = [random.standard_normal((rows, CHANNELS[of]), np.float32) for _, rows, of in LAYERS]
    for index, w in enumerate(weights):
        w *= 2.0**index
    inputs = {}
    for of, channels in CHANNELS.items():
        inputs[of] = random.standard_normal((24, channels), np.float32) * np.exp(random.normal(size=channels))
        inputs[of][:, 3] = 0
    return weights, {of: x.astype(np.float32) for of, x in inputs.items()}


def write(path, layers):
    """A file of (name, weights, activations, number of the layer that has them first or None)."""
    with LayerWriter(path) as writer:
        ids = []
        for name, w, x, first in layers:
            ids.append(writer.add(name, w, tokens=len(x)))
            writer.append(ids[-1], x, None if first is None else ids[first])
    return ("inputs=file", f"inputs.path={path}", "layers=null", "tokens=null", "timing=once")


@pytest.fixture
def split(given, tmp_path):
    """The layers as they are."""
    weights, inputs = given
    firsts = {of: members[0] for of, members in GROUPS.items()}
    layers = [
        (name, w, inputs[of], None if firsts[of] == index else firsts[of])
        for index, ((name, _, of), w) in enumerate(zip(LAYERS, weights, strict=True))
    ]
    return write(tmp_path / "split.h5", layers)


@pytest.fixture
def whole(given, tmp_path):
    """One layer for each input, with the rows of all."""
    weights, inputs = given
    layers = [
        (of, np.concatenate([weights[member] for member in members]), inputs[of], None)
        for of, members in GROUPS.items()
    ]
    return write(tmp_path / "whole.h5", layers)


def left_by(name, config, on_host):
    """The layers that a verified run leaves."""
    spec = spec_of(config)
    form = spec.convention.quantizer
    with make_backend(name, spec.tile, form, search_on_host=on_host, **spec.variants) as backend:
        pipeline = Pipeline(backend, spec)
        pipeline.run()
    return pipeline.layers


ASKED = {
    "diag": ("quant=int4_row",),
    "output": ("quant=int4_row", "search=output"),
    "zero points": ("convention=llm_awq", "clip=none", "quant=int4_g128", "quant.group_size=5"),
    "duo": ("convention=autoawq", "clip=none", "quant=int3_g128", "quant.group_size=8", "inputs.holdout=0.25"),
    "weights' beta": ("search.formula=gamma_beta", "gammas=[0,0.5]", "search.betas=[0,0.7]", "quant.bits=4"),
    "fp4": ("search=output", "quant=mxfp4"),
}
ON_GPU = [pytest.param("cuda", asked, on_host, marks=pytest.mark.gpu) for asked in ASKED for on_host in (False, True)]


@pytest.mark.parametrize(
    ("name", "asked", "on_host"),
    [
        *(("cpu", asked, True) for asked in ASKED),
        *((name, asked, True) for name in COMPILED for asked in ("diag", "output")),
        *ON_GPU,
    ],
)
def test_a_search_is_that_of_one_layer_with_all_rows(compose, split, whole, name, asked, on_host):
    more = ("share=inputs", "save=full", "verify=true", *ASKED[asked])
    parts, layers = (left_by(name, compose(*files, *more), on_host) for files in (split, whole))
    for members, layer in zip(GROUPS.values(), layers, strict=True):
        assert layer.shares_s_with == ()
        sizes = [len(parts[member].quantized.steps) for member in members]
        for member, stop, size in zip(members, np.cumsum(sizes), sizes, strict=True):
            part = parts[member]
            assert part.shares_s_with == tuple(other for other in members if other != member)
            np.testing.assert_allclose(part.search.error, layer.search.error, rtol=1e-5)
            assert part.search.candidate == layer.search.candidate
            assert same_bits(part.search.s, layer.search.s)
            np.testing.assert_allclose(part.by_max.error, layer.by_max.error, rtol=1e-5)
            assert same_bits(part.by_max.s, layer.by_max.s)
            assert same_bits(part.abs_max, layer.abs_max)
            for own, of_all in zip(part.quantized.arrays.values(), layer.quantized.arrays.values(), strict=True):
                assert np.array_equal(own, of_all[stop - size : stop])
            assert ("error_curve" in part.verify) == (member == members[0])
        # Each has its own figures, which together are those of the whole.
        for metric in layer.metrics.keys() & {"output_mse", "max_output_mse", "weight_mse", "held_out_output_mse"}:
            found = np.average([parts[member].metrics[metric] for member in members], weights=sizes)
            assert found == pytest.approx(layer.metrics[metric], rel=1e-5)


FORMATS = ("per_row", "int4_g128", "nvfp4", "mxfp4")
ALIKE = [("cpu", *each) for each in itertools.product(FORMATS, ("diag", "output"))]


@pytest.mark.parametrize(
    ("name", "quant", "search"), [*ALIKE, *(pytest.param("cuda", *each[1:], marks=pytest.mark.gpu) for each in ALIKE)]
)
def test_the_error_is_the_sum_over_layers_each_with_its_own_factor_of_steps(compose, split, name, quant, search):
    asked = (f"quant={quant}", "quant.group_size=4", f"search={search}", "verify=true")
    on_host = no_device_search(spec_of(compose(*asked)).convention, shares=True) is not None
    shared, alone = (left_by(name, compose(*split, *asked, f"share={how}"), on_host) for how in ("inputs", "layers"))
    for members in GROUPS.values():
        errors = np.array([alone[member].search.error for member in members])
        if search == "output":
            errors *= np.array([[len(alone[member].quantized.steps)] for member in members])
            errors /= sum(len(alone[member].quantized.steps) for member in members)
        for member in members:
            np.testing.assert_allclose(shared[member].search.error, errors.sum(axis=0), rtol=1e-5)
    assert [layer.search.chosen for layer in shared] != [layer.search.chosen for layer in alone]


@pytest.mark.parametrize("name", DEVICES)
@pytest.mark.parametrize(("objective", "points"), [(Objective.diag, 7), (Objective.output, 3)])
def test_kernels_search_for_all_layers_at_once(name, objective, points):
    whole = layer_of(9, 37)
    rows = [slice(0, 2), slice(2, 8), slice(8, 9)]
    parts = [replace(whole, weight=whole.weight[each], input_of=0 if each.start else None) for each in rows]
    chosen = convention(points, objective=objective, share=Share.inputs)
    found = []
    for specs in ([whole], parts):
        with make_backend(name) as backend:
            layers = allocate(backend, specs, chosen).layers
            for layer, stage in itertools.product(layers, UP_TO_CODES):
                stage.call(backend, layer, chosen)
            read = backend.read
            search = [[read(each).copy() for each in (layer.error, layer.s, layer.inv_s)] for layer in layers]
            made = [layer.quantized.map(read) for layer in layers]
            found.append((search, [(each.steps.copy(), each.codes.copy()) for each in made]))
    ((search,), ((steps, codes),)), (searches, quantized) = found
    assert all(map(same_bits, one, search) for one in searches)
    for each, (own_steps, own_codes) in zip(rows, quantized, strict=True):
        assert same_bits(own_steps, steps[each])
        assert np.array_equal(own_codes, codes[each])


def test_the_kernels_have_one_matrix_and_no_second_copy_of_it(compose, split, whole):
    one, other = (spec_of(compose(*files, "share=inputs", "search=output")) for files in (split, whole))
    assert search_sizes(one.layers, one.convention) == [
        sizes | {"tokens": 24} for sizes in search_sizes(other.layers, other.convention)
    ]
    alone = replace(one.convention, share=Share.layers)
    once = sum(8 * CHANNELS[of] + 8 * alone.grid.size for of, members in GROUPS.items() for _ in members[1:])
    assert kept_bytes(one.layers, alone) - kept_bytes(one.layers, one.convention) == once


def test_a_factor_for_the_steps_of_each_matrix_is_searched_on_the_host():
    nvfp4 = Convention(quantizer=Format(16, 4, Element.e2m1, step_dtype=StepDtype.e4m3))
    mxfp4 = Convention(quantizer=Format(16, 4, Element.e2m1, step_dtype=StepDtype.e8m0))
    why = "to its kernels layers that share s are one matrix, with one factor for e4m3 steps"
    assert no_device_search(nvfp4, shares=True) == why
    assert no_device_search(nvfp4, shares=False) is None
    assert no_device_search(mxfp4, shares=True) is None


def test_tools_but_for_torchao_have_one_s_for_an_input(compose):
    alone = {tool for tool, record in CONVENTIONS.items() if record.share is Share.layers}
    assert alone == {ConventionChoice.day58, ConventionChoice.torchao}
    assert settled(compose("convention=autoawq")).share is Share.inputs
    assert spec_of(compose("convention=autoawq", "share=layers")).convention.share is Share.layers


def test_layers_of_inputs_of_their_own_are_as_ever(compose, whole):
    asked = (*whole, "convention=llm_awq", "quant=int4_g128")
    one, other = (left_by("cpu", compose(*asked, f"share={share.name}"), True) for share in Share)
    for ours, theirs in zip(one, other, strict=True):
        assert same_bits(ours.search.error, theirs.search.error)
        assert same_bits(ours.search.s, theirs.search.s)
        assert (ours.metrics, ours.shares_s_with) == (theirs.metrics, ())


def test_files_tell_who_shares(cli, split, tmp_path):
    asked = ("quant=int4_row", "share=inputs", "export=compressed_tensors", "backend=cpu")
    given = (*split, *asked, f"hydra.run.dir={tmp_path}")
    code, out, err = cli(*given)
    assert (code, err, "; one s for all layers of an input (inputs: 2, layers: 5)\n" in out) == (0, "", True)
    found = explain(tmp_path / "results.h5", "k", 3)
    assert any(re.fullmatch("search by diag: .*, one for the outputs of layers 000 005, too", line) for line in found)
    with h5py.File(tmp_path / "results.h5") as file:
        layers = list(file["layers"].values())
        told = [layer["search"].attrs.get("shares_s_with") for layer in layers]
        curves = [layer["search/error"][()] for layer in layers]
        scales = [layer["scales/s"][()] for layer in layers]
    assert told == ["002 005", "004", "000 005", None, "001", "000 002"]
    for first, *others in GROUPS.values():
        assert all(same_bits(curves[first], curves[other]) for other in others)
        assert all(same_bits(scales[first], scales[other]) for other in others)
    # One norm can take these on: what a checkpoint multiplies its input by is the same for all who read it.
    exported = read_checkpoint(tmp_path / "checkpoint")
    for first, *others in GROUPS.values():
        factors = [exported[LAYERS[member][0]].act_pre_scale for member in (first, *others)]
        assert all(same_bits(each, 1 / scales[first]) for each in factors)


@pytest.mark.parametrize("value", ["all", "1", "[inputs]"])
def test_what_share_may_be(cli, value):
    code, _, err = cli(f"share={value}")
    assert (code, err.count("\n")) == (2, 1)
    assert re.fullmatch(r"error: share=.*: allowed: layers, inputs, null \(as the convention has it\)", err.strip())
