"""Our numbers beside the published ones: what differs, by how much, and whether that says anything.

The rule was fixed before any number was seen. The difference of the last epochs' means has a 95 %
interval by Student's t, with the standard deviation s pooled over both, each a sample's (divided by
n - 1; a published population's is converted):

    s^2 = ((n1 - 1) s1^2 + (n2 - 1) s2^2) / (n1 + n2 - 2),
    difference +- t(.975, n1 + n2 - 2) s sqrt(1 / n1 + 1 / n2).

A cell **agrees** where the interval holds 0 or the difference is at most 1 point, which is about
how well later papers' reruns meet the authors' numbers; else it **differs**. It is **open** where
either side has fewer than 2 runs or does not say its spread, and **shorter** where we trained for
fewer epochs than the protocol has, or on a part of the images, so that the two are not the same
experiment.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd
from scipy.special import stdtrit

from apl.catalog import CATALOG
from apl.claims import POINTS, interval
from apl.grid import KINDS, Cell
from apl.recipes import published
from apl.records import Record, digest

__all__ = [
    *("LAST", "changed", "compare", "layout", "measures", "summarize", "verdict"),
]

_MEASURES = ("test", "ILSVRC12 top-1")  # what our test accuracy is, on WebVision the second
_PRINTED = "ma2020-printed-secondhand"

LAST = 10
"""How many epochs at the end a mean is taken over, beside the last one alone."""


def summarize(records: Iterable[Record]) -> pd.DataFrame:
    """One row for runs that differ in nothing but the seed; accuracies in percent.

    ``last``, ``std`` and ``half`` are the mean over seeds at the last epoch, the sample standard
    deviation and half of the mean's 95 % interval; ``best`` and ``last_ten`` are means over seeds
    of the best epoch, which is chosen by the test set, and of the mean of the last ten epochs;
    ``runs`` says the last epoch of every seed.

    Examples
    --------
    >>> def run(seed, *accuracies):
    ...     settings = {"dataset": "digits", "source": "book", "loss": "ce", "noise": "clean"}
    ...     settings |= {"rate": 0.0, "seed": seed, "epochs": 2}
    ...     history = pd.DataFrame({"epoch": [1, 2], "test_accuracy": accuracies})
    ...     return Record(settings, history, {})
    >>> table = summarize([run(0, 0.9, 0.5), run(1, 0.8, 0.7)])
    >>> table[["n", "last", "best", "last_ten", "runs"]].values.tolist()
    [[2, 60.0, 85.0, 72.5, '0: 50.00, 1: 70.00']]
    """
    groups: dict[str, list[Record]] = {}
    for record in records:
        settings = {k: v for k, v in record.settings.items() if k != "seed"}
        groups.setdefault(digest(settings), []).append(record)
    return pd.DataFrame([_row(group) for group in groups.values()], columns=list(_COLUMNS))


def compare(records: Iterable[Record], source: str = "ma2020-notebook") -> pd.DataFrame:
    """:func:`summarize`, beside what a source published for the same cell, and the verdict.

    ``published``, ``published_std`` (a sample's, where the source says what its own is) and
    ``published_n`` are empty where it has no such cell; ``difference`` is ours minus theirs in
    points, ``deviations`` the same in pooled standard deviations, ``verdict`` see
    :mod:`apl.comparison`. Beside our WebVision runs, which the authors' notebook does not have, are
    their printed numbers as a review quotes them. What a source published twice, with other
    settings, makes two rows, and ``published_note`` says which is which.

    Raises
    ------
    ValueError
        for a source that published nothing, see :func:`apl.recipes.published`
    """
    theirs = published(source)
    if source == "ma2020-notebook":  # it has no WebVision; the printed table has
        every = published()
        printed = every["source"].eq(_PRINTED) & every["dataset"].eq("webvision")
        theirs = every[every["source"].eq(source) | printed]
    theirs = theirs[(theirs["settings"] == "") & theirs["measure"].isin(_MEASURES)]
    # Nobody knows the rate of real noise; ours have 0 for it.
    theirs = theirs.assign(rate=theirs["rate"].where(theirs["noise"] != "real", 0.0))
    theirs = theirs.assign(published_std=[_sample(row) for row in theirs.itertuples()])
    theirs = theirs.rename(
        columns={"mean": "published", "runs": "published_n", "note": "published_note"}
    )
    cell = ["dataset", "noise", "rate", "loss"]
    columns = [*cell, "published", "published_std", "published_n", "published_note"]
    table = summarize(records).merge(theirs[columns], how="left", on=cell)
    judged = [_judged(row) for row in table.to_dict("records")]
    return table.join(pd.DataFrame(judged, columns=["difference", "deviations", "verdict"]))


def verdict(
    ours: float, std: float, n: int, theirs: float, their_std: float, their_n: int
) -> tuple[float, float, str]:
    """The difference in points and in pooled standard deviations, and the verdict.

    >>> verdict(78.0, 0.5, 3, 79.8, 0.5, 3)
    (-1.799..., -3.599..., 'differs')
    >>> verdict(78.0, 5.0, 3, 79.8, 5.0, 3)[2], verdict(79.0, 0.1, 3, 79.8, 0.1, 3)[2]
    ('agrees', 'agrees')
    >>> verdict(78.0, math.nan, 1, 79.8, 0.5, 3)[2]
    'open'
    """
    difference = ours - theirs
    if n < 2 or not their_n >= 2 or math.isnan(std) or math.isnan(their_std):
        return difference, math.nan, "open"
    freedom = n + their_n - 2
    pooled = math.sqrt(((n - 1) * std**2 + (their_n - 1) * their_std**2) / freedom)
    half = stdtrit(freedom, 0.975) * pooled * math.sqrt(1 / n + 1 / their_n)
    agrees = abs(difference) <= max(half, POINTS)
    deviations = difference / pooled if pooled else math.nan
    return difference, deviations, "agrees" if agrees else "differs"


def layout(table: pd.DataFrame) -> str:
    """The table of :func:`compare` for people, a part for each protocol."""
    if table.empty:
        return "no records"
    parts = []
    order = {name: i for i, name in enumerate(CATALOG)}
    kinds = {name: i for i, name in enumerate(KINDS)}
    protocol = ["dataset", "source", "epochs", "full_epochs", "changed"]
    for (dataset, source, epochs, full, changed), rows in table.groupby(protocol, sort=False):
        rows = rows.assign(kind=rows["noise"].map(kinds), place=rows["loss"].map(order))
        rows = rows.sort_values(["kind", "rate", "place"])
        length = f"{epochs} epochs" if epochs == full else f"{epochs} of {full} epochs"
        head = f"{dataset} ({source}), {length}" + (f", {changed}" if changed else "")
        head += ", ILSVRC12 top-1" if dataset == "webvision" else ""
        known = rows["published"].notna()
        shown = pd.DataFrame(
            {
                "noise": rows["noise"].str.cat(rows["rate"].map(" {:g}".format)),
                "loss": rows["loss"],
                "n": rows["n"],
                "last": rows["last"].map("{:.2f}".format),
                "std": rows["std"].map(_number),
                "±95 %": rows["half"].map(_number),
                "best*": rows["best"].map("{:.2f}".format),
                "last ten": rows["last_ten"].map("{:.2f}".format),
                "published": rows["published"].map(_number),
                "std ": rows["published_std"].map(_number),
                "n ": rows["published_n"].map(lambda n: "-" if pd.isna(n) else str(n)),
                "points": rows["difference"].map(lambda x: _number(x, "+")),
                "in std": rows["deviations"].map(lambda x: _number(x, "+")),
                "verdict": rows["verdict"],
                "each seed": rows["runs"],
            }
        )
        if not known.any():
            shown = shown.drop(columns=["published", "std ", "n ", "points", "in std", "verdict"])
        parts.append(f"{head}\n{shown.to_string(index=False)}")
    return "\n\n".join(parts) + "\n\n* the best epoch is chosen by the test set"


def _number(value: float, sign: str = "") -> str:
    return "-" if math.isnan(value) else f"{value:{sign}.2f}"


_CELL = ("dataset", "source", "noise", "rate", "loss")
_COLUMNS = (
    *(*_CELL, "epochs", "full_epochs", "changed", "n"),
    *("last", "std", "half", "best", "last_ten", "runs"),
)


def _row(group: list[Record]) -> dict[str, Any]:
    group = sorted(group, key=lambda record: record.settings["seed"])
    settings = group[0].settings
    runs = pd.DataFrame([measures(record) for record in group])
    n, std = len(group), float(runs["last"].std(ddof=1))
    half = interval(runs["last"])[1]
    words, full = changed(settings)
    return {
        **{name: settings[name] for name in _CELL},
        **{"epochs": settings["epochs"], "full_epochs": full, "changed": words, "n": n},
        **{"std": std, "half": half},
        **{name: float(runs[name].mean()) for name in runs},
        "runs": ", ".join(
            f"{record.settings['seed']}: {value:.2f}"
            for record, value in zip(group, runs["last"], strict=True)
        ),
    }


def measures(record: Record) -> dict[str, float]:
    """The three accuracies of a run, in percent: ``last``, ``best`` and ``last_ten`` epochs.

    >>> history = pd.DataFrame({"epoch": [1, 2], "test_accuracy": [0.75, 0.5]})
    >>> measures(Record({}, history, {}))
    {'last': 50.0, 'best': 75.0, 'last_ten': 62.5}
    """
    curve = 100 * record.history["test_accuracy"]
    last, best, last_ten = curve.iloc[-1], curve.max(), curve.tail(LAST).mean()
    return {"last": float(last), "best": float(best), "last_ten": float(last_ten)}


def changed(settings: Mapping[str, Any]) -> tuple[str, int]:
    """What of the settings is not the protocol's, in words, and how many epochs that has.

    >>> changed(Cell("digits", "nce+mae", epochs=2, changes=(("alpha", 0.1),)).settings())
    ('alpha=0.1', 60)
    """
    cell = Cell(
        settings["dataset"],
        settings["loss"],
        settings["noise"],
        settings["rate"],
        0,
        "code" if settings["source"] == "book" else settings["source"],
    )
    full = cell.settings()
    flat = [dict(s) | dict(s.get("loss_parameters", {})) for s in (settings, full)]
    flat[1] = {"scale": 1.0, "samples": None, **flat[1]}
    skipped = {"seed", "epochs", "loss_parameters"}
    names = [name for name in flat[0] if name not in skipped and name in flat[1]]
    different = [n for n in names if digest({"": flat[0][n]}) != digest({"": flat[1][n]})]
    return " ".join(f"{name}={flat[0][name]}" for name in different), full["epochs"]


def _sample(row: Any) -> float:
    """A published standard deviation as a sample's."""
    if not pd.isna(row.ddof) and row.ddof == 0 and row.runs > 1:
        return float(row.std * math.sqrt(row.runs / (row.runs - 1)))
    return float(row.std)


def _judged(row: dict[str, Any]) -> tuple[float, float, str]:
    if math.isnan(row["published"]):
        return math.nan, math.nan, "not published"
    n = row["published_n"]
    theirs = row["published"], row["published_std"], 0 if pd.isna(n) else int(n)
    difference, deviations, word = verdict(row["last"], row["std"], row["n"], *theirs)
    part = row["epochs"] < row["full_epochs"] or "samples=" in row["changed"]
    return difference, deviations, "shorter" if part else word
