"""The public address: written into every file that needs it, and taken out without a trace."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import nbformat
import pytest
import yaml

sys.path.append(str(Path(__file__).resolve().parents[1] / "book" / "tools"))

import address
import first_cell

ROOT = Path(__file__).resolve().parents[1]
URL = "https://github.com/someone/some-book"
PAGES = "https://someone.github.io/some-book"
COLAB = "https://colab.research.google.com/github/someone/some-book/blob/main/book/quickstart.ipynb"
FROM_GIT = f"apl-companion @ git+{URL}"


@pytest.fixture
def tree(tmp_path):
    """A copy of the files that an address goes into, without one."""
    (tmp_path / "book").mkdir()
    for path in address.rendered(ROOT, None):
        shutil.copyfile(path, tmp_path / path.relative_to(ROOT))
    address.apply(tmp_path, None)
    return tmp_path


def contents(tree):
    return {path.name: path.read_bytes() for path in tree.rglob("*") if path.is_file()}


def project(tree):
    return tomllib.loads((tree / "pyproject.toml").read_text())["project"]


def theme_options(tree):
    config = yaml.safe_load((tree / "_config.yml").read_text())
    return config["sphinx"]["config"]["html_theme_options"]


def install_cells(tree):
    for path in sorted(tree.glob("book/*.ipynb")):
        cells = json.loads(path.read_text())["cells"]
        yield next("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")


def test_the_files_agree_with_pyproject():
    kept = address.kept()
    stale = [
        path.relative_to(ROOT).as_posix()
        for path, text in address.rendered(ROOT, kept).items()
        if text != path.read_text(encoding="utf-8")
    ]
    assert not stale, "run `make address`"


def test_with_an_address_every_file_has_it(tree):
    changed = address.apply(tree, address.parse(URL))
    assert {path.name for path in changed} == contents(tree).keys()

    assert project(tree)["urls"] == {"Repository": URL, "Documentation": PAGES}
    assert project(tree)["name"] == FROM_GIT.split()[0]
    options = theme_options(tree)
    assert options["repository_url"] == URL
    assert options["repository_branch"] == "main"
    assert options["path_to_docs"] == ""
    assert options["use_repository_button"] is True
    assert options["launch_buttons"] == {"colab_url": "https://colab.research.google.com"}
    citation = yaml.safe_load((tree / "CITATION.cff").read_text())
    assert (citation["repository-code"], citation["url"]) == (URL, PAGES)
    readme = (tree / "README.md").read_text()
    links = re.findall(r"\]\((https://[^)]+)\)", readme)
    for link in (COLAB, PAGES, f"{URL}/actions/workflows/test.yml/badge.svg"):
        assert link in links
    assert f'`pip install "{FROM_GIT}"`' in readme
    assert f"`git clone {URL}`" in readme
    cells = list(install_cells(tree))
    assert cells
    assert all(f'"{FROM_GIT}"' in cell for cell in cells)
    quickstart = nbformat.read(tree / "book" / "quickstart.ipynb", as_version=4)
    assert f'pip install "{FROM_GIT}"' in quickstart.cells[0].source
    nbformat.validate(quickstart)


def test_without_an_address_no_file_has_one(tree):
    assert "urls" not in project(tree)
    options = theme_options(tree)
    assert not options.keys() & {"repository_url", "launch_buttons", "use_repository_button"}
    assert not yaml.safe_load((tree / "CITATION.cff").read_text()).keys() & {
        "repository-code",
        "url",
    }
    assert not any(b"apl-companion @ git+" in text for text in contents(tree).values())
    assert all("pip install ." in cell for cell in install_cells(tree))


def test_putting_it_in_and_taking_it_out_leaves_no_trace(tree):
    before = contents(tree)
    address.apply(tree, address.parse(URL))
    given = contents(tree)
    assert address.kept(tree) == address.parse(URL)
    assert address.apply(tree, address.parse(URL)) == []  # a second time changes nothing
    address.apply(tree, address.parse("https://github.com/another/one"))
    assert not any(b"some-book" in text for text in contents(tree).values())
    address.apply(tree, address.parse(URL))
    assert contents(tree) == given
    address.apply(tree, None)
    assert contents(tree) == before


def test_nothing_but_blocks_and_first_cells_changes(tree):
    comments = (tree / "_config.yml").read_text().count("#")
    address.apply(tree, address.parse(URL))
    assert (tree / "_config.yml").read_text().count("#") == comments + 1  # in the block itself
    for path in tree.glob("book/*.ipynb"):
        ours = nbformat.read(path, as_version=4).cells
        theirs = nbformat.read(ROOT / "book" / path.name, as_version=4).cells
        blocks = [cell.source for cell in ours if "address:begin" in cell.source]
        assert len(blocks) == (path.name == "quickstart.ipynb")
        same = [
            cell
            for cell in ours
            if cell.source not in blocks and not first_cell.is_first_cell(cell)
        ]
        assert all(cell in theirs for cell in same)


def test_a_file_without_its_block_stops_everything(tree):
    readme = tree / "README.md"
    readme.write_text(readme.read_text().replace("<!-- address:begin badges -->\n", ""))
    before = contents(tree)
    with pytest.raises(address.AddressError, match=r"README\.md must have, once each.*badges"):
        address.apply(tree, address.parse(URL))
    assert contents(tree) == before


@pytest.mark.parametrize("spelled", [URL + "/", URL + ".git"])
def test_an_address_may_end_as_git_or_a_browser_writes_it(spelled):
    assert address.parse(spelled).fields["url"] == URL


def test_pages_of_the_repository_that_is_an_owners_site():
    site = address.parse("https://github.com/someone/someone.github.io")
    assert site.fields["pages"] == "https://someone.github.io"


@pytest.mark.parametrize(
    "url",
    [
        "someone/some-book",
        "http://github.com/someone/some-book",
        "https://example.com/someone/some-book",
        "https://github.com/someone",
        "https://github.com/someone/some-book/tree/main",
        'https://github.com/someone/some-book" #',
    ],
)
def test_a_bad_address_is_refused_in_one_sentence(url):
    tool = [sys.executable, ROOT / "book" / "tools" / "address.py", url]
    if url == "someone/some-book":
        refused = subprocess.run(tool, capture_output=True, text=True)
        assert refused.returncode == 1
        assert refused.stderr == (
            f"{url!r} is not the address of a repository on GitHub,"
            " which looks like https://github.com/OWNER/NAME.\n"
        )
    with pytest.raises(address.AddressError, match=r"is not the address of a repository"):
        address.parse(url)


# --- the first cell -----------------------------------------------------------------------------


def run_cell(source, tmp_path, *, missing):
    """Run a cell in IPython, with a pip that only says what it was asked."""
    asked = tmp_path / "asked.json"
    (tmp_path / "pip.py").write_text(
        f"import json, sys\nopen({str(asked)!r}, 'w').write(json.dumps(sys.argv[1:]))\n"
    )
    if missing:
        source = (
            "import importlib.util as util\n"
            "real = util.find_spec\n"
            "util.find_spec = lambda name: None if name == 'apl' else real(name)\n" + source
        )
    command = ["-m", "IPython", "--quick", "--no-banner", "--colors=nocolor", "-c", source]
    done = subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path), "IPYTHONDIR": str(tmp_path), "PATH": ""},
    )
    return done, json.loads(asked.read_text()) if asked.exists() else None


def test_the_first_cell_installs_what_is_missing_and_keeps_torch_and_numpy(tmp_path):
    done, asked = run_cell(first_cell.source(FROM_GIT), tmp_path, missing=True)
    assert asked is not None, done.stdout + done.stderr
    verb, *options = asked
    assert verb == "install"
    assert {f"{name}=={version(name)}" for name in ("numpy", "torch")} < set(options)
    assert options[-1] == FROM_GIT


def test_the_first_cell_does_nothing_where_the_package_is(tmp_path):
    assert importlib.util.find_spec("apl")
    for requirement in (FROM_GIT, None):
        done, asked = run_cell(first_cell.source(requirement), tmp_path, missing=False)
        assert asked is None
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_without_an_address_the_first_cell_says_what_to_do(tmp_path):
    done, asked = run_cell(first_cell.source(None), tmp_path, missing=True)
    assert asked is None
    last = (done.stdout + done.stderr).strip().splitlines()[-1]
    assert re.fullmatch(r"ModuleNotFoundError: apl is missing: run `pip install \.` in .+\.", last)


@pytest.mark.parametrize("requirement", [FROM_GIT, None])
def test_the_first_cell_is_put_once_after_the_title_and_is_clean(tmp_path, requirement):
    new = nbformat.v4
    notebook = new.new_notebook(
        cells=[new.new_markdown_cell("# Title"), new.new_code_cell("print(1)")]
    )
    for wanted in (None, requirement, requirement):
        first_cell.put(notebook, wanted)
    assert [cell.cell_type for cell in notebook.cells] == ["markdown", "code", "code"]
    assert notebook.cells[1].source == first_cell.source(requirement)
    nbformat.write(notebook, tmp_path / "new.ipynb")
    ruff = [sys.executable, "-m", "ruff"]
    settings = ["--config", str(ROOT / "book" / "ruff.toml"), "new.ipynb"]
    for check in (["check", "--quiet"], ["format", "--check", "--quiet"]):
        subprocess.run([*ruff, *check, "--no-cache", *settings], check=True, cwd=tmp_path)
