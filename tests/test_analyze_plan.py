"""Mixed-bit plans: costs of layers measured and scaled, the recipes written, and what is refused."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import yaml
from evaluation_studies import RECIPES, study

from awq_pycuda import analyze
from awq_pycuda.analysis.layer_costs import NATS, layer_costs
from awq_pycuda.analysis.plan import overrides
from awq_pycuda.config import settled
from awq_pycuda.config_text import as_yaml, config_hash
from awq_pycuda.evaluating.recipes import parse
from awq_pycuda.results.evaluation_write import write_evaluation


@pytest.fixture
def tried(tmp_path):
    """An evaluation whose layers were tried alone under `rtn_int4`."""
    folder = tmp_path / "tried"
    folder.mkdir()
    write_evaluation(folder / "evaluation.h5", study(alone="rtn_int4"))
    return folder


def run(*arguments):
    return analyze.main(["plan", *map(str, arguments)])


def test_a_recipe_that_was_not_tried_alone_is_scaled_by_the_power_of_its_layers_errors(tmp_path):
    record = study(alone="rtn_int4")
    costs = layer_costs([(tmp_path, record)])
    assert costs.names == [name for name in RECIPES if name != "plan"]
    tried, other = costs.names.index("rtn_int4"), costs.names.index("awq_int4")
    measured = (record.alone.kl * record.windows.tokens).sum(axis=1) / record.windows.tokens.sum()
    np.testing.assert_allclose(costs.costs[tried], measured, rtol=1e-12)
    by_name = {recipe.name: recipe.of_layers.output_sqnr_db for recipe in record.recipes}
    more_db = by_name["awq_int4"] - by_name["rtn_int4"]
    np.testing.assert_allclose(costs.costs[other], measured / 10 ** (more_db / 10), rtol=1e-12)
    assert list(costs.sources) == ["measured" if index == tried else "scaled" for index in range(len(costs.names))]


def test_of_two_recipes_tried_alone_the_nearer_error_is_scaled_and_no_error_costs_nothing(tmp_path):
    near, far = study(alone="rtn_int4"), study(alone="rtn_int8")
    silent = near.recipes[1].of_layers.output_sqnr_db
    silent[0], silent[1] = np.inf, np.nan
    costs = layer_costs([(tmp_path, near), (tmp_path, far)])
    low, high, scaled = (costs.names.index(name) for name in ("rtn_int4", "rtn_int8", "awq_int4"))
    assert costs.costs[scaled, :2].tolist() == [0.0, 0.0]
    for layer in range(2, len(costs.layers)):
        distance = {one: abs(np.log(costs.errors[one, layer] / costs.errors[scaled, layer])) for one in (low, high)}
        base = min(distance, key=distance.get)
        expected = costs.costs[base, layer] * costs.errors[scaled, layer] / costs.errors[base, layer]
        assert costs.costs[scaled, layer] == pytest.approx(expected, rel=1e-12)


def test_the_plan_is_within_its_size_costs_least_and_is_written_as_recipes(tried, tmp_path, capsys):
    out = tmp_path / "plan.yaml"
    assert run(tried, "size=5.2", "among=rtn_int4,rtn_int8", "name=mixed", f"out={out}") == 0
    printed = capsys.readouterr().out
    recipes = yaml.safe_load(out.read_text(encoding="utf-8"))
    assert list(recipes) == ["rtn_int4", "rtn_int8", "mixed"]
    layers = recipes["mixed"]["layers"]
    costs = layer_costs([(tried, study(alone="rtn_int4"))])
    assert list(layers) == list(costs.layers)
    bits = [RECIPES[name][1] for name in layers.values()]
    assert np.mean(bits) == 4.125 + 2 / 8 * (8.06 - 4.125)  # all layers have as many weights
    assert set(layers.values()) == {"rtn_int4", "rtn_int8"}
    saved = costs.costs[costs.names.index("rtn_int4")] - costs.costs[costs.names.index("rtn_int8")]
    assert layers[costs.layers[int(saved.argmax())]] == "rtn_int8"
    assert f"mixed: {np.mean(bits):.4g} bits of a weight (up to 5.2)" in printed
    assert "rtn_int4 (costs measured)" in printed
    assert "rtn_int8 (costs scaled by output errors)" in printed
    assert re.search(r"rtn_nvfp4: 4.5, \S+, 0\.\d+", printed)


def test_a_recipe_as_the_size_is_written_beside_the_plan_of_its_size(tried, tmp_path):
    out = tmp_path / "plan.yaml"
    assert run(tried, "size=rtn_nvfp4", "among=rtn_int4,rtn_int8", f"out={out}") == 0
    recipes = yaml.safe_load(out.read_text(encoding="utf-8"))
    assert list(recipes) == ["rtn_int4", "rtn_nvfp4", "plan"]  # a layer at 8 bits would already be too much
    assert recipes["rtn_nvfp4"] == ["quant.element=fp4", "quant.group_size=16", "quant.step_dtype=e4m3", "gammas=[0]"]


def test_names_that_no_file_of_recipes_takes_are_written_so_that_it_does(tmp_path):
    record = study(alone="rtn_int4")
    named = [replace(one, name=one.name.replace("rtn_", "gammas=[0] ")) for one in record.recipes]
    write_evaluation(tmp_path / "evaluation.h5", replace(record, recipes=named))
    out = tmp_path / "plan.yaml"
    assert run(tmp_path, "size=gammas=[0] int8", f"out={out}") == 0
    recipes = yaml.safe_load(out.read_text(encoding="utf-8"))
    assert "gammas_0_int8" in recipes
    assert set(recipes["plan"]["layers"].values()) <= set(recipes)


def test_several_sizes_are_several_plans_of_one_file(tried, tmp_path):
    out = tmp_path / "plans.yaml"
    assert run(tried, "size=4.7,rtn_int8", "among=rtn_int4,rtn_int8", f"out={out}") == 0
    recipes = yaml.safe_load(out.read_text(encoding="utf-8"))
    assert list(recipes) == ["rtn_int4", "rtn_int8", "plan_4.7", "plan_rtn_int8"]
    taken = [sorted(recipes[name]["layers"].values()).count("rtn_int8") for name in ("plan_4.7", "plan_rtn_int8")]
    assert taken == [1, 8]


def test_the_overrides_written_hold_what_makes_the_quantization_and_nothing_of_the_machine():
    config = """\
    tokens: 512
    gammas: [0.0, 0.5]
    threads: 2
    convention: day58
    quant: {bits: 4, group_size: null, element: int}
    clip: {enabled: true, skip: [q_, 'a b']}
    inputs: {kind: file, path: /somewhere.h5, holdout: 0.25}
    timing: {repeats: 1}
    """
    assert overrides(config) == [
        "tokens=512",
        "gammas=[0.0,0.5]",
        "convention=day58",
        "quant.bits=4",
        "quant.element=int",
        "clip.enabled=true",
        'clip.skip=[q_,"a b"]',
        "inputs.holdout=0.25",
    ]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["size=2"], "size=2: no recipe is so small; allowed: from 4.125 bits"),
        (["size=int5"], "size=int5: allowed: bits of a weight up to 32, or a recipe: "),
        (["size=nan"], "size=nan: allowed: bits"),
        (["size=5", "among=rtn_int8,x"], "among=rtn_int8,x: x is no recipe; allowed: awq_int4, "),
        (["size=5", "name=rtn_int8"], "name=rtn_int8: rtn_int8 is a recipe; allowed: another"),
        (["size=5", "out=plan.txt"], "out=plan.txt: cannot be written; allowed: a file name that ends in .yaml"),
        ([], "size=: is missing; allowed: numbers of bits"),
    ],
)
def test_what_no_plan_can_be_made_of_is_refused_in_one_line(tried, capsys, monkeypatch, arguments, line):
    monkeypatch.chdir(tried)
    assert run(tried, *arguments) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(f"error: {line}")
    assert printed.err.count("\n") == 1
    assert [path.name for path in tried.iterdir()] == ["evaluation.h5"]


def test_evaluations_that_do_not_tell_the_costs_are_refused(tmp_path):
    record = study(alone="rtn_int4")
    broken = {
        "no layer was tried alone": [study()],
        "a mixture was tried alone": [study(alone="plan")],
        "not all layers were tried alone": [_interrupted(record, 0)],
        "its model_sha256 is not that": [record, study(model_sha256="other")],
        "its recipe awq_int4 is another": [record, study({"awq_int4": ("quant: {bits: 3}", 3.1, 0.9)})],
    }
    for line, records in broken.items():
        with pytest.raises(analyze.InputError, match=line):
            layer_costs([(tmp_path / f"{index}.h5", each) for index, each in enumerate(records)])
    assert json.loads(record.recipes[-1].mixture)  # a mixture is no plain recipe


def _interrupted(record, windows):
    """The evaluation as an interruption in the window behind so many would have left it."""
    left = {name: getattr(record.alone, name).copy() for name in ("kl", "kl_reverse", "nll", "stream")}
    for values in left.values():
        values[1:, windows:] = np.nan
    return replace(record, alone=replace(record.alone, **left))


def test_what_all_layers_were_tried_on_before_an_interruption_counts(tmp_path):
    record = study(alone="rtn_int4")
    costs = layer_costs([(tmp_path, _interrupted(record, 3))])
    np.testing.assert_allclose(costs.costs[costs.names.index("rtn_int4")], record.alone.kl[:, :3].mean(axis=1))


def test_where_forwards_ended_behind_a_block_the_error_of_the_stream_tells_the_costs(tmp_path):
    record = study(alone="rtn_int4")
    record.alone.kl[:5] = np.nan
    costs = layer_costs([(tmp_path, record)])
    index = costs.names.index("rtn_int4")
    assert costs.sources[index] == "stream"
    np.testing.assert_allclose(costs.costs[index, :5], NATS * record.alone.stream[:5].mean(axis=1))
    np.testing.assert_allclose(costs.costs[index, 5:], record.alone.kl[5:].mean(axis=1))


RECIPE_FILE = """\
clipped: [convention=llm_awq, quant=int4_g128, quant.bits=5, clip=groups]
nvfp4: [convention=llm_compressor, quant=nvfp4, search.formula=duo, inputs.first_token=64, tokens=100]
rtn: [quant=per_row, "gammas=[0]"]
"""


def test_the_overrides_written_make_the_config_of_their_recipe_again(tmp_path):
    first, again = tmp_path / "first.yaml", tmp_path / "again.yaml"
    first.write_text(RECIPE_FILE, encoding="utf-8")
    recipes = parse(str(first), 512)
    texts = {one.name: overrides(as_yaml(settled(one.config))) for one in recipes}
    again.write_text(yaml.safe_dump(texts, sort_keys=False), encoding="utf-8")
    for one, other in zip(recipes, parse(str(again), 512), strict=True):
        assert config_hash(settled(other.config)) == config_hash(settled(one.config)), one.name
