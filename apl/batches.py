"""Batches of samples that are read from files, and who reads and who gets which part of them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

__all__ = ["Batches", "Drawn", "cut", "default_workers", "ended", "loader", "mixed"]

Sample = tuple[Tensor, int]
Key = tuple[int, int]


def cut(n: int, parts: int) -> list[tuple[list[int], float]]:
    """The parts of a batch of n samples: which samples, and the part's weight in the mean.

    With fewer samples than parts, some samples come twice, the second time with weight 0: no part
    is empty, and every sample counts once.

    >>> cut(5, 2), cut(1, 2)
    ([([0, 1, 2], 0.6), ([3, 4], 0.4)], [([0], 1.0), ([0], 0.0)])
    """
    if n < parts:
        return [([j % n], 1 / n if j < n else 0.0) for j in range(parts)]
    return [(p.tolist(), len(p) / n) for p in np.array_split(np.arange(n), parts)]


class Batches(Sampler[list[Key]]):
    """The batches of an epoch, in the seed's order, or of them the share of one process.

    Each sample is an epoch and an index, see :class:`Drawn`; ``epoch`` is to be set before each.

    Examples
    --------
    >>> first, second = (Batches(5, 4, 2, seed=0, rank=rank, size=2) for rank in range(2))
    >>> [len(batch) for batch in first], [len(batch) for batch in second]
    ([2, 1], [2, 1])
    """

    def __init__(
        self, n: int, batch_size: int, parts: int, *, seed: int, rank: int = 0, size: int = 1
    ) -> None:
        if parts % size:
            raise ValueError(
                f"{size} processes cannot share a batch of {parts} parts: take a number that "
                f"divides {parts}, or other parts (--set parts={size})"
            )
        if batch_size < parts:
            raise ValueError(f"a batch of {batch_size} cannot be cut into {parts} parts")
        self.n, self.batch_size, self.parts = n, batch_size, parts
        self.seed, self.epoch = seed, 0
        self.mine = slice(rank * (parts // size), (rank + 1) * (parts // size))

    def __len__(self) -> int:
        return -(-self.n // self.batch_size)

    def pieces(self, step: int) -> list[tuple[list[int], float]]:
        """This process's parts of a batch, as :func:`cut` gives them."""
        n = min(self.batch_size, self.n - step * self.batch_size)
        return cut(n, self.parts)[self.mine]

    def __iter__(self) -> Iterator[list[Key]]:
        draws = torch.Generator().manual_seed(mixed(self.seed, 2, self.epoch))
        order = torch.randperm(self.n, generator=draws).tolist()
        for step in range(len(self)):
            batch = order[step * self.batch_size : (step + 1) * self.batch_size]
            yield [(self.epoch, batch[i]) for part, _ in self.pieces(step) for i in part]


class Drawn(Dataset[Sample]):
    """A data set whose random transforms are drawn for each epoch and sample anew, from the seed.

    So the images do not depend on which worker or process reads them, or whether the run was
    continued. Its keys are pairs, an epoch and an index.
    """

    def __init__(self, data: Dataset[Sample], seed: int) -> None:
        self.data, self.seed = data, seed

    def __getitem__(self, key: Key) -> Sample:
        epoch, index = key
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(mixed(self.seed, 3, epoch, index))
            return self.data[index]


def default_workers(size: int = 1) -> int:
    """How many processes read images for each of ``size`` that train: 8, or the cores there are."""
    cores = min(8, (os.cpu_count() or 1) // size)
    return cores if cores > 1 else 0


def loader(
    data: Drawn, batches: Sampler[list[Key]] | list[list[Key]], workers: int, device: torch.device
) -> DataLoader[Sample]:
    """Read batches of keys with so many worker processes, 0 for none."""
    options: dict[str, Any] = {"num_workers": workers, "pin_memory": device.type == "cuda"}
    if workers:  # a process with threads, as torch's are, cannot safely be forked
        options |= {"multiprocessing_context": "spawn", "persistent_workers": True}
    return DataLoader(data, batch_sampler=batches, **options)


@contextmanager
def ended(*loaders: DataLoader[Sample]) -> Iterator[None]:
    """End the worker processes of these loaders on the way out, also by an exception.

    An exception keeps the loaders until the garbage collector comes, and it takes the queues of
    workers that have not started yet away before it tells them to end: they would fail.
    """
    try:
        yield
    finally:
        for each in loaders:
            # PyTorch has no public name for this; what a loop left behind does it in __del__.
            if (workers := getattr(each, "_iterator", None)) is not None:
                workers._shutdown_workers()


def mixed(*values: int) -> int:
    """One seed made of several numbers.

    >>> mixed(0, 1) == mixed(0, 1), mixed(0, 1) == mixed(1, 0)
    (True, False)
    """
    return int(np.random.SeedSequence(values).generate_state(1)[0])
