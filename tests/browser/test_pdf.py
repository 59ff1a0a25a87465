"""The PDF of the whole book, as `make pdf` makes it; without TeX this is skipped, and says so."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from pypdf import PdfReader

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ROOT / "book" / "tools"
sys.path.append(str(TOOLS))

import pdf  # noqa: E402

TOC = yaml.safe_load((ROOT / "_toc.yml").read_text())
PAGES = [TOC["root"], *(page["file"] for part in TOC["parts"] for page in part["chapters"])]


def title(name: str) -> str:
    """Return the title of a page, as plain text."""
    for suffix in (".md", ".ipynb"):
        path = (ROOT / name).with_suffix(suffix)
        if path.exists():
            # In a notebook the heading is the first of the strings that say "# ...".
            (found, *_) = re.findall(r'^\s*"?# (.+?)(?:\\n)?"?,?$', path.read_text(), re.MULTILINE)
            return letters(re.sub(r"[`*$]", "", found))
    raise FileNotFoundError(name)


def letters(text: str) -> str:
    """Return a text without what typesetting changes: spaces, hyphens, quotes."""
    return re.sub(r"\W", "", text).lower()


@pytest.fixture(scope="module")
def reader() -> PdfReader:
    if missing := pdf.missing_programs():
        pytest.skip(
            f"THE PDF OF THE BOOK IS NOT CHECKED: {' and '.join(missing)} cannot be found. On"
            f" Debian: `apt-get install --no-install-recommends {pdf.PACKAGES}`"
        )
    done = subprocess.run(
        [sys.executable, TOOLS / "build.py", "--pdf"], capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return PdfReader(pdf.PDF)


@pytest.fixture(scope="module")
def texts(reader: PdfReader) -> list[str]:
    return [page.extract_text() for page in reader.pages]


def outline(items: list) -> list[str]:
    """Return all titles of an outline that may be nested."""
    return [
        title
        for item in items
        for title in (outline(item) if isinstance(item, list) else [letters(item.title)])
    ]


def test_every_page_of_the_book_is_a_chapter(reader: PdfReader) -> None:
    found = [found for found in outline(reader.outline) if found in {*map(title, PAGES)}]
    assert found == [title(name) for name in PAGES]


def test_every_part_is_in_the_outline(reader: PdfReader) -> None:
    assert {letters(part["caption"]) for part in TOC["parts"]} <= {*outline(reader.outline)}


def test_no_chapter_is_empty(reader: PdfReader) -> None:
    assert len(reader.pages) > 2 * len(PAGES)


def test_title_page_says_what_this_is(reader: PdfReader, texts: list[str]) -> None:
    config = yaml.safe_load((ROOT / "_config.yml").read_text())
    assert letters(config["title"]) in letters(texts[0])
    assert reader.metadata.title == config["title"]


def test_sheets_are_numbered_as_they_are_counted(texts: list[str]) -> None:
    for number, text in enumerate(texts[1:], start=2):
        assert text.split()[-1] == str(number), text[-200:]


def test_every_reference_is_resolved(reader: PdfReader, texts: list[str]) -> None:
    for text in texts:
        assert "??" not in text
        assert not re.search(r"\b(?:Fig\.|Table|Definition|Lemma|Theorem|Exercise) \.", text)
    actions = [
        link.get_object().get("/A", {}) for page in reader.pages for link in page.annotations or ()
    ]
    inside = {str(action["/D"]) for action in actions if action.get("/S") == "/GoTo"}
    assert inside, "the PDF has links"
    assert inside <= {*reader.named_destinations}


def test_statements_have_the_numbers_of_the_site(texts: list[str]) -> None:
    html = ROOT / "_build" / "check" / "_build" / "html"
    if not html.is_dir():
        pytest.skip("the site is not rendered: run `python book/tools/build.py --stored`")
    text = " ".join(" ".join(texts).split())
    numbered = re.compile(
        r'caption-number">(?:(?:Fig\.|Definition|Lemma|Proposition|Theorem|Exercise) \d+\.\d+)'
    )
    shown = {
        found.removeprefix('caption-number">')
        for name in PAGES
        for found in numbered.findall((html / f"{name}.html").read_text())
    }
    assert shown, "the site numbers its statements"
    assert {number for number in shown if number not in text} == set()


def test_fonts_are_embedded(reader: PdfReader) -> None:
    for page in reader.pages:
        for font in page["/Resources"].get("/Font", {}).values():
            inner = font.get_object().get("/DescendantFonts", [font])[0].get_object()
            described = inner["/FontDescriptor"].get_object()
            assert {"/FontFile", "/FontFile2", "/FontFile3"} & {*described}
