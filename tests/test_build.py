"""How `make book` executes the chapters before Jupyter Book renders them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from jupyter_cache import get_cache

ROOT = Path(__file__).resolve().parents[1]
TOC = "parts: [{chapters: [{file: book/good}, {file: book/words}, {file: book/bad}]}]"
# In a process of its own: kernels and their event loops leave warnings behind.
EXECUTE = """
import sys
from pathlib import Path
import build
build.ROOT, build.CACHE, build.ALONE = Path.cwd(), Path("cache"), {*sys.argv[1:]}
build.execute()
"""


@pytest.fixture
def book(tmp_path):
    """A book of one chapter that runs, one that fails, and a page without code."""
    (tmp_path / "_toc.yml").write_text(TOC)
    (tmp_path / "_config.yml").write_text("execute: {timeout: 60}")
    folder = tmp_path / "book"
    folder.mkdir()
    (folder / "words.md").write_text("# Words")
    for name, code in {"good": "print(6 * 7)", "bad": "1 / 0"}.items():
        cells = [nbformat.v4.new_code_cell(code)]
        nbformat.write(nbformat.v4.new_notebook(cells=cells), folder / f"{name}.ipynb")
    return folder


def execute(book, *alone):
    """What is printed when the chapters are executed."""
    code = f"import sys; sys.path.insert(0, {str(ROOT / 'book' / 'tools')!r}){EXECUTE}"
    run = [sys.executable, "-c", code, *alone]
    return subprocess.run(
        run, cwd=book.parent, check=True, stdout=subprocess.PIPE, text=True
    ).stdout


def test_chapters_are_executed_once_and_what_fails_is_left_over(book):
    first = execute(book)
    assert first.startswith("Executing chapters: 2, ")
    assert "good.ipynb" in first and first.count("failed") == 1

    cache = get_cache(book.parent / "cache")
    good = nbformat.read(book / "good.ipynb", as_version=4)
    _, found = cache.merge_match_into_notebook(good)
    assert found.cells[0].outputs[0].text == "42\n"
    with pytest.raises(KeyError):
        cache.match_cache_notebook(nbformat.read(book / "bad.ipynb", as_version=4))
    cache.db.dispose()  # else a later Python warns of a connection that is not closed

    again = execute(book)
    assert again.startswith("Executing chapters: 1, ") and "good" not in again


def test_a_chapter_that_measures_time_waits_for_its_turn(book):
    assert execute(book, "good.ipynb", "bad.ipynb") == ""
