"""What the paper's runs were set to, as data files with the origin of every value.

One file for each data set, beside this one: ``mnist.csv``, ``cifar10.csv``, ``cifar100.csv``,
``webvision.csv``, and ``digits.csv`` and ``digit-pairs.csv`` for the book's own. A row is one
value: source, kind of noise, loss, parameter, value, origin. Rows without a loss are the rest of a
run: the network, the optimizer, the schedule, the augmentation, the noise procedure. Rows with a
loss and without a noise are exceptions from these. All others are the parameters of a loss.

The sources:

- ``"code"``: the configuration files of the official code as it stands (commit 04bce53 of
  HanxunH/Active-Passive-Losses).
- ``"2020"``: the job scripts of February 2020 (its commit 89fa39a), which the published numbers go
  back to; what a script does not pass has the default of ``train.py``.
- ``"followers"``: what later papers ran the same losses with, from their public repositories; for
  losses only.
- ``"alfs"``: the one of them that differs, Asymmetric Loss Functions (hitcszx/ALFs): beta = 100 on
  MNIST, 1 on CIFAR-100; for three of the sums only.
- ``"book"``: this book's own runs on digits and on digit pairs. Losses have the catalog's defaults
  on digits; on digit pairs, the other set of 100 classes, what the official code has for CIFAR-100,
  in the catalog's terms: its MAE is 2 (1 - p_y), twice the code's, so that beta is half.

Where a source contradicts itself, the file holds one choice:

- 2020, SCE on CIFAR-10 with asymmetric noise: (.1, 1), the script for rate .4, the one rate that is
  published; the script for .1 to .3 passes nothing, hence (1, 1), and a note says (.1, 5).
- 2020, NGCE and its sums on CIFAR-100: the scripts (q = .2; alpha = 5 with asymmetric noise), not
  the notes (q = .3 for NGCE alone; alpha = 10).
- 2020, MNIST: the scripts, alpha = beta = 1; a week later the sums were tuned again, to values that
  are not recorded.
- 2020: what the scripts are named for, also where an edited script runs another loss (MAE in
  MNIST's ``nce_mae``, NGCE + RCE in ``ngce`` on MNIST and CIFAR-10).
- followers: the values that Active Negative Loss, eps-softmax and joint asymmetric loss agree on;
  ``alfs`` is the alternative.

The parameter ``runs`` is the loss that is really trained. In three configuration files of ``code``,
for NGCE + RCE, it is NGCE + MAE.

``cifar10n.csv``, ``cifar10n_opinions.csv`` and ``cifar100n.csv`` count the labels that people gave,
see :func:`apl.human.counted`.

``published.csv`` has the accuracies that were published, in percent, and where: see
:func:`published`.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from types import MappingProxyType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "DATASETS",
    "Recipe",
    "augmentation",
    "book_parameters",
    "protocol_rows",
    "published",
    "recipe",
    "recipes",
]

DATASETS = ("digits", "digit-pairs", "mnist", "cifar10", "cifar100", "webvision")
"""The data sets that have a file of recipes."""

_SOURCES = ("code", "2020", "followers", "alfs", "book")
_COLUMNS = ("source", "dataset", "noise", "loss")
_NUMBERS = ("rate", "mean", "std", "ddof", "runs")


@dataclass(frozen=True)
class Recipe:
    """The settings of one loss in the runs of one source.

    ``runs`` is the loss that is trained; ``values`` are its parameters, ``origins`` where each of
    them, and ``runs``, is written.
    """

    source: str
    dataset: str
    noise: str
    loss: str
    runs: str
    values: Mapping[str, float]
    origins: Mapping[str, str]


@lru_cache(maxsize=1)
def recipes() -> tuple[Recipe, ...]:
    """Every recipe, source by source.

    >>> len({(r.source, r.dataset, r.noise, r.loss) for r in recipes()}) == len(recipes())
    True
    """
    rows: dict[tuple[str, str, str, str], dict[str, tuple[str, str]]] = {}
    for row in _rows():
        if not row["noise"]:
            continue
        key = row["source"], row["dataset"], row["noise"], row["loss"]
        found = rows.setdefault(key, {})
        found[row["parameter"]] = row["value"], row["origin"]
    return tuple(
        Recipe(
            *key,
            runs=found["runs"][0],
            values=MappingProxyType({p: float(v) for p, (v, _) in found.items() if p != "runs"}),
            origins=MappingProxyType({p: origin for p, (_, origin) in found.items()}),
        )
        for key, found in rows.items()
    )


def recipe(dataset: str, loss: str, noise: str = "symmetric", source: str = "code") -> Recipe:
    """The settings a loss was run with.

    Parameters
    ----------
    dataset
        "mnist", "cifar10", "cifar100" or "webvision"
    loss
        its name in the catalog, upper or lower case
    noise
        "symmetric" or "asymmetric"; "real" for "webvision"
    source
        "code", "2020", "followers" or "alfs", see :mod:`apl.recipes`

    Raises
    ------
    ValueError
        where that source has no such data set, noise or loss; it lists those there are

    Examples
    --------
    >>> recipe("cifar100", "nce+rce", "asymmetric", "2020").values["alpha"]
    5.0
    >>> recipe("cifar100", "nce+rce", "asymmetric", "2020").origins["alpha"]
    'official 89fa39a, slurm/cifar100/nce_rce.slurm'
    """
    wanted = (source, dataset, noise, loss.lower() if isinstance(loss, str) else loss)
    given = (source, dataset, noise, loss)
    left: list[Recipe] = [r for r in recipes() if r.source != "book"]
    for i, (column, value) in enumerate(zip(_COLUMNS, wanted, strict=True)):
        known = [getattr(r, column) for r in left]
        left = [r for r in left if getattr(r, column) == value]
        if not left:
            raise ValueError(_unknown(given, i, known))
    return left[0]


def book_parameters(dataset: str, loss: str, noise: str = "symmetric") -> Mapping[str, float]:
    """The parameters of a loss in this book's own runs, where they are not its defaults.

    >>> dict(book_parameters("digit-pairs", "nce+mae")), dict(book_parameters("digits", "nce+mae"))
    ({'alpha': 10.0, 'beta': 0.5}, {})
    """
    key = "book", dataset, noise, loss.lower()
    found = [r for r in recipes() if (r.source, r.dataset, r.noise, r.loss) == key]
    return dict(found[0].values) if found else {}


@lru_cache(maxsize=1)
def protocol_rows() -> tuple[Mapping[str, str], ...]:
    """Every row on a run as a whole, data set by data set; ``loss`` is "" for all losses.

    >>> [row["value"] for row in protocol_rows() if row["parameter"] == "nesterov"].count("true")
    2
    """
    rows = [dict(row) for row in _rows() if not row["noise"]]
    rows.sort(key=lambda row: DATASETS.index(row["dataset"]))
    return tuple(MappingProxyType({n: v for n, v in row.items() if n != "noise"}) for row in rows)


def augmentation(dataset: str) -> Mapping[str, float | bool]:
    """How the training images of a data set are changed at random; all sources agree on it.

    >>> dict(augmentation("cifar100")), dict(augmentation("mnist"))
    ({'crop': 4, 'flip': True, 'rotate': 20.0}, {})
    """
    rows = (row for row in protocol_rows() if row["dataset"] == dataset)
    written = next(row["value"] for row in rows if row["parameter"] == "augment")
    pairs = (step.partition("=") for step in written.split() if written != "none")
    return {name: _number(value) if value else True for name, _, value in pairs}


def published(
    source: str | None = None, dataset: str | None = None, loss: str | None = None
) -> pd.DataFrame:
    """The accuracies that were published, one row a cell; of one source, data set or loss only.

    ``mean`` and ``std`` are in percent, over ``runs`` seeds, at the last epoch. ``ddof`` is 0 where
    ``std`` is known to be the population's, which divides by ``runs``; it and ``runs`` are empty
    where the source does not say. A loss that is in the catalog has its name there, others have
    their authors', and ``settings`` holds what the row is named for ("scale=10"). Left out are two
    entries of a parameter study that are copies of others and no runs.

    The sources:

    - ``"ma2020-notebook"``: the authors' own result notebook (official commit fdd52a2). All nine
      cells that could be compared with the printed tables agree with them.
    - ``"ma2020-notebook-superseded"``: a week older, before MNIST was tuned again.
    - ``"ma2020-printed-secondhand"``: cells of the printed tables, as a review quotes them; the
      WebVision ones are here only.
    - ``"wang2024-eps-softmax"``, ``"ou2023-curriculum"``: reruns in later papers.
    - ``"zhou2021-quoted-by-ou2023"``, ``"jal2025-secondhand"``, ``"ye2023-secondhand"``: numbers of
      later papers, as others quote them.

    Raises
    ------
    ValueError
        for a source, data set or loss that is not in the table; it lists those there are

    Examples
    --------
    >>> table = published("ma2020-notebook", "cifar10", "nce+rce")
    >>> table.query("noise == 'symmetric' and rate == 0.6")[["mean", "std", "runs"]].values.tolist()
    [[79.78, 0.5, 3]]
    """
    import pandas as pd

    file = resources.files(__name__).joinpath("published.csv")
    with file.open(encoding="utf-8") as lines:
        table = pd.read_csv(lines, keep_default_na=False, na_values={c: [""] for c in _NUMBERS})
    table = table.astype({"ddof": "Int64", "runs": "Int64"})
    for column, wanted in {"source": source, "dataset": dataset, "loss": loss}.items():
        if wanted is not None:
            chosen = table[table[column] == wanted]
            if chosen.empty:
                known = ", ".join(table[column].unique())
                raise ValueError(f"nothing is published for {column} {wanted!r}; there is {known}")
            table = chosen
    return table.reset_index(drop=True)


@lru_cache(maxsize=1)
def _rows() -> tuple[Mapping[str, str], ...]:
    """The rows of all data sets, source by source."""
    rows = []
    for dataset in DATASETS:
        file = resources.files(__name__).joinpath(f"{dataset}.csv")
        for row in csv.DictReader(file.read_text(encoding="utf-8").splitlines()):
            source = row.pop("source")
            rows.append(MappingProxyType({"source": source, "dataset": dataset, **row}))
    return tuple(sorted(rows, key=lambda row: _SOURCES.index(row["source"])))


def _number(written: str) -> float:
    return float(written) if "." in written else int(written)


def _unknown(given: tuple[str, ...], i: int, known: Iterable[str]) -> str:
    source, dataset, noise, _ = given
    where = (
        "no source of recipes",
        f"no recipe of source {source!r} is for the data set",
        f"no recipe of source {source!r} for {dataset} has the noise",
        f"no recipe of source {source!r} for {dataset} with {noise} noise is for the loss",
    )[i]
    return f"{where} {given[i]!r}; there is {', '.join(dict.fromkeys(known))}"
