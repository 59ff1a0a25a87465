"""The wheel: what is in it, and that an environment of its own imports it from anywhere."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "book" / "tools"))

import outside

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return outside.build_wheel(tmp_path_factory.mktemp("wheel"))


def test_the_wheel_has_the_package_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    package = {name for name in names if not name.split("/")[0].endswith(".dist-info")}
    source = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "apl").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    records = {f"apl/_results/{path.name}" for path in (ROOT / "book" / "results").iterdir()}
    assert package == source | records
    assert {Path(name).suffix for name in package - records} == {".py", ".csv", ".typed"}
    assert {"apl/__init__.py", "apl/py.typed", "apl/recipes/mnist.csv"} <= package
    about = {name.split("/", 1)[1] for name in set(names) - package}
    assert about == {"METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE"}


def test_the_environment_has_the_wheel_and_borrows_the_rest(wheel, tmp_path):
    environment, empty = tmp_path / "environment", tmp_path / "empty"
    empty.mkdir()
    python = outside.make_environment(environment, wheel)
    script = (
        "import sys, importlib.metadata as metadata; from importlib.util import find_spec\n"
        "import apl\n"
        "print(apl.__file__, find_spec('torch').origin, sep='\\n')\n"
        "from apl import results\n"
        "print(metadata.version('apl-companion'), len(results.records('digits')))\n"
        "print(*sys.path, sep='\\n')\n"
    )
    done = subprocess.run(
        [python, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        cwd=empty,
        env=outside.outside_environ(),
    )
    ours, theirs, version, *path = done.stdout.splitlines()
    assert Path(ours).is_relative_to(environment)
    assert not Path(theirs).is_relative_to(environment)
    assert version.split()[0] in wheel.name
    assert int(version.split()[1]) > 0
    assert str(ROOT) not in path  # what an editable install would add


def test_no_editable_install_is_borrowed(wheel, tmp_path, monkeypatch):
    # One that adds a path, as hatchling makes them, and one that adds an import hook.
    borrowed, tree = tmp_path / "borrowed", tmp_path / "tree"
    (tree / "apl").mkdir(parents=True)
    borrowed.mkdir()
    (borrowed / "path.pth").write_text(f"{tree}\n")
    (borrowed / "hook.pth").write_text("import sys; sys.hooked = True\n")
    monkeypatch.setattr(outside.site, "getsitepackages", lambda: [str(borrowed)])
    python = outside.make_environment(tmp_path / "environment", wheel)
    script = "import sys; print(hasattr(sys, 'hooked'), *sys.path, sep='\\n')"
    done = subprocess.run([python, "-c", script], capture_output=True, text=True, check=True)
    hooked, *path = done.stdout.splitlines()
    assert hooked == "False"
    assert str(borrowed) in path
    assert str(tree) not in path


def test_chapters_are_copied_with_a_first_cell_that_runs(tmp_path):
    chapters = sorted((ROOT / "book").glob("*.ipynb"))
    outside.copy_chapters(chapters, tmp_path / "chapters")
    assert sorted(path.name for path in (tmp_path / "chapters").iterdir()) == [
        path.name for path in chapters
    ]
    for path in (tmp_path / "chapters").iterdir():
        code = [c for c in outside.nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
        assert "is_relative_to(sys.prefix)" in code[0].source
        assert not code[0].metadata.tags
