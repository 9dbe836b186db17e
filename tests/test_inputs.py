"""The plan of the layers: shapes, sources, and the file behind them."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from conftest import ROOT

from awq_pycuda.errors import InputError
from awq_pycuda.layers import inputs
from awq_pycuda.layers.inputs import LayerSpec, Salient, Uniform, file_sha256, plan_layers
from awq_pycuda.sweeps import worker
from awq_pycuda.sweeps.messages import Job


def save(path, **tensors):
    np.savez(path, **{name.replace("__", "."): np.asarray(values, np.float32) for name, values in tensors.items()})


@pytest.mark.parametrize("weight", [np.ones((5, 3), np.float32), Uniform(5, 3, 0, 0)], ids=["array", "uniform"])
def test_a_layer_s_features_are_those_of_its_weight(weight):
    spec = LayerSpec("a", 7, weight, None)
    assert (spec.out_features, spec.in_features) == (5, 3)


@pytest.mark.parametrize(("overrides", "tokens"), [((), 11), (("tokens=4",), 4)])
def test_a_file_without_activations_gets_tokens_or_n_of_them(compose, tmp_path, overrides, tokens):
    save(tmp_path / "a.npz", **{"000__weight": np.ones((5, 3)), "001__weight": np.ones((2, 5))})
    config = compose("inputs=file", f"inputs.path={tmp_path / 'a.npz'}", "n=11", "seed=6", *overrides)
    first, second = plan_layers(config)
    assert (first.tokens, second.tokens) == (tokens, tokens)
    assert first.activations == Uniform(tokens, 3, 6, 0)
    assert second.activations is None


@pytest.mark.parametrize(("holdout", "kept"), [(0, 8), (0.25, 6), (0.3, 6), (0.9, 1)])
def test_the_last_tokens_of_a_file_are_held_out(compose, tmp_path, holdout, kept):
    x = np.arange(24.0).reshape(8, 3)
    save(tmp_path / "a.npz", **{"000__weight": np.ones((5, 3)), "000__activations": x, "001__weight": np.ones((2, 5))})
    given = ("inputs=file", f"inputs.path={tmp_path / 'a.npz'}", f"inputs.holdout={holdout}")
    first, second = plan_layers(compose(*given))
    assert np.array_equal(first.activations, x[:kept])
    assert [(spec.tokens, spec.held_out_tokens) for spec in (first, second)] == [(kept, 8 - kept)] * 2
    assert second.held_out is None
    assert first.held_out is None if holdout == 0 else np.array_equal(first.held_out, x[kept:])


def test_held_out_tokens_are_drawn_apart(compose):
    given = ("n=4", "tokens=10", "layers=2", "seed=9", "inputs=outliers", "inputs.holdout=0.2")
    first, second = plan_layers(compose(*given))
    salient = Salient(9, 0, 0.01, 10, 100)
    assert first.activations == Uniform(8, 4, 9, 0, 1, None, salient)
    assert first.held_out == Uniform(2, 4, 9, 2**33, 1, None, salient)
    assert (second.held_out, second.held_out_tokens) == (None, 2)


@pytest.mark.parametrize(("holdout", "held_out"), [(0.01, 0), (0.99, 8)])
def test_a_share_that_leaves_a_layer_no_token_is_refused(compose, tmp_path, holdout, held_out):
    save(tmp_path / "a.npz", **{"000__weight": np.ones((5, 3)), "000__activations": np.ones((8, 3))})
    config = compose("inputs=file", f"inputs.path={tmp_path / 'a.npz'}", f"inputs.holdout={holdout}")
    with pytest.raises(InputError) as refused:
        plan_layers(config)
    told = f"of 8 tokens of layer 000 that is {held_out}; allowed: a share of the tokens, from 0 to below 1"
    assert str(refused.value) == f"inputs.holdout={holdout}: {told}"


def test_a_layer_with_activations_sets_the_tokens_of_those_that_follow(compose, tmp_path):
    tensors = {"000__weight": np.ones((5, 3)), "000__activations": np.ones((6, 3)), "001__weight": np.ones((2, 5))}
    tensors |= {"002__weight": np.ones((4, 8)), "002__activations": np.ones((9, 8)), "003__weight": np.ones((1, 4))}
    save(tmp_path / "a.npz", **tensors)
    specs = plan_layers(compose("inputs=file", f"inputs.path={tmp_path / 'a.npz'}"))
    assert [spec.tokens for spec in specs] == [6, 6, 9, 9]
    assert [spec.activations is None for spec in specs] == [False, True, False, True]
    assert [(spec.out_features, spec.in_features) for spec in specs] == [(5, 3), (2, 5), (4, 8), (1, 4)]


@pytest.mark.parametrize(("held", "refused"), [(1000, False), (1001, True)])
def test_a_file_of_more_layers_than_results_can_name_is_refused(compose, tmp_path, held, refused):
    save(tmp_path / "a.npz", **{f"{index:04d}__weight": [[1]] for index in range(held)})
    source = ("inputs=file", f"inputs.path={tmp_path / 'a.npz'}")
    if refused:
        with pytest.raises(InputError, match=r"^layers=null: inputs\.path=.* holds 1001 layers; allowed: "):
            plan_layers(compose(*source))
    else:
        assert len(plan_layers(compose(*source))) == held
    assert len(plan_layers(compose(*source, "layers=1"))) == 1


def test_a_run_names_the_layers_with_fewer_tokens_than_asked_for(cli, tmp_path):
    path = tmp_path / "a.npz"
    rows = {"000": 9, "001": 2, "003": 5}
    weights = {f"{index:03d}__weight": np.ones((4, 4)) for index in range(4)}
    save(path, **weights, **{f"{name}__activations": np.ones((count, 4)) for name, count in rows.items()})
    code, out, err = cli("inputs=file", f"inputs.path={path}", "tokens=6", "backend=cpu")
    assert (code, err) == (0, "")
    assert "fewer than tokens=6: 001 (2), 003 (5)" in out.splitlines()
    with h5py.File(*tmp_path.rglob("results.h5")) as file:
        assert [int(layer.attrs["tokens"]) for layer in file["layers"].values()] == [6, 2, 2, 5]
    assert "fewer than" not in cli("inputs=file", f"inputs.path={path}", "tokens=2", "backend=cpu")[1]


def test_synthetic_layers_draw_from_subsequences_of_their_own(compose):
    config = compose("n=4", "tokens=3", "layers=2", "seed=9", "inputs=outliers", "inputs.weight_scale=he")
    salient = [Salient(9, layer, 0.01, 10, 100) for layer in range(2)]
    bound = (6 / 4) ** 0.5
    assert plan_layers(config) == [
        LayerSpec("000", 3, Uniform(4, 4, 9, 1, bound, salient[1]), Uniform(3, 4, 9, 0, 1, None, salient[0])),
        LayerSpec("001", 3, Uniform(4, 4, 9, 2, bound), None),
    ]


def test_salient_channels_draw_apart_from_x_and_weights(monkeypatch):
    drawn = []

    def uniform(seed, subsequence, count):
        drawn.append((seed, subsequence, count))
        return np.linspace(0.1, 1, count, dtype=np.float32)

    monkeypatch.setattr(inputs.philox, "uniform", uniform)
    gains = Salient(5, 3, 0.25, 2.0, 32.0).gains(8)
    assert drawn == [(5, 2**32 + 3, 16)]
    # The lowest two of the first eight are chosen; their factors come from the ninth and tenth.
    exponents = np.linspace(0.1, 1, 16, dtype=np.float32)[8:10]
    np.testing.assert_allclose(gains, [*(2 * 16**exponents), *[1] * 6], rtol=1e-6)


def test_gains_are_none_where_all_are_1():
    plain = Uniform(3, 2, 0, 0)
    assert plain.row_gain() is plain.col_gain() is None
    assert Uniform(3, 2, 0, 0, bound=0.5).row_gain().tolist() == [0.5] * 3
    salient = Salient(0, 1, 0.5, 4, 4)
    both = Uniform(3, 2, 0, 0, 0.5, salient, salient)
    assert both.row_gain().tolist() == (salient.gains(3) / 2).tolist()
    assert both.col_gain().tolist() == salient.gains(2).tolist()


@pytest.mark.parametrize("damaged", [False, True])
def test_a_damaged_file_that_hdf5_finds_no_end_of_is_refused(tmp_path, damaged):
    """Zeros in its strings, as a power cut leaves them. In a process of its own, which would hang otherwise."""
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file["layers/000/weight"] = np.ones((4, 4), np.float32)
        file["layers/000"].attrs["name"] = "a name"
    content = bytearray(path.read_bytes())
    begin = content.index(b"GCOL") + 16
    content[begin : begin + 4080] = bytes(4080 if damaged else 0) or content[begin : begin + 4080]
    path.write_bytes(content)
    command = [sys.executable, "-m", "awq_pycuda.run", "inputs=file", f"inputs.path={path}", "backend=cpu", "n=4"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=60, check=False, cwd=tmp_path, env=environment
    )
    if not damaged:
        assert (done.returncode, done.stderr) == (0, "")
        return
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: inputs.path={path}: damaged HDF5 file: ")


# --- a file that changes meanwhile --------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["size", "time"])
def test_a_changed_file_is_read_again(compose, tmp_path, what):
    """By its size where the time is the same, by its time where the size is."""
    path = tmp_path / "a.npz"
    config = compose("inputs=file", f"inputs.path={path}")
    seen = []
    for value, rows in ((1, 2), (2, 2 if what == "time" else 3)):
        save(path, **{"000__weight": np.full((rows, 2), value)})
        os.utime(path, ns=(0, value if what == "time" else 0))
        (spec,) = plan_layers(config)
        seen.append((spec.weight.shape[0], spec.weight[0, 0], file_sha256(path)))
        assert seen[-1][2] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert [row[:2] for row in seen] == [(2, 1), (2 if what == "time" else 3, 2)]
    assert seen[0][2] != seen[1][2]


def test_a_file_is_read_once_for_many_runs(compose, monkeypatch, tmp_path):
    path = tmp_path / "a.npz"
    save(path, **{"000__weight": np.ones((2, 2))})
    config = compose("inputs=file", f"inputs.path={path}")
    reads = []
    load = inputs.load_layers
    monkeypatch.setattr(inputs, "load_layers", lambda *asked: reads.append(asked) or load(*asked))
    assert plan_layers(config)[0].weight is plan_layers(config)[0].weight
    assert len(reads) == 1
    assert plan_layers(compose("inputs=file", f"inputs.path={path}", "layers=1"))
    assert len(reads) == 2


def test_a_job_whose_file_is_replaced_once_it_was_read_is_refused(compose, monkeypatch, tmp_path):
    """The folder would be that of the new file, the results in it those of the old one."""
    path = tmp_path / "a.npz"
    save(path, **{"000__weight": np.ones((2, 2))})
    monkeypatch.chdir(tmp_path)
    config = compose("inputs=file", f"inputs.path={path}", "backend=cpu", "n=4")
    job = Job(config, tmp_path, Path("study"), [], "")
    validate = worker.validate

    def replace(config):
        validated = validate(config)
        save(tmp_path / "b.npz", **{"000__weight": np.zeros((2, 2))})
        os.replace(tmp_path / "b.npz", path)
        return validated

    with monkeypatch.context() as patch:
        patch.setattr(worker, "validate", replace)
        outcome = worker.run_job(job, lambda started: None).outcome
    assert (outcome.state, outcome.folder) == ("failed", None)
    assert outcome.reason.startswith(f"inputs.path={path}: it changed while it was read; allowed: ")
    assert not (tmp_path / "study").exists()
    assert worker.run_job(job, lambda started: None).outcome.state == "complete"
