"""Formats and recipes: what runs are called by, the table over them, and the figures that set them side by side."""

import h5py
import numpy as np
import pytest
from result_files import editing, make_run

from awq_pycuda import analyze
from awq_pycuda.analysis import figure_style
from awq_pycuda.analysis.collect import by_gamma, collect
from awq_pycuda.analysis.figures_quality import error_removed_against
from awq_pycuda.analysis.figures_sweep import curves_by_sweep, held_out
from awq_pycuda.analysis.recipes import format_name, recipe_name
from awq_pycuda.analysis.selection import run_labels, swept_keys
from awq_pycuda.analysis.tables import table

FORMATS = {"int4_g128": "int4 g128", "nvfp4": "nvfp4"}
RECIPES = {
    "RTN + clip": ("gamma_grid=rtn", "clip=groups"),
    "AWQ": ("clip=none",),
    "AWQ + clip": ("clip=groups",),
    "duo": ("clip=none", "search.formula=duo"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two formats by four recipes, with held-out tokens on which one layer loses with one of them."""
    base = tmp_path_factory.mktemp("recipes")
    random = np.random.default_rng(0)
    with h5py.File(base / "layers.h5", "w") as file:  # each of its own activations: nothing passes from one to the next
        for layer in range(6):
            file[f"layers/{layer:03d}/weight"] = random.standard_normal((16, 32)).astype("f4")
            spread = random.lognormal(0, 1, 32)
            file[f"layers/{layer:03d}/activations"] = (random.standard_normal((64, 32)) * spread).astype("f4")
    for quant in FORMATS:
        for name, asked in RECIPES.items():
            given = ("inputs=file", f"inputs.path={base / 'layers.h5'}", "layers=null", "tokens=null", "timing=once")
            asked = (f"quant={quant}", "convention=llm_awq", "inputs.holdout=0.25", *asked)
            path = make_run(base / "runs" / f"{quant} {name}", *given, *asked)
    with editing(path) as file:
        metrics = file["layers/002/metrics"].attrs
        metrics["held_out_output_mse"] = 1.5 * metrics["held_out_rtn_output_mse"]
    return base / "runs"


@pytest.fixture(scope="module")
def found(folder):
    return collect([folder])


@pytest.fixture(autouse=True)
def style():
    with figure_style.style():
        yield


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({}, "int8 row"),
        ({"quant.bits": 3, "quant.group_size": 128, "quant.element": "int"}, "int3 g128"),
        ({"quant.element": "e2m1", "quant.bits": 4, "quant.group_size": 16, "quant.step_dtype": "e4m3"}, "nvfp4"),
        ({"quant.element": "e2m1", "quant.bits": 4, "quant.group_size": 32, "quant.step_dtype": "e8m0"}, "mxfp4"),
        ({"quant.element": "e2m1", "quant.group_size": 32, "quant.step_dtype": "e8m0_up"}, "fp4 g32 e8m0_up"),
        ({"quant.element": "e2m1", "quant.group_size": None, "quant.step_dtype": None}, "fp4 row"),
    ],
)
def test_a_format_has_a_name(config, name):
    assert format_name(config) == name


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({}, "AWQ"),
        ({"gammas": [0.0]}, "RTN"),
        ({"gammas": [0], "clip.enabled": True}, "RTN + clip"),
        ({"gammas": [0.0], "search.formula": "duo"}, "duo"),
        ({"gammas": [0.0, 0.5], "search.formula": "both", "clip.enabled": True}, "AWQ or duo + clip"),
        ({"search.formula": "gamma_beta"}, "γ × β"),
        ({"clip.enabled": True, "clip.joint": True}, "AWQ with clip"),
        ({"gammas": [0.0], "clip.enabled": True, "clip.joint": True}, "RTN + clip"),
        ({"search.statistic": "abs_max", "clip.enabled": True}, "AWQ of max|x| + clip"),
    ],
)
def test_a_recipe_has_a_name(config, name):
    assert recipe_name(config) == name


def test_keys_that_make_a_format_or_a_recipe_are_told_by_its_name(found):
    assert {"quant.element", "quant.group_size", "search.formula", "clip.enabled"} < set(found.swept)
    assert swept_keys(found) == {"format": [], "recipe": []}
    names = {f"format={form} recipe={recipe}" for form in FORMATS.values() for recipe in RECIPES}
    assert set(run_labels(found).values()) == names


def test_keys_that_a_name_does_not_tell_apart_stay(folder, tmp_path):
    for divisor in ("largest", "half_range"):
        for quant in FORMATS:
            asked = (f"quant={quant}", "quant.symmetric=true", f"quant.divisor={divisor}", "timing=once")
            make_run(tmp_path / f"{divisor} {quant}", *asked)
    keys = swept_keys(collect([tmp_path]))
    assert "format" not in keys
    assert "quant.divisor" in keys


def cells(lines):
    """The cells of a table in Markdown, by row and column."""
    header, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    return {(row[0], column): cell for row in rows for column, cell in zip(header[1:], row[1:], strict=True)}


def of(found, form, recipe):
    layers = found.layers
    return layers[(layers["format"] == form) & (layers["recipe"] == recipe)]


def test_the_table_has_a_figure_of_all_layers_on_both_kinds_of_tokens(found):
    first, empty, *lines = table(found, "format", "recipe", "error_removed", "median")
    assert (first, empty) == ("`error_removed`, median of 6 layers, in brackets on held-out tokens", "")
    told = cells(lines)
    assert set(told) == {(form, recipe) for form in FORMATS.values() for recipe in RECIPES}
    for (form, recipe), cell in told.items():
        mine = of(found, form, recipe)
        removed, others = mine["error_removed"].median(), mine["held_out_error_removed"].median()
        assert others == pytest.approx((1 - mine["held_out_output_mse"] / mine["held_out_rtn_output_mse"]).median())
        assert cell == f"{100 * removed:.1f} % ({100 * others:.1f} %)"


def test_the_table_has_rtn_in_front_where_it_has_the_figure(found):
    told = cells(list(table(found, "recipe", "format", "output_sqnr_db", "lowest"))[2:])
    assert [column for row, column in told if row == "AWQ"] == ["RTN", *FORMATS.values()]
    mine = of(found, "nvfp4", "AWQ")
    figures = mine["output_sqnr_db"].min(), mine["held_out_output_sqnr_db"].min()
    assert told["AWQ", "nvfp4"] == "{:.2f} ({:.2f})".format(*figures)
    mine = found.layers[found.layers["recipe"] == "duo"]
    assert told["duo", "RTN"].startswith(f"{mine['rtn_output_sqnr_db'].min():.2f} (")


def test_the_table_counts_the_layers_that_lose(found):
    told = cells(list(table(found, "format", "recipe", "error_removed", "below_0"))[2:])
    counts = [int((of(found, *key)["held_out_error_removed"] < 0).sum()) for key in told]
    assert [int(cell.split("(")[1].strip(")")) for cell in told.values()] == counts
    assert any(counts)


def test_the_table_as_a_command(folder, found, capsys):
    assert analyze.main(["table", str(folder), "rows=name", "figure=gamma_chosen", "over=highest"]) == 0
    assert capsys.readouterr().out.splitlines() == list(table(found, "name", "recipe", "gamma_chosen", "highest"))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["rows=nothing"], "rows=nothing: no column of the layers; allowed: such as format"),
        (["columns=config"], "columns=config: no column of the layers; allowed: such as format"),
        (["figure=name"], "figure=name: allowed: error_removed, propagated_sqnr_db, "),
        (["figure=unclipped_output_mse"], "figure=unclipped_output_mse: no layer has it; allowed: a figure"),
        (["over=sum"], "over=sum: allowed: median, mean, lowest, highest, below_0"),
        (["top=1"], "top=1: no such key"),
    ],
)
def test_a_table_that_cannot_be_is_one_line(folder, capsys, arguments, told):
    assert analyze.main(["table", str(folder / "nvfp4 AWQ"), *arguments]) == 2
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert out == ""
    assert line.startswith(f"error: {told}")


def test_a_table_of_nothing_is_one_line(capsys):
    assert analyze.main(["table"]) == 2
    assert capsys.readouterr().err == "error: PATH: no value; allowed: result files and folders\n"


def test_what_is_removed_has_a_second_panel_on_held_out_tokens(found):
    figure = dict(error_removed_against(found))["format"]()
    assert [panel.get_title() for panel in figure.axes] == ["the tokens searched on", "held-out tokens"]
    for panel, column in zip(figure.axes, ("error_removed", "held_out_error_removed"), strict=True):
        (line,) = [line for line in panel.lines if line.get_color() == figure_style.SERIES[0]]
        assert line.get_ydata() == pytest.approx([of(found, form, "AWQ")[column].median() for form in FORMATS.values()])


def test_every_layer_is_drawn_from_the_tokens_searched_on_to_those_held_out(found):
    figure = held_out(found)
    assert [panel.get_title() for panel in figure.axes] == list(FORMATS.values())
    for panel in figure.axes:
        mine = of(found, panel.get_title(), "AWQ")
        ends = np.array([line.get_ydata() for line in panel.lines if line.get_color() == figure_style.GREY])
        assert len(ends) == len(RECIPES) * 6
        assert ends[:6] == pytest.approx(mine[["error_removed", "held_out_error_removed"]].to_numpy())
        medians = [bars.get_segments()[0][0, 1] for bars in panel.collections]
        assert medians[:2] == pytest.approx(list(mine[["error_removed", "held_out_error_removed"]].median()))


def test_layers_that_lose_much_are_named_once_a_panel(found):
    figure = held_out(found)
    for panel in figure.axes:
        layers = found.layers[found.layers["format"] == panel.get_title()]
        worst = layers.groupby("layer")["held_out_error_removed"].min().sort_values(ascending=False)
        names = [f"layer {layer}" for layer in worst[worst < -0.05].index]
        assert [text.get_text() for text in panel.texts] == names
    assert "layer 2" in names


def test_curves_over_the_layers_stand_once_for_runs_that_searched_the_same(found):
    figure = curves_by_sweep(found)
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["AWQ / AWQ + clip", "duo"]
    below = {panel.get_title(): figure.axes[len(FORMATS) + place] for place, panel in enumerate(figure.axes[:2])}
    curves = by_gamma(found.curves)
    for form, panel in below.items():
        mine = curves[curves["run"].isin(of(found, form, "AWQ")["run"])]
        assert panel.lines[0].get_ydata() == pytest.approx(mine.groupby("gamma")["error_relative"].median())
        above = next(one for one in figure.axes if one.get_title() == form)
        assert sum(bar.get_height() for bar in above.patches) == pytest.approx(2)


def test_without_a_sweep_or_held_out_tokens_there_is_neither_figure(folder, tmp_path):
    one = collect([folder / "nvfp4 AWQ"])
    assert held_out(one) is None
    assert curves_by_sweep(one) is None
    for n in (16, 32):
        make_run(tmp_path / str(n), f"n={n}")
    assert held_out(collect([tmp_path])) is None
