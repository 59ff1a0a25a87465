"""What there is to run: the cells of the paper's tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from apl import human, precision
from apl.catalog import CATALOG
from apl.checkpoints import Checkpoint
from apl.protocols import SMALL, Protocol
from apl.recipes import protocol_rows, recipes

__all__ = ["KINDS", "LEVELS", "Cell", "grid", "table_losses"]

LEVELS: tuple[tuple[str, float], ...] = (
    ("clean", 0.0),
    *(("symmetric", rate) for rate in (0.2, 0.4, 0.6, 0.8)),
    *(("asymmetric", rate) for rate in (0.1, 0.2, 0.3, 0.4)),
)
"""The noise of the paper's tables, kind and rate."""

KINDS: tuple[str, ...] = (
    *dict(LEVELS),
    *(kind for name in human.SETS for kind in human.noises(name)),
    "real",
)
"""All kinds of noise, in the order of tables: the paper's, labels that people gave, WebVision's."""

_CHANGEABLE = (
    *("network", "procedure", "batch_size", "lr", "momentum", "nesterov", "weight_decay"),
    *("eta_min", "clip", "decay", "parts", "samples", "precision"),
)
_MAY_BE_ZERO = ("momentum", "weight_decay", "eta_min")


@dataclass(frozen=True)
class Cell:
    """One run of the grid.

    ``source`` is where the paper's protocol is taken from, "code" or "2020"; digits have one only,
    "book". Where ``epochs`` is None the protocol's are run. ``changes`` replace settings of the
    protocol (network, procedure, lr, ...) or, for other names, parameters of the loss; for
    CIFAR-100, ``(("network", "resnet34"), ("alpha", 5.0))``.

    Labels that people gave, "human-worst" for one, have the rate that was measured, see
    :func:`apl.human.rate`; losses have the parameters they have for symmetric noise.

    Raises
    ------
    ValueError
        for a data set, source, loss, noise, rate or change that is not known; it lists what is

    Examples
    --------
    >>> Cell("digits", "NCE+MAE", "symmetric", 0.6, seed=1)
    digits nce+mae symmetric 0.6 seed 1
    >>> Cell("cifar10", "ce", "human-worst")
    cifar10 ce human-worst 0.40208 seed 0
    >>> Cell("cifar100", "nce+rce", "asymmetric", 0.4, source="2020").settings()["loss_parameters"]
    {'alpha': 5.0, 'beta': 0.1}
    """

    dataset: str
    loss: str
    noise: str = "clean"
    rate: float = 0.0
    seed: int = 0
    source: str = "code"
    epochs: int | None = None
    changes: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self) -> None:
        if self.noise not in KINDS:
            raise ValueError(f"no noise {self.noise!r}; there is {', '.join(KINDS)}")
        if human.is_human(self.noise):
            measured = human.rate(self.dataset, self.noise)
            if self.rate not in (0, measured):
                raise ValueError(
                    f"{self.noise} cannot have the rate {self.rate:g}: {measured:g} of the labels "
                    "are wrong, as measured"
                )
            object.__setattr__(self, "rate", measured)
        if (self.dataset == "webvision") != (self.noise == "real"):
            raise ValueError(
                f"{self.dataset} with {self.noise} noise is not possible: webvision has real noise "
                "and no other, and it alone has it"
            )
        if (self.noise in ("clean", "real")) != (self.rate == 0):
            raise ValueError(
                f"{self.noise} noise of rate {self.rate:g} is not possible: clean has the rate 0, "
                "symmetric and asymmetric have one above 0; real noise has none that is known"
            )
        if not isinstance(self.seed, int) or not 0 <= self.seed < 2**32:
            raise ValueError(f"seed = {self.seed!r} is not allowed: it is an int in 0..2**32-1")
        if self.epochs is not None and (not isinstance(self.epochs, int) or self.epochs < 1):
            raise ValueError(f"epochs = {self.epochs!r} is not allowed: it is an int of at least 1")
        if self.dataset in SMALL:
            object.__setattr__(self, "source", "book")
        object.__setattr__(self, "loss", self.loss.lower())
        object.__setattr__(self, "rate", float(self.rate))
        object.__setattr__(self, "changes", tuple(sorted(self.changes)))
        self.settings()  # says what is wrong before anything runs

    @property
    def kind(self) -> str:
        """The noise's kind for the protocol, where no noise is symmetric noise of rate 0."""
        return "symmetric" if self.noise == "clean" else self.noise

    def protocol(self, root: str | Path | None = None) -> Protocol:
        """The protocol, with this cell's epochs and changes."""
        given = _protocol(self.dataset, self.source, self.epochs, self.changes)
        return replace(given, root=root)

    def train(
        self, root: str | Path | None = None, checkpoint: Checkpoint | None = None
    ) -> pd.DataFrame:
        """Do the run and return its history, see :func:`apl.training.train`."""
        return self.protocol(root).train(
            self.loss,
            self.kind,
            self.rate,
            self.seed,
            parameters=self.parameters(),
            progress=False,
            checkpoint=checkpoint,
        )

    def parameters(self) -> dict[str, Any]:
        """Those of the changes that are the loss's."""
        return {name: value for name, value in self.changes if name not in _CHANGEABLE}

    def settings(self) -> dict[str, Any]:
        """All that the numbers depend on, device and versions apart, as plain values."""
        names: dict[str, Any] = {"dataset": self.dataset, "source": self.source, "loss": self.loss}
        names |= {"noise": self.noise, "rate": self.rate, "seed": self.seed}
        key = self.dataset, self.source, self.loss, self.kind, self.rate, self.epochs, self.changes
        return names | _rest(*key)

    def __repr__(self) -> str:
        noise = f"{self.noise} {self.rate:g}" if self.rate else self.noise
        changes = "".join(f" {name}={value}" for name, value in self.changes)
        epochs = "" if self.epochs is None else f" {self.epochs} epochs"
        source = " 2020" if self.source == "2020" else ""
        return f"{self.dataset}{source} {self.loss} {noise} seed {self.seed}{epochs}{changes}"


def table_losses(dataset: str, source: str = "code") -> tuple[str, ...]:
    """The losses of the paper's table for a data set, as a source has them; digits have all.

    >>> "mae+rce" in table_losses("cifar10"), "mae+rce" in table_losses("cifar10", "2020")
    (False, True)
    """
    if dataset == "digits":
        return tuple(CATALOG)
    source = "book" if dataset in SMALL else source
    found = dict.fromkeys(r.loss for r in recipes() if (r.source, r.dataset) == (source, dataset))
    return tuple(found)


def grid(
    datasets: Iterable[str] = ("digits",),
    *,
    losses: Sequence[str] | None = None,
    noises: Sequence[str] | None = None,
    rates: Sequence[float] | None = None,
    seeds: Sequence[int] | None = None,
    source: str = "code",
    epochs: int | None = None,
    changes: Mapping[str, Any] | None = None,
) -> list[Cell]:
    """The cells of the paper's tables, or the part of them that is named.

    They come seed by seed, so that a grid that is stopped early has every cell once. Rates are
    those of the paper, unless both noises and rates are named; then it is every pair of them.
    Labels that people gave are run only where they are named, or all of a data set's as "human".

    Raises
    ------
    ValueError
        for a name or number that is not known, see :class:`Cell`, and a rate the paper does not
        have for any kind of noise

    Examples
    --------
    >>> grid(losses=["ce"], noises=["symmetric"], seeds=[0])[:2]
    [digits ce symmetric 0.2 seed 0, digits ce symmetric 0.4 seed 0]
    >>> len(grid())
    648
    """
    cells = []
    for dataset in datasets:
        chosen = table_losses(dataset, source) if losses is None else losses
        own = Protocol.of(dataset, source=source).seeds if seeds is None else seeds
        levels = _levels(dataset, noises, rates)
        cells += [
            Cell(dataset, loss, noise, rate, seed, source, epochs, tuple((changes or {}).items()))
            for seed in own
            for loss in chosen
            for noise, rate in levels
        ]
    return list(dict.fromkeys(cells))


def _levels(
    dataset: str, noises: Sequence[str] | None, rates: Sequence[float] | None
) -> list[tuple[str, float]]:
    if dataset == "webvision":
        return [("real", 0.0)] if "real" in (noises or ["real"]) and not rates else []
    if noises is None and rates is None:
        return list(LEVELS)
    given = []
    if noises is not None:
        for noise in noises:
            if noise not in (*KINDS, "human"):
                raise ValueError(f"no noise {noise!r}; there is {', '.join(KINDS)}, or human")
        named = [n for n in noises if human.is_human(n)]
        named += human.noises(dataset) if "human" in noises else ()
        given = [(noise, human.rate(dataset, noise)) for noise in named]
        noises = [n for n in noises if n not in ("human", "real") and not human.is_human(n)]
    if rates is None:
        return [level for level in LEVELS if level[0] in (noises or ())] + given
    if noises is None:
        known = {rate for _, rate in LEVELS}
        for rate in rates:
            if rate not in known:
                listed = ", ".join(f"{r:g}" for r in sorted(known))
                raise ValueError(
                    f"no table has the rate {rate:g}, they have {listed}; name the noise too to "
                    "run it all the same"
                )
        return [level for level in LEVELS if level[1] in rates]
    clean = [("clean", 0.0)] if "clean" in noises else []
    return clean + [(noise, rate) for noise in noises if noise != "clean" for rate in rates] + given


@lru_cache(maxsize=64)
def _protocol(
    dataset: str, source: str, epochs: int | None, changes: tuple[tuple[str, Any], ...]
) -> Protocol:
    given = Protocol.of(dataset, source="code" if source == "book" else source, epochs=epochs)
    chosen = {name: value for name, value in changes if name in _CHANGEABLE}
    for name, value in chosen.items():
        absent = {"samples": int, "precision": str}.get(name)  # in the protocols as they are
        kind = absent or type(getattr(given, name))
        if kind is type(None):
            raise ValueError(f"{dataset} has no setting {name!r} that could be changed")
        chosen[name] = _checked(dataset, name, value, kind)
    # What is changed holds for every loss.
    exceptions = {
        loss: {name: value for name, value in own.items() if name not in chosen}
        for loss, own in given.exceptions.items()
    }
    return replace(given, exceptions=exceptions, **chosen)


def _checked(dataset: str, name: str, value: Any, kind: type[Any]) -> Any:
    if kind is str:
        rows = protocol_rows()
        known = {r["value"] for r in rows if r["dataset"] == dataset and r["parameter"] == name}
        known |= {"procedure": {"matrix"}, "precision": {*precision.NAMES}}.get(name, set())
        if value not in known:
            raise ValueError(f"no {name} {value!r} for {dataset}; there is {', '.join(known)}")
        return value
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not kind:
        raise ValueError(f"{name} = {value!r} is not allowed: it is {kind.__name__}")
    if kind is not bool and not (0 <= value < float("inf") and (value or name in _MAY_BE_ZERO)):
        raise ValueError(f"{name} = {value!r} is not allowed: it is finite and above 0")
    return value


@lru_cache(maxsize=4096)
def _rest(
    dataset: str,
    source: str,
    loss: str,
    kind: str,
    rate: float,
    epochs: int | None,
    changes: tuple[tuple[str, Any], ...],
) -> dict[str, Any]:
    """The settings that follow from the names of a cell."""
    protocol = _protocol(dataset, source, epochs, changes)
    if not human.is_human(kind) and kind != "real":
        protocol.transition_matrix(kind, rate)  # says what is wrong with them
    parameters = {name: value for name, value in changes if name not in _CHANGEABLE}
    function: Any = protocol.loss(loss, kind, given=torch.arange(protocol.K), **parameters)
    values = function.settings if hasattr(function, "settings") else function.hyperparameters
    if "scale" in parameters:
        values = {**values, "scale": parameters["scale"]}
    settings = protocol.settings(loss)
    augment = asdict(settings.pop("augment"))
    return {
        **{"network": protocol.network, "procedure": protocol.procedure},
        **{"runs": getattr(function, "runs", loss), "loss_parameters": dict(values)},
        **settings,
        "augment": augment,
        # Only where it is set: a run of everything is the one that was recorded before.
        **({} if protocol.samples is None else {"samples": protocol.samples}),
    }
