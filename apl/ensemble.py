"""Many runs of one small network at once, each with its own loss, seed, labels and learning rate.

A step on so small a network as the digits' mostly waits for torch to be called. Here the weights of
all runs are stacked, (runs, outputs, inputs), and a step of all of them is as many calls as one.
The numbers are those of :func:`apl.training.train` up to float rounding, as sums are taken in
another order. Training enlarges such differences as it does any others, so that after many epochs a
sample may be predicted differently.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from itertools import groupby

import pandas as pd
import torch
from torch import Tensor, nn

from apl.data import Dataset
from apl.losses import Loss
from apl.noise import generator
from apl.stacked import Stack, available, stackable
from apl.training import memorized

__all__ = ["MOST", "Run", "available", "train"]

MOST = 24
"""How many runs are best trained at once: more of them fit the cache of a CPU less well."""


@dataclass(frozen=True, eq=False)
class Run:
    """What a run of an ensemble has of its own; ``model`` is trained in place."""

    model: nn.Module
    loss: nn.Module
    data: Dataset
    lr: float
    seed: int = 0


@torch.no_grad()
def train(
    runs: Sequence[Run],
    *,
    epochs: int,
    batch_size: int = 128,
    momentum: float = 0.9,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    eta_min: float = 0.0,
    clip: float = 5.0,
    on_epoch: Callable[[int], None] | None = None,
) -> list[pd.DataFrame | FloatingPointError]:
    """Train all runs at once, each as :func:`apl.training.train` does alone; return their tables.

    A run whose training loss is no longer finite has the error in place of its table, and does not
    touch the others. It runs on a CPU, where one thread is fastest, and needs numba.

    Parameters
    ----------
    runs
        of networks of one shape, with training and test sets of one size. A network is an
        ``nn.Sequential`` of ``Flatten``, then ``Linear``, ``BatchNorm1d`` and ``ReLU``; a loss is a
        mean :class:`apl.losses.Loss`
    epochs, batch_size, momentum, nesterov, weight_decay, eta_min, clip
        as in :func:`apl.training.train`, the same for all
    on_epoch
        called with the number of epochs done after each; what it raises ends the training

    Raises
    ------
    ValueError
        for runs that do not go together, for networks, losses or devices of another kind, and where
        numba is missing

    Examples
    --------
    >>> import apl
    >>> digits = apl.data.load("digits").with_noise(apl.noise.symmetric(10, 0.4), seed=0)
    >>> losses = [apl.CE(), apl.normalize(apl.CE())]
    >>> runs = [Run(apl.models.digits_net(), loss, digits, lr=0.01) for loss in losses]
    >>> [history["epoch"].tolist() for history in train(runs, epochs=2)]
    [[1, 2], [1, 2]]
    """
    # Runs of one loss side by side, so that it is evaluated once for all of them.
    places = sorted(range(len(runs)), key=lambda place: _key(runs[place].loss))
    inner = [runs[place] for place in places]
    _check(inner, batch_size)
    network, losses = Stack([run.model for run in inner]), _Losses([r.loss for r in inner])
    data = _Data([run.data for run in inner])
    orders = [generator(run.seed, stream=2) for run in inner]
    highest = torch.tensor([run.lr for run in inner], dtype=torch.float64, device=data.device)
    rows: list[list[dict[str, float]]] = [[] for _ in inner]
    errors: dict[int, FloatingPointError] = {}
    for epoch in range(epochs):
        lr = eta_min + (highest - eta_min) * (1 + math.cos(math.pi * epoch / epochs)) / 2
        total = torch.zeros(len(inner), device=data.device)
        order = torch.stack([torch.randperm(data.N, generator=own) for own in orders])
        for images, given in data.batches(order.to(data.device), batch_size):
            batch_losses, slope = losses(network.forward(images.mT, training=True), given)
            network.backward(slope)
            network.step(lr, momentum, nesterov, weight_decay, clip)
            total += batch_losses * given.shape[1]
        train_losses = [value / data.N for value in total.tolist()]
        measures = data.measures(network)
        for m, train_loss in enumerate(train_losses):
            if m not in errors and not math.isfinite(train_loss):
                what = f"the training loss is {train_loss} in epoch {epoch + 1}"
                errors[m] = FloatingPointError(what)
            own = {name: values[m] for name, values in measures.items()}
            rows[m].append({"epoch": epoch + 1, "train_loss": train_loss} | own)
        if on_epoch is not None:
            on_epoch(epoch + 1)
        if len(errors) == len(inner):
            break
    network.write_back()
    done = {p: errors.get(m, pd.DataFrame(rows[m])) for m, p in enumerate(places)}
    return [done[place] for place in range(len(runs))]


class _Data:
    """The data of all runs, images as (runs, N, inputs)."""

    def __init__(self, data: Sequence[Dataset]) -> None:
        self.images = _stacked([one.images for one in data]).flatten(2)
        self.test_images = _stacked([one.test_images for one in data]).flatten(2)
        self.given, self.labels, self.test_labels = (
            torch.stack([getattr(one, name) for one in data])
            for name in ("given", "labels", "test_labels")
        )
        self.device = self.given.device
        self.M, self.N = self.given.shape
        # Where runs share their images, all of them are read from one place.
        own = 0 if self.images.stride(0) == 0 else self.N
        self._first = own * torch.arange(self.M, device=self.device)[:, None]
        self._samples = (self.images[0] if own == 0 else self.images.flatten(0, 1)).contiguous()

    def batches(self, order: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
        """Images (runs, B, inputs) and labels (runs, B) in the order of each run."""
        places = (order + self._first).flatten()
        images = self._samples.index_select(0, places).view(self.M, self.N, -1)
        given = self.given.gather(1, order)
        return list(zip(images.split(size, 1), given.split(size, 1), strict=True))

    def measures(self, network: Stack) -> dict[str, list[float]]:
        """The measures of an epoch, for each run."""
        tested = network.predict(self.test_images) == self.test_labels
        shares = memorized(network.predict(self.images), self.given, self.labels)
        shares = {"test_accuracy": tested.float().mean(-1)} | shares
        table = torch.stack(list(shares.values())).tolist()  # one copy from the device
        return dict(zip(shares, table, strict=True))


class _Losses:
    """The losses of all runs, each evaluated once on all of its runs, which stand side by side."""

    def __init__(self, losses: Sequence[nn.Module]) -> None:
        groups = [list(group) for _, group in groupby(losses, key=_key)]
        self.sizes = [len(group) for group in groups]
        self.each = [copy(group[0]) for group in groups]
        for loss in self.each:
            loss.__dict__["reduction"] = "none"

    def __call__(self, logits: Tensor, given: Tensor) -> tuple[Tensor, Tensor]:
        """The mean losses (runs,), and their gradients in the logits (runs, K, B)."""
        M, K, B = logits.shape
        sizes = [size * B for size in self.sizes]
        rows = logits.mT.reshape(M * B, K)
        with torch.enable_grad():
            rows.requires_grad_()
            parts = zip(self.each, rows.split(sizes), given.flatten().split(sizes), strict=True)
            values = torch.cat([loss(part, labels) for loss, part, labels in parts])
            (slope,) = torch.autograd.grad(values.sum(), rows)
        return values.detach().view(M, B).mean(-1), slope.view(M, B, K).mT / B


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    """The tensors as one; where all are the same, without a copy."""
    first = tensors[0]
    if all(tensor is first for tensor in tensors):
        return first.expand(len(tensors), *first.shape)
    return torch.stack(list(tensors))


def _key(loss: nn.Module) -> str:
    """The same for losses that are the same function."""
    if not isinstance(loss, Loss) or loss.reduction != "mean":
        raise ValueError(f"an ensemble takes losses of apl that are means, not {loss!r}")
    return f"{loss.expression} {sorted(loss.hyperparameters.items())}"


def _check(runs: Sequence[Run], batch_size: int) -> None:
    if not runs:
        raise ValueError("an ensemble needs at least one run")
    if not available():
        raise ValueError("an ensemble needs numba, which is not installed; runs can go one by one")
    if any(run.data.device.type != "cpu" for run in runs):
        raise ValueError(
            "an ensemble trains on a CPU; on a GPU runs go one by one, or as processes"
        )
    shapes = []
    for run in runs:
        if not stackable(run.model):
            raise ValueError(
                "an ensemble takes networks that are an nn.Sequential of Flatten, then Linear, "
                "BatchNorm1d after it and ReLU"
            )
        sizes = [tuple(p.shape) for p in (run.data.images, run.data.test_images)]
        shapes.append((str(run.model), sizes, run.data.K, run.data.device))
    if any(shape != shapes[0] for shape in shapes):
        raise ValueError("the runs of an ensemble have networks and data sets of one shape")
    N = len(runs[0].data.given)
    if N % batch_size == 1 and any(isinstance(m, nn.BatchNorm1d) for m in runs[0].model.modules()):
        raise ValueError(
            f"of {N} samples, batches of {batch_size} leave one over: batch normalization needs two"
        )
