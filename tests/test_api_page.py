"""book/api.md, which autodoc makes from the docstrings, misses nothing that is public."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil
import re
import sys
from pathlib import Path

import pytest

import apl

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "book" / "tools"))

import apl_names  # noqa: E402

PAGE = (ROOT / "book" / "api.md").read_text()
LISTED = re.findall(r"^\.\. automodule:: (\S+)\n((?:   :.*\n)*)", PAGE, re.MULTILINE)
MODULES = [name for name, _ in LISTED]
ROOMS = sorted(
    module.name
    for module in pkgutil.walk_packages(apl.__path__, "apl.")
    if not any(part.startswith("_") for part in module.name.split("."))
)


def own(module):
    """Return what a room defines for others to use: its functions and classes."""
    names = getattr(module, "__all__", [n for n in vars(module) if not n.startswith("_")])
    found = {name: getattr(module, name) for name in names}
    return {
        name: value
        for name, value in found.items()
        if (inspect.isfunction(value) or inspect.isclass(value))
        and value.__module__ == module.__name__
    }


def test_every_room_is_described_once():
    assert sorted(MODULES) == ROOMS


@pytest.mark.parametrize("name", ROOMS)
def test_every_public_name_of_a_room_is_described(name):
    module = importlib.import_module(name)
    assert module.__doc__, name
    described = own(module)
    if described:  # a package may only collect what its rooms define
        assert ":members:" in dict(LISTED)[name]
    # autodoc leaves out what has no docstring of its own.
    undescribed = [n for n, value in described.items() if not (value.__doc__ or "").strip()]
    assert not undescribed


@pytest.mark.parametrize("name", apl.__all__)
def test_every_name_of_the_package_is_described(name):
    value = getattr(apl, name)
    if inspect.ismodule(value):
        assert value.__name__ in MODULES
    else:
        assert value.__module__ in MODULES
        assert name in own(importlib.import_module(value.__module__))


def test_a_short_name_leads_to_its_description():
    (failed, tried) = doctest.testmod(apl_names)
    assert tried > 0 and failed == 0
