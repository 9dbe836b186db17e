"""Pictures of evaluations: what stands where, and what is left out."""

from dataclasses import replace

import numpy as np
import pytest
from evaluation_studies import RECIPES, RTN, study, write_study
from matplotlib.colors import to_hex

from awq_pycuda.analysis import figure_style, figures
from awq_pycuda.analysis.collect import collect
from awq_pycuda.analysis.figures_evaluation import layers_alone, recipes, tokens
from awq_pycuda.results.evaluation_write import write_evaluation


def drawn(folder, family):
    """By what stands behind its name: each picture of a family."""
    with figure_style.style():
        return {key: draw() for key, draw in family(collect([folder]))}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    base = tmp_path_factory.mktemp("study")
    write_study(base, alone="rtn_int4")
    return base


def marks(panel):
    """Points drawn one by one: place, colour, colour of the face."""
    lines = (line for line in panel.lines if line.get_marker() not in ("None", None, "") and len(line.get_xdata()) == 1)
    return [(line.get_xdata()[0], line.get_ydata()[0], to_hex(line.get_markerfacecolor())) for line in lines]


def test_recipes_are_points_of_size_and_kl(folder):
    figure = drawn(folder, recipes)[""]
    left, right = figure.axes
    table = collect([folder]).evaluations[0].recipes
    table = table[table["recipe"] != "original"]
    assert [(x, y) for x, y, _ in marks(left)] == list(zip(table["bits"], table["kl"], strict=True))
    hollow = [name for name, (*_, face) in zip(table["recipe"], marks(left), strict=True) if face == "#ffffff"]
    assert hollow == ["rtn_int4", "rtn_nvfp4", "rtn_int8"]
    assert left.get_yscale() == "log"
    joined = [line for line in left.lines if len(line.get_xdata()) > 1 and line.get_linestyle() == "-"]
    assert [len(line.get_xdata()) for line in joined] == [
        3,
        2,
    ]  # int4 and nvfp4; int8 is alone, the mixture is no format
    assert {text.get_text() for text in left.texts} == {"int4 g128", "nvfp4", "int8 row"}
    bars = [collection.get_segments()[0] for collection in left.collections]
    assert [bar[0][1] for bar in bars] == pytest.approx(table["kl_low"].tolist())
    assert [bar[1][1] for bar in bars] == pytest.approx(table["kl_high"].tolist())
    labels = [label.get_text().split() for label in right.get_yticklabels()]
    assert labels == [[name, f"{bits:.2f}"] for name, bits in zip(table["recipe"], table["bits"], strict=True)]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["RTN", "AWQ", "AWQ + clip", "mixture"]


def test_names_of_formats_close_together_keep_apart(tmp_path):
    sizes = {bits: f"quant: {{bits: {bits}, group_size: 128}}\n{RTN}" for bits in (2, 3, 4, 5)}
    write_study(tmp_path, {f"r{bits}": (config, 4 + bits / 100, 0.1) for bits, config in sizes.items()})
    places = [text.get_position()[0] for text in drawn(tmp_path, recipes)[""].axes[0].texts]
    assert len(places) == 4
    assert np.diff(places).min() >= 0.044


def test_layers_are_ranked_by_cost_beside_their_sqnr(folder):
    (figure,) = drawn(folder, layers_alone).values()
    left, middle, *right = figure.axes
    evaluation = collect([folder]).evaluations[0]
    table = evaluation.layers[evaluation.layers["recipe"] == "rtn_int4"].sort_values("kl_alone", ascending=False)
    assert [x for x, *_ in marks(left)] == table["kl_alone"].tolist()
    assert [x for x, *_ in marks(middle)] == table["output_sqnr_db"].tolist()
    names = [label.get_text() for label in left.get_yticklabels()]
    assert names == [name.removeprefix("model.layers.") for name in table["name"]]
    for panel, column, sign in zip(right, ("output_sqnr_db", "stream_alone"), (-1, 1), strict=True):
        pairs = {(x, y) for line in panel.lines for x, y in zip(*line.get_data(), strict=True)}
        assert pairs == set(zip(table[column], table["kl_alone"], strict=True))
        rho = np.corrcoef(table["kl_alone"].rank(), (sign * table[column]).rank())[0, 1]
        assert panel.get_title().endswith(f": ρ {rho:.2f}")


def test_layers_of_which_the_stream_is_not_known_have_one_panel_less(tmp_path):
    record = study(alone="rtn_int4")
    unknown = replace(record.alone, stream=np.full_like(record.alone.stream, np.nan))
    write_evaluation(tmp_path / "evaluation.h5", replace(record, alone=unknown))
    (figure,) = drawn(tmp_path, layers_alone).values()
    assert len(figure.axes) == 3


def test_kl_by_position_and_by_share_of_the_tokens(folder):
    figure = drawn(folder, tokens)[""]
    left, right = figure.axes
    evaluation = collect([folder]).evaluations[0]
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert set(names) == set(RECIPES)
    kl = {recipe.name: recipe.of_tokens.kl for recipe in evaluation.record.recipes}
    for line, name in zip(left.lines, names, strict=True):
        x, y = line.get_data()
        assert x[0] == 1
        assert y[0] == pytest.approx(kl[name].reshape(8, 12)[:, 0].mean())
    for line, name in zip(right.lines[1:], names, strict=True):
        x, y = line.get_data()
        assert (x[-1], y[-1]) == (1, pytest.approx(1))
        assert y[9] == pytest.approx(np.sort(kl[name])[-10:].sum() / kl[name].sum())


def test_files_are_named_by_evaluation_where_there_are_several_and_old_ones_go(folder, tmp_path):
    out = tmp_path / "figures"
    out.mkdir()
    (out / "evaluation_layers_gone.png").touch()
    write_study(tmp_path / "a b", {"one": ("", 4.0, 0.1)})
    write_study(tmp_path / "c", {"none": ("", 4.0, 0.0)}, windows=1, blocks=1)
    paths, failures = figures.write_figures(collect([tmp_path]), out)
    assert failures == []
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in paths)
    assert {path.stem for path in paths} == {"evaluation_recipes_a_b", "evaluation_tokens_a_b"}
