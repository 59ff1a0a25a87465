"""Execute the chapters as a reader does who has the package and not the repository.

`make test` runs nbval through this: the chapters are copied into an empty folder outside the
repository and executed in an environment of their own, in which `apl` is the wheel built from this
tree. That environment borrows everything else (torch!) from the one this program runs in, so that
nothing is downloaded.
"""

from __future__ import annotations

import argparse
import os
import site
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterable
from pathlib import Path

import nbformat

import address
import first_cell

ROOT = Path(__file__).resolve().parents[2]
# Cells tagged nbval-check-output must give what is stored; the others must run. Warnings are the
# kernel machinery's here, not ours. The cells of a chapter share a process.
NBVAL = [
    *("-q", "--disable-warnings", "--nbval-lax", "--nbval-current-env"),
    *("--nbval-cell-timeout", "900", "-n", "2", "--dist", "loadscope"),
]
# Runs in each chapter's kernel, after its first cell.
FROM_THE_WHEEL = """

import sys
from pathlib import Path

import apl

assert Path(apl.__file__).is_relative_to(sys.prefix), f"not the wheel: {apl.__file__}"
"""


def build_wheel(folder: Path) -> Path:
    """Build the wheel of this tree into a folder, without a network, and return its path."""
    options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--no-index"]
    command = ["wheel", *options, "--no-build-isolation", "--wheel-dir", str(folder), str(ROOT)]
    subprocess.run([sys.executable, "-m", "pip", *command], check=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


def make_environment(folder: Path, wheel: Path) -> Path:
    """Make an environment with the wheel and this one's packages; return its interpreter.

    The packages come by way of a .pth file, and .pth files in a folder that is named by one are
    not read. So an editable install of `apl` here, of whichever kind, is not one there.
    """
    windows = os.name == "nt"
    venv.create(folder, symlinks=not windows)
    python = folder / ("Scripts/python.exe" if windows else "bin/python")
    # Before the .pth file: pip would find `apl` there and call the wheel installed.
    options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--no-index"]
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", *options, str(wheel)]
    subprocess.run(pip, check=True)
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    answer = subprocess.run([python, "-c", ask], check=True, capture_output=True, text=True)
    packages = [path for path in site.getsitepackages() if Path(path).is_dir()]
    Path(answer.stdout.strip(), "borrowed.pth").write_text("\n".join(packages) + "\n")
    return python


def outside_environ() -> dict[str, str]:
    """Return this process's environment variables without those that lead back to this tree."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def copy_chapters(chapters: Iterable[Path], folder: Path) -> None:
    """Copy chapters into a folder; in the copies the first cell runs, and says where `apl` is."""
    folder.mkdir()
    requirement = address.requirement(address.kept())
    for path in chapters:
        notebook = nbformat.read(path, as_version=4)
        first_cell.put(notebook, requirement)
        (cell,) = filter(first_cell.is_first_cell, notebook.cells)
        cell.source += FROM_THE_WHEEL
        cell.metadata.tags = []
        nbformat.write(notebook, folder / path.name)


def main() -> int:
    """Run the command line; return the exit status of nbval."""
    parser = argparse.ArgumentParser(
        description="Execute chapters with nbval outside the repository, with the wheel of apl."
    )
    parser.add_argument("notebooks", nargs="*", type=Path, help="default: every chapter of book/")
    chapters = parser.parse_args().notebooks or sorted((ROOT / "book").glob("*.ipynb"))

    with tempfile.TemporaryDirectory(prefix="apl-", ignore_cleanup_errors=True) as name:
        folder = Path(name).resolve()
        wheel = build_wheel(folder)
        print(f"{wheel.name}: {wheel.stat().st_size / 1000:.0f} kB", flush=True)
        python = make_environment(folder / "environment", wheel)
        copy_chapters(chapters, folder / "chapters")
        (folder / "pytest.ini").write_text("[pytest]\n")  # or pytest looks for one further up
        return subprocess.run(
            [python, "-m", "pytest", *NBVAL, "chapters"], cwd=folder, env=outside_environ()
        ).returncode


if __name__ == "__main__":
    sys.exit(main())
