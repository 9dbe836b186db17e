"""The report in a real browser, for the tests of it: one browser a file, and pages that note every fault."""

import shutil

import pytest

from awq_pycuda.analysis.collect import collect
from awq_pycuda.analysis.report import write_report

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = ("--disable-gpu", "--no-first-run", *(f"--disable-{what}" for what in ("background-networking", "sync")))
FLAGS += ("--disable-component-update",)


@pytest.fixture(scope="module")
def browser():
    """One browser for all tests of a file."""
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.fail(f"no browser for the tests of the report ({', '.join(BROWSERS)}): `make browser` installs one")
    from playwright.sync_api import sync_playwright  # here, so that the GPU tests are collected without it

    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=path, args=list(FLAGS))
        yield found
        found.close()


@pytest.fixture(scope="module")
def show(browser):
    """`show(folder)`: the report on a folder of results, in a page that has been read whole."""
    contexts = []

    def open_report(folder, width=1280, **options):
        path = folder / "report.html"
        write_report(collect([folder]), path, [])
        context = browser.new_context(viewport={"width": width, "height": 900}, **options)
        contexts.append(context)
        page = context.new_page()
        page.faults, page.requested = [], []
        page.on("console", lambda message: page.faults.append(message.text))
        page.on("pageerror", lambda error: page.faults.append(str(error)))
        page.on("request", lambda request: page.requested.append(request.url))
        page.goto(path.as_uri())
        page.wait_for_selector("html[data-ready]")
        return page

    yield open_report
    for context in contexts:
        context.close()


def plot(page, figure, expression):
    """What a figure's Plotly element `gd` says."""
    return page.evaluate(
        f"(() => {{ const gd = document.querySelector('#figure-{figure} .plot'); return {expression}; }})()"
    )


def beyond(page):
    """Elements that reach beyond the screen and stand in nothing that scrolls and says so."""
    return page.evaluate(
        """() => [...document.querySelectorAll('main *, header *')].filter((e) => {
            const box = e.getBoundingClientRect();
            return box.width && box.right > innerWidth + 1 && !e.closest('.more-right') && !e.closest('svg');
        }).map((e) => e.outerHTML.slice(0, 80))"""
    )
