"""A small Sphinx extension: the PDF of the book is published with the pages and linked from each.

Where `make pdf` has not made one, there is no link.
"""

from __future__ import annotations

from pathlib import Path

from sphinx.application import Sphinx
from sphinx.config import Config

from pdf import PDF

TEMPLATES = Path(__file__).resolve().parents[1] / "_templates"
TEMPLATE = "pdf-link.html"


def add_link(app: Sphinx, config: Config, path: Path = PDF) -> None:
    """Copy the PDF beside the pages and put a link into the sidebar, if there is one."""
    if path.is_file():
        config.templates_path = [*config.templates_path, str(TEMPLATES)]
        config.html_extra_path = [*config.html_extra_path, str(path)]
        options = config.html_theme_options
        config.html_theme_options = options | {
            "primary_sidebar_end": [*options.get("primary_sidebar_end", []), TEMPLATE]
        }


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the extension."""
    app.connect("config-inited", add_link)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
