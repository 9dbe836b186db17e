"""What layers cost, predicted from their file: shares of the residual stream by hand, and what is held against them."""

import h5py
import numpy as np
import pytest
from evaluation_studies import study

from awq_pycuda import analyze
from awq_pycuda.analysis.prediction import NATS, predict, shares_of_stream
from awq_pycuda.errors import InputError
from awq_pycuda.results.evaluation_write import write_evaluation

# By part of a block: (out_features, in_features), and the part whose input it sees, too.
BLOCK = {
    "self_attn.q_proj": ((8, 8), None),
    "self_attn.k_proj": ((8, 8), "self_attn.q_proj"),
    "self_attn.o_proj": ((8, 8), None),
    "mlp.up_proj": ((6, 8), None),
    "mlp.down_proj": ((8, 6), None),
}


def write_layers(path, bias=False, tokens=5):
    """A layer file of two blocks; returns weight, activations and bias of each layer by name."""
    rng = np.random.default_rng(0)
    made, numbers = {}, {}
    with h5py.File(path, "w") as file:
        for block in range(2):
            for part, (shape, like) in BLOCK.items():
                name = f"model.layers.{block}.{part}"
                numbers[name] = f"{len(numbers):03}"
                group = file.create_group(f"layers/{numbers[name]}")
                group.attrs["name"] = name
                weight = group["weight"] = rng.standard_normal(shape, np.float32)
                x = rng.standard_normal((tokens, shape[1]), np.float32)
                if like:
                    group.attrs["activations_of"] = numbers[f"model.layers.{block}.{like}"]
                else:
                    group["activations"] = x
                if bias:
                    group["bias"] = rng.standard_normal(shape[0], np.float32)
                made[name] = weight, x, group["bias"][()] if bias else 0
    return made


@pytest.mark.parametrize("bias", [False, True])
def test_a_layers_share_is_that_of_the_output_it_goes_into_of_all_that_was_written_so_far(tmp_path, bias):
    made = write_layers(tmp_path / "layers.h5", bias)
    shares = shares_of_stream(tmp_path / "layers.h5")
    assert list(shares) == list(made)
    stream = 0
    for block in range(2):
        for writes, fed in (("self_attn.o_proj", ("q", "k", "o")), ("mlp.down_proj", ("up", "down"))):
            weight, x, shift = (np.asarray(each, np.float64) for each in made[f"model.layers.{block}.{writes}"])
            written = np.array([[row @ channel for channel in weight] for row in x]) + shift
            stream = stream + written
            expected = np.mean([(one @ one) / (all_ @ all_) for one, all_ in zip(written, stream, strict=True)])
            for name in fed:
                path = f"model.layers.{block}.{writes.split('.')[0]}.{name}_proj"
                assert shares[path] == pytest.approx(expected, rel=1e-5)
    assert shares["model.layers.0.self_attn.q_proj"] == 1  # nothing was written before


def test_a_prediction_is_error_times_share_beside_what_was_measured(tmp_path, capsys):
    write_layers(tmp_path / "layers.h5")
    record = study(alone="rtn_int4")
    write_evaluation(tmp_path / "evaluation.h5", record)
    found = {each.recipe: each for each in predict(tmp_path / "layers.h5", [tmp_path])}
    assert list(found) == [recipe.name for recipe in record.recipes[1:]]
    shares = shares_of_stream(tmp_path / "layers.h5")
    for recipe in record.recipes[1:]:
        one = found[recipe.name]
        expected = [
            NATS * 10 ** (-decibels / 10) * shares[name]
            for name, decibels in zip(record.layers.name, recipe.of_layers.output_sqnr_db, strict=True)
        ]
        np.testing.assert_allclose(one.costs, expected, rtol=1e-12)
        assert one.kl == recipe.kl.value
        assert np.isnan(one.alone).all() == (recipe.name != "rtn_int4")
    assert analyze.main(["predict", str(tmp_path / "layers.h5"), str(tmp_path), "top=2"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "recipe: KL predicted, KL measured"
    cheapest = min(found.values(), key=lambda one: one.costs.sum())
    assert printed[1] == f"  {cheapest.recipe}: {cheapest.costs.sum():.4g}, {cheapest.kl:.4g}"
    assert printed[8].startswith("rank correlation over 7 recipes: ")
    assert printed[9].startswith("rtn_int4, rank correlation over its layers tried alone: ")
    assert printed[9].endswith("of the stream's error behind their blocks: 1.00")  # as it was made up
    tried = found["rtn_int4"]
    costliest = int(tried.costs.argmax())
    assert printed[11] == f"  {tried.layers[costliest]}: {tried.costs[costliest]:.4g}, {tried.alone[costliest]:.4g}"
    assert len(printed) == 13


def test_a_layer_without_an_error_costs_nothing(tmp_path):
    write_layers(tmp_path / "layers.h5")
    record = study()
    record.recipes[1].of_layers.output_sqnr_db[:2] = np.inf, np.nan
    write_evaluation(tmp_path / "evaluation.h5", record)
    assert predict(tmp_path / "layers.h5", [tmp_path])[0].costs[:2].tolist() == [0.0, 0.0]


def test_layer_files_and_results_that_do_not_fit_are_refused(tmp_path, capsys):
    path = tmp_path / "layers.h5"
    write_layers(path)
    with h5py.File(path, "a") as file:
        del file["layers/003/activations"]
        file["layers/003/activations"] = np.ones((4, 8), np.float32)
    with pytest.raises(InputError, match=r"layer 3 \(.*up_proj\) has other tokens than the first layer; allowed"):
        shares_of_stream(path)
    with h5py.File(path, "a") as file:
        del file["layers/003/activations"]
    with pytest.raises(InputError, match=r"layer 3 \(.*up_proj\) has no activations; allowed"):
        shares_of_stream(path)
    with h5py.File(path, "w") as file:
        file["layers/000/weight"], file["layers/000/activations"] = np.ones((3, 4)), np.ones((2, 4))
    with pytest.raises(InputError):
        shares_of_stream(path)
    write_layers(path)
    write_evaluation(tmp_path / "evaluation.h5", study(blocks=3))
    assert analyze.main(["predict", str(path), str(tmp_path)]) == 2
    assert "its layer model.layers.2.self_attn.q_proj is not in the layer file" in capsys.readouterr().err
    assert analyze.main(["predict", str(path)]) == 2
    assert capsys.readouterr().err.startswith("error: predict: 1 paths; allowed: a file of layers, then ")
