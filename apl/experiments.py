"""Many runs on digits: what is trained is a list of settings, what comes back is one table."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import torch
from joblib import Parallel, delayed
from tqdm import tqdm

from apl import data, models, noise
from apl.losses import loss
from apl.training import train


@dataclass(frozen=True)
class Setting:
    """One training run on digits.

    ``seed`` draws the wrong labels, the network's weights and the order of the samples. With
    ``hold_out`` the run trains on the rest and is evaluated on that fraction of the *training*
    set, with its wrong labels: for choosing settings without looking at the test set.

    Examples
    --------
    >>> Setting("nce+mae", "symmetric", 0.6, lr=0.01, parameters={"beta": 0.1}).label
    'nce+mae, beta=0.1'
    """

    loss: str
    noise: str = "symmetric"
    rate: float = 0.0
    lr: float = 0.01
    seed: int = 0
    epochs: int = 50
    parameters: Mapping[str, Any] = field(default_factory=dict)
    hold_out: float = 0.0

    @property
    def label(self) -> str:
        """The loss and its parameters, for tables and figures."""
        return ", ".join([self.loss, *(f"{k}={v:g}" for k, v in self.parameters.items())])

    @property
    def transition_matrix(self) -> torch.Tensor:
        """The noise as a matrix."""
        if self.noise == "symmetric":
            return noise.symmetric(10, self.rate)
        if self.noise == "asymmetric":
            return noise.asymmetric("digits", self.rate)
        raise ValueError(f"noise is {self.noise!r}: it must be 'symmetric' or 'asymmetric'")


def run_one(setting: Setting) -> pd.DataFrame:
    """The history of one run, with its setting in the first columns."""
    torch.set_num_threads(1)  # the network is small; runs side by side use the cores better
    digits = data.load("digits").with_noise(setting.transition_matrix, seed=setting.seed)
    if setting.hold_out:
        digits = digits.hold_out(setting.hold_out, seed=setting.seed)
    history = train(
        models.digits_net(setting.seed, width=128),
        loss(setting.loss, **setting.parameters),
        digits,
        epochs=setting.epochs,
        lr=setting.lr,
        seed=setting.seed,
        progress=False,
    )
    columns = {
        "loss": setting.loss,
        "label": setting.label,
        "noise": setting.noise if setting.rate else "clean",
        "rate": setting.rate,
        "lr": setting.lr,
        "seed": setting.seed,
    }
    return pd.concat([pd.DataFrame([columns] * len(history)), history], axis=1)


def run(settings: Iterable[Setting], *, jobs: int | None = None) -> pd.DataFrame:
    """Train every setting, several at a time, and return all histories in one table.

    The numbers do not depend on ``jobs``, by default one for each processor.

    Examples
    --------
    >>> table = run([Setting("ce", rate=0.4, epochs=1), Setting("mae", rate=0.4, epochs=1)], jobs=1)
    >>> list(table["loss"])
    ['ce', 'mae']
    """
    settings = list(settings)
    for setting in settings:  # a wrong name or rate is said before any run starts
        loss(setting.loss, **setting.parameters)
        _ = setting.transition_matrix
    done = Parallel(n_jobs=jobs or os.cpu_count(), return_as="generator")(
        delayed(run_one)(setting) for setting in settings
    )
    bar = {"disable": True} if "CI" in os.environ else {}
    return pd.concat(
        list(tqdm(done, total=len(settings), unit="run", leave=False, **bar)), ignore_index=True
    )
