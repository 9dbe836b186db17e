"""The report in a real browser: it opens offline and without errors, sorts, filters, shows and prints."""

import re
import shutil
from html.parser import HTMLParser

import pytest
from browser_pages import browser, plot, show
from result_files import editing, make_run, vary

from awq_pycuda.analysis import report_data
from awq_pycuda.analysis.collect import collect

EVIL = '<img src=x onerror="window.hacked=1"><script>window.hacked=1</script></script><b>&amp;\''
FAILED = "zz <img src=x onerror='window.hacked=1'> failed"
TILES, SIZES = (8, 16, 32), (16, 32, 64, 128)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """12 complete runs of 3 layers, a failed one, and a file that is no result; names and reasons hold markup."""
    base = tmp_path_factory.mktemp("report")
    first = make_run(base / "first")

    def results(index):
        with editing(first) as file:
            for layer in file["layers"].values():
                layer["search/error"][1:] *= 1 + index / 10
                layer["metrics"].attrs["output_mse"] *= 1 + index / 10
                layer.attrs["name"] = f"block.{EVIL}"

    for index, (n, tile) in enumerate((n, tile) for n in SIZES for tile in TILES):
        results(index)
        vary(first, base / "sweep" / f"{index:02d}", {"n": n, "tokens": n, "tile": tile, "study": EVIL}, 1 + index)
    failed = vary(first, base / "sweep" / FAILED, {"n": 7}, status="failed", error=f"MemoryError: {EVIL}")
    with editing(failed) as file:
        del file["layers"], file["timings"]
    (base / "sweep" / "foreign.h5").write_text(EVIL)
    return base


@pytest.fixture(scope="module")
def opened(show, folder):
    """`opened(name)`: the report on a folder of results, in a page that has been read whole."""
    return lambda name: show(folder / name)


@pytest.fixture(scope="module")
def still(opened):
    """The report of the sweep, for tests that only look."""
    yield (page := opened("sweep"))
    assert page.faults == []
    assert page.evaluate("window.hacked") is None


@pytest.fixture(scope="module")
def touched(opened):
    yield (page := opened("sweep"))
    assert page.faults == []
    assert page.evaluate("window.hacked") is None


@pytest.fixture
def page(touched):
    """The report of the sweep as it opens, for tests that change it."""
    touched.reload()
    touched.wait_for_selector("html[data-ready]")
    return touched


def column(page, head):
    """The texts of a column of the table's visible rows."""
    heads = [text.strip() for text in page.locator("#runs thead th .dt-column-title").all_inner_texts()]
    return page.locator(f"#runs tbody td:nth-child({heads.index(head) + 1})").all_inner_texts()


def sort(page, head, order):
    """Clicks on a head and waits until the table is sorted: it sorts after the click's event."""
    page.locator("#runs thead .dt-column-title").get_by_text(head, exact=True).click()
    page.locator(f"#runs thead th[aria-sort={order}]", has_text=head).wait_for()


BARS = "document.querySelector('#figure-stages .plot').data[0].x.length === {}"


def test_it_opens_from_the_file_alone_without_errors(still):
    page = still
    assert page.faults == []
    assert [url for url in page.requested if not url.startswith(("file://", "blob:"))] == []
    assert {url.partition("#")[0] for url in page.requested if url.startswith("file://")} == {page.url}
    assert "No roofline" in page.locator("main > .note").inner_text()
    titles = page.locator(".figure h2").all_inner_texts()
    assert [title.split(":")[0] for title in titles] == [
        "What AWQ does to the output's error, against a swept key",
        "SQNR and error removed, layer by layer",
        "Error of the scale search over γ",
        "Error propagation by depth (AWQ)",
        "Time against a swept key",
        "Time of the stages",
        "Activation statistics and AWQ scales by input channel",
    ]
    assert page.locator(".figure .plot svg.main-svg").count() >= 6


class Addresses(HTMLParser):
    """Every address that the page's markup asks for; scripts and styles are no markup."""

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attrs):
        self.found += [value for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]


def test_no_address_stands_in_its_markup(still, folder):
    text = (folder / "sweep" / "report.html").read_text(encoding="utf-8")
    parser = Addresses()
    parser.feed(text)
    assert parser.found == ["data:,"]  # the icon, which a browser would ask for otherwise
    style = "".join(re.findall(r"<style>(.*?)</style>", text, re.DOTALL))
    assert re.findall(r"@import|url\((?!['\"]?data:)", style) == []


def test_the_head_counts_the_files_and_names_what_failed_and_what_was_left_out(still):
    page = still
    tiles = dict(
        zip(page.locator(".summary dt").all_inner_texts(), page.locator(".summary dd").all_inner_texts(), strict=True)
    )
    assert tiles["complete runs"].split() == ["12", "1", "failed,", "1", "left", "out"]
    failed, left_out = (t.locator("tbody td").all_inner_texts() for t in page.locator("table.plain").all())
    assert failed[:2] == [FAILED, f"MemoryError: {EVIL}"]
    assert failed[3].endswith(f"{FAILED}/results.h5")
    assert left_out[0].endswith("foreign.h5")
    assert left_out[1] == "not an HDF5 file"


def test_the_table_sorts_by_number(page):
    assert len(column(page, "run")) == 13
    for order, named in ((1, "ascending"), (-1, "descending")):
        sort(page, "pipeline ms", named)
        *times, none = column(page, "pipeline ms")
        assert none == "-"  # the failed run has no time: behind all that have one, either way
        assert list(map(float, times)) == sorted(map(float, times))[::order]
        assert len(times) == 12
    sort(page, "tile", "ascending")
    assert column(page, "tile") == sorted(column(page, "tile"), key=int)


def test_the_search_filters_and_the_figures_follow(page):
    rows = page.locator("#runs tbody tr").all_inner_texts()
    page.wait_for_function(BARS.format(12))
    page.locator(".dt-search input").fill("failed")
    assert column(page, "run") == [FAILED]
    page.wait_for_function(BARS.format(0))
    page.locator(".dt-search input").fill("128")
    found = [text for text in rows if "128" in text]
    assert page.locator("#runs tbody tr").all_inner_texts() == found
    assert 3 <= len(found) < 12
    assert "filtered from 13" in page.locator(".dt-info").inner_text()
    page.wait_for_function(BARS.format(len(found)))
    page.locator(".dt-search input").fill("")
    page.wait_for_function(BARS.format(12))
    assert page.locator("#runs tbody tr").all_inner_texts() == rows


def test_a_column_s_menu_filters_by_its_values(page):
    page.locator("#runs thead th", has_text=re.compile("^tile")).first.locator(
        ".dtcc-button_dropdown, .dtcc-button"
    ).first.click()
    page.locator(".dtcc-dropdown .dtcc-button", has_text=re.compile("^8$")).click()
    assert column(page, "tile") == ["8"] * 4
    page.wait_for_function(BARS.format(4))
    page.keyboard.press("Escape")
    page.locator("#runs thead th").first.locator(".dtcc-button").first.click()
    assert FAILED in page.locator(".dtcc-dropdown .dtcc-button").all_inner_texts()


HOVERED = [("sqnr", 2, 0), ("curves", 0, 1), ("channels", 1, 3), ("propagation", 1, 1), ("stages", 3, 2)]


@pytest.mark.parametrize(("figure", "trace", "point"), HOVERED)
def test_hovering_tells_run_and_layer_and_takes_names_as_they_are(still, figure, trace, point):
    page = still
    page.locator(f"#figure-{figure}").scroll_into_view_if_needed()
    x, y = plot(
        page,
        figure,
        f"""(() => {{
            const trace = gd.data[{trace}], full = gd._fullLayout, box = gd.getBoundingClientRect();
            const xaxis = full.xaxis, yaxis = trace.yaxis === 'y2' ? full.yaxis2 : full.yaxis;
            const bar = trace.type === 'bar' ? gd.calcdata[{trace}][{point}] : null;
            const place = bar ? bar.b + bar.s / 2 : trace.x[{point}];
            return [box.left + xaxis._offset + xaxis.d2p(place), box.top + yaxis._offset + yaxis.d2p(trace.y[{point}])];
        }})()""",
    )
    page.mouse.move(x, y)
    label = page.locator(f"#figure-{figure} .hoverlayer .hovertext")
    label.first.wait_for()
    text = " ".join(label.first.locator("tspan, text").all_text_contents())
    assert re.search(r"\brun .*: n=\d+ tile=\d+", text)
    if figure == "stages":  # a bar is a run, over all of its layers
        assert "all 3 layers" in text
    else:
        assert f"layer {{}}: block.{EVIL}".format(re.search(r"layer (\d)", text)[1]) in text


def test_another_swept_key_changes_the_axis(page):
    assert plot(page, "time", "gd.layout.xaxis.title.text") == "n"
    assert plot(page, "time", "gd.layout.xaxis.type") == "log"
    page.locator("#figure-time select[name=x]").select_option(label="tile")
    assert plot(page, "time", "gd.layout.xaxis.title.text") == "tile"
    lines = "gd.data.filter((t) => t.mode === 'lines+markers').flatMap((t) => t.{})"
    assert sorted(set(plot(page, "time", lines.format("x")))) == list(TILES)
    pipeline = plot(page, "time", lines.format("y"))
    page.locator("#figure-time select[name=y]").select_option(label="relu")
    relu = plot(page, "time", lines.format("y"))
    assert len(relu) == len(pipeline) == 12
    assert max(relu) < min(pipeline)


def test_run_and_layer_choose_what_the_figures_show(page, folder):
    collection = collect([folder / "sweep"])
    page.locator("#figure-curves select[name=run]").select_option("3")
    page.locator("#figure-curves select[name=layer]").select_option("2")
    mine = collection.curves[(collection.curves["run"] == "03") & (collection.curves["layer"] == 2)]
    shown = [value for value in plot(page, "curves", "gd.data[0].y") if value is not None]
    assert shown == pytest.approx(mine.sort_values("gamma")["error_relative"].tolist(), rel=1e-3)
    ring = plot(page, "curves", "[gd.data.at(-1).x, gd.data.at(-1).y].flat()")
    assert ring == pytest.approx(
        mine[mine["chosen"]][["gamma", "error_relative"]].to_numpy().ravel().tolist(), rel=1e-3
    )
    page.locator("#figure-stages select[name=run]").select_option("5")
    layers = collection.layers[collection.layers["run"] == "05"]
    assert plot(page, "stages", "gd.data[1].x") == pytest.approx(layers["ms.compute_s"].tolist(), rel=1e-4)
    page.locator("#figure-stages select[name=unit]").select_option("share")
    assert plot(page, "stages", "gd._fullLayout.xaxis.range[1]") == pytest.approx(100, rel=0.06)


LUMINANCE = """(color) => { const [r, g, b] = color.match(/[\\d.]+/g).map(Number); return (r + g + b) / 765; }"""


def brightness(page):
    """Of the page, of its text, of the table's rows, and of a plot's text: 0 is black, 1 white."""
    return page.evaluate(
        f"""() => {{
            const bright = {LUMINANCE};
            const of = (selector, property) => bright(getComputedStyle(document.querySelector(selector))[property]);
            return [of('html', 'backgroundColor'), of('body', 'color'), of('#runs td', 'color'),
                of('#figure-sqnr .xtick text', 'fill')];
        }}"""
    )


def test_dark_is_dark_and_the_button_changes_it(page):
    light = brightness(page)
    assert light[0] > 0.9
    assert max(light[1:]) < 0.3
    page.locator("#theme").click()
    assert (dark := brightness(page))[0] < 0.15
    assert min(dark[1:]) > 0.8
    page.locator("#theme").click()
    assert brightness(page) == light
    page.emulate_media(color_scheme="dark")
    page.wait_for_function("document.documentElement.classList.contains('dark')")
    assert brightness(page) == dark
    page.emulate_media(color_scheme="light")


def test_it_prints_light_with_every_row_and_comes_back(page):
    page.emulate_media(color_scheme="dark")
    page.locator(".dt-length select").select_option("10")
    assert len(column(page, "run")) == 10
    printed = page.evaluate(
        """() => {
            dispatchEvent(new Event('beforeprint'));
            const seen = [document.documentElement.classList.contains('dark'),
                document.querySelectorAll('#runs tbody tr').length,
                Math.max(...[...document.querySelectorAll('.plot')].map((plot) => plot._fullLayout.width))];
            dispatchEvent(new Event('afterprint'));
            return seen;
        }"""
    )
    assert printed == [False, 13, 690]  # a plot is as wide as A4 less its margins
    assert len(column(page, "run")) == 10
    assert brightness(page)[0] < 0.15
    pdf = page.pdf(prefer_css_page_size=True)
    assert pdf.startswith(b"%PDF-")
    assert len(re.findall(rb"/Type\s*/Page\b", pdf)) in range(3, 8)
    page.emulate_media(color_scheme="light")


def test_many_layers_and_keys_fit(opened, folder):
    deep = make_run(folder / "deep", "layers=11")
    for run in range(9):
        config = {f"group.key{key}": "value" * (4 + (run == key)) for key in range(6)}
        vary(
            deep,
            folder / "many" / str(run),
            {"n": 2 ** (run % 3), "path": f"/data/rather_long/layers_{run}.h5"} | config,
        )
    boxes = "[...document.querySelectorAll('{}')].map((element) => element.getBoundingClientRect().toJSON())"
    title, top = (page := opened("many")).evaluate(boxes.format(".cbtitle text, .cbaxis g:last-child > text"))[::-1]
    assert title["top"] >= top["bottom"]
    page.locator("#figure-time select[name=colour]").select_option(label="path")
    assert plot(page, "time", "gd._fullLayout._size.h") > 220  # of 400: the legend leaves the most to the plot
    page.emulate_media(media="print")
    page.set_viewport_size({"width": 703, "height": 900})  # A4 less its margins
    assert len({box["right"] for box in page.evaluate(boxes.format("main, #runs"))}) == 1


def test_nothing_is_wider_than_a_phone(page):
    page.set_viewport_size({"width": 390, "height": 800})
    page.wait_for_function("Math.max(...[...document.querySelectorAll('.plot')].map((p) => p._fullLayout.width)) < 390")
    assert page.evaluate("document.scrollingElement.scrollWidth") <= 390
    page.set_viewport_size({"width": 1280, "height": 900})


def test_one_run_or_none_needs_no_choices(opened, folder):
    page = opened("first")
    assert page.locator("#figure-time").count() == 0
    assert page.locator("select[name=run]").count() == 0
    assert page.locator("#runs tbody tr").count() == 1
    assert page.faults == []
    (folder / "none").mkdir()
    (folder / "none" / "foreign.h5").write_text("no result")
    page = opened("none")
    assert "No result could be read." in page.locator("main").inner_text()
    assert page.locator(".figure").count() == 0
    assert page.faults == []


def test_the_page_holds_so_many_curves_and_channels_and_says_so(opened, folder, monkeypatch):
    collection = collect([folder / "sweep"])
    removed = collection.layers.groupby("run")["error_removed"].median().sort_values(ascending=False)
    monkeypatch.setattr(report_data, "MOST_CHANNEL_RUNS", 5)
    data = report_data.page_data(collection, [])
    assert len(data["channels"]) == 5 * 3
    best = {data["runs"].index(run) for run in removed.index[:2]}
    monkeypatch.setattr(report_data, "MOST_CHANNELS", 16 * 3 * 2)
    monkeypatch.setattr(report_data, "MOST_CURVE_POINTS", 5 * 3 * 2 + 7)
    data = report_data.page_data(collection, [])
    for held in (data["channels"], data["curves"]):
        assert len(held) == 2 * 3
        assert {item["run"] for item in held} == best
    monkeypatch.setattr(report_data, "MOST_CHANNELS", 16 * 2)  # less than one run: its layers with the most removed
    page = opened("sweep")
    caption = page.locator("#figure-channels .caption").inner_text()
    assert "the channels of 2 of 36 layers" in caption
    assert "the curves of 6 of 36 layers" in page.locator("#figure-curves .caption").inner_text()
    assert page.faults == []


def test_without_a_browser_the_tests_say_what_to_do(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(pytest.fail.Exception, match="make browser"):
        next(browser.__wrapped__())
