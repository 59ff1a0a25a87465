"""Execute chapters in place and store them with their outputs.

GitHub and Colab show what is stored, so every chapter is committed executed. What depends on the
machine or the moment and not on the chapter (timings, kernel and interpreter versions) is left
out: storing an unchanged chapter twice gives the same file.

A new chapter gets the first cell that all chapters have: see first_cell.py.

A chapter that raises, or that writes to stderr, is not stored.
"""

from __future__ import annotations

import argparse
import base64
import os
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

import address
import first_cell

BOOK = Path(__file__).resolve().parents[1]
# The image the cell with this tag shows is also the README's figure.
FIGURE_TAG, FIGURE = "readme-figure", BOOK / "images" / "first-figure.png"
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


class NotStored(Exception):
    """Why a chapter was left as it was."""


def tags(cell: nbformat.NotebookNode) -> list[str]:
    """Return the tags of a cell."""
    return list(cell.metadata.get("tags", []))


def merge_streams(outputs: list[nbformat.NotebookNode]) -> list[nbformat.NotebookNode]:
    """Join consecutive pieces of one stream, which the kernel cuts at arbitrary places."""
    merged: list[nbformat.NotebookNode] = []
    for output in outputs:
        last = merged[-1] if merged else None
        if last and output.output_type == last.output_type == "stream" and output.name == last.name:
            last.text += output.text
        else:
            merged.append(output)
    return merged


def clean(notebook: nbformat.NotebookNode) -> None:
    """Remove in place what execution adds beside the outputs."""
    notebook.metadata = nbformat.from_dict(METADATA)
    for cell in notebook.cells:
        cell.source = "\n".join(line.rstrip() for line in cell.source.strip("\n").split("\n"))
        for key in ("execution", "collapsed", "ExecuteTime"):
            cell.metadata.pop(key, None)
        if cell.cell_type == "code":
            cell.outputs = merge_streams(cell.outputs)


def execute(path: Path, timeout: int) -> nbformat.NotebookNode:
    """Return the notebook executed from top to bottom in a fresh kernel, in the book's folder."""
    notebook = nbformat.read(path, as_version=4)
    first_cell.put(notebook, address.requirement(address.kept()))
    client = NotebookClient(
        notebook,
        timeout=timeout,
        kernel_name="python3",
        record_timing=False,
        resources={"metadata": {"path": str(BOOK)}},
    )
    try:
        client.execute()
    except CellExecutionError as error:
        raise NotStored(str(error)) from None
    except TimeoutError:
        raise NotStored(f"a cell ran for more than {timeout} s") from None
    clean(notebook)
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if output.get("name") == "stderr":
                raise NotStored(f"a cell wrote to stderr:\n\n{cell.source}\n\n{output.text}")
    return notebook


def save_figure(notebook: nbformat.NotebookNode) -> None:
    """Write the image of the cell tagged for the README, if the notebook has one."""
    for cell in notebook.cells:
        if FIGURE_TAG not in tags(cell):
            continue
        images = [o.data["image/png"] for o in cell.outputs if "image/png" in o.get("data", {})]
        if len(images) != 1:
            raise NotStored(f"the cell tagged {FIGURE_TAG} shows {len(images)} images, not 1")
        FIGURE.parent.mkdir(exist_ok=True)
        FIGURE.write_bytes(base64.b64decode(images[0]))


def main() -> int:
    """Run the command line; return its exit status."""
    parser = argparse.ArgumentParser(
        description="Execute chapters in place and store them with their outputs; "
        f"save the image of the cell tagged {FIGURE_TAG} as {FIGURE.relative_to(BOOK.parent)}."
    )
    parser.add_argument("notebooks", nargs="*", type=Path, help="default: every chapter of book/")
    parser.add_argument("--timeout", type=int, default=900, help="seconds for a cell (%(default)s)")
    arguments = parser.parse_args()

    # Figures are stored only under the inline backend, which ipykernel picks when none is named.
    os.environ.pop("MPLBACKEND", None)
    failed = 0
    for path in arguments.notebooks or sorted(BOOK.glob("*.ipynb")):
        print(f"{path.name:28}", end="", flush=True)
        start = time.perf_counter()
        try:
            notebook = execute(path, arguments.timeout)
            save_figure(notebook)
        except NotStored as reason:
            failed += 1
            print(f"NOT STORED: {reason}", flush=True)
            continue
        nbformat.write(notebook, path)
        seconds, kilobytes = time.perf_counter() - start, path.stat().st_size / 1000
        print(f"{seconds:7.1f} s {kilobytes:8.0f} kB", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
