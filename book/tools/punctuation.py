"""A small Sphinx extension: a line does not break between a formula and its punctuation.

An inline formula is a box of its own, so a browser may start a line with the comma that follows
it, or end one with the parenthesis before it.
"""

from __future__ import annotations

import re
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.transforms.post_transforms import SphinxPostTransform

CLOSING = re.compile(r"[.,;:!?)\]’”]+(?:s\b)?|-\w+")
OPENING = re.compile(r"[(\[“]+$")


def kept_together(formula: nodes.math) -> None:
    """Put a formula and the punctuation that touches it into one span of class `keep`."""
    parent, place = formula.parent, formula.parent.index(formula)
    before = parent[place - 1] if place > 0 else None
    after = parent[place + 1] if place + 1 < len(parent) else None
    opening = OPENING.search(before) if isinstance(before, nodes.Text) else None
    closing = CLOSING.match(after) if isinstance(after, nodes.Text) else None
    if not opening and not closing:
        return
    span = nodes.inline("", "", classes=["keep"])
    parts: list[nodes.Node] = []
    if opening:
        parts.append(nodes.Text(str(before)[: opening.start()]))
        span += nodes.Text(opening.group())
    span += formula.deepcopy()
    parts.append(span)
    if closing:
        span += nodes.Text(closing.group())
        parts.append(nodes.Text(str(after)[closing.end() :]))
    parent[place - bool(opening) : place + 1 + bool(closing)] = parts


class Punctuation(SphinxPostTransform):
    """Keep every inline formula together with its punctuation."""

    default_priority = 900
    formats = ("html",)

    def run(self, **kwargs: Any) -> None:
        """Run the transform."""
        for formula in list(self.document.findall(nodes.math)):
            kept_together(formula)


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the extension."""
    app.add_post_transform(Punctuation)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
