"""Many runs under one protocol: what is trained is a list of settings, what comes back a table."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import torch
from joblib import Parallel, delayed
from tqdm import tqdm

from apl.protocols import Protocol


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
    small = protocol.name == "digits"
    if small:
        torch.set_num_threads(1)  # runs side by side use the cores better
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
    columns = {
        "loss": setting.loss,
        "label": setting.label,
        "noise": setting.noise if setting.rate else "clean",
        "rate": setting.rate,
        "lr": protocol.settings(setting.loss, lr=setting.lr)["lr"],
        "seed": setting.seed,
    }
    return pd.concat([pd.DataFrame([columns] * len(history)), history], axis=1)


def run(
    settings: Iterable[Setting], *, protocol: Protocol | None = None, jobs: int | None = None
) -> pd.DataFrame:
    """Train every setting, and return all histories in one table.

    The protocol is that of digits unless one is given. On digits runs go side by side, by default
    one for each processor, and the numbers do not depend on ``jobs``; on the paper's data sets one
    run keeps the device busy, and by default they go one after the other.

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
    jobs = jobs or (os.cpu_count() if protocol.name == "digits" else 1)
    done = Parallel(n_jobs=jobs, return_as="generator")(
        delayed(run_one)(setting, protocol) for setting in settings
    )
    bar = {"disable": True} if "CI" in os.environ else {}
    return pd.concat(
        list(tqdm(done, total=len(settings), unit="run", leave=False, **bar)), ignore_index=True
    )
