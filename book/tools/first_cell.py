"""The first code cell of every chapter, which installs the package where it is missing.

A chapter opened on Colab has no repository around it. Its first code cell brings the package, and
does nothing where `apl` can be imported. The book does not show the cell, and neither nbval nor
nbclient runs it: an execution of the book must not install anything.
"""

from __future__ import annotations

import nbformat

# Hidden in the book; left alone by nbval; left alone by nbclient.
TAGS = ["remove-cell", "nbval-skip", "skip-execution"]

# A chapter does not move an installed numpy or torch, whose versions fit the machine's GPU. pip
# would, to get a newer torchvision say: so it is told which versions there are.
WITH_ADDRESS = """\
# Installs the package where it is missing, for example on Colab.
from importlib.metadata import version
from importlib.util import find_spec

if find_spec("apl") is None:
    have = [name for name in ("numpy", "torch") if find_spec(name)]
    keep = " ".join(f"{{name}}=={{version(name)}}" for name in have)
    %pip install --quiet {{keep}} "{requirement}"
"""

WITHOUT_ADDRESS = """\
# Says how to install the package where it is missing.
from importlib.util import find_spec

if find_spec("apl") is None:
    raise ModuleNotFoundError(
        "apl is missing: run `pip install .` in a copy of its repository."
    )
"""


def source(requirement: str | None) -> str:
    """Return the text of the cell, given what pip is to install; without it, a sentence."""
    text = WITHOUT_ADDRESS if requirement is None else WITH_ADDRESS.format(requirement=requirement)
    return text.rstrip("\n")


def is_first_cell(cell: nbformat.NotebookNode) -> bool:
    """Say whether a cell is the one that `put` puts into a chapter."""
    return cell.cell_type == "code" and set(TAGS) <= set(cell.metadata.get("tags", []))


def put(notebook: nbformat.NotebookNode, requirement: str | None) -> None:
    """Put the cell into a chapter in place: after the title, before any other code."""
    cell = nbformat.v4.new_code_cell(source(requirement), id="install", metadata={"tags": TAGS})
    if (notebook.nbformat, notebook.nbformat_minor) < (4, 5):
        del cell["id"]  # which older notebooks, and those saved by Colab, do not have
    others = [other for other in notebook.cells if not is_first_cell(other)]
    title = 1 if others and others[0].cell_type == "markdown" else 0
    notebook.cells = [*others[:title], cell, *others[title:]]
