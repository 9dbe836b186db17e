"""Evaluations in the page, in a real browser: points, what opens a recipe's layers, and their table."""

import pytest
from browser_pages import beyond, browser, plot, show
from evaluation_studies import RECIPES, RTN, write_study
from result_files import make_run

from awq_pycuda.analysis.collect import collect

EVIL = '<img src=x onerror="window.hacked=1"></script>'
LAYERS = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An evaluation alone, with markup for names; its first recipe's layers were tried alone."""
    base = tmp_path_factory.mktemp("evaluation")
    write_study(base / "study", {EVIL: RECIPES["awq_int4"]} | RECIPES, alone=EVIL, model=EVIL, said=f'["{EVIL[:4]} &"]')
    return base


@pytest.fixture(scope="module")
def page(show, folder):
    yield (page := show(folder))
    assert page.faults == []
    assert page.evaluate("window.hacked") is None


@pytest.fixture(scope="module")
def evaluation(folder):
    return collect([folder]).evaluations[0]


def opened(page):
    """The recipe whose layers are shown: as the menu has it, and the pressed button's."""
    chosen = page.locator("#figure-layers-0 select[name=recipe] option:checked").inner_text()
    return chosen, page.locator("button.open[aria-pressed=true]").all_inner_texts()


def cells(page, column):
    heads = [text.strip() for text in page.locator(".layer-table th").all_inner_texts()]
    return page.locator(f".layer-table tbody td:nth-child({heads.index(column) + 1})").all_inner_texts()


def test_recipes_are_points_with_intervals_and_there_are_no_runs(page, evaluation):
    assert page.locator("h1").inner_text() == f"Evaluation of {EVIL}"
    assert page.locator("#runs, #table").count() == 0
    assert page.locator("h2").all_inner_texts() == [
        "Evaluation study",
        "What each recipe costs the model",
        "Layers of a recipe",
    ]
    table = evaluation.recipes.set_index("index")
    found = plot(
        page,
        "recipes-0",
        "gd.data.filter((t) => t.customdata).flatMap((t) => t.customdata.map((of, i) => "
        "[of, t.x[i], t.y[i], t.y[i] - t.error_y.arrayminus[i], t.y[i] + t.error_y.array[i]]))",
    )
    assert sorted(of for of, *_ in found) == list(range(1, len(RECIPES) + 2))
    for of, *numbers in found:
        assert numbers == pytest.approx(table.loc[of, ["bits", "kl", "kl_low", "kl_high"]].tolist(), rel=1e-4)
    names = plot(page, "recipes-0", "gd.data.filter((t) => t.customdata).map((t) => t.name)")
    assert names == ["RTN", "AWQ", "AWQ + clip", "mixture"]
    assert plot(page, "recipes-0", "gd.data.filter((t) => t.mode === 'lines').map((t) => t.x.length)") == [4, 2, 1]
    assert plot(page, "recipes-0", "gd.layout.yaxis.type") == "log"


def test_the_table_says_the_same_and_holds_the_original(page, evaluation):
    rows = page.locator("table.recipes tbody tr").all_inner_texts()
    assert [row.split("\t")[0] for row in rows] == evaluation.recipes["recipe"].tolist()
    assert rows[-1].split("\t")[1] == "original"
    assert page.locator("table.recipes tr:last-child button").count() == 0
    details = page.locator("section.evaluation details")
    details.locator("summary").click()
    assert details.locator("li").all_inner_texts() == [f"{EVIL[:4]} &"]


def test_a_click_on_a_point_opens_its_layers(page, evaluation):
    page.locator("#figure-recipes-0").scroll_into_view_if_needed()
    x, y = plot(
        page,
        "recipes-0",
        """(() => {
            const t = gd.data.find((trace) => trace.name === 'AWQ + clip'), full = gd._fullLayout;
            const box = gd.querySelector('.nsewdrag').getBoundingClientRect();
            return [box.left + full.xaxis.d2p(t.x[0]), box.top + full.yaxis.d2p(t.y[0])];
        })()""",
    )
    page.mouse.move(x, y)
    page.mouse.click(x, y)
    assert opened(page) == ("clip_int4", ["clip_int4"])
    layers = evaluation.layers[evaluation.layers["recipe"] == "clip_int4"].sort_values("layer")
    page.locator(".layer-table th button", has_text="layer").click()
    assert [float(text) for text in cells(page, "SQNR dB")] == pytest.approx(
        layers["output_sqnr_db"].tolist(), rel=1e-3
    )
    assert [float(text) for text in cells(page, "γ")] == layers["gamma"].tolist()


def test_the_keyboard_opens_and_sorts(page, evaluation):
    page.locator("button.open", has_text="rtn_nvfp4").focus()
    page.keyboard.press("Enter")
    assert opened(page) == ("rtn_nvfp4", ["rtn_nvfp4"])
    assert page.evaluate("document.activeElement.name") == "recipe"
    page.keyboard.press("ArrowDown")  # the menu goes on to the next
    assert opened(page)[1] == ["awq_nvfp4"]
    page.locator(".layer-table th button", has_text="SQNR").focus()
    for sign, word in ((1, "ascending"), (-1, "descending")):
        page.keyboard.press("Enter")
        values = [float(text) for text in cells(page, "SQNR dB")]
        assert values == sorted(values)[::sign]
        assert page.locator(f".layer-table th[aria-sort={word}]").inner_text().startswith("SQNR dB")
        assert page.evaluate("document.activeElement.textContent") == "SQNR dB"
    assert len(values) == LAYERS


def test_costs_alone_stand_beside_the_decibels(page, evaluation):
    alone = evaluation.layers[evaluation.layers["kl_alone"].notna()]
    page.locator("#figure-layers-0 select[name=show]").select_option("cost")
    found = plot(page, "layers-0", "gd.data.flatMap((t) => t.x.map((layer, i) => [layer, t.y[i]]))")
    assert [cost for _, cost in sorted(found)] == pytest.approx(alone["kl_alone"].tolist(), rel=1e-4)
    for choice, column in (("own", "output_sqnr_db"), ("stream", "stream_alone")):
        page.locator("#figure-layers-0 select[name=show]").select_option(choice)
        found = plot(page, "layers-0", "gd.data.flatMap((t) => t.x)")
        assert sorted(found) == pytest.approx(sorted(alone[column]), rel=1e-4)
    caption = page.locator("#figure-layers-0 .caption").inner_text()
    assert "Spearman's ρ" in caption
    assert EVIL in caption
    page.locator(".layer-table th button", has_text="rank").click()
    assert cells(page, "rank") == [str(1 + rank) for rank in range(LAYERS)]
    best = alone.sort_values("kl_alone", ascending=False)["name"].iloc[0]
    assert cells(page, "name")[0] == best.removeprefix("model.layers.")


def test_other_figures_and_sizes(page, evaluation):
    show = page.locator("#figure-recipes-0 select[name=show]")
    show.select_option("perplexity")
    assert "can fall while the model moves away" in page.locator("#figure-recipes-0 .caption").inner_text()
    show.select_option("top1")
    page.locator("#figure-recipes-0 select[name=x]").select_option("bytes")
    table = evaluation.recipes.set_index("index")
    first = plot(page, "recipes-0", "(() => { const t = gd.data.at(-1); return [t.customdata[0], t.x[0], t.y[0]]; })()")
    of, size, share = first
    assert (size, share) == pytest.approx((table.loc[of, "linear_bytes"] / 1e6, table.loc[of, "top1"]), rel=1e-4)
    show.select_option("kl")


def test_without_layers_alone_beside_runs_and_several(show, tmp_path):
    write_study(tmp_path / "a", {"one": (RTN, 8.0, 0.0)}, status="failed", error="RuntimeError: no", windows=1)
    write_study(tmp_path / "b")
    make_run(tmp_path / "run")
    page = show(tmp_path, width=500)
    assert page.locator("#figure-layers-0, #figure-layers-1, #figure-sqnr, #runs").count() == 4
    assert "RuntimeError: no" in page.locator("#evaluation-0 .warning").inner_text()
    assert page.locator("#figure-layers-1 select[name=show] option").all_inner_texts()[0].startswith("SQNR")
    assert page.locator("#figure-layers-1 .layer-table th").count() == 7
    page.locator("#evaluation-1 button.open", has_text="plan").click()
    assert page.locator("#figure-layers-1 select[name=recipe] option:checked").inner_text() == "plan"
    assert page.locator("#evaluation-0 button.open[aria-pressed=true]").all_inner_texts() == ["one"]
    assert beyond(page) == []
    assert page.evaluate("document.scrollingElement.scrollWidth") <= 500
    assert page.faults == []
