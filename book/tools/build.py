"""Build the book.

`make book` executes the chapters through jupyter-cache, several at once, and renders them.
jupyter-cache keys a chapter by its cells alone, so this first empties the cache whenever something
else that a chapter shows has changed: the code of apl, the records in book/results, or an installed
package.

`make test` renders what is stored in the notebooks (--stored), because nbval has just executed
them and two executions would prove no more than one.

Both read every page again (--all): Sphinx reports the warnings of a page only when it reads it,
and a second build must not pass where the first one failed.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import yaml
from jupyter_cache import get_cache
from jupyter_cache.executors import load_executor

import pdf

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "_build"
CACHE = BUILD / ".jupyter_cache"  # where Jupyter Book looks
AT_ONCE = min(4, os.cpu_count() or 1)
"""So many chapters are executed at once; each needs about a core and 1 GB."""
ALONE = {"costs.ipynb"}
"""Chapters that measure time: they are left to Jupyter Book, which executes one at a time."""


def digest() -> str:
    """Return a digest of everything a chapter's output depends on, apart from its cells."""
    seen = hashlib.sha256(sys.version.encode())
    for name, version in sorted({(d.name or "", d.version) for d in distributions()}):
        seen.update(f"{name}=={version}\n".encode())
    for folder in ("apl", "book/results"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                seen.update(f"{path.relative_to(ROOT)}\n".encode())
                seen.update(hashlib.sha256(path.read_bytes()).digest())
    return seen.hexdigest()


def freshen() -> None:
    """Empty the execution cache if it was filled under another digest."""
    record, now = BUILD / "executed-with.sha256", digest()
    if CACHE.exists() and (not record.exists() or record.read_text() != now):
        print("Code, records or packages have changed: every chapter runs again.", flush=True)
        shutil.rmtree(CACHE)
    BUILD.mkdir(exist_ok=True)
    record.write_text(now)


def execute() -> None:
    """Execute the chapters that the cache does not have, in the order of the book.

    One that fails is left to Jupyter Book, which says where and why.
    """
    contents = yaml.safe_load((ROOT / "_toc.yml").read_text())
    files = [chapter["file"] for part in contents["parts"] for chapter in part["chapters"]]
    paths = [path for file in files if (path := ROOT / f"{file}.ipynb").exists()]
    cache = get_cache(CACHE)
    for path in paths:
        cache.add_nb_to_project(str(path))
    missing = {Path(record.uri) for record in cache.list_unexecuted()}
    paths = [path for path in paths if path in missing and path.name not in ALONE]
    if not paths:
        return
    timeout = yaml.safe_load((ROOT / "_config.yml").read_text())["execute"]["timeout"]

    def run(path: Path) -> tuple[bool, float]:
        start = time.perf_counter()
        runner = load_executor("local-serial", get_cache(CACHE))
        found = runner.run_and_cache(filter_uris=[str(path)], timeout=timeout)
        return bool(found.succeeded), time.perf_counter() - start

    print(f"Executing chapters: {len(paths)}, {AT_ONCE} at once.", flush=True)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        running = {pool.submit(run, path): path.name for path in paths}
        for number, each in enumerate(as_completed(running), start=1):
            done, seconds = each.result()
            how = f"{seconds:6.1f} s" if done else "failed"
            print(f"{number:4} of {len(paths)} {running[each]:28}{how}", flush=True)


def jupyter_book(*arguments: str) -> int:
    """Run `jupyter-book build` with warnings as errors; return its exit status."""
    program = Path(sys.executable).with_name("jupyter-book")
    options = ["--all", "--quiet", "-W", "-n", "--keep-going", *arguments]
    return subprocess.run([program, "build", ".", *options], cwd=ROOT).returncode


def stored() -> dict[str, Any]:
    """Return the book's settings for a build elsewhere that executes nothing."""
    config = yaml.safe_load((ROOT / "_config.yml").read_text())
    config["execute"]["execute_notebooks"] = "off"
    local = config["sphinx"]["local_extensions"]  # beside the settings, for Jupyter Book
    config["sphinx"]["local_extensions"] = {name: str(ROOT / path) for name, path in local.items()}
    return config


def main() -> int:
    """Run the command line; return its exit status."""
    parser = argparse.ArgumentParser(description="Build the book into _build/html.")
    parser.add_argument(
        "--stored",
        action="store_true",
        help="render the stored outputs without executing anything, into _build/check",
    )
    parser.add_argument(
        "--pdf",
        action="store_true",
        help="typeset the stored outputs with LaTeX, into _build/pdf/normalized-losses.pdf",
    )
    arguments = parser.parse_args()
    if arguments.pdf:
        return pdf.build(jupyter_book, stored())
    if not arguments.stored:
        freshen()
        execute()
        return jupyter_book()  # which ends by saying where to open the book

    check = BUILD / "check"
    check.mkdir(parents=True, exist_ok=True)
    (check / "_config.yml").write_text(yaml.safe_dump(stored()))
    return jupyter_book(
        *("--config", str(check / "_config.yml")),
        *("--toc", str(ROOT / "_toc.yml")),
        *("--path-output", str(check)),
    )


if __name__ == "__main__":
    sys.exit(main())
