"""What recipes gain over RTN, in layers and in the model, and by the tokens searched on: figures and tables."""

import json
import sys

import numpy as np
import pytest
from conftest import ROOT
from evaluation_studies import RECIPES, write_study

sys.path.insert(0, str(ROOT / "tools"))
import evaluation_tables

from awq_pycuda.analysis import figure_style, figures_recipes
from awq_pycuda.analysis.collect import collect

RTN, AWQ, CLIP = (RECIPES[f"{name}_int4"][0] for name in ("rtn", "awq", "clip"))
DRAWS = {"rtn": (RTN + "tokens: 512\n", 4.1, 0.4)} | {
    f"of_{tokens}_{draw}": (f"{AWQ}tokens: {tokens}\n", 4.1, 0.1 + 1 / tokens)
    for tokens in (16, 64, 256)
    for draw in "ab"
}


def evaluation(folder, *arguments, **options):
    (found,) = collect([write_study(folder, *arguments, **options)]).evaluations
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return evaluation(tmp_path_factory.mktemp("study"))


@pytest.fixture(scope="module")
def of_draws(tmp_path_factory):
    clipped = {"c": (f"{CLIP}tokens: 16\n", 4.1, 0.1)}
    return evaluation(tmp_path_factory.mktemp("draws"), DRAWS | clipped)


def test_shares_are_of_rtn_in_the_same_format(found):
    table = figures_recipes.against_rtn(found).set_index("recipe")
    assert set(table.index) == {"awq_int4", "clip_int4", "awq_nvfp4"}
    kl = found.recipes.set_index("recipe")["kl"]
    row = table.loc["awq_int4"]
    assert row["removed"] == pytest.approx(1 - kl["awq_int4"] / kl["rtn_int4"])
    assert row["removed_low"] < row["removed"] < row["removed_high"]
    assert table.loc["awq_nvfp4", "removed_high"] < 0
    # 1.5 dB in each layer
    assert row["own"] == pytest.approx(1 - 10**-0.15)


def drawn(family, found):
    with figure_style.style():
        return [draw() for _, draw in family(type("Collection", (), {"evaluations": [found]})())]


def test_a_point_for_each_recipe_that_has_an_rtn(found):
    (figure,) = drawn(figures_recipes.gains, found)
    (panel,) = figure.axes
    points = [line for line in panel.lines if line.get_marker() in figure_style.MARKERS]
    assert len(points) == 3
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["int4 g128", "nvfp4", "AWQ", "AWQ + clip", "as much as the layers"]


def test_nothing_is_drawn_where_nothing_is_compared(tmp_path):
    found = evaluation(tmp_path, {"awq": (AWQ, 4.1, 0.2)})
    assert drawn(figures_recipes.gains, found) == [None]
    assert drawn(figures_recipes.draws, found) == [None]


def test_a_curve_takes_three_numbers_of_tokens(of_draws):
    (figure,) = drawn(figures_recipes.draws, of_draws)
    (panel,) = figure.axes
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["int4 g128 AWQ"]
    points = [line for line in panel.lines if line.get_marker() == "o"]
    assert [sorted(set(line.get_xdata())) for line in points] == [[16, 64, 256]]
    assert [len(line.get_xdata()) for line in points] == [6]


def test_the_table_of_recipes(found):
    lines = evaluation_tables.recipes(found).splitlines()
    cells = {line.split(" | ")[0].strip("| `"): line.split(" | ") for line in lines if line.startswith("| `")}
    assert list(cells) == ["clip_int4", "awq_int4", "rtn_int4", "plan", "rtn_nvfp4", "awq_nvfp4", "rtn_int8"]
    assert cells["awq_int4"][3].startswith("48 % (37 to 58)")
    assert cells["awq_int4"][4] == "29 %"
    assert cells["awq_nvfp4"][3].startswith("−")
    assert cells["rtn_int4"][3] == cells["rtn_int4"][4] == ""
    assert lines[-1].startswith("tiny, 96 tokens predicted in 8 windows; the original's perplexity is ")


def test_of_what_kind_the_weights_are_stands_beside_the_table(tmp_path):
    said = ["weights: dequantized from GGUF's Q4_1 (210 tensors)", "captured: all"]
    found = evaluation(tmp_path, {"awq": (AWQ, 4.1, 0.2)}, said=json.dumps(said))
    line = f"Its {said[0]}. Q4_1 has at most 16 values in each group of 32."
    assert evaluation_tables.recipes(found).splitlines()[-1] == line


def test_the_tables_of_layers_tried_alone(tmp_path):
    found = evaluation(tmp_path, alone="rtn_int4")
    alone = found.layers[found.layers["recipe"] == "rtn_int4"].set_index("name")
    _, _, *rows = evaluation_tables.kinds(found).splitlines()
    kinds = [row.split(" | ")[0].strip("| `") for row in rows]
    assert sorted(kinds) == ["down_proj", "o_proj", "q_proj", "up_proj"]
    first = alone[alone.index.str.endswith(kinds[0])]["kl_alone"]
    assert rows[0].split(" | ")[1] == "2"
    assert rows[0].split(" | ")[2] == f"{100 * first.sum() / alone['kl_alone'].sum():.0f} %"
    _, _, *rows = evaluation_tables.costliest(found).splitlines()
    assert len(rows) == 8  # of ten there are no more
    costliest = alone["kl_alone"].idxmax()
    assert rows[0].startswith(f"| `{costliest}` | ")
    lower = (alone["output_sqnr_db"] < alone.loc[costliest, "output_sqnr_db"]).sum()
    assert rows[0].endswith(f" | {lower + 1} of 8 |")


def test_the_table_of_draws(of_draws):
    _, _, *rows = evaluation_tables.draws(of_draws).splitlines()
    cells = [row.split(" | ") for row in rows]
    sizes = [("| 16", "AWQ", "2"), ("| 16", "AWQ + clip", "1"), ("| 64", "AWQ", "2"), ("| 256", "AWQ", "2")]
    assert [tuple(each[:3]) for each in cells] == sizes
    kl = of_draws.recipes.set_index("recipe")["kl"]
    assert float(cells[2][3].split()[0]) == pytest.approx(np.median([kl["of_64_a"], kl["of_64_b"]]), rel=0.01)
