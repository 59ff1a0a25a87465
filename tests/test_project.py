"""The files that are not code: packaging, table of contents, stored notebooks, README figure."""

from __future__ import annotations

import base64
import re
import sys
import tomllib
from pathlib import Path

import nbformat
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

sys.path.append(str(Path(__file__).resolve().parents[1] / "book" / "tools"))

import address
import first_cell

ROOT = Path(__file__).resolve().parents[1]
BOOK = ROOT / "book"
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
NOTEBOOKS = sorted(BOOK.glob("*.ipynb"))
# nbval and nbclient leave cells with these tags alone, so they have no outputs to store.
SKIPPED = {"nbval-skip", "skip-execution"}
# What conda-forge calls the packages it has under another name.
CONDA_NAMES = {"pytorch": "torch", "matplotlib-base": "matplotlib"}


def tags(cell):
    return set(cell.metadata.get("tags", []))


def code_cells(path):
    cells = nbformat.read(path, as_version=4).cells
    return [cell for cell in cells if cell.cell_type == "code" and cell.source.strip()]


each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


# --- packaging ----------------------------------------------------------------------------------


def pyproject_requirements():
    lines = list(PROJECT["dependencies"])
    for extra in PROJECT["optional-dependencies"].values():
        lines += extra
    found = {}
    for requirement in map(Requirement, lines):
        if requirement.name != PROJECT["name"]:  # an extra that includes another
            assert requirement.name not in found, f"{requirement.name} is listed twice"
            found[canonicalize_name(requirement.name)] = requirement.specifier
    return found | {"python": SpecifierSet(PROJECT["requires-python"])}


def environment_requirements():
    entries = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    lines = [entry for entry in entries if isinstance(entry, str) and entry != "pip"]
    (from_pip,) = (entry["pip"] for entry in entries if isinstance(entry, dict))
    assert from_pip[-1] == "-e .", "the last thing installed is the package itself"
    found = {}
    for requirement in map(Requirement, lines + from_pip[:-1]):
        name = canonicalize_name(requirement.name)
        found[CONDA_NAMES.get(name, name)] = requirement.specifier
    return found


def test_conda_and_pip_ask_for_the_same_packages():
    assert environment_requirements() == pyproject_requirements()


def test_every_requirement_has_a_lower_bound_and_none_is_pinned():
    for name, specifier in pyproject_requirements().items():
        operators = {clause.operator for clause in specifier}
        assert ">=" in operators, name
        assert operators <= {">=", "<"}, name


def test_citation_names_this_version_and_the_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == PROJECT["version"]
    (paper,) = citation["references"]
    bibliography = (BOOK / "references.bib").read_text()
    entry = bibliography.split("@inproceedings{ma2020normalized,")[1].split("\n}\n")[0]
    names = [f"{author['family-names']}, {author['given-names']}" for author in paper["authors"]]
    assert " and ".join(names) in entry
    assert paper["title"] in entry
    assert f"{paper['start']}--{paper['end']}" in entry


# --- the book -----------------------------------------------------------------------------------


def toc_files(node):
    for key, value in node.items():
        if key in ("root", "file"):
            yield value
        elif isinstance(value, list):
            for child in value:
                yield from toc_files(child)


def test_table_of_contents_lists_every_page_once():
    listed = sorted(toc_files(yaml.safe_load((ROOT / "_toc.yml").read_text())))
    pages = sorted(
        path.relative_to(ROOT).with_suffix("").as_posix()
        for path in BOOK.iterdir()
        if path.suffix in {".md", ".ipynb"}
    )
    assert listed == pages


def test_every_citation_has_an_entry():
    entries = set(re.findall(r"^@\w+\{(\w+),", (BOOK / "references.bib").read_text(), re.MULTILINE))
    for path in sorted(BOOK.glob("*.md")) + NOTEBOOKS:
        for keys in re.findall(r"\{cite(?::\w+)?\}`([^`]+)`", path.read_text()):
            assert {key.strip() for key in keys.split(",")} <= entries, path.name


def test_there_are_chapters():
    assert NOTEBOOKS


@each_notebook
def test_first_code_cell_installs_the_package(path):
    (cell, *others) = code_cells(path)
    assert cell.source == first_cell.source(address.requirement(address.kept())), (
        "run `make address`"
    )
    assert {"remove-cell"} | SKIPPED <= tags(cell)
    assert (cell.execution_count, cell.outputs) == (None, [])
    assert not any(first_cell.is_first_cell(other) for other in others)


@each_notebook
def test_notebook_is_stored_executed_from_top_to_bottom(path):
    counts = [cell.execution_count for cell in code_cells(path) if not tags(cell) & SKIPPED]
    assert counts, "a chapter runs something"
    assert counts == list(range(1, len(counts) + 1)), "run `make notebooks`"


@each_notebook
def test_notebook_stores_no_errors_and_no_warnings(path):
    for cell in code_cells(path):
        for output in cell.outputs:
            assert output.output_type != "error", cell.source
            assert output.get("name") != "stderr", cell.source


@each_notebook
def test_checked_cells_have_something_to_check(path):
    # nbval passes a checked cell that stores nothing, and skips images when it compares.
    for cell in code_cells(path):
        if "nbval-check-output" in tags(cell):
            text = [output.get("text", "") for output in cell.outputs]
            text += [
                value
                for output in cell.outputs
                for mime, value in output.get("data", {}).items()
                if mime.startswith("text/") and not value.startswith("<Figure size")
            ]
            assert any(piece.strip() for piece in text), cell.source


def test_some_cells_are_checked():
    assert any(
        "nbval-check-output" in tags(cell) for path in NOTEBOOKS for cell in code_cells(path)
    )


@each_notebook
def test_notebook_reads_well_outside_the_book(path):
    # GitHub and Colab know nothing of the macros in _config.yml and would print them in red.
    config = yaml.safe_load((ROOT / "_config.yml").read_text())
    macros = config["sphinx"]["config"]["mathjax3_config"]["tex"]["macros"]
    pattern = re.compile(r"\\(" + "|".join(macros) + r")(?![A-Za-z])")
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "markdown":
            assert not pattern.search(cell.source), cell.source


@each_notebook
def test_no_section_has_the_title_of_its_chapter(path):
    # Jupyter Book's LaTeX builder would take the section for the chapter.
    cells = nbformat.read(path, as_version=4).cells
    text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    titles = [title.strip() for title in re.findall(r"^#+ (.*)$", text, re.MULTILINE)]
    assert titles.count(titles[0]) == 1


@each_notebook
def test_no_proof_is_a_dropdown(path):
    # A proof has no title bar to click: the toggle script fails on it, and takes the solutions of
    # the page with it. A proof to fold is a `{dropdown}`.
    text = "\n".join(cell.source for cell in nbformat.read(path, as_version=4).cells)
    assert not re.search(r"\{prf:proof\}[^\n]*\n:class: dropdown", text)


def test_readme_shows_the_figure_stored_in_its_chapter():
    (cell,) = (
        cell for path in NOTEBOOKS for cell in code_cells(path) if "readme-figure" in tags(cell)
    )
    (image,) = (out.data["image/png"] for out in cell.outputs if "image/png" in out.get("data", {}))
    figure = BOOK / "images" / "first-figure.png"
    assert figure.read_bytes() == base64.b64decode(image), "run `make notebooks`"
    assert figure.relative_to(ROOT).as_posix() in (ROOT / "README.md").read_text()
