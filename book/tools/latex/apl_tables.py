"""Columns of the book's tables on paper.

On a screen a wide table scrolls. On paper LaTeX has to be told which columns may wrap: those of
words, in proportion to what stands in them, and never numbers; and a long table breaks over pages.
"""

from __future__ import annotations

import re
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.transforms.post_transforms import SphinxPostTransform

LINE = 88  # characters in a line of text
GAP = 2.6  # what every column adds, in characters
SHORT = 18  # a column this narrow does not wrap
ROWS = 12  # a table with more of them may break over pages


def width(node: nodes.Node) -> float:
    """Return about how many characters wide a cell is when set in one line."""
    if isinstance(node, nodes.Text):
        return len(node)
    if isinstance(node, nodes.math):
        symbols = re.sub(
            r"\\(frac|text|mathbf|operatorname|left|right)|[{}_^&\s]", "", node.astext()
        )
        return len(re.sub(r"\\[A-Za-z]+", "x", symbols))
    if isinstance(node, nodes.raw):
        return 0
    wider = 1.25 if isinstance(node, nodes.literal) else 1.0
    return wider * sum(map(width, node.children))


def columns(widths: list[float]) -> str:
    r"""Return the columns of a table in LaTeX, from the width of the widest cell in each.

    >>> columns([4, 12, 12])
    'lll'
    >>> columns([4, 60, 100])
    'l\\aplcolumn{0.378}\\aplcolumn{0.488}'
    """
    if sum(widths) + GAP * len(widths) <= LINE:
        return "l" * len(widths)
    long = [j for j, w in enumerate(widths) if w > SHORT] or list(range(len(widths)))
    fixed = sum(w for j, w in enumerate(widths) if j not in long) + GAP * len(widths)
    shares = {j: widths[j] ** 0.5 for j in long}  # the longest column must not starve the others
    room = max(1 - fixed / LINE, 0.3) / sum(shares.values())
    return "".join(
        f"\\aplcolumn{{{room * shares[j]:.3f}}}" if j in shares else "l" for j in range(len(widths))
    )


class Tables(SphinxPostTransform):
    """Choose the columns of every table, and let a long one break."""

    default_priority = 800
    formats = ("latex",)

    def run(self, **kwargs: Any) -> None:
        """Run the transform."""
        for table in list(self.document.findall(nodes.table)):
            rows = list(table.findall(nodes.row))
            cells = [
                [cell for cell in row.children if isinstance(cell, nodes.entry)] for row in rows
            ]
            if len({len(row) for row in cells}) != 1:
                continue  # with merged cells LaTeX is better at it
            widest = [max(map(width, column)) for column in zip(*cells, strict=True)]
            if len(rows) > ROWS:
                table["classes"].append("longtable")
            spec = addnodes.tabular_col_spec(spec="{" + columns(widest) + "}")
            table.parent.insert(table.parent.index(table), spec)
            for formula in list(table.findall(nodes.math)):
                if "\\frac" in formula.astext():
                    strut = nodes.raw("", "\\aplstrut{}", format="latex")
                    formula.parent.insert(formula.parent.index(formula), strut)
