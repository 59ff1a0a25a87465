"""What runs say: intervals over seeds, paired comparisons with a verdict, tables of them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import pandas as pd
from scipy.special import stdtrit

from apl.catalog import CATALOG

__all__ = ["POINTS", "Claim", "claim", "interval", "markdown", "report", "table"]

POINTS = 1.0
"""A smaller difference than so many points is not called one, however narrow its interval."""


@dataclass(frozen=True)
class Claim:
    """A difference between two losses on the same seeds, and what it shows.

    ``mean`` and ``half``, half of its 95 % interval, are in points, ``n`` is the number of seeds.
    """

    mean: float
    half: float
    n: int

    @property
    def word(self) -> str:
        """The verdict: "holds", "reversed" or "not shown", see :func:`claim`."""
        for sign, word in ((1, "holds"), (-1, "reversed")):
            if sign * self.mean - self.half > 0 and sign * self.mean >= POINTS:
                return word
        return "not shown"

    def __str__(self) -> str:
        return f"{self.mean:+.1f} ± {self.half:.1f}, {self.word}"


def interval(values: Iterable[float]) -> tuple[float, float]:
    """The mean and half of its 95 % interval by Student's t, which is NaN for a single value.

    >>> mean, half = interval([1.0, 2.0, 3.0])
    >>> mean, round(half, 3)
    (2.0, 2.484)
    """
    column = pd.Series(list(values), dtype=float)
    n = len(column)
    if n < 2:
        return float(column.mean()), math.nan
    return float(column.mean()), float(stdtrit(n - 1, 0.975) * column.std(ddof=1) / math.sqrt(n))


def claim(more: pd.Series, less: pd.Series) -> Claim:
    """Whether ``more`` is above ``less``, two columns in points with the seed as their index.

    The claim **holds** where the 95 % interval of the mean paired difference lies above 0 and the
    mean is at least ``POINTS``; it is **reversed** where the same is true with the opposite sign,
    and **not shown** otherwise.

    Raises
    ------
    ValueError
        for columns that do not have the same seeds, each once, and at least two of them

    Examples
    --------
    >>> seeds = [0, 1, 2]
    >>> str(claim(pd.Series([90.0, 91.0, 92.0], seeds), pd.Series([80.0, 82.0, 81.0], seeds)))
    '+10.0 ± 2.5, holds'
    """
    if sorted(more.index) != sorted(less.index) or not more.index.is_unique or len(more) < 2:
        raise ValueError(
            f"seeds {sorted(more.index)} and {sorted(less.index)} cannot be paired: it takes the "
            "same ones, at least two, each once"
        )
    mean, half = interval(more - less)
    return Claim(mean, half, len(more))


def table(
    runs: pd.DataFrame,
    rows: str = "loss",
    columns: str | list[str] = "rate",
    measure: str = "last",
    order: Iterable[object] | None = None,
) -> pd.DataFrame:
    """Mean and 95 % interval over seeds, in words, for every row and column.

    ``runs`` are those of :func:`apl.results.runs`; ``order`` are the rows that are wanted.

    Examples
    --------
    >>> runs = pd.DataFrame({"loss": ["ce"] * 2, "rate": [0.6] * 2, "last": [50.0, 52.0]})
    >>> table(runs).loc["ce", 0.6]
    '51.0 ± 12.7'
    """
    columns = [columns] if isinstance(columns, str) else list(columns)
    cells = {key: _words(part[measure]) for key, part in runs.groupby([rows, *columns])}
    index = pd.MultiIndex.from_tuples(cells, names=[rows, *columns])
    wide = pd.Series(cells.values(), index=index, dtype=object).unstack(columns, fill_value="–")
    return wide if order is None else wide.loc[list(order)]


def report(
    runs: pd.DataFrame, by: str = "loss", order: Iterable[object] | None = None
) -> pd.DataFrame:
    """Everything about a group of runs: last epoch, best epoch, mean of the last ten, each seed.

    Only the last epoch is a result. The best one is chosen by the test set, and stands beside it
    to show what that choice would do.

    Examples
    --------
    >>> columns = {"loss": ["ce", "ce"], "seed": [0, 1], "last": [50.0, 52.0]}
    >>> runs = pd.DataFrame(columns | {"best": [70.0, 72.0], "last_ten": [50.5, 51.5]})
    >>> report(runs).loc["ce"].tolist()
    ['51.0 ± 12.7', '71.0', '51.0', '50.0, 52.0']
    """
    lines = {
        key: {
            "last epoch": _words(part["last"]),
            "best epoch": f"{part['best'].mean():.1f}",
            "mean of the last ten": f"{part['last_ten'].mean():.1f}",
            "last epoch, each seed": ", ".join(f"{v:.1f}" for v in part["last"]),
        }
        for key, part in runs.sort_values("seed").groupby(by)
    }
    found = pd.DataFrame.from_dict(lines, orient="index").rename_axis(by)
    return found if order is None else found.loc[list(order)]


def markdown(report: pd.DataFrame) -> str:
    """What :func:`report` returns as a table of a page, losses in capitals.

    >>> columns = {"loss": ["ce"], "seed": [0], "last": [50.0], "best": [70.0], "last_ten": [51.0]}
    >>> print(markdown(report(pd.DataFrame(columns)).iloc[:, 1:3]))
    | loss | best epoch | mean of the last ten |
    |---|---|---|
    | CE | 70.0 | 51.0 |
    """
    head = " | ".join([str(report.index.name), *report.columns])
    lines = [f"| {head} |", "|---" * (len(report.columns) + 1) + "|"]
    for name, row in report.iterrows():
        title = str(name).upper() if name in CATALOG else str(name)
        lines.append(f"| {' | '.join([title, *row])} |")
    return "\n".join(lines).replace(" ± ", "\u00a0±\u00a0").replace(", ", ",\u00a0")


def _words(values: pd.Series) -> str:
    mean, half = interval(values)
    return f"{mean:.1f}" if math.isnan(half) else f"{mean:.1f} ± {half:.1f}"
