"""A small Sphinx extension: what the book needs in LaTeX beyond what Sphinx and Jupyter Book do.

Only `book/tools/build.py --pdf` loads it. Jupyter Book's LaTeX support makes parts of the captions
in `_toc.yml` and leaves folded code out; this adds what a printed book needs besides:

- numbers as on the site: chapters are numbered where `_toc.yml` says so, and nowhere else;
- the first page of the book is a chapter with sections, like any other;
- definitions, theorems, proofs, exercises and solutions are environments of `preamble.tex`, with
  an anchor where they stand;
- outputs of folded cells are kept, and the bibliography stays where `_toc.yml` puts it.
"""

from __future__ import annotations

from typing import Any

from apl_tables import Tables
from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.builders.latex.nodes import thebibliography
from sphinx.config import Config
from sphinx.transforms import SphinxTransform
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.util.docutils import SphinxTranslator
from sphinx_exercise.nodes import (
    depart_exercise_enumerable_node,
    depart_exercise_node,
    depart_solution_node,
    exercise_enumerable_node,
    exercise_node,
    solution_node,
    visit_exercise_enumerable_node,
    visit_exercise_node,
    visit_solution_node,
)
from sphinx_jupyterbook_latex.nodes import RootHeader
from sphinx_proof.nodes import (
    NODE_TYPES,
    depart_enumerable_node,
    depart_unenumerable_node,
    proof_node,
    unenumerable_node,
    visit_enumerable_node,
    visit_unenumerable_node,
)

NUMBERED = "apl_numbered"  # an attribute of the toctrees of the first page


def own_class(app: Sphinx, config: Config) -> None:
    """Use Sphinx's own document class: Jupyter Book's needs half a gigabyte of TeX's fonts."""
    config["latex_theme"] = "manual"
    config["latex_elements"]["preamble"] = "\\input{preamble.tex}\n"


class RememberNumbered(SphinxTransform):
    """Note on the first page which of its tables of contents number their chapters."""

    default_priority = 600

    def apply(self, **kwargs: Any) -> None:
        """Run the transform."""
        for toctree in self.document.findall(addnodes.toctree):
            toctree.parent[NUMBERED] = bool(toctree.get("numbered"))


class KeepOutputs(SphinxPostTransform):
    """Fold a cell's code only: what it shows is shown."""

    default_priority = 390  # before Jupyter Book's, at 400
    formats = ("latex",)

    def run(self, **kwargs: Any) -> None:
        """Run the transform."""
        for node in self.document.findall(nodes.container):
            classes = node["classes"]
            if "tag_hide-cell" in classes:
                classes[classes.index("tag_hide-cell")] = "tag_hide-input"


class Proofs(SphinxPostTransform):
    """Take a proof out of the untitled box in which sphinx-proof puts it."""

    default_priority = 390
    formats = ("latex",)

    def run(self, **kwargs: Any) -> None:
        """Run the transform."""
        for node in self.document.findall(proof_node):
            (box,) = node.children
            node.children = []
            node.extend(box.children)
            text = next(node.findall(nodes.Text))
            if text.startswith("Proof. "):
                rest = nodes.Text(text.removeprefix("Proof. "))
                text.parent.replace(text, [nodes.emphasis("", "Proof."), nodes.Text(" "), rest])


def latex(text: str) -> nodes.raw:
    """Return a node that is this LaTeX."""
    return nodes.raw("", text, format="latex")


class Descriptions(SphinxPostTransform):
    """Begin a paragraph where autodoc begins to describe a module: Sphinx goes on in the last."""

    default_priority = 390
    formats = ("latex",)

    def run(self, **kwargs: Any) -> None:
        """Run the transform."""
        for node in list(self.document.findall(addnodes.index)):
            if any(entry[1].startswith("module;") for entry in node["entries"]):
                node.parent.insert(node.parent.index(node), latex("\n\n"))


class Chapters(SphinxPostTransform):
    """Finish the order of chapters that Jupyter Book's transform (at 700) has made of the book."""

    default_priority = 750
    formats = ("latex",)

    def run(self, **kwargs: Any) -> None:
        """Run the transform."""
        if self.env.docname != self.config.master_doc:
            return
        title = self.env.titles[self.config.master_doc]
        first = next(self.document.findall(nodes.section))
        heading = nodes.inline("", "", *(child.deepcopy() for child in title.children))
        first.insert(0, [latex("\n\\aplnumbered{-1}\n\\chapter{"), heading, latex("}\n")])

        for part in list(self.document.children):
            wrapped = [n for n in part.findall(nodes.Element) if NUMBERED in n]
            if wrapped:
                numbered = any(node[NUMBERED] for node in wrapped)
                before = latex(f"\n\\aplnumbered{{{0 if numbered else -1}}}\n")
                part.parent.insert(part.parent.index(part), before)

        self.bibliography_in_place()

    def bibliography_in_place(self) -> None:
        """Move the list of references back to its page, from the end of the document."""
        lists = [node for node in self.document.children if isinstance(node, thebibliography)]
        pages = [
            page
            for page in self.document.findall(addnodes.start_of_file)
            if page["docname"] in self.bibliography_pages()
        ]
        for node, page in zip(lists, pages, strict=True):
            self.document.remove(node)
            next(page.findall(nodes.section)).append(node)

    def bibliography_pages(self) -> set[str]:
        """Return the names of the pages with a bibliography directive."""
        domain: Any = self.env.get_domain("cite")
        return {key.docname for key in domain.bibliographies}


def kind(node: nodes.Element) -> str:
    """Return the environment of preamble.tex in which a statement is set."""
    if isinstance(node, solution_node):
        return "aplsolution"
    if isinstance(node, exercise_node | exercise_enumerable_node):
        return "aplexercise"
    example = node.get("realtype") in {"example", "remark"}
    return "aplexample" if example else "aplstatement"


def visitors(visit: Any, depart: Any) -> tuple[Any, Any]:
    """Return two visitors that set a statement as theirs do, but in an environment of its own."""
    generic = "\\begin{sphinxadmonition}{note}"

    def enter(self: SphinxTranslator, node: nodes.Element) -> None:
        self.body.append("\n\\phantomsection")
        visit(self, node)

    def leave(self: SphinxTranslator, node: nodes.Element) -> None:
        depart(self, node)
        at = max(i for i, piece in enumerate(self.body) if piece.strip() == generic)
        self.body[at] = f"\n\\begin{{{kind(node)}}}"
        self.body[-1] = self.body[-1].replace("sphinxadmonition", kind(node))

    return enter, leave


def visit_proof(self: SphinxTranslator, node: nodes.Element) -> None:
    """Begin a proof."""
    self.body.append("\n\\begin{aplproof}\n")


def depart_proof(self: SphinxTranslator, node: nodes.Element) -> None:
    """End a proof."""
    self.body.append("\\end{aplproof}\n")


def visit_heading(self: SphinxTranslator, node: nodes.Element) -> None:
    """Begin a heading of the first page."""
    self.body.append("\n\\section{")


def depart_heading(self: SphinxTranslator, node: nodes.Element) -> None:
    """End a heading of the first page."""
    self.body.append("}\n")


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the extension."""
    app.connect("config-inited", own_class, priority=900)
    app.add_transform(RememberNumbered)
    app.add_post_transform(KeepOutputs)
    app.add_post_transform(Proofs)
    app.add_post_transform(Descriptions)
    app.add_post_transform(Chapters)
    app.add_post_transform(Tables)
    statement = visitors(visit_enumerable_node, depart_enumerable_node)
    for cls in NODE_TYPES.values():
        app.add_node(cls, override=True, latex=statement)
    for cls, visit, depart in (
        (unenumerable_node, visit_unenumerable_node, depart_unenumerable_node),
        (exercise_node, visit_exercise_node, depart_exercise_node),
        (
            exercise_enumerable_node,
            visit_exercise_enumerable_node,
            depart_exercise_enumerable_node,
        ),
        (solution_node, visit_solution_node, depart_solution_node),
    ):
        app.add_node(cls, override=True, latex=visitors(visit, depart))
    app.add_node(proof_node, override=True, latex=(visit_proof, depart_proof))
    app.add_node(RootHeader, override=True, latex=(visit_heading, depart_heading))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
