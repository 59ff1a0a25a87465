"""The figures of the book: readable at phone width, without color, in light and dark mode."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from matplotlib.axes import Axes
from torch import Tensor

from apl import risk
from apl.claims import interval

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


def seeds(
    runs: pd.DataFrame,
    by: str = "loss",
    measure: str = "last",
    *,
    order: Sequence[Any] | None = None,
    xlabel: str = "test accuracy at the last epoch (%)",
    ax: Axes | None = None,
) -> Axes:
    """Every run a dot, a line for each group; a bar is the 95 % interval of its mean.

    ``runs`` are those of :func:`apl.results.runs`, ``order`` the groups from top to bottom.

    Examples
    --------
    >>> runs = pd.DataFrame({"loss": ["ce", "ce", "mae"], "last": [50.0, 52.0, 90.0]})
    >>> [label.get_text() for label in seeds(runs).get_yticklabels()]
    ['CE', 'MAE']
    """
    order = list(dict.fromkeys(runs[by])) if order is None else list(order)
    ax = ax or plt.subplots(figsize=(6.4, 0.6 + 0.42 * len(order)))[1]
    for height, name in enumerate(order):
        values = runs.loc[runs[by] == name, measure]
        mean, half = interval(values)
        ax.errorbar(mean, height, xerr=half, fmt="|", color="black", capsize=4, markersize=12)
        ax.plot(values, [height] * len(values), "o", alpha=0.6, markeredgecolor="white")
    ax.set_yticks(range(len(order)), [str(name).upper() for name in order])
    ax.set(xlabel=xlabel, ylim=(len(order) - 0.5, -0.5))
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


CORNERS = torch.tensor([[0.5, 3**0.5 / 2], [0.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
"""Where the three classes lie in :func:`simplex`, class 1 on top, 2 on the left, 3 on the right."""


def simplex(
    loss: risk.LossFunction,
    row: Sequence[float],
    *,
    floor: float = 1e-3,
    levels: int = 12,
    minimizer: bool = True,
    ax: Axes | None = None,
) -> Axes:
    """The noisy risk of every prediction over three classes, darker where it is smaller.

    ``row`` is the distribution of the noisy label; with [1, 0, 0] this is the clean risk of
    class 1. Predictions keep all probabilities at or above ``floor``. A star marks the minimizer
    (:func:`apl.risk.minimize`). Between neighboring contours lie equally many predictions, so
    that losses of different scale can be compared.

    Raises
    ------
    ValueError
        for a row that does not have three entries

    Examples
    --------
    >>> import apl
    >>> simplex(apl.MAE(), [0.6, 0.4, 0.0], minimizer=False).get_aspect()
    1.0
    """
    if len(row) != 3:
        raise ValueError(f"the row has {len(row)} entries: the simplex is drawn for 3 classes")
    ax = ax or plt.subplots(figsize=(4.2, 3.8))[1]
    labels = torch.as_tensor(row, dtype=torch.float64)
    steps = torch.linspace(0, 1, 121, dtype=torch.float64)
    first, second = torch.meshgrid(steps, steps, indexing="ij")
    inside = first + second <= 1 + 1e-9
    first, second = first[inside], second[inside]
    p = torch.stack([first, second, (1 - first - second).clamp(min=0)], -1)
    p = p * (1 - 3 * floor) + floor
    values = risk.noisy_risk(loss, p, labels).detach().numpy()
    edges = np.unique(np.quantile(values, np.linspace(0, 1, levels + 1)))
    x, height = (p @ CORNERS).T.numpy()
    shades = mpl.colors.BoundaryNorm(edges, 256)
    ax.tricontourf(x, height, values, levels=edges, cmap="Blues_r", norm=shades)
    ax.tricontour(x, height, values, levels=edges[1:-1], colors="black", linewidths=0.4, alpha=0.5)
    ax.plot(*CORNERS[[0, 1, 2, 0]].T.numpy(), color="black", linewidth=1.2)
    for k, (x_offset, y_offset) in enumerate(((-11, -5), (0, -16), (0, -16))):
        ax.annotate(
            f"{k + 1}",
            (float(CORNERS[k, 0]), float(CORNERS[k, 1])),
            ha="center",
            xytext=(x_offset, y_offset),
            textcoords="offset points",
        )
    if minimizer:
        best = risk.minimize(loss, labels, floor) @ CORNERS
        ax.plot(
            *best.tolist(),
            "*",
            markersize=17,
            color="#de8f05",
            markeredgecolor="black",
            clip_on=False,
            zorder=5,
        )
    ax.set_aspect("equal")
    ax.axis("off")
    return ax
