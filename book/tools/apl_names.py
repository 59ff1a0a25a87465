"""A small Sphinx extension for book/api.md: names that lead somewhere, signatures one can read.

Readers, and docstrings, say `apl.loss` and `apl.symbolic.normalize`; described are
`apl.losses.loss` and `apl.symbolic.expressions.normalize`, where the code is.
"""

from __future__ import annotations

from collections.abc import Iterable

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util.nodes import make_refnode


def described(alias: str, names: Iterable[str]) -> str | None:
    """Return the described name that an alias stands for, if exactly one can be meant.

    >>> described("apl.loss", ["apl.losses.loss", "apl.protocols.Protocol.loss"])
    'apl.losses.loss'
    >>> described("apl.names", ["apl.losses.names", "apl.noise.names"])
    """
    package, _, last = alias.rpartition(".")
    if not alias.startswith("apl."):
        return None
    found = [n for n in names if n.startswith(f"{package}.") and n.rpartition(".")[2] == last]
    nearest = min((n.count(".") for n in found), default=0)
    near = [n for n in found if n.count(".") == nearest]
    return near[0] if len(near) == 1 else None


def resolve(
    app: Sphinx, env: BuildEnvironment, node: addnodes.pending_xref, text: nodes.TextElement
) -> nodes.reference | None:
    """Return a reference for a name that Sphinx has not found."""
    if node.get("refdomain") != "py":
        return None
    known = env.domains["py"].get_objects()
    objects = {name: (page, anchor) for name, _, _, page, anchor, _ in known}
    name = described(node["reftarget"], objects)
    if name is None:
        return None
    page, anchor = objects[name]
    return make_refnode(app.builder, node["refdoc"], page, anchor, text, name)


def readable(
    app: Sphinx, what: str, name: str, obj: object, options: object, signature: str, result: str
) -> tuple[str, str] | None:
    """Write a default that a data class computes as `...`: Sphinx cannot parse `<factory>`."""
    if signature and "<factory>" in signature:
        return signature.replace("<factory>", "..."), result
    return None


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the extension."""
    app.connect("missing-reference", resolve)
    app.connect("autodoc-process-signature", readable)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
