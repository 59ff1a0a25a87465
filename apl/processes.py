"""Several processes at one training run, as ``torchrun`` starts them; without it, one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["ALONE", "Team", "joined", "leave", "reworded", "team"]


@dataclass(frozen=True)
class Team:
    """The processes at a run, as one of them sees it.

    ``rank`` counts them from 0, ``size`` is how many there are, ``device`` is this one's own GPU,
    or the CPU. The first, rank 0, leads: it alone prints and writes.

    Examples
    --------
    >>> ALONE.leads, ALONE.share("value"), ALONE.total(torch.tensor([2.0]))
    (True, 'value', tensor([2.]))
    """

    rank: int = 0
    size: int = 1
    device: str | None = None

    @property
    def leads(self) -> bool:
        """Whether this is the first process."""
        return self.rank == 0

    def share(self, value: Any) -> Any:
        """What the first process gives, in every process; whoever is early waits for the others."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def total(self, values: Tensor) -> Tensor:
        """The sum of a tensor over all processes, in every process."""
        if self.size > 1:
            values = values.clone()
            dist.all_reduce(values)
        return values

    def copy(self, values: Tensor) -> None:
        """Overwrite a tensor with the first process's, in every process."""
        if self.size > 1:
            dist.broadcast(values, src=0)


ALONE = Team()
"""One process that nobody joins."""


def team() -> Team:
    """The processes that have met, see :func:`joined`; without that, this one alone.

    >>> team().size
    1
    """
    if not (dist.is_available() and dist.is_initialized()):
        return ALONE
    device = f"cuda:{torch.cuda.current_device()}" if dist.get_backend() == "nccl" else "cpu"
    return Team(dist.get_rank(), dist.get_world_size(), device)


@contextmanager
def joined() -> Iterator[Team]:
    """Meet the other processes that ``torchrun`` started; alone where it did not start this one.

    It reads what torchrun puts into the environment: ``RANK``, ``WORLD_SIZE`` and ``LOCAL_RANK``.
    GPUs speak NCCL to each other, CPUs gloo.

    Raises
    ------
    RuntimeError
        where there are GPUs, but fewer than processes on this machine

    Examples
    --------
    >>> with joined() as team:
    ...     team.size
    1
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield ALONE
        return
    local, device = int(os.environ.get("LOCAL_RANK", "0")), "cpu"
    if torch.cuda.is_available():
        if local >= torch.cuda.device_count():
            raise RuntimeError(
                f"process {local + 1} on this machine has no GPU of its own: there are "
                f"{torch.cuda.device_count()}, so start torchrun with --nproc_per_node "
                f"{torch.cuda.device_count()}"
            )
        device = f"cuda:{local}"
        torch.cuda.set_device(device)
    dist.init_process_group("gloo" if device == "cpu" else "nccl")
    try:
        yield team()
    finally:
        leave()


def leave() -> None:
    """Go on alone, where the others cannot be told to: a wait for this process ends in an error."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def reworded() -> Iterator[None]:
    """Say in one sentence that another process is gone, which shows as a broken connection."""
    try:
        yield
    except RuntimeError as error:
        network = isinstance(error, dist.DistError) or "closed by peer" in str(error)
        if not network or team().size == 1:
            raise
        raise RuntimeError("another process of this run ended, see what it said") from error
