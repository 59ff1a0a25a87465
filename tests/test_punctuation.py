"""Formulas keep their punctuation: book/tools/punctuation.py."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from docutils import nodes

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "book" / "tools"))

from punctuation import kept_together


def paragraph(before, after):
    made = nodes.paragraph()
    for piece in (before, None, after):
        if piece is None:
            made += nodes.math("", "p_y")
        elif piece:
            made += nodes.Text(piece)
    return made


@pytest.mark.parametrize(
    ("before", "after", "kept"),
    [
        ("the label ", ", and", "p_y,"),
        ("(", ") holds", "(p_y)"),
        ("see (", " below", "(p_y"),
        ("", ".", "p_y."),
        ("a ", "-th class", "p_y-th"),
    ],
)
def test_punctuation_that_touches_a_formula_is_kept_with_it(before, after, kept):
    made = paragraph(before, after)
    text = made.astext()
    kept_together(next(made.findall(nodes.math)))
    (span,) = made.findall(nodes.inline)
    assert span.astext() == kept
    assert span["classes"] == ["keep"]
    assert made.astext() == text


@pytest.mark.parametrize(("before", "after"), [("the label ", " is"), ("", ""), ("x", "y")])
def test_other_text_is_left_alone(before, after):
    made = paragraph(before, after)
    kept_together(next(made.findall(nodes.math)))
    assert not list(made.findall(nodes.inline))
