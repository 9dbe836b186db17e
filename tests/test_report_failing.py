"""A figure of the report that fails says so in its place, in a real browser, and the others are drawn."""

import pytest
from browser_pages import browser, plot, show
from result_files import make_run, vary

from awq_pycuda.analysis import report_data

LINE = "This figure could not be drawn: TypeError"


@pytest.fixture
def page(show, tmp_path, monkeypatch):
    """A report in which the channels are no data at all, and the curves of the last of three layers are none."""
    first = make_run(tmp_path / "first")
    vary(first, tmp_path / "second", {"tile": 8})
    made = report_data._curves

    def curves(*arguments):
        found = made(*arguments)
        for curve in found["curves"]:
            curve["ratio"] = curve["ratio"] if curve["layer"] < 2 else None
        return found

    monkeypatch.setattr(report_data, "_curves", curves)
    monkeypatch.setattr(report_data, "_channels", lambda *_: [None])
    return show(tmp_path)


def state(page, figure):
    """Its caption, and whether its plot is seen."""
    place = page.locator(f"#figure-{figure}")
    return place.locator(".caption").inner_text(), place.locator(".plot").is_visible()


def test_one_that_fails_says_so_and_the_others_are_drawn(page):
    for figure in ("curves", "channels"):
        caption, seen = state(page, figure)
        assert caption.startswith(LINE)
        assert not seen
    for figure in ("answer", "sqnr", "propagation", "time", "stages"):
        caption, seen = state(page, figure)
        assert "could not be drawn" not in caption
        assert seen
        assert plot(page, figure, "gd.data.length")
    assert page.locator("#runs tbody tr").count() == 2
    assert {fault.split()[0] for fault in page.faults} == {"curves", "channels"}


def test_one_that_fails_is_drawn_again_when_something_else_is_chosen(page):
    choice = page.locator("#figure-curves select[name=layer]")
    choice.select_option("1")
    caption, seen = state(page, "curves")
    assert caption.startswith("The search's error")
    assert seen
    assert plot(page, "curves", "gd.data[0].y.length") > 3
    choice.select_option("2")
    assert state(page, "curves")[0].startswith(LINE)
    choice.select_option("0")
    page.locator("#theme").click()  # draws every figure again
    assert state(page, "curves")[1]
    assert state(page, "channels")[0].startswith(LINE)
