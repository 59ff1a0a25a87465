"""Many runs under one protocol: what is trained is a list of settings, what comes back a table."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pandas as pd
import torch
from joblib import Parallel, delayed
from tqdm import tqdm

from apl import ensemble, human
from apl.protocols import SMALL, Protocol
from apl.training import one_thread


@dataclass(frozen=True)
class Setting:
    """One training run.

    ``seed`` draws the wrong labels, the network's weights and the order of the samples. With
    ``hold_out`` the run trains on the rest and is evaluated on that fraction of the *training*
    set, with its wrong labels: for choosing settings without looking at the test set. Where ``lr``
    or ``epochs`` is None, or a parameter of the loss is not named, the protocol's is taken.

    Examples
    --------
    >>> Setting("nce+mae", "symmetric", 0.6, lr=0.01, parameters={"beta": 0.1}).label
    'nce+mae, beta=0.1'
    """

    loss: str
    noise: str = "symmetric"
    rate: float = 0.0
    lr: float | None = None
    seed: int = 0
    epochs: int | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    hold_out: float = 0.0

    @property
    def label(self) -> str:
        """The loss and its parameters, for tables and figures."""
        return ", ".join([self.loss, *(f"{k}={v:g}" for k, v in self.parameters.items())])


def run_one(setting: Setting, protocol: Protocol) -> pd.DataFrame:
    """The history of one run, with its setting in the first columns."""
    small = protocol.name in SMALL
    with one_thread() if small else nullcontext():
        history = protocol.train(
            setting.loss,
            setting.noise,
            setting.rate,
            setting.seed,
            setting.epochs,
            lr=setting.lr,
            parameters=setting.parameters,
            hold_out=setting.hold_out,
            progress=False if small else None,
        )
    return _labeled(history, setting, protocol)


def run_together(settings: Sequence[Setting], protocol: Protocol) -> list[pd.DataFrame]:
    """The same of several runs that differ in loss, noise, rate, lr and seed only, at once.

    Raises
    ------
    FloatingPointError
        where one of them diverges

    Examples
    --------
    >>> settings = [Setting("ce", rate=0.4, epochs=1), Setting("mae", rate=0.4, epochs=1)]
    >>> [len(table) for table in run_together(settings, Protocol.of("digits"))]
    [1, 1]
    """
    common = protocol.together(settings[0].loss, epochs=settings[0].epochs)
    if common is None:
        raise ValueError(f"runs on {protocol.name} go one by one")
    runs = [
        protocol.member(
            setting.loss,
            setting.noise,
            setting.rate,
            setting.seed,
            lr=setting.lr,
            parameters=setting.parameters,
            hold_out=setting.hold_out,
        )
        for setting in settings
    ]
    with one_thread():
        histories = ensemble.train(runs, **common)
    tables = []
    for setting, history in zip(settings, histories, strict=True):
        if isinstance(history, FloatingPointError):
            raise history
        tables.append(_labeled(history, setting, protocol))
    return tables


def run(
    settings: Iterable[Setting],
    *,
    protocol: Protocol | None = None,
    jobs: int | None = None,
    together: bool = True,
) -> pd.DataFrame:
    """Train every setting, and return all histories in one table.

    The protocol is that of digits unless one is given. On digits, runs are trained up to
    :data:`apl.ensemble.MOST` at once, see there, and such ensembles go side by side, by default one
    for each processor. The numbers do not depend on ``jobs``. They are those of the plain loop,
    which ``together=False`` chooses, up to float rounding. On the paper's data sets one run keeps
    the device busy: it is always the loop, and by default one run after the other.

    Raises
    ------
    ValueError
        for a name, rate or parameter that is not known, before any run starts
    FloatingPointError
        where a run diverges

    Examples
    --------
    >>> table = run([Setting("ce", rate=0.4, epochs=1), Setting("mae", rate=0.4, epochs=1)], jobs=1)
    >>> list(table["loss"])
    ['ce', 'mae']
    """
    settings, protocol = list(settings), protocol or Protocol.of("digits")
    for setting in settings:  # a wrong name or rate is said before any run starts
        T = protocol.transition_matrix(setting.noise, setting.rate)
        every_class = torch.arange(len(T))
        protocol.loss(setting.loss, setting.noise, given=every_class, **setting.parameters)
    small = protocol.name in SMALL
    jobs = jobs or (os.cpu_count() if small else 1)
    bar = {"disable": True} if "CI" in os.environ else {}
    found: dict[int, pd.DataFrame] = {}
    with tqdm(total=len(settings), unit="run", leave=False, **bar) as progress:
        if small and together and ensemble.available():
            groups = _groups(settings, protocol)
            tasks = [delayed(run_together)([settings[i] for i in g], protocol) for g in groups]
        else:
            groups = [[i] for i in range(len(settings))]
            tasks = [delayed(_alone)(setting, protocol) for setting in settings]
        done = Parallel(n_jobs=min(jobs or 1, max(len(tasks), 1)), return_as="generator")(tasks)
        for group, tables in zip(groups, done, strict=True):
            found |= dict(zip(group, tables, strict=True))
            progress.update(len(group))
    return pd.concat([found[i] for i in range(len(settings))], ignore_index=True)


def _alone(setting: Setting, protocol: Protocol) -> list[pd.DataFrame]:
    return [run_one(setting, protocol)]


def _groups(settings: Sequence[Setting], protocol: Protocol) -> list[list[int]]:
    """Which settings are trained at once: those of one loss together, whatever their order."""
    alike: dict[str, list[int]] = {}
    for i, setting in enumerate(settings):
        key = f"{protocol.together(setting.loss, epochs=setting.epochs)} {setting.hold_out}"
        alike.setdefault(key, []).append(i)
    groups = []
    for places in alike.values():
        places.sort(key=lambda i: (settings[i].label, i))
        # An even number of equal parts keeps two processors busy to the end. It does not depend on
        # how many there are, and so neither do the numbers.
        few = len(places) <= ensemble.MOST // 2
        parts = 1 if few else 2 * math.ceil(len(places) / (2 * ensemble.MOST))
        bounds = [round(part * len(places) / parts) for part in range(parts + 1)]
        groups += [places[start:end] for start, end in pairwise(bounds)]
    return groups


def _labeled(history: pd.DataFrame, setting: Setting, protocol: Protocol) -> pd.DataFrame:
    people = human.is_human(setting.noise)
    columns = {
        "loss": setting.loss,
        "label": setting.label,
        "noise": setting.noise if setting.rate or people else "clean",
        "rate": human.rate(protocol.name, setting.noise) if people else setting.rate,
        "lr": protocol.settings(setting.loss, lr=setting.lr)["lr"],
        "seed": setting.seed,
    }
    return pd.concat([pd.DataFrame([columns] * len(history)), history], axis=1)
