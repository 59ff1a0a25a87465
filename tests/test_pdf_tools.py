"""The making of the PDF, apart from TeX: tests/browser/test_pdf.py looks at the PDF itself."""

from __future__ import annotations

import doctest
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ROOT / "book" / "tools"
sys.path += [str(TOOLS), str(TOOLS / "latex")]

import build  # noqa: E402
import pdf  # noqa: E402
import pdf_link  # noqa: E402

CONFIG = yaml.safe_load((ROOT / "_config.yml").read_text())
MACROS = CONFIG["sphinx"]["config"]["mathjax3_config"]["tex"]["macros"]


def test_chapters_that_measure_time_are_there():
    assert all((ROOT / "book" / name).exists() for name in build.ALONE)


def test_every_macro_of_the_site_is_one_in_print():
    defined = re.findall(r"\\renewcommand\{\\(\w+)\}", pdf.macros(CONFIG))
    assert defined == list(MACROS)


def test_examples_of_the_tools():
    import apl_tables

    for module in (pdf, apl_tables):
        failed, tried = doctest.testmod(module)
        assert tried > 0 and failed == 0, module.__name__


def test_without_tex_one_sentence_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(pdf.shutil, "which", lambda name: None)
    assert pdf.build(lambda *options: pytest.fail("nothing to build with"), build.stored()) == 1
    said = capsys.readouterr().err
    assert "latexmk and xelatex cannot be found" in said
    assert "apt-get install --no-install-recommends latexmk texlive-xetex" in said


@pytest.mark.parametrize(
    "line",
    [
        "Missing character: There is no ✗ in font TeX Gyre Pagella!",
        "LaTeX Warning: Reference `book/digits:fig' on page 3 undefined on input line 12.",
        "LaTeX Warning: Hyper reference `term' on page 3 undefined on input line 12.",
        "LaTeX Warning: Citation `ma' on page 3 undefined on input line 12.",
        r"Overfull \hbox (80.0pt too wide) in paragraph at lines 3--4",
    ],
)
def test_what_a_reader_would_trip_over_is_a_mistake(line):
    log = f"This is XeTeX\n{line}\nOverfull \\hbox (1.5pt too wide) in paragraph at lines 1--2\n"
    assert pdf.mistakes(log) == [line]


def test_packages_are_the_same_wherever_they_are_installed():
    workflow = (ROOT / ".github" / "workflows" / "publish.yml").read_text()
    assert pdf.PACKAGES in workflow
    assert pdf.PACKAGES in (ROOT / ".ci" / "run").read_text()


def html_config():
    return SimpleNamespace(templates_path=[], html_extra_path=[], html_theme_options={})


def test_the_site_links_to_the_pdf_where_there_is_one(tmp_path):
    path = tmp_path / pdf.PDF.name
    path.write_bytes(b"%PDF-")
    config = html_config()
    pdf_link.add_link(None, config, path)
    assert config.html_extra_path == [str(path)]
    (template,) = config.html_theme_options["primary_sidebar_end"]
    (folder,) = map(Path, config.templates_path)
    assert f"pathto('{path.name}', 1)" in (folder / template).read_text()


def test_without_a_pdf_there_is_no_link(tmp_path):
    config = html_config()
    pdf_link.add_link(None, config, tmp_path / pdf.PDF.name)
    assert config == html_config()


def test_the_pdf_is_named_in_the_citation_file():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert pdf.PDF.name in citation["abstract"]
