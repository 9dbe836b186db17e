"""The page answers first what AWQ does, against what was swept; it names runs and layers, and fits a small screen."""

import numpy as np
import pytest
from browser_pages import beyond, browser, plot, show
from result_files import editing, make_run, vary

from awq_pycuda.analysis.collect import collect

SEEDS = range(3)
NAMES = [f"model.layers.{layer}.mlp.{part}_proj" for layer in range(2) for part in ("up", "down")]


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """Two sizes, two kinds of inputs, three seeds; four layers with names."""
    folder = tmp_path_factory.mktemp("swept")
    for n in (16, 32):
        for kind in ("outliers", "synthetic"):
            for seed in SEEDS:
                overrides = (f"n={n}", f"inputs={kind}", f"seed={seed}", "layers=4", "study=kinds", "timing.repeats=4")
                path = make_run(folder / f"{n}{kind}{seed}", *overrides)
                with editing(path) as file:
                    for layer, name in zip(file["layers"].values(), NAMES, strict=True):
                        layer.attrs["name"] = name
    return folder


@pytest.fixture(scope="module")
def page(show, swept):
    yield (page := show(swept))
    assert page.faults == []


def line(page, name):
    """x and y of the line of the first figure whose name ends so."""
    found = plot(page, "answer", "gd.data.filter((t) => t.text).map((t) => [t.name, t.x, t.y])")
    return next(each[1:] for each in found if each[0].endswith(name))


def choose(page, **choices):
    for name, label in choices.items():
        page.locator(f"#figure-answer select[name={name}]").select_option(label=label)


def of(table, n, kind):
    return table[(table["n"] == n) & (table["inputs.kind"] == kind)]


def test_the_first_figure_is_error_removed_with_seeds_folded(page, swept):
    assert page.locator(".figure").first.get_attribute("id") == "figure-answer"
    above = "document.querySelector('#figure-answer').getBoundingClientRect().top < "
    assert page.evaluate(f"{above} document.querySelector('#runs').getBoundingClientRect().top")
    runs = collect([swept]).runs
    for kind in ("outliers", "synthetic"):
        x, y = line(page, f"inputs.kind={kind}")
        assert x == [16, 32]
        assert y == pytest.approx([of(runs, n, kind)["error_removed_median"].median() for n in x], abs=1e-5)
    band = plot(page, "answer", "gd.data.find((t) => t.fill === 'toself').y")
    every = [of(runs, n, "outliers")["error_removed_median"] for n in (16, 32)]
    assert band[:2] == pytest.approx([values.max() for values in every], abs=1e-5)
    assert band[2:] == pytest.approx([values.min() for values in every[::-1]], abs=1e-5)
    assert "median over its seeds" in page.locator("#figure-answer .caption").inner_text()


def test_sqnr_of_one_layer_by_its_name(page, swept):
    layers = collect([swept]).layers
    choose(page, show="SQNR of AWQ and RTN", layer=f"layer 2: {NAMES[2]}")
    mine = layers[layers["name"] == NAMES[2]]
    values = "gd.data.filter((t) => t.text && t.line.dash === '{}').map((t) => t.y)"
    for dash, column in (("solid", "output_sqnr_db"), ("dash", "rtn_output_sqnr_db")):
        expected = [[of(mine, n, kind)[column].median() for n in (16, 32)] for kind in ("outliers", "synthetic")]
        assert np.array(plot(page, "answer", values.format(dash))) == pytest.approx(np.array(expected), rel=1e-4)
    choose(page, show="error removed", layer="all layers (median)", colour="layer", x="inputs.kind")
    assert plot(page, "answer", "gd.data.filter((t) => t.text).map((t) => t.name)") == [
        f"…{f'layer {index}: {name}'[-23:]}" for index, name in enumerate(NAMES)
    ]
    assert plot(page, "answer", "gd.layout.xaxis.ticktext") == ["outliers", "synthetic"]
    choose(page, colour="every combination of the other keys", x="n")


def test_a_run_alone_shows_the_quartiles_of_its_layers(show, tmp_path):
    for kind in ("outliers", "synthetic"):
        make_run(tmp_path / kind, f"inputs={kind}", "layers=4")
    page = show(tmp_path)
    runs = collect([tmp_path]).runs
    above = [runs["error_removed_q75"][i] - runs["error_removed_median"][i] for i in range(2)]
    (found,) = plot(page, "answer", "gd.data.filter((t) => t.text).map((t) => [t.y, t.error_y.array])")
    assert found[0] == pytest.approx(runs["error_removed_median"].tolist(), abs=1e-5)
    assert found[1] == pytest.approx(above, abs=1e-5)
    assert page.faults == []


def test_seeds_alone_are_an_axis_of_their_own(show, tmp_path):
    for seed in SEEDS:
        make_run(tmp_path / str(seed), f"seed={seed}")
    page = show(tmp_path)
    assert plot(page, "answer", "gd.layout.xaxis.title.text") == "seed"
    assert page.locator("#figure-answer select[name=colour] option").all_inner_texts() == ["nothing", "layer"]
    medians = plot(page, "sqnr", "gd.data.filter((t) => t.name === 'AWQ, median').map((t) => t.x)")[0]
    layers = collect([tmp_path]).layers
    assert medians == pytest.approx(layers.groupby("layer")["output_sqnr_db"].median().tolist(), rel=1e-4)
    assert page.faults == []


def test_the_head_says_what_when_where_and_runs_are_named(page, swept):
    assert page.locator("h1").inner_text() == "Study kinds"
    assert page.title() == "Study kinds · awq_pycuda"
    about = dict(
        zip(page.locator(".about dt").all_inner_texts(), page.locator(".about dd").all_inner_texts(), strict=True)
    )
    runs = collect([swept]).runs
    assert about["date"].startswith(runs["created"].min()[:16].replace("T", " "))
    assert about["device"] == f"{runs['device_name'][0]} (cpu)"
    assert about.get("commit", "").startswith(str(runs["git_commit"][0] or "")[:7])
    names = page.locator("#runs tbody td:first-child").all_inner_texts()
    assert names[0] == "n=16 inputs.kind=outliers seed=0"
    assert len(set(names)) == 12
    assert page.locator("#figure-curves select[name=run] option").nth(1).inner_text() == names[0]


@pytest.mark.parametrize("run", ["alone", "2026-01-02/03-04-05-678901"])
def test_a_lone_run_is_named_by_its_folder_or_its_command(show, tmp_path, run):
    make_run(tmp_path / run, "layers=2")
    page = show(tmp_path)
    name = page.locator("#runs tbody td:first-child").inner_text()
    assert name == ("alone" if run == "alone" else "n=16 layers=3 backend=cpu inputs=outliers layers=2")
    assert page.locator("h1").inner_text() == f"Run {name}"
    ticks = page.locator("#figure-sqnr .ytick text").all_text_contents()
    assert [text.strip() for text in ticks] == ["layer 0", "layer 1"]
    assert page.locator("#figure-answer").count() == 0


def test_layers_that_no_error_reaches_from_others_have_no_propagation(show, tmp_path):
    first = make_run(tmp_path / "chained" / "a", "layers=3")
    assert show(tmp_path / "chained").locator("#figure-propagation").count() == 1
    own = vary(first, tmp_path / "own" / "b")
    with editing(own) as file:
        for layer in file["layers"].values():
            layer["metrics"].attrs["propagated_output_mse"] = layer["metrics"].attrs["output_mse"]
    page = show(tmp_path / "own")
    assert page.locator("#figure-propagation").count() == 0
    assert page.locator("#figure-sqnr").count() == 1


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_at_500_pixels_nothing_is_cut_without_a_sign(show, swept, scheme):
    page = show(swept, width=500, color_scheme=scheme)
    assert page.evaluate("document.scrollingElement.scrollWidth") <= 500
    assert beyond(page) == []
    box = page.locator("#table .more-right")
    assert box.count() == 1
    mask = "getComputedStyle(document.querySelector('#table .more-right')).maskImage"
    assert "linear-gradient" in page.evaluate(mask)
    hint = "getComputedStyle(document.querySelector('#table .scrolls'), '::after').content"
    assert "scroll sideways" in page.evaluate(hint)
    assert box.get_attribute("tabindex") == "0"  # the keyboard scrolls it, too
    box.evaluate("(e) => { e.scrollLeft = e.scrollWidth; }")
    page.wait_for_selector("#table .more-left:not(.more-right)")
    assert page.faults == []


def test_on_a_wide_screen_nothing_says_that_it_scrolls(show, tmp_path):
    make_run(tmp_path / "one")
    page = show(tmp_path, width=1400)
    assert page.locator(".scrolls, .more-right").count() == 0


def test_figures_tell_a_reader_without_eyes_what_they_are(page):
    for figure in page.locator(".plot").all():
        assert figure.get_attribute("role") == "img"
        assert len(figure.get_attribute("aria-label")) > 30
    assert page.locator(".controls select").count() == page.locator("label select").count()
