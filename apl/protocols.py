"""What a chapter trains: digits on a CPU, the paper's own data set and recipe on a GPU.

The numbers, and where each of them is written, are in the files of :mod:`apl.recipes`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from apl import augment, human, models, paper, processes, streaming, webvision
from apl import noise as noises
from apl.checkpoints import Checkpoint
from apl.data import Dataset, load
from apl.ensemble import Run
from apl.losses import loss as catalog_loss
from apl.recipes import book_parameters, protocol_rows
from apl.training import train
from apl.vision import SETS

__all__ = ["NAMES", "SOURCES", "Protocol", "default_name", "duration", "protocol"]

NAMES = tuple(dict.fromkeys(row["dataset"] for row in protocol_rows()))
"""The data sets that have a protocol."""

SMALL = tuple(dict.fromkeys(r["dataset"] for r in protocol_rows() if r["source"] == "book"))
"""Those of them that are the book's own: digits in seconds, without a GPU."""

SOURCES = ("code", "2020")
"""Where the paper's protocols may be taken from, see :mod:`apl.recipes`."""

_ORIGIN = {
    "book": "this book's own settings",
    "code": "as in the official code",
    "2020": "as in the authors' scripts of February 2020",
}
_TYPES: Mapping[str, Any] = {
    **dict.fromkeys(("epochs", "batch_size", "eval_batch_size", "parts"), int),
    **dict.fromkeys(("lr", "momentum", "weight_decay", "eta_min", "decay"), float),
    **dict.fromkeys(("clip", "cpu_seconds"), float),
    **dict.fromkeys(("network", "procedure"), str),
    "nesterov": lambda text: {"true": True, "false": False}[text],
    "seeds": lambda text: tuple(map(int, text.split())),
}
_SETTINGS = (
    *("epochs", "batch_size", "eval_batch_size", "lr", "momentum", "nesterov", "weight_decay"),
    *("eta_min", "clip", "decay", "parts", "precision"),
)
# Each run of an ensemble has an lr of its own, and small networks need none of the others.
_ALONE = ("lr", "augment", "eval_batch_size", "precision")


@dataclass(frozen=True, repr=False)
class Protocol:
    """How a data set is trained on. What is to be compared, the loss, is left open.

    SGD, gradients clipped at norm ``clip``, a learning rate that falls from ``lr`` to ``eta_min``
    along one cosine over all epochs; the augmentation is :func:`apl.augment.paper`'s. The
    ``procedure`` that makes labels wrong is "official", the official code's with its flaws, or
    "matrix", exact counts by a transition matrix. Where the noise is labels that people gave,
    "official" takes those, and "matrix" makes the same mistakes, equally many, on images drawn at
    random. ``exceptions`` are what differs for a loss: NLNL's number of epochs above all.
    ``cpu_seconds`` is about what an epoch takes without a GPU, ``root`` the folder of the data set,
    see :func:`apl.data.load`.

    WebVision stays in its files: :mod:`apl.streaming` trains on it, with a learning rate that is
    multiplied by ``decay`` after each epoch and batches in ``parts``. Its noise is "real", its own.
    What a protocol does not have is None.

    With ``samples`` only the first so many images are trained on and tested with, to try a run out.
    Where ``precision`` is None, the network computes in what is fastest on the device, see
    :mod:`apl.precision`; "float32" is the plain path.

    Examples
    --------
    >>> digits = Protocol.of("digits")
    >>> digits
    Protocol('digits', 'book', digits_net, 60 epochs, cpu)
    >>> digits.train("nce+mae", rate=0.6, epochs=1)["epoch"].tolist()
    [1]
    """

    name: str
    source: str
    network: str
    epochs: int
    batch_size: int
    eval_batch_size: int
    lr: float
    momentum: float
    nesterov: bool
    weight_decay: float
    clip: float
    seeds: tuple[int, ...]
    cpu_seconds: float
    eta_min: float | None = None
    procedure: str | None = None
    decay: float | None = None
    parts: int | None = None
    samples: int | None = None
    precision: str | None = None
    exceptions: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, hash=False)
    device: str = "cpu"
    root: str | Path | None = None

    @classmethod
    def of(
        cls,
        name: str,
        *,
        source: str = "code",
        epochs: int | None = None,
        root: str | Path | None = None,
    ) -> Protocol:
        """The protocol of a data set, in silence; the arguments are those of :func:`protocol`."""
        if name not in NAMES:
            raise ValueError(f"no protocol {name!r}; there is {', '.join(NAMES)}")
        if source not in SOURCES:
            raise ValueError(f"no source of protocols {source!r}; there is {', '.join(SOURCES)}")
        source = "book" if name in SMALL else source
        by_loss: dict[str, dict[str, Any]] = {}
        for row in protocol_rows():
            mine = (row["dataset"], row["source"]) == (name, source)
            if mine and row["parameter"] in _TYPES:
                value = _TYPES[row["parameter"]](row["value"])
                by_loss.setdefault(row["loss"], {})[row["parameter"]] = value
        if not by_loss:
            known = dict.fromkeys(r["source"] for r in protocol_rows() if r["dataset"] == name)
            raise ValueError(f"{name} has no protocol of {source!r}; there is {', '.join(known)}")
        settings = by_loss.pop("")
        if epochs is not None:  # for every loss
            settings["epochs"] = epochs
            for exception in by_loss.values():
                exception.pop("epochs", None)
        # A network as small as the digits' gains nothing from a GPU.
        device = "cuda" if name not in SMALL and torch.cuda.is_available() else "cpu"
        return cls(name, source, **settings, exceptions=by_loss, device=device, root=root)

    @property
    def K(self) -> int:
        """The number of classes."""
        return {"cifar100": 100, "digit-pairs": 100, "webvision": webvision.K}.get(self.name, 10)

    @property
    def title(self) -> str:
        """The data set's name for figures."""
        titles = {name: known.title for name, known in SETS.items()}
        titles |= {"digits": "Digits", "digit-pairs": "Digit pairs", "webvision": "WebVision-mini"}
        return titles[self.name]

    def loss(
        self,
        name: str,
        noise: str = "symmetric",
        *,
        given: Tensor | None = None,
        seed: int = 0,
        **parameters: Any,
    ) -> nn.Module:
        """A loss by name: :func:`apl.paper_loss` on the paper's data sets, else ``apl.loss``.

        On digit pairs a loss has the parameters of the paper's runs on CIFAR-100, the other set of
        100 classes. A parameter ``scale`` multiplies it. ``given`` and ``seed`` are for the paper's
        NLNL. Raises as these two.
        """
        if self.source == "book":
            parameters = {**book_parameters(self.name, name, noise), **parameters}
            scale = parameters.pop("scale", None)
            function = catalog_loss(name, **parameters)
            return function if scale is None else scale * function
        # Nobody tuned a loss for labels that people gave: it gets what it has for symmetric noise.
        noise = "symmetric" if human.is_human(noise) else noise
        return paper.paper_loss(
            self.name, name, noise, source=self.source, given=given, seed=seed, **parameters
        )

    def transition_matrix(self, noise: str = "symmetric", rate: float = 0.0) -> Tensor:
        """The noise as a matrix, which the official procedure meets only roughly: (K, K).

        Of labels that people gave it is what was measured, whatever the rate.

        Raises: ValueError for another kind than "symmetric", "asymmetric" and those of
        :func:`apl.human.noises`, a rate outside 0..1; for human labels as :func:`apl.human.labels`.
        """
        if self.name == "webvision":
            raise ValueError("webvision has real noise, whose matrix nobody knows, and no other")
        if noise == "symmetric":
            return noises.symmetric(self.K, rate)
        if noise == "asymmetric":
            return noises.asymmetric(self.name, rate)
        if human.is_human(noise):
            return human.transition_matrix(self.name, noise, self.root)
        raise ValueError(
            f"noise is {noise!r}: it must be 'symmetric' or 'asymmetric', or for CIFAR human labels"
        )

    def data(self, noise: str = "symmetric", rate: float = 0.0, seed: int = 0) -> Dataset:
        """The data set on the device, with wrong labels in its training part.

        Labels that people gave are the same for every seed, unless "matrix" is the procedure. With
        ``samples`` it is the first so many images of both parts.

        Raises: as :meth:`transition_matrix` and :func:`apl.data.load`.
        """
        whole = self._data(noise, rate, seed)
        return whole if self.samples is None else whole.first(self.samples)

    def _data(self, noise: str, rate: float, seed: int) -> Dataset:
        if human.is_human(noise):
            clean = _load(self.name, self.device, self.root)
            given = human.labels(self.name, noise, clean.labels, self.root)
            if self.procedure == "matrix":
                return clean.with_noise(noises.measured(clean.labels, given, self.K), seed)
            return replace(clean, given=given)
        T = self.transition_matrix(noise, rate)
        clean = _load(self.name, self.device, self.root)
        if self.procedure == "matrix":
            return clean.with_noise(T, seed)
        return replace(clean, given=noises.official(self.name, clean.labels, noise, rate, seed))

    def model(self, seed: int = 0) -> nn.Module:
        """The network with the initial weights of a seed."""
        # Half of its default width: the digits' network still memorizes every wrong label.
        options = {"width": 128} if self.network == "digits_net" else {}
        if self.name == "digit-pairs":
            options |= {"K": 100, "pixels": 128}
        network: nn.Module = getattr(models, self.network)(seed, **options)
        return network

    def settings(
        self, loss: str = "", *, epochs: int | None = None, lr: float | None = None
    ) -> dict[str, Any]:
        """Keyword arguments for :func:`apl.training.train`, all but the seed; ``loss`` by name.

        >>> cifar10 = Protocol.of("cifar10")
        >>> cifar10.settings()["epochs"], cifar10.settings("nlnl")["epochs"]
        (120, 1000)
        """
        own = {n: value for n in _SETTINGS if (value := getattr(self, n)) is not None}
        changed = webvision.transforms() if self.name == "webvision" else augment.paper(self.name)
        own |= {"augment": changed, **self.exceptions.get(loss.lower(), {})}
        changes = {"epochs": epochs, "lr": lr}
        return own | {name: value for name, value in changes.items() if value is not None}

    def train(
        self,
        loss: str,
        noise: str = "symmetric",
        rate: float = 0.0,
        seed: int = 0,
        epochs: int | None = None,
        *,
        lr: float | None = None,
        parameters: Mapping[str, Any] | None = None,
        hold_out: float = 0.0,
        progress: bool | None = None,
        checkpoint: Checkpoint | None = None,
    ) -> pd.DataFrame:
        """Train once and return the history, see :func:`apl.training.train`.

        Parameters
        ----------
        loss, noise, rate
            the loss by name, the kind and the rate of the noise
        seed
            of the wrong labels, the initial weights, the order of samples and the augmentation
        epochs, lr, parameters
            to replace the protocol's; in a shorter run the cosine spans the shorter run
        hold_out
            the fraction of the training set to evaluate on, with its wrong labels, instead of the
            test set
        progress, checkpoint
            as in :func:`apl.training.train`
        """
        settings = self.settings(loss, epochs=epochs, lr=lr)
        settings |= {"seed": seed, "progress": progress, "checkpoint": checkpoint}
        if self.name == "webvision":
            if noise != "real" or rate or hold_out:
                raise ValueError("webvision has real noise, no rate, and no part that is held out")
            function = self.loss(loss, noise, **(parameters or {}))
            mini = webvision.read(self.root, settings.pop("augment"))
            settings |= {"device": self.device, "team": processes.team()}
            return streaming.train(self.model(seed), function, mini.train, mini.tests, **settings)
        run = self.member(loss, noise, rate, seed, parameters=parameters, hold_out=hold_out)
        return train(run.model, run.loss, run.data, **settings)

    def member(
        self,
        loss: str,
        noise: str = "symmetric",
        rate: float = 0.0,
        seed: int = 0,
        *,
        lr: float | None = None,
        parameters: Mapping[str, Any] | None = None,
        hold_out: float = 0.0,
    ) -> Run:
        """What a run has of its own, to train it with others; the arguments are :meth:`train`'s."""
        data = self.data(noise, rate, seed)
        if hold_out:
            data = data.hold_out(hold_out, seed)
        function = self.loss(loss, noise, given=data.given, seed=seed, **(parameters or {}))
        return Run(self.model(seed), function, data, self.settings(loss, lr=lr)["lr"], seed)

    def together(self, loss: str = "", *, epochs: int | None = None) -> dict[str, Any] | None:
        """Keyword arguments for :func:`apl.ensemble.train`; None where runs go one by one.

        >>> Protocol.of("digits").together("ce")["epochs"], Protocol.of("mnist").together("ce")
        (60, None)
        """
        if self.name not in SMALL or self.precision not in (None, "float32"):
            return None
        own = self.settings(loss, epochs=epochs)
        return {name: own[name] for name in own if name not in _ALONE}

    def __repr__(self) -> str:
        return (
            f"Protocol({self.name!r}, {self.source!r}, {self.network}, {self._length}, "
            f"{self.device})"
        )

    def __str__(self) -> str:
        what = f"{self.title} on {self.device}, {_ORIGIN[self.source]}: {self.network}"
        run = f"{what}, {self._length} a run"
        if self.device != "cpu":
            return f"{run}; how long one takes, the progress bar says after its first epoch"
        time = f"{run}, about {duration(self.epochs * self.cpu_seconds)} on"
        if self.name in SMALL:
            return f"{time} one core"
        return f"{time} two cores: it is meant for a GPU"

    @property
    def _length(self) -> str:
        return f"{self.epochs} epoch{'' if self.epochs == 1 else 's'}"


def protocol(
    name: str | None = None,
    *,
    source: str = "code",
    epochs: int | None = None,
    root: str | Path | None = None,
) -> Protocol:
    """What to train here; it prints what was picked, where it runs and how long that takes.

    Parameters
    ----------
    name
        "digits", "digit-pairs", "mnist", "cifar10", "cifar100" or "webvision"; by default what
        the environment variable ``APL_PROTOCOL`` names, else "cifar10" where there is a GPU and
        "digits" where there is none
    source
        "code" or "2020", whose settings the paper's data sets get, see :mod:`apl.recipes`; digits
        and WebVision have one protocol only
    epochs
        for shorter runs than the protocol's; the learning rate then falls within them
    root
        the folder of the data set, see :func:`apl.data.load`

    Raises
    ------
    ValueError
        for an unknown name or source; it lists those there are

    Examples
    --------
    >>> digits = protocol("digits")
    Digits on cpu, this book's own settings: digits_net, 60 epochs a run, about ...
    """
    found = Protocol.of(name or default_name(), source=source, epochs=epochs, root=root)
    print(found)
    return found


def default_name() -> str:
    """The data set to train on where none is named: ``APL_PROTOCOL``'s, or this machine's.

    Raises
    ------
    ValueError
        where APL_PROTOCOL names another; it lists those there are

    >>> default_name() in NAMES
    True
    """
    named = os.environ.get("APL_PROTOCOL")
    if named and named not in NAMES:
        raise ValueError(f"no protocol {named!r} (from APL_PROTOCOL); there is {', '.join(NAMES)}")
    return named or ("cifar10" if torch.cuda.is_available() else "digits")


@lru_cache(maxsize=1)
def _load(name: str, device: str, root: str | Path | None) -> Dataset:
    return load(name, device=device, root=root)


def duration(seconds: float) -> str:
    """Seconds in words, in the unit that suits them.

    >>> duration(1.2), duration(90), duration(150), duration(86400)
    ('a second', '90 seconds', '2 minutes', '24 hours')
    """
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} seconds" if seconds >= 1.5 else "a second"
