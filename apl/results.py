"""The runs this project has made and passes on: what the book's tables and figures are drawn from.

They are the packed records of ``book/results``, which the installed package carries with it.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pandas as pd

from apl.comparison import changed, measures
from apl.records import Record, Store

__all__ = ["curves", "folder", "records", "runs"]

_FILTERS = ("dataset", "source", "loss", "noise", "rate", "seed", "epochs")


def folder() -> Path:
    """Where the records are: in the package, or in ``book/results`` beside it in the repository.

    >>> folder().is_dir()
    True
    """
    package = Path(__file__).parent
    installed = package / "_results"
    return installed if installed.is_dir() else package.parent / "book" / "results"


def records(
    dataset: str | Iterable[str] | None = None, *, where: str | Path | None = None, **wanted: Any
) -> list[Record]:
    """The records of these runs, by name of data set, loss and noise, and by seed.

    Parameters
    ----------
    dataset, wanted
        what a run must have: ``dataset``, ``source``, ``loss``, ``noise``, ``rate``, ``seed``,
        ``epochs``, and ``changed``, what is not the protocol's in words ("alpha=0.1 beta=10"; by
        default "", nothing, and None for whatever it is); each one value or several
    where
        another folder of records than the project's own

    Raises
    ------
    ValueError
        for another name to choose by, for a file that is no record, and where there is no such run

    Examples
    --------
    >>> record = records("digits", loss="nce+mae", noise="symmetric", rate=0.6, seed=0)[0]
    >>> record.settings["epochs"], len(record.history)
    (60, 60)
    """
    for name in wanted:
        if name not in (*_FILTERS, "changed"):
            raise ValueError(f"runs are not chosen by {name!r}; there is {', '.join(_FILTERS)}")
    wanted = {"dataset": dataset, "changed": "", **wanted}
    sets = {name: _set(value) for name, value in wanted.items() if value is not None}
    found = [
        record
        for record in _all(folder() if where is None else Path(where))
        if all(_of(record, name) in values for name, values in sets.items())
    ]
    if not found:
        asked = ", ".join(f"{name} {value!r}" for name, value in wanted.items() if value)
        raise ValueError(f"no run of {asked or 'any kind'} is recorded")
    return sorted(found, key=lambda record: _key(record.settings))


def runs(dataset: str | Iterable[str] | None = None, **wanted: Any) -> pd.DataFrame:
    """One row a run: what was run, its accuracies in percent, what made it.

    ``last``, ``best`` and ``last_ten`` are the test accuracy of the last epoch, of the best one,
    which is chosen by the test set, and the mean of the last ten. ``full_epochs`` are the
    protocol's. The arguments are those of :func:`records`.

    Examples
    --------
    >>> table = runs("digits", loss="ce", noise="symmetric", rate=0.6)
    >>> list(table["seed"][:3]), bool((table["best"] >= table["last"]).all())
    ([0, 1, 2], True)
    """
    return pd.DataFrame([_row(record) for record in records(dataset, **wanted)])


def curves(dataset: str | Iterable[str] | None = None, **wanted: Any) -> pd.DataFrame:
    """One row an epoch, with the columns of :func:`apl.experiments.run`; fractions, not percent.

    The arguments are those of :func:`records`.

    Examples
    --------
    >>> table = curves("digits", loss=("ce", "nce"), noise="clean", seed=0)
    >>> table.groupby("loss")["epoch"].max().to_dict()
    {'ce': 60, 'nce': 60}
    """
    tables = []
    for record in records(dataset, **wanted):
        settings, words = record.settings, changed(record.settings)[0]
        names = {name: settings[name] for name in ("dataset", "loss")}
        names |= {"label": ", ".join([settings["loss"], *words.split()]), "changed": words}
        names |= {name: settings[name] for name in ("noise", "rate", "lr", "seed")}
        tables.append(record.history.assign(**names)[[*names, *record.history]])
    return pd.concat(tables, ignore_index=True)


@lru_cache(maxsize=4)
def _all(where: Path) -> tuple[Record, ...]:
    found, wrong = Store(where).all()
    for error in wrong:
        raise error
    return tuple(found)


def _of(record: Record, name: str) -> Any:
    return changed(record.settings)[0] if name == "changed" else record.settings[name]


def _set(value: Any) -> frozenset[Any]:
    single = isinstance(value, str) or not isinstance(value, Iterable)
    return frozenset([value] if single else value)


def _key(settings: Any) -> tuple[Any, ...]:
    return tuple(settings[name] for name in ("dataset", "noise", "rate", "loss", "seed", "epochs"))


def _row(record: Record) -> dict[str, Any]:
    settings, made = record.settings, record.made
    words, full = changed(settings)
    names = {name: settings[name] for name in (*_FILTERS,)}
    made_by = {name: made.get(name) for name in ("seconds", "device", "torch", "commit")}
    return names | {"full_epochs": full, "changed": words} | measures(record) | made_by
