"""The book as one PDF: Sphinx writes LaTeX from the stored notebooks, latexmk runs xelatex.

The settings are those of the site, from `_config.yml`, so is every TeX macro; what differs on paper
is in `latex/`: an extension for the structure, a preamble for the look.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import yaml

ROOT = Path(__file__).resolve().parents[2]
OUTPUT = ROOT / "_build" / "pdf"
NAME = "normalized-losses"
PDF = OUTPUT / f"{NAME}.pdf"
SOURCES = Path(__file__).with_name("latex")
PACKAGES = (
    "latexmk texlive-xetex texlive-latex-extra texlive-fonts-recommended"
    " fonts-texgyre fonts-texgyre-math"
)
# A line this much wider than the text, in points, has left the paper.
MARGIN = 65.0
MONO = ("", "-Bold", "-Oblique", "-BoldOblique")


def missing_programs() -> list[str]:
    """Return what is needed and not installed."""
    return [name for name in ("latexmk", "xelatex") if shutil.which(name) is None]


def macros(config: dict[str, Any]) -> str:
    r"""Return LaTeX for the macros that the site gives to MathJax.

    >>> macro = {"norm": ["\\lVert #1 \\rVert", 1]}
    >>> print(macros({"sphinx": {"config": {"mathjax3_config": {"tex": {"macros": macro}}}}}))
    \providecommand{\norm}{}\renewcommand{\norm}[1]{\lVert #1 \rVert}
    """
    found = config["sphinx"]["config"]["mathjax3_config"]["tex"]["macros"]
    lines = []
    for name, meaning in found.items():
        text, count = meaning if isinstance(meaning, list) else (meaning, 0)
        arguments = f"[{count}]" if count else ""
        lines.append(
            f"\\providecommand{{\\{name}}}{{}}\\renewcommand{{\\{name}}}{arguments}{{{text}}}"
        )
    return "\n".join(lines)


def settings(config: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of the site with those of the PDF added."""
    config["latex"] = {"latex_documents": {"targetname": f"{NAME}.tex"}}
    fonts = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    sphinx = config["sphinx"]["config"]
    config["sphinx"]["local_extensions"]["apl_latex"] = str(SOURCES)
    sphinx["extensions"].append("apl_latex")
    sphinx["latex_additional_files"] = [
        str(SOURCES / "preamble.tex"),
        str(OUTPUT / "macros.tex"),
        *(str(fonts / f"DejaVuSansMono{style}.ttf") for style in MONO),
    ]
    sphinx["latex_domain_indices"] = False
    sphinx["latex_table_style"] = ["booktabs"]
    sphinx["latex_elements"] = {
        "papersize": "a4paper",
        "pointsize": "11pt",
        "extraclassoptions": "openany,oneside",
        "fncychap": "",
        "fontpkg": "",
        "geometry": "\\usepackage[margin=27mm, includehead=false]{geometry}",
        "makeindex": "",
        "printindex": "",
        "sphinxsetup": "verbatimwrapslines=true, verbatimforcewraps=false, "
        "InnerLinkColor={HTML}{1F5AA8}, OuterLinkColor={HTML}{1F5AA8}, "
        "VerbatimColor={HTML}{F7F7F8}, VerbatimBorderColor={HTML}{F7F7F8}",
        "fvset": "\\fvset{fontsize=\\small}",
        "figure_align": "!htb",
        "tocdepth": "\\setcounter{tocdepth}{1}",
    }
    return config


def mistakes(log: str) -> list[str]:
    """Return what the reader of a page would trip over, from the log of its last typesetting."""
    found = re.findall(r"^Missing character: .*", log, re.MULTILINE)
    found += re.findall(
        r"^LaTeX Warning: (?:Reference|Citation|Hyper reference) .*", log, re.MULTILINE
    )
    found += re.findall(r"^Package hyperref Warning: .*undefined.*", log, re.MULTILINE)
    wide = re.findall(r"^(Overfull \\hbox \(([\d.]+)pt too wide\).*)", log, re.MULTILINE)
    return found + [line for line, points in wide if float(points) > MARGIN]


def typeset(folder: Path) -> int:
    """Run latexmk in a folder; print what went wrong; return its exit status."""
    command = [
        "latexmk",
        "-gg",  # from the start: after a failure latexmk would not try the same text again
        "-xelatex",
        "-interaction=nonstopmode",
        "-halt-on-error",
        "-file-line-error",
    ]
    done = subprocess.run(
        [*command, f"{NAME}.tex"],
        cwd=folder,
        env=os.environ | {"LATEXOPTS": "", "XINDYOPTS": "", "max_print_line": "500"},
        capture_output=True,
        text=True,
        errors="replace",
    )
    log = (folder / f"{NAME}.log").read_text(errors="replace")
    if done.returncode:
        print(f"LaTeX failed; the whole log is {folder / NAME}.log:", file=sys.stderr)
        print("\n".join(log.splitlines()[-40:]), file=sys.stderr)
        return done.returncode
    found = mistakes(log)
    for line in found:
        print(line, file=sys.stderr)
    return 1 if found else 0


def build(jupyter_book: Callable[..., int], config: dict[str, Any]) -> int:
    """Write the PDF, given what runs Jupyter Book and the settings; return an exit status."""
    if missing := missing_programs():
        print(
            f"The PDF needs TeX, and {' and '.join(missing)} cannot be found; on Debian and Ubuntu"
            f" this installs it:\napt-get install --no-install-recommends {PACKAGES}",
            file=sys.stderr,
        )
        return 1
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    OUTPUT.mkdir(parents=True, exist_ok=True)
    PDF.unlink(missing_ok=True)
    release = f"\\newcommand{{\\aplversion}}{{{version}}}\n"
    (OUTPUT / "macros.tex").write_text(release + macros(config) + "\n")
    (OUTPUT / "_config.yml").write_text(yaml.safe_dump(settings(config)))
    status = jupyter_book(
        *("--builder", "latex"),
        *("--config", str(OUTPUT / "_config.yml")),
        *("--toc", str(ROOT / "_toc.yml")),
        *("--path-output", str(OUTPUT)),
    )
    folder = OUTPUT / "_build" / "latex"
    status = status or typeset(folder)
    if not status:
        shutil.copyfile(folder / PDF.name, PDF)
        print(f"The book is in {PDF.relative_to(ROOT)}")
    return status
