"""The training loop for data that stay in files: read by workers, in one process or in several.

What :mod:`apl.training` is for data that fit a device, this is for those that do not. Every batch
is cut into as many ``parts`` as the original run had GPUs. Batch normalization sees one part at a
time, and only the first part moves its running statistics, as under ``torch.nn.DataParallel``. The
processes that ``torchrun`` starts divide the parts among them; one process does them in turn. The
order of the samples, their augmentation and the parts depend on the seed and the settings alone, so
that one, two or four processes do the same arithmetic, up to the order of sums.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from torch.utils.data import ConcatDataset, Dataset
from tqdm import tqdm

from apl import precision as precisions
from apl.batches import Batches, Drawn, Key, Sample, default_workers, ended
from apl.batches import loader as reading
from apl.checkpoints import Checkpoint, OutOfTime
from apl.processes import ALONE, Team, reworded
from apl.training import on_gpu, repeatable, sgd

__all__ = ["train"]

TOP = (1, 5)
"""For which k top-k accuracy is measured."""


@repeatable()
@reworded()
def train(
    model: nn.Module,
    loss: Callable[[Tensor, Tensor], Tensor],
    data: Dataset[Sample],
    tests: Mapping[str, Dataset[Sample]],
    *,
    epochs: int,
    lr: float,
    decay: float,
    batch_size: int = 512,
    eval_batch_size: int = 1024,
    parts: int = 1,
    momentum: float = 0.9,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    clip: float = 5.0,
    seed: int = 0,
    workers: int | None = None,
    device: str | torch.device = "cpu",
    progress: bool | None = None,
    checkpoint: Checkpoint | None = None,
    team: Team = ALONE,
    precision: str | None = None,
) -> pd.DataFrame:
    """Train with SGD on samples read from files; return a table, one row an epoch.

    Under ``torchrun`` every process of the team calls it with the same arguments. Only the first
    one uses the checkpoint, and all of them return the same table.

    Parameters
    ----------
    model, loss
        the network and the loss of logits and labels, which takes the mean over samples
    data, tests
        data sets of pairs, image and label; the first of the tests by name is ``test_accuracy``
    epochs, lr, momentum, nesterov, weight_decay, clip, seed, progress, checkpoint, precision
        as in :func:`apl.training.train`
    decay
        what the learning rate is multiplied by after each epoch
    batch_size, parts
        how many samples, in all processes together, make a step; the last batch of an epoch is the
        smaller rest. In how many parts batch normalization sees them, see :mod:`apl.streaming`
    eval_batch_size
        how many images are predicted at once, in all processes together
    workers
        processes that read images, for each that trains; by default as many as
        :func:`default_workers` says, and 0 reads them in the process itself
    device, team
        where to train, and with whom, see :mod:`apl.processes`

    Returns
    -------
    pandas.DataFrame
        ``epoch``, ``train_loss``, ``test_accuracy`` and, for each test, its top-1 and top-5
        accuracy at the end of the epoch as fractions: ``NAME_top1``, ``NAME_top5``

    Raises
    ------
    ValueError
        where the processes cannot share the parts, and for an unknown precision
    FloatingPointError
        when the training loss is no longer finite
    OutOfTime
        where the deadline of the checkpoint does not leave the time for another epoch

    Examples
    --------
    >>> import apl
    >>> from torch.utils.data import TensorDataset
    >>> digits = apl.data.load("digits")
    >>> train_part = TensorDataset(digits.images, digits.labels)
    >>> tests = {"digits": TensorDataset(digits.test_images, digits.test_labels)}
    >>> net = apl.models.digits_net()
    >>> history = train(
    ...     net, apl.CE(), train_part, tests, epochs=1, lr=0.1, decay=0.97, workers=0
    ... )
    >>> list(history.columns)
    ['epoch', 'train_loss', 'test_accuracy', 'digits_top1', 'digits_top5']
    """
    device = torch.device(team.device or device)
    batches = Batches(_len(data), batch_size, parts, seed=seed, rank=team.rank, size=team.size)
    readers = default_workers(team.size) if workers is None else workers
    loader = reading(Drawn(data, seed), batches, readers, device)
    shown = _dealt(tests, max(1, eval_batch_size // team.size), team)
    test_loader = reading(Drawn(ConcatDataset(tests.values()), seed), shown, readers // 2, device)

    model.to(device).to(memory_format=torch.channels_last)
    numbers = precisions.of(device, precision)
    scaler = precisions.scaler(numbers, device)
    weights = list(model.parameters())
    optimizer = sgd(weights, lr, momentum, weight_decay, nesterov, on_gpu(device))
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, decay)
    rows: list[dict[str, float]] = []
    if checkpoint is not None and team.leads:
        states = {"model": model, "optimizer": optimizer, "schedule": schedule, "loss": loss}
        states |= {"scaler": scaler} if scaler.is_enabled() else {}
        rows = checkpoint.resume(**states)
    rows = _same_start(rows, optimizer, schedule, scaler, team)
    net = model
    if team.size > 1:  # it gives every process the first one's weights, and later gradients' means
        net = DistributedDataParallel(model, broadcast_buffers=False)
    bar: dict[str, Any] = {"leave": False, "unit": "batch"}
    if not team.leads or progress is not None or "CI" in os.environ:
        bar["disable"] = not (team.leads and progress)

    with ended(loader, test_loader):
        for epoch in range(len(rows), epochs):
            batches.epoch = epoch
            shown_loader = tqdm(loader, desc=f"epoch {epoch + 1}/{epochs}", **bar)
            train_loss = _epoch(
                net, loss, shown_loader, batches, optimizer, scaler, clip, numbers, device, team
            )
            schedule.step()
            if not abs(train_loss) < float("inf"):
                raise FloatingPointError(f"the training loss is {train_loss} in epoch {epoch + 1}")
            for values in model.buffers():
                team.copy(values)
            accuracy = _accuracy(model, test_loader, shown, tests, numbers, device, team)
            row = {"epoch": epoch + 1, "train_loss": train_loss}
            row["test_accuracy"] = next(iter(accuracy.values()))
            rows.append(row | accuracy)
            _save(checkpoint, rows, epochs, team)
    return pd.DataFrame(rows)


def _epoch(
    net: nn.Module,
    loss: Callable[[Tensor, Tensor], Tensor],
    loader: Any,
    batches: Batches,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    clip: float,
    numbers: str,
    device: torch.device,
    team: Team,
) -> float:
    """One epoch of training; its mean loss, the same in every process."""
    net.train()
    weights = list(net.parameters())
    many = net if isinstance(net, DistributedDataParallel) else None
    total = torch.zeros((), device=device)
    for step, (images, labels) in enumerate(loader):
        pieces = batches.pieces(step)
        sizes = [len(part) for part, _ in pieces]
        images = images.to(device, non_blocking=True, memory_format=torch.channels_last)
        labels = labels.to(device, non_blocking=True)
        optimizer.zero_grad()
        step_loss = torch.zeros((), device=device)
        cuts = zip(images.split(sizes), labels.split(sizes), pieces, strict=True)
        for i, (part, given, (_, weight)) in enumerate(cuts):
            # Gradients are exchanged once a step, with the last part.
            hold = many.no_sync() if many is not None and i + 1 < len(pieces) else nullcontext()
            moves = batches.mine.start + i == 0
            with hold, _statistics(net, moves):
                with precisions.computing(numbers, device):
                    logits = net(part)
                if numbers != "float32":
                    logits = logits.float()
                part_loss = weight * loss(logits, given)
                # The processes' gradients are averaged; what is wanted is their sum.
                scaler.scale(team.size * part_loss).backward()
            step_loss += part_loss.detach()
        scaler.unscale_(optimizer)
        clip_grad_norm_(weights, clip)
        scaler.step(optimizer)
        scaler.update()
        total += step_loss * min(batches.batch_size, batches.n - step * batches.batch_size)
    return team.total(total).item() / batches.n


@torch.no_grad()
def _accuracy(
    model: nn.Module,
    loader: Any,
    shown: Sequence[Sequence[Key]],
    tests: Mapping[str, Dataset[Sample]],
    numbers: str,
    device: torch.device,
    team: Team,
) -> dict[str, float]:
    """The top-k accuracies on every test, the same in every process."""
    model.eval()
    ends = np.cumsum([_len(test) for test in tests.values()])
    right = torch.zeros(len(tests), len(TOP), dtype=torch.int64, device=device)
    for keys, (images, labels) in zip(shown, loader, strict=True):
        with precisions.computing(numbers, device):
            images = images.to(device, non_blocking=True, memory_format=torch.channels_last)
            logits = model(images)
        found = logits.topk(min(max(TOP), logits.shape[-1])).indices == labels.to(device)[:, None]
        hits = torch.stack([found[:, :k].any(-1) for k in TOP], -1).long()
        which = np.searchsorted(ends, [index for _, index in keys], side="right")
        right.index_add_(0, torch.as_tensor(which, device=device), hits)
    counts = team.total(right).tolist()
    return {
        f"{name}_top{k}": counts[i][j] / _len(test)
        for i, (name, test) in enumerate(tests.items())
        for j, k in enumerate(TOP)
    }


@contextmanager
def _statistics(net: nn.Module, move: bool) -> Iterator[None]:
    """Whether batch normalization moves its running statistics."""
    layers = [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    before = [layer.momentum for layer in layers]
    try:
        for layer in layers:
            layer.momentum = layer.momentum if move else 0.0
        yield
    finally:
        for layer, momentum in zip(layers, before, strict=True):
            layer.momentum = momentum


def _same_start(
    rows: list[dict[str, float]],
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    scaler: torch.amp.GradScaler,
    team: Team,
) -> list[dict[str, float]]:
    """Where a continued run goes on, in every process; the weights follow by themselves."""
    buffer = io.BytesIO()
    if team.leads:
        torch.save([rows, *(s.state_dict() for s in (optimizer, schedule, scaler))], buffer)
    content = team.share(buffer.getvalue() if rows else None)
    if content is not None and not team.leads:
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        rows = state[0]
        optimizer.load_state_dict(state[1])
        schedule.load_state_dict(state[2])
        scaler.load_state_dict(state[3])
    return rows


def _save(
    checkpoint: Checkpoint | None, rows: list[dict[str, float]], epochs: int, team: Team
) -> None:
    """Save if it is time to; all processes stop together at the deadline of the first."""
    late = None
    try:
        if checkpoint is not None and team.leads:
            checkpoint.after_epoch(rows, epochs)
    except OutOfTime as stopped:
        late = str(stopped)
    if (late := team.share(late)) is not None:
        raise OutOfTime(late)


def _dealt(tests: Mapping[str, Dataset[Sample]], batch_size: int, team: Team) -> list[list[Key]]:
    """The samples of all tests, dealt out to the processes, in batches."""
    mine = range(team.rank, sum(_len(test) for test in tests.values()), team.size)
    return [
        [(0, index) for index in mine[i : i + batch_size]] for i in range(0, len(mine), batch_size)
    ]


def _len(data: Any) -> int:
    return len(data)
