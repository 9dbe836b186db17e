"""Clipping: the ratio of every group, against a plain definition in float64."""

from dataclasses import replace

import h5py
import numpy as np
import pytest
from conftest import BACKENDS, make_backend
from result_files import make_run

from awq_pycuda.analysis.explain import explain
from awq_pycuda.choices import Element, StepDtype
from awq_pycuda.engine.pipeline import Pipeline
from awq_pycuda.engine.spec import spec_of
from awq_pycuda.errors import InputError
from awq_pycuda.parallel import use_threads
from awq_pycuda.quant.clipping import Clipping, clip, clipped, find_ratios
from awq_pycuda.quant.format import Format
from awq_pycuda.quant.quantized import Quantized, dequantize, quantize, steps_of

NVFP4 = Format(16, 4, Element.e2m1, step_dtype=StepDtype.e4m3)
RANDOM = np.random.default_rng(4)
FORMATS = [
    Format(None, 4),
    Format(16, 4),
    Format(16, 3, symmetric=False),
    Format(13, 4, symmetric=False, include_zero=False, least_range=1e-5),
]


def layer(rows=10, channels=40, tokens=24):
    w = RANDOM.standard_t(3, (rows, channels)).astype(np.float32)
    x = (RANDOM.normal(size=(tokens, channels)) * RANDOM.lognormal(0, 1, channels)).astype(np.float32)
    return w, RANDOM.uniform(0.5, 2, channels).astype(np.float32), x


def plainly(w, s, x, form, ratios):
    """Group by group, ratio by ratio: (rows, groups, ratios) errors.

    Limits and ranges in float32: a group clipped on both sides has its zero point at a rounding tie.
    """
    x = x.astype(np.float64)
    size = form.size(w.shape[1])
    errors = np.empty((len(w), form.groups(w.shape[1]), len(ratios)))
    for n, row in enumerate(w * s):
        for g, start in enumerate(range(0, row.size, size)):
            group, inputs = row[start : start + size], (x / s)[:, start : start + size]
            for i, ratio in enumerate(ratios):
                limit = np.float32(ratio) * np.abs(group).max()
                held = group.clip(-limit, limit)
                if form.symmetric:
                    step = limit / form.largest
                    back = (held / step).round() * step
                else:
                    low, high = held.min(), held.max()
                    if form.include_zero:
                        low, high = min(low, 0), max(high, 0)
                    step = max(high - low, np.float32(form.least_range)) / np.float32(2**form.bits - 1)
                    zero = np.clip(-np.round(low / step), 0, 2**form.bits - 1)
                    back = (np.clip(np.round(held / step) + zero, 0, 2**form.bits - 1) - zero) * step
                errors[n, g, i] = ((inputs @ (back.astype(np.float64) - group)) ** 2).mean()
    return errors


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: f"{form.group_size} {form.bits} {form.symmetric}")
@pytest.mark.parametrize("tokens", [24, 9])
def test_every_group_gets_the_ratio_of_its_least_error(form, tokens):
    w, s, x = layer(tokens=tokens)
    ratios = Clipping().ratios
    found = find_ratios(w, s, x, form, ratios).everywhere
    errors = plainly(w, s, x, form, ratios)
    chosen = np.array([list(ratios.astype(np.float32)).index(ratio) for ratio in found.ratio.ravel()])
    picked = np.take_along_axis(errors.reshape(-1, len(ratios)), chosen[:, None], 1)[:, 0]
    assert (picked <= errors.reshape(-1, len(ratios)).min(axis=1) * (1 + 1e-4)).all()
    assert len(set(chosen)) > 2
    assert found.error == pytest.approx(errors.sum(axis=1).mean(axis=0), rel=1e-4)
    assert found.error_chosen == pytest.approx(errors.min(axis=2).sum(axis=1).mean(), rel=1e-4)
    assert found.tried.tolist() == ratios.tolist()
    held, scaled = clipped(w, s, found.ratio, form), w * s
    for index, start in enumerate(range(0, 40, form.size(40))):
        group = scaled[:, start : start + form.size(40)]
        limit = np.abs(group).max(axis=1, keepdims=True) * found.ratio[:, index : index + 1]
        assert np.array_equal(held[:, start : start + form.size(40)], group.clip(-limit, limit))


def codes_of(w, s, ratio, form):
    """What a stored layer stands for, times s: the codes of the clipped weights, dequantized."""
    ones = np.ones_like(s)
    held = clipped(w, s, ratio, form)
    steps = steps_of(held, ones, form)
    quantized = Quantized(format=form, **steps.arrays, codes=np.empty(w.shape, np.int8))
    quantize(held, ones, quantized)
    return dequantize(quantized)


@pytest.mark.parametrize("form", [*FORMATS, NVFP4], ids=str)
def test_what_is_judged_is_what_is_stored(form):
    """Of NVFP4, too, whose largest weight, which little signal reaches, sets the factor of the whole matrix."""
    w, s, x = layer()
    x[:, np.abs(w * s).max(axis=0).argmax()] /= 100
    found = find_ratios(w, s, x, form, Clipping().ratios).everywhere
    off = (codes_of(w, s, found.ratio, form) - w * s).astype(np.float64)
    size = form.size(40)
    parts = [(x / s)[:, start : start + size] @ off[:, start : start + size].T for start in range(0, 40, size)]
    assert found.error_chosen == pytest.approx(sum((part**2).mean() for part in parts), rel=1e-4)
    assert (found.ratio < 1).mean() > 0.1


def test_no_ratio_is_better_than_none_where_nothing_is_lost():
    w = np.array([[7, -3, 1], [0, 0, 0]], np.float32)
    found = find_ratios(
        w, np.ones(3, np.float32), np.eye(3, dtype=np.float32), Format(None, 4), Clipping().ratios
    ).everywhere
    assert found.ratio.tolist() == [[1], [1]]  # of equals the first
    assert (found.error[0], found.error_chosen) == (0, 0)


def test_weights_are_held_to_the_limits_of_their_groups():
    scaled = np.array([[3.0, -4, 1, 5, -2]])
    assert clip(scaled, np.array([[3.5, 1, 9]]), Format(2)).tolist() == [[3, -3.5, 1, 1, -2]]


def test_the_ratios_and_tokens_of_the_reference():
    ratios = Clipping().ratios
    assert (len(ratios), ratios[0], ratios[-1]) == (10, 1, pytest.approx(0.55))
    x = np.arange(1200)[:, None]
    assert len(Clipping().of(x)) == 600
    assert len(Clipping().of(x[:700])) == 700
    assert len(Clipping().of(x[:100])) == 100
    assert Clipping().skips("layers.0.self_attn.q_proj")
    assert not Clipping().skips("layers.0.self_attn.v_proj")


def test_threads_do_not_change_a_bit():
    w, s, x = layer(3000, 200, 30)
    found = []
    for threads in (1, 3):
        with use_threads(threads):
            found.append(find_ratios(w, s, x, Format(64, 4), (1, 0.8)).everywhere)
    assert np.array_equal(found[0].ratio, found[1].ratio)
    assert found[0].error.tolist() == found[1].error.tolist()


@pytest.mark.parametrize("bad", [{"grid": 0}, {"least": 1.0}, {"least": -0.1}, {"tokens": 0}])
def test_values_that_make_no_sense_are_refused(bad):
    (name,) = bad
    with pytest.raises(InputError, match=f"^{name}="):
        Clipping(**bad)


ASKED = {"symmetric": ("quant=int4_g128",), "zero points": ("quant=int4_g128", "quant.symmetric=false")}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ASKED)
def test_a_run_clips_what_its_layers_names_allow(compose, tmp_path, backend, kind):
    """Of three layers the second is skipped; `verify` holds codes and steps before the clipped weights."""
    with h5py.File(tmp_path / "a.h5", "w") as file:
        for index, name in enumerate(("mlp.up", "attn.q_proj", "attn.o_proj")):
            w, _, x = layer(12, 40, 60)
            group = file.create_group(f"layers/{index:03d}")
            group.attrs["name"] = name
            group["weight"], group["activations"] = w, x
    given = ("inputs=file", f"inputs.path={tmp_path / 'a.h5'}", "clip=groups", "quant.group_size=16", "timing=once")
    spec = spec_of(compose(*ASKED[kind], *given, "verify=true"))
    with make_backend(backend, spec.tile, spec.convention.quantizer, **spec.variants) as machine:
        pipeline = Pipeline(machine, spec)
        pipeline.run()
    assert pipeline.timings.stages[2] == "clip_weights"
    for found, plan in zip(pipeline.layers, spec.layers, strict=True):
        if "q_" in plan.name:
            assert found.clipped is None
            assert "unclipped_output_mse" not in found.metrics
            continue
        again = find_ratios(
            plan.weight, found.search.s, plan.activations, spec.convention.quantizer, Clipping().ratios
        ).everywhere
        assert np.array_equal(found.clipped.ratio, again.ratio)
        assert found.verify["clipped"] <= 1e-6
        assert found.metrics["output_mse"] < found.metrics["unclipped_output_mse"]
        assert 0 < found.lost.clipped < found.lost.by_row.sum()
        # With clipping switched off the codes are those that the unclipped error is of.
        alone = replace(spec, convention=replace(spec.convention, clip=None))
        with make_backend(backend, spec.tile, spec.convention.quantizer, **spec.variants) as machine:
            other = Pipeline(machine, alone)
            other.run()
        same = next(each for each in other.layers if each.name == found.name)
        assert same.metrics["output_mse"] == pytest.approx(found.metrics["unclipped_output_mse"], rel=1e-6)


def test_explain_tells_what_clipping_did(tmp_path):
    asked = ("clip=groups", "quant=int4_g128", "quant.group_size=16")
    path = make_run(tmp_path, "n=64", "layers=1", "inputs=outliers", *asked)
    lines = list(explain(path, "0", 1))
    (at,) = [at for at, line in enumerate(lines) if line.startswith("clipping: ")]
    with h5py.File(path) as file:
        group = file["layers/000"]
        lost = group["lost"]
        share = 100 * lost.attrs["clipped"] / lost["by_row"][()].sum()
        ratio = group["clip/ratio"][()]
        without = group["metrics"].attrs["unclipped_output_sqnr_db"]
        assert group["clip/tried"][()].tolist() == Clipping().ratios.tolist()
        assert group["clip"].attrs["error_chosen"] <= group["clip/error"][()].min()
    kept = f"{100 * (ratio < 1).mean():.1f} % of the groups are clipped"
    assert lines[at] == f"clipping: {kept}; without it {without:.2f} dB"
    assert lines[at + 1] == f"  clipped weights hold {share:.1f} % of the error, rounded ones {100 - share:.1f} %"
