"""The figures say what they should without color."""

from __future__ import annotations

from itertools import pairwise

import matplotlib.pyplot as plt
import pandas as pd
import pytest

import apl
from apl import plots


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


def history(end, seed=0):
    return pd.DataFrame({"epoch": [1, 2, 3], "test_accuracy": [0.1, 0.4, end], "seed": seed})


def test_every_table_is_a_curve_of_its_own_style_with_its_name():
    tables = {f"loss {i}": history(0.5 + 0.01 * i) for i in range(10)}
    axes = plots.curves(tables)
    assert len(axes.lines) == 10
    assert len({line.get_linestyle() for line in axes.lines[:4]}) == 4
    assert {text.get_text() for text in axes.texts} == set(tables)


def test_a_curve_is_the_mean_over_seeds_and_its_band_their_range():
    axes = plots.curves({"CE": pd.concat([history(0.5, 0), history(0.7, 1)])})
    assert axes.lines[0].get_ydata()[-1] == pytest.approx(60)
    heights = axes.collections[0].get_paths()[0].vertices[:, 1]
    assert (heights.min(), heights.max()) == pytest.approx((10, 70))


def test_labels_at_the_ends_do_not_overlap():
    axes = plots.curves({str(i): history(0.5 + 0.001 * i) for i in range(4)})
    heights = sorted(text.xy[1] for text in axes.texts)
    low, high = axes.get_ylim()
    assert min(b - a for a, b in pairwise(heights)) >= 0.05 * (high - low)


def test_a_transition_matrix_shows_its_probabilities_and_blanks_zeros():
    axes = plots.transition_matrix(apl.noise.asymmetric("digits", 0.4))
    written = [text.get_text() for text in axes.texts]
    assert written.count(".40") == 5
    assert written.count(".60") == 5
    assert written.count("1.00") == 5
    assert written.count("") == 85
