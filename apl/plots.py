"""The figures of the book: readable at phone width, without color, in light and dark mode."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from torch import Tensor

STYLES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)), (0, (1, 3)), (0, (3, 5)))
"""Line styles, so that a curve is found without its color."""


def use_style() -> None:
    """Set the look of all figures; call it once, at the top of a chapter.

    Examples
    --------
    >>> use_style()
    """
    sns.set_theme(context="notebook", style="ticks", palette="colorblind", font_scale=1.1)
    mpl.rcParams.update(
        {
            "figure.figsize": (6.4, 4.0),
            "figure.dpi": 110,
            "figure.constrained_layout.use": True,
            "figure.facecolor": "white",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "lines.linewidth": 2.2,
            "svg.hashsalt": "apl",
        }
    )


def curves(
    tables: Mapping[str, pd.DataFrame],
    column: str = "test_accuracy",
    *,
    ylabel: str = "test accuracy",
    percent: bool = True,
    ax: Axes | None = None,
) -> Axes:
    """One curve over epochs for each named table, the mean over its seeds, labeled at its end.

    The band around a curve runs from its lowest to its highest seed. The tables are histories
    of :func:`apl.training.train` or :func:`apl.experiments.run`.

    Examples
    --------
    >>> history = pd.DataFrame({"epoch": [1, 2], "test_accuracy": [0.5, 0.75]})
    >>> curves({"CE": history}).get_ylabel()
    'test accuracy (%)'
    """
    ax = ax or plt.subplots()[1]
    ends: list[tuple[float, str, Any]] = []
    for (name, table), style in zip(tables.items(), cycle(STYLES), strict=False):
        by_epoch = table.groupby("epoch")[column]
        mean, low, high = (
            100 * v if percent else v for v in (by_epoch.mean(), by_epoch.min(), by_epoch.max())
        )
        (line,) = ax.plot(mean.index, mean, linestyle=style)
        ax.fill_between(mean.index, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
        ends.append((float(mean.iloc[-1]), name, line.get_color()))
    ax.set(xlabel="epoch", ylabel=f"{ylabel} (%)" if percent else ylabel)
    label_ends(ax, ends)
    return ax


def label_ends(ax: Axes, ends: Sequence[tuple[float, str, Any]]) -> None:
    """Write (height, name, color) labels at the right edge of the axes, kept from overlapping."""
    low, high = ax.get_ylim()
    gap, last = (high - low) * 0.075, -float("inf")
    right = ax.get_xlim()[1]
    for height, name, color in sorted(ends):
        last = max(height, last + gap)
        ax.annotate(
            name, (right, last), color=color, va="center", annotation_clip=False, fontweight="bold"
        )


def transition_matrix(
    T: Tensor, classes: Sequence[str] | None = None, *, ax: Axes | None = None
) -> Axes:
    """A transition matrix as a heat map with its probabilities written in, zeros left blank.

    Examples
    --------
    >>> from apl import noise
    >>> transition_matrix(noise.symmetric(3, 0.4)).get_xlabel()
    'given label'
    """
    ax = ax or plt.subplots(figsize=(5.2, 4.6))[1]
    names = list(classes) if classes else [str(k) for k in range(len(T))]
    text = [[f"{v:.2f}".lstrip("0") if v else "" for v in row] for row in T.tolist()]
    sns.heatmap(
        T.tolist(),
        vmin=0,
        vmax=1,
        cmap="Blues",
        annot=text,
        fmt="",
        square=True,
        linewidths=0.5,
        cbar=False,
        xticklabels=names,
        yticklabels=names,
        annot_kws={"fontsize": 9},
        ax=ax,
    )
    ax.set(xlabel="given label", ylabel="true label")
    ax.tick_params(left=False, bottom=False)
    plt.setp(ax.get_yticklabels(), rotation=0)
    return ax
