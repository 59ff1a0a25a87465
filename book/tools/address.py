"""Write the address of the public repository wherever it is needed, or take it out.

    make address URL=https://github.com/OWNER/NAME
    make address URL=                               # there is none (yet)
    make address                                    # bring all files in step with pyproject.toml

The address is kept in pyproject.toml, under [project.urls]. Everything else follows from it: the
first code cell of each chapter, and in the files of BLOCKS whatever stands between the comments
`address:begin NAME` and `address:end`. Nothing outside these is touched, so taking an address out
gives the bytes from before it was put in.
"""

from __future__ import annotations

import argparse
import re
import sys
import textwrap
import tomllib
from pathlib import Path
from typing import NamedTuple

import nbformat

import first_cell

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "apl-companion"
# For each file and block: its text with an address, and its text without one.
BLOCKS: dict[str, dict[str, tuple[str, str]]] = {
    "pyproject.toml": {
        "urls": ('[project.urls]\nRepository = "{url}"\nDocumentation = "{pages}"\n', ""),
    },
    "_config.yml": {
        "buttons": (
            "repository_url: {url}\n"
            "repository_branch: main\n"
            'path_to_docs: "" # _toc.yml and _config.yml lie at the root of the repository\n'
            "use_repository_button: true\n"
            "use_issues_button: true\n"
            "launch_buttons:\n"
            "  colab_url: https://colab.research.google.com\n",
            "",
        ),
    },
    "CITATION.cff": {
        "links": ("repository-code: {url}\nurl: {pages}\n", ""),
    },
    "README.md": {
        "badges": (
            "\n[![tests]({url}/actions/workflows/test.yml/badge.svg)]"
            "({url}/actions/workflows/test.yml)\n"
            "[![Open the quick start in Colab]"
            "(https://colab.research.google.com/assets/colab-badge.svg)]({colab})\n"
            "[**Read the book**]({pages})\n",
            "\n",
        ),
        "copy": ("this repository (`git clone {url}`)", "this repository"),
        "install": (
            '`pip install "{requirement}"`',
            "`pip install .` from a copy of the repository",
        ),
    },
    "book/quickstart.ipynb": {
        "install": (
            '\n```bash\npip install "{requirement}"\n```\n\n'
            "On Colab the chapter's first cell does it.\n",
            "\nFrom a copy of this repository:\n\n```bash\npip install .\n```\n",
        ),
    },
}
IN_MARKDOWN = re.compile(
    r"(?P<open><!-- address:begin (?P<name>\w+) -->).*?(?P<close><!-- address:end -->)", re.DOTALL
)
IN_CODE = re.compile(
    r"^(?P<open>(?P<indent> *)# address:begin (?P<name>\w+)\n).*?(?P<close>^ *# address:end$)",
    re.DOTALL | re.MULTILINE,
)


class AddressError(Exception):
    """Why an address cannot be written, in one sentence."""


class Address(NamedTuple):
    """A repository on GitHub."""

    owner: str
    name: str

    @property
    def fields(self) -> dict[str, str]:
        """Return what the texts of BLOCKS are filled with."""
        url, host = f"https://github.com/{self.owner}/{self.name}", f"{self.owner}.github.io"
        colab = f"https://colab.research.google.com/github/{self.owner}/{self.name}/blob/main"
        return {
            "url": url,
            # A repository named after its owner's site is that site.
            "pages": f"https://{host}" + (f"/{self.name}" if self.name != host else ""),
            "colab": f"{colab}/book/quickstart.ipynb",
            "requirement": f"{PACKAGE} @ git+{url}",
        }


def parse(url: str) -> Address | None:
    """Return the repository that a URL names, or None for the empty one."""
    if not url:
        return None
    found = re.fullmatch(r"https://github\.com/([\w-]+)/([\w.-]+?)(\.git)?/?", url, re.ASCII)
    if found is None:
        raise AddressError(
            f"{url!r} is not the address of a repository on GitHub,"
            " which looks like https://github.com/OWNER/NAME."
        )
    return Address(found[1], found[2])


def kept(root: Path = ROOT) -> Address | None:
    """Return the address in pyproject.toml, or None."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return parse(project.get("urls", {}).get("Repository", ""))


def requirement(address: Address | None) -> str | None:
    """Return what pip is to install from an address."""
    return address.fields["requirement"] if address else None


def fill(text: str, file: str, address: Address | None) -> str:
    """Return the text of a file, or of its Markdown cells, with each of its blocks written anew."""
    seen = []

    def written(block: re.Match[str]) -> str:
        name = block["name"]
        seen.append(name)
        if name not in BLOCKS[file]:
            raise AddressError(f"{file} has a block {name!r} that {Path(__file__).name} lacks.")
        given, none = BLOCKS[file][name]
        body = given.format(**address.fields) if address else none
        indent = block.groupdict().get("indent", "")
        return block["open"] + textwrap.indent(body, indent) + block["close"]

    pattern = IN_MARKDOWN if file.endswith((".md", ".ipynb")) else IN_CODE
    filled = pattern.sub(written, text)
    if sorted(seen) != sorted(BLOCKS[file]):
        expected = ", ".join(BLOCKS[file])
        raise AddressError(
            f"{file} must have, once each, these blocks from `address:begin NAME` to"
            f" `address:end`: {expected}; it has: {', '.join(seen) or 'none'}."
        )
    return filled


def fill_notebook(text: str, file: str, address: Address | None) -> str:
    """Return the text of a chapter with its first cell, and its blocks if it has any."""
    notebook = nbformat.reads(text, as_version=4)
    first_cell.put(notebook, requirement(address))
    if file in BLOCKS:
        prose = [cell for cell in notebook.cells if cell.cell_type == "markdown"]
        between = "\0"  # in no cell, so that the cells come apart again
        sources = fill(between.join(cell.source for cell in prose), file, address).split(between)
        for cell, source in zip(prose, sources, strict=True):
            cell.source = source
    return nbformat.writes(notebook) + "\n"


def rendered(root: Path, address: Address | None) -> dict[Path, str]:
    """Return what each file is to contain."""
    files = {root / file for file in BLOCKS} | set((root / "book").glob("*.ipynb"))
    texts = {}
    for path in sorted(files):
        file = path.relative_to(root).as_posix()
        text = path.read_text(encoding="utf-8")
        write = fill_notebook if path.suffix == ".ipynb" else fill
        texts[path] = write(text, file, address)
    return texts


def apply(root: Path, address: Address | None) -> list[Path]:
    """Write the address into all files, or into none if one of them is not as expected."""
    changed = []
    for path, text in rendered(root, address).items():
        if text != path.read_text(encoding="utf-8"):
            path.write_text(text, encoding="utf-8", newline="\n")
            changed.append(path)
    return changed


def main() -> int:
    """Run the command line; return its exit status."""
    parser = argparse.ArgumentParser(
        description="Write the address of the public repository wherever it is needed."
    )
    parser.add_argument("url", nargs="?", help="empty: take it out; absent: as in pyproject.toml")
    arguments = parser.parse_args()
    try:
        address = kept() if arguments.url is None else parse(arguments.url)
        changed = apply(ROOT, address)
    except AddressError as reason:
        print(reason, file=sys.stderr)
        return 1
    print(f"Address: {address.fields['url'] if address else 'none'}.")
    for path in changed:
        print(f"Written: {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
