"""The rendered book in Chromium, from file:// and without a network.

`make test` runs this after it has rendered the book; the folder is BOOK_HTML or the one that
`book/tools/build.py --stored` writes. Not part of a plain `pytest` run: see norecursedirs.
"""

from __future__ import annotations

import html
import os
import re
import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit

import pytest
from playwright.sync_api import Browser, BrowserContext, Error, Page, sync_playwright

ROOT = Path(__file__).resolve().parents[2]
BOOK = Path(os.environ.get("BOOK_HTML", ROOT / "_build/check/_build/html")).resolve()
INSPECT = Path(__file__).with_name("inspect.js").read_text()
CHAPTERS = re.findall(r"(?:root|file): (\S+)", (ROOT / "_toc.yml").read_text())
WIDTHS = {1280: "light", 390: "dark"}  # and the color scheme a page is first opened in
SYSTEM = ("chromium", "chromium-browser", "google-chrome")
NO_BROWSER = (
    "NO CHROMIUM STARTS, SO THE RENDERED BOOK IS NOT CHECKED. Install one (Debian: `apt-get install"
    " chromium`; anywhere: `.venv/bin/playwright install chromium`) and run `make test` again."
)


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    errors = []
    with sync_playwright() as playwright:
        for program in [*filter(None, map(shutil.which, SYSTEM)), None]:  # None: Playwright's own
            try:
                browser = playwright.chromium.launch(
                    executable_path=program, args=["--disable-gpu", "--disable-quic"]
                )
            except Error as error:
                errors.append(f"{program}: {error.message.splitlines()[0]}")
            else:
                yield browser
                browser.close()
                return
    stop = pytest.fail if os.environ.get("CI") else pytest.skip
    stop("\n".join([NO_BROWSER, *errors]))


def opened(browser: Browser, width: int) -> BrowserContext:
    """Return a window without a network that notes what goes wrong in `context.wrong`."""
    context = browser.new_context(
        viewport={"width": width, "height": 900},
        color_scheme=WIDTHS[width],
        offline=True,
        reduced_motion="reduce",
    )
    context.set_default_timeout(20_000)
    context.wrong = wrong = []

    def requested(request) -> None:
        if not request.url.startswith((BOOK.as_uri() + "/", "data:", "blob:")):
            wrong.append(f"request: {request.url}")

    def logged(message) -> None:
        if message.type == "error":
            wrong.append(f"console: {message.text}")

    context.on("request", requested)
    context.on("requestfailed", lambda request: wrong.append(f"failed: {request.url}"))
    context.on("console", logged)
    context.on("weberror", lambda error: wrong.append(f"script: {error.error}"))
    return context


@pytest.fixture
def page(browser: Browser, width: int) -> Iterator[Page]:
    """A page of the given width on which, in the end, nothing went wrong."""
    context = opened(browser, width)
    yield context.new_page()
    wrong = context.wrong
    context.close()
    assert not wrong, "\n".join(wrong)


each_width = pytest.mark.parametrize("width", WIDTHS)


def visit(page: Page, name: str) -> None:
    """Open a page of the book and wait until its formulas are set."""
    page.goto(f"{BOOK.as_uri()}/{name}.html")
    page.evaluate("window.MathJax?.startup?.promise.then(() => document.fonts.ready).then(() => 0)")
    page.add_style_tag(content="* { transition: none !important; animation: none !important }")


def unfold(page: Page) -> None:
    """Click whatever is folded, from the top to the bottom of the page."""
    closed = page.locator(".toggle-hidden > .admonition-title .toggle-button").or_(
        page.locator(".bd-article details:not([open]) > summary")
    )
    for _ in range(closed.count()):
        closed.first.click()
    assert closed.count() == 0, "folds that do not open on a click"


@cache
def anchors(path: Path) -> set[str]:
    return {html.unescape(name) for name in re.findall(r'\bid="([^"]+)"', path.read_text())}


def dead_links(page: Page) -> set[str]:
    """Return the links of a page into the book that lead nowhere."""
    dead = set()
    for link in page.evaluate("[...document.links].map((link) => link.href)"):
        if link.startswith("file:"):
            url, fragment = urldefrag(link)
            path = Path(unquote(urlsplit(url).path))
            known = path.is_file() and path.is_relative_to(BOOK)
            if not known or (fragment and unquote(fragment) not in anchors(path)):
                dead.add(link)
    return dead


def test_the_book_is_rendered() -> None:
    missing = [name for name in CHAPTERS if not (BOOK / f"{name}.html").is_file()]
    assert not missing, "run `python book/tools/build.py --stored` first"


@each_width
@pytest.mark.parametrize("name", [*CHAPTERS, "search", "genindex"])
def test_page(page: Page, name: str, width: int) -> None:
    visit(page, name)
    unfold(page)
    schemes = ["light", "dark"]
    for scheme in schemes if WIDTHS[width] == "light" else reversed(schemes):
        page.emulate_media(color_scheme=scheme)
        page.wait_for_selector(f"html[data-theme={scheme}]")
        wrong = page.evaluate(INSPECT)
        assert not wrong, f"{name}, {width} px, {scheme}:\n" + "\n".join(wrong)
    assert not dead_links(page)


@pytest.mark.parametrize("width", [1280])
def test_the_front_door_leads_to_the_first_page(page: Page, width: int) -> None:
    page.goto(f"{BOOK.as_uri()}/index.html")
    page.wait_for_url(f"**/{CHAPTERS[0]}.html")


@each_width
def test_search_finds_a_page_with_the_word(page: Page, width: int) -> None:
    visit(page, CHAPTERS[0])
    page.locator(".search-button__button:visible").first.click()
    field = page.locator("#pst-search-dialog input[name=q]")
    field.fill("memorization")
    field.press("Enter")
    page.wait_for_url("**/search.html?q=memorization**")
    page.locator("#search-results li a").first.click()
    page.wait_for_url("**/book/*.html*")
    assert "memoriz" in page.locator(".bd-article").inner_text().lower()
    assert not dead_links(page)
