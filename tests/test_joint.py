"""Scales searched jointly with clipping: against every candidate and every ratio tried one by one, in float64."""

import h5py
import numpy as np
import pytest
from conftest import BACKENDS, make_backend
from result_files import make_run
from test_clipping import plainly

from awq_pycuda.analysis.explain import explain
from awq_pycuda.backends.choose import no_device_search
from awq_pycuda.choices import Element, Objective, StepDtype
from awq_pycuda.engine.arrays import allocate
from awq_pycuda.engine.pipeline import Pipeline
from awq_pycuda.engine.spec import spec_of
from awq_pycuda.parallel import use_threads
from awq_pycuda.quant.clipping import Clipping
from awq_pycuda.quant.conventions import Convention
from awq_pycuda.quant.format import Format
from awq_pycuda.quant.joint import search_jointly
from awq_pycuda.quant.quantized import Quantized, dequantize, quantize, steps_of
from awq_pycuda.quant.search import candidates

RANDOM = np.random.default_rng(7)
NVFP4 = Format(16, 4, Element.e2m1, step_dtype=StepDtype.e4m3)
FORMATS = [Format(None, 4), Format(16, 3), Format(13, 4, symmetric=False, include_zero=False, least_range=1e-5), NVFP4]


def layer(rows=10, channels=40, tokens=24):
    w = RANDOM.standard_t(3, (rows, channels)).astype(np.float32)
    x = (RANDOM.normal(size=(tokens, channels)) * RANDOM.lognormal(0, 1, channels)).astype(np.float32)
    return w, x


def asked(form, objective, **fields):
    return Convention(quantizer=form, objective=objective, clip=Clipping(joint=True), **fields)


def searched(convention, w, x):
    scales = candidates(convention, np.abs(x).mean(axis=0))
    return scales, search_jointly(convention, [(w, True)], scales, x, np.square(x).mean(axis=0))


def of_rows(w, x, s, form, objective, limits):
    """(N,) float64: each row's part of the objective, of weights held to these (N, K) limits."""
    held = (w * s).clip(-limits, limits)
    steps = steps_of(held, np.ones_like(s), form)
    stored = Quantized(format=form, **steps.arrays, codes=np.empty(w.shape, np.int8))
    quantize(held, np.ones_like(s), stored)
    off = dequantize(stored, 1 / s.astype(np.float64), np.float64) - w
    if objective is Objective.diag:
        return off**2 @ np.square(x.astype(np.float64)).mean(axis=0)
    return np.square(x.astype(np.float64) @ off.T).mean(axis=0) / len(w)


def limits_of(scaled, ratio, form):
    """(N, K) limits of the weights of groups held to these (N, groups) ratios."""
    channels = scaled.shape[1]
    size = form.size(channels)
    peaks = np.maximum.reduceat(np.abs(scaled), np.arange(0, channels, size), axis=1)
    return np.repeat(peaks * ratio, size, axis=1)[:, :channels]


@pytest.mark.parametrize("form", FORMATS[:3], ids=lambda form: f"{form.group_size} {form.bits}")
@pytest.mark.parametrize("objective", Objective)
def test_every_candidate_is_judged_by_the_weights_that_it_would_be_stored_as(form, objective):
    w, x = layer()
    convention = asked(form, objective)
    scales, found = searched(convention, w, x)
    tried = Clipping().ratios.astype(np.float32)
    errors, kept = [], []
    for s in scales:
        ratio = tried[plainly(w, s, x, form, tried).argmin(axis=2)]
        clipped = of_rows(w, x, s, form, objective, limits_of(w * s, ratio, form))
        without = of_rows(w, x, s, form, objective, np.inf)
        errors.append((np.minimum(clipped, without).sum(), without.sum(), clipped.sum()))
        kept.append(np.where((clipped < without)[:, None], ratio, 1))
    joint, unclipped, everywhere = np.transpose(errors)
    assert found.error == pytest.approx(joint, rel=1e-4)
    assert found.unclipped == pytest.approx(unclipped, rel=1e-4)
    assert found.error.argmin() == joint.argmin()
    assert np.array_equal(found.clipped[0].ratio, kept[joint.argmin()])
    # Some rows are better off unclipped, but where ratios are chosen by the very errors that candidates are.
    assert (joint < everywhere).any() == (form.group_size is not None or objective is Objective.diag)
    assert joint.min() <= everywhere[unclipped.argmin()]  # what clipping after the search would leave


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: f"{form.group_size} {form.bits} {form.element.name}")
@pytest.mark.parametrize("objective", Objective)
def test_the_chosen_error_is_that_of_the_codes_and_no_candidate_loses_by_clipping(form, objective):
    w, x = layer(24, 48, 40)
    scales, found = searched(asked(form, objective), w, x)
    s, ratio = scales[found.error.argmin()], found.clipped[0].ratio
    assert found.error.min() == pytest.approx(
        of_rows(w, x, s, form, objective, limits_of(w * s, ratio, form)).sum(), rel=1e-4
    )
    assert (found.error <= found.unclipped).all()
    assert found.error.min() < found.unclipped.min()
    assert 0 < (ratio < 1).mean() < 1


def test_the_kernels_leave_it_to_the_host():
    assert no_device_search(Convention(clip=Clipping()), shares=True) is None
    why = "its kernels clip no weights, as clip.joint=true asks of each candidate"
    assert no_device_search(Convention(clip=Clipping(joint=True)), shares=False) == why


def test_threads_do_not_change_a_bit():
    w, x = layer(300, 200, 30)
    found = []
    for threads in (1, 3):
        with use_threads(threads):
            found.append(searched(asked(Format(64, 4), Objective.output, gammas=(0.0, 0.5)), w, x)[1])
    assert found[0].error.tolist() == found[1].error.tolist()
    assert np.array_equal(found[0].clipped[0].ratio, found[1].clipped[0].ratio)


def test_a_candidate_that_overflows_is_not_chosen():
    w, x = layer()
    scales = np.ones((3, 40), np.float32)
    scales[0] = 1e38
    found = search_jointly(
        asked(Format(16, 4), Objective.diag, gammas=(0.0, 0.5, 1.0)), [(w, True)], scales, x, np.square(x).mean(axis=0)
    )
    assert found.error[0] == found.unclipped[0] == np.inf
    assert found.error.argmin() == 1


@pytest.fixture
def file(tmp_path):
    """A layer file of three layers, of which the second is not clipped."""
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as made:
        for index, name in enumerate(("mlp.up", "attn.q_proj", "attn.o_proj")):
            group = made.create_group(f"layers/{index:03d}")
            group.attrs["name"] = name
            group["weight"], group["activations"] = layer(12, 40, 60)
    return path


def finished(compose, file, backend, *overrides):
    given = ("inputs=file", f"inputs.path={file}", "quant.bits=4", "quant.group_size=16", "timing=once", "verify=true")
    spec = spec_of(compose(*given, *overrides))
    with make_backend(backend, spec.tile, spec.convention.quantizer, search_on_host=True, **spec.variants) as machine:
        pipeline = Pipeline(machine, spec)
        pipeline.run()
    return pipeline.layers


def test_kernels_do_not_take_a_joint_search_for_a_plain_one(compose, file):
    """Of shares that nobody has written the weights would be held to whatever there is: to 0, most often."""
    spec = spec_of(compose("inputs=file", f"inputs.path={file}", "quant.group_size=16", "clip=joint"))
    with make_backend("host", spec.tile, spec.convention.quantizer, **spec.variants) as machine:
        clipped, *_ = allocate(machine, spec.layers, spec.convention).layers
        with pytest.raises(ValueError, match="no kernel searches scales jointly with clipping: search on the host"):
            machine.compute_s(clipped, spec.convention)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("objective", Objective, ids=lambda objective: objective.name)
def test_a_run_leaves_no_more_error_than_with_clipping_after_the_search(compose, file, backend, objective):
    """Nor than without; what is skipped stays as it is, and RTN is that of unclipped weights."""
    by = f"search={objective.name}"
    joint, separate = (finished(compose, file, backend, by, f"clip={name}") for name in ("joint", "groups"))
    for found, other in zip(joint, separate, strict=True):
        assert found.metrics["rtn_output_mse"] == other.metrics["rtn_output_mse"]
        if "q_" in found.name:
            assert found.clipped is found.search.unclipped is None
            assert found.metrics == other.metrics
            continue
        assert found.search.unclipped == pytest.approx(other.search.error, rel=1e-4)
        assert found.search.error_rtn == pytest.approx(other.search.error_rtn, rel=1e-4)
        assert found.search.error_chosen <= found.search.error_rtn
        assert 0 < found.lost.clipped < found.lost.by_row.sum()
        if objective is Objective.output:
            assert found.search.error_chosen == pytest.approx(found.metrics["output_mse"], rel=1e-4)
            of_separate = [other.metrics[name] for name in ("output_mse", "unclipped_output_mse")]
            assert found.metrics["output_mse"] <= of_separate[0] * (1 + 1e-5)
            assert of_separate[0] < of_separate[1]
        else:
            assert found.lost.by_row.sum() == pytest.approx(found.search.error_chosen, rel=1e-4)
            assert found.lost.by_row.sum() <= other.lost.by_row.sum() * (1 + 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("objective", Objective, ids=lambda objective: objective.name)
def test_layers_that_share_s_are_judged_together(compose, file, backend, objective):
    """Query and key, which are not clipped, and value, which is: by the error of all of their outputs."""
    with h5py.File(file, "r+") as opened:
        for index, name in enumerate(("q_proj", "k_proj", "v_proj")):
            group = opened[f"layers/{index:03d}"]
            group.attrs["name"] = name
            if index:
                del group["activations"]
                group.attrs["activations_of"] = "000"
    asked = (f"search={objective.name}", "share=inputs")
    joint = finished(compose, file, backend, *asked, "clip=joint")
    separate = finished(compose, file, backend, *asked, "clip=groups")
    assert [found.clipped is None for found in joint] == [True, True, False]
    first = joint[0].search
    for found in joint[1:]:
        assert found.search.error.tolist() == first.error.tolist()
        assert found.search.unclipped.tolist() == first.unclipped.tolist()
    assert first.unclipped == pytest.approx(separate[0].search.error, rel=1e-4)
    assert (first.error < first.unclipped).all()
    diag, output = sum(found.lost.by_row.sum() for found in joint), [found.metrics["output_mse"] for found in joint]
    by_output = objective is Objective.output
    assert first.error_chosen == pytest.approx(np.mean(output) if by_output else diag, rel=1e-4)


def test_nothing_is_chosen_by_held_out_tokens(compose, file):
    """Other tokens there, another error on them: all else stays."""
    asked = ("clip=joint", "inputs.holdout=0.25")
    before = finished(compose, file, "cpu", *asked)
    with h5py.File(file, "r+") as opened:
        for group in opened["layers"].values():
            group["activations"][45:] *= -3
    after = finished(compose, file, "cpu", *asked)
    for one, other in zip(before, after, strict=True):
        assert one.search.error.tolist() == other.search.error.tolist()
        assert one.search.s.tolist() == other.search.s.tolist()
        assert one.metrics["output_mse"] == other.metrics["output_mse"]
        assert one.metrics["held_out_output_mse"] != other.metrics["held_out_output_mse"]


def test_a_file_has_both_curves_and_explain_shows_them(tmp_path):
    path = make_run(tmp_path, "n=64", "layers=1", "clip=joint", "quant=int4_g128", "quant.group_size=16")
    with h5py.File(path) as file:
        search = file["layers/000/search"]
        error, unclipped = search["error"][()], search["unclipped_error"][()]
        assert (error < unclipped).all()
        assert search.attrs["error_rtn"] == unclipped[0]
        assert search.attrs["error_chosen"] == error.min()
    (line,) = [line for line in explain(path, "0", 1) if "without clipping gamma" in line]
    assert f"without clipping gamma {unclipped.argmin() / 4:g}: " in line


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["clip.joint=true"], "clip.joint=true: clip.enabled=false; allowed: true where weights are clipped, false"),
        (["clip=joint", "clip.joint=maybe"], "clip.joint=maybe: allowed: true where weights are clipped, false"),
        (["clip=jointly"], "clip=jointly: no such option; allowed: default, groups, joint, none"),
    ],
)
def test_what_cannot_be_joint_is_one_line(cli, given, told):
    code, _, err = cli(*given)
    assert code == 2
    assert err.splitlines() == [f"error: {told}"]
