"""The training loop, on one page, and what it watches: how much is memorized."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from tqdm import trange

from apl import capture
from apl import precision as precisions
from apl.checkpoints import Checkpoint
from apl.data import Dataset
from apl.noise import generator

AHEAD = 4096
"""On a GPU so many images are augmented at once, for the batches that follow."""


@contextmanager
def repeatable() -> Iterator[None]:
    """Only such cuDNN kernels as give the same numbers each time, in float32 without TF32.

    Both choices are put back afterwards.
    """
    cudnn = torch.backends.cudnn
    # Before torch 2.9 there was one switch for convolutions and recurrent layers together.
    place, name, value = (
        (cudnn.conv, "fp32_precision", "ieee")
        if hasattr(cudnn, "conv")
        else (cudnn, "allow_tf32", False)
    )
    before = cudnn.deterministic, getattr(place, name)
    cudnn.deterministic = True
    setattr(place, name, value)
    try:
        yield
    finally:
        cudnn.deterministic = before[0]
        setattr(place, name, before[1])


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread for torch, which is fastest for a small network, and gives the same numbers.

    >>> with one_thread():
    ...     torch.get_num_threads()
    1
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@repeatable()
def train(
    model: nn.Module,
    loss: Callable[[Tensor, Tensor], Tensor],
    data: Dataset,
    *,
    epochs: int,
    lr: float,
    batch_size: int = 128,
    eval_batch_size: int = 1024,
    momentum: float = 0.9,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    eta_min: float = 0.0,
    clip: float = 5.0,
    augment: Callable[[Tensor, torch.Generator], Tensor] | None = None,
    seed: int = 0,
    progress: bool | None = None,
    checkpoint: Checkpoint | None = None,
    precision: str | None = None,
    graph: bool | None = None,
    on_step: Callable[[], None] = lambda: None,
) -> pd.DataFrame:
    """Train on the given labels with SGD and a cosine schedule; return a table, one row an epoch.

    Everything stays on the data's device, and a step does not wait for it: the running loss is read
    once an epoch. So small a network as the digits' trains fastest on one core,
    see :func:`one_thread`, and many of them in an ensemble, see :mod:`apl.ensemble`.

    On a GPU, the network computes in half precision; images are augmented for many batches at once;
    the optimizer updates all weights in one kernel; and a step is recorded once as a CUDA graph,
    which then launches all of it at once. On a CPU, none of this happens: float32, step by step.

    Parameters
    ----------
    model, loss, data
        the network (trained in place, on the data's device), the loss of logits and labels, and
        the data set, whose ``given`` labels are trained on
    epochs, lr, batch_size, momentum, nesterov, weight_decay
        of SGD; the last batch of an epoch is the smaller rest
    eta_min
        where the learning rate ends: it falls from ``lr`` along a cosine, a step after each epoch
    clip
        the largest norm of the gradient over all parameters
    augment
        changes the images of a batch at random, see :mod:`apl.augment`; for training only
    eval_batch_size
        how many images are predicted at once, on a GPU at least 1024; it changes the speed and the
        memory, not the task
    seed
        of the order of the samples and of the augmentation; the same seed gives the same numbers on
        the same device
    progress
        whether to show a progress bar; by default it shows, unless CI or TQDM_DISABLE is set
    checkpoint
        where to keep a run that may be killed, and to continue it from; the numbers stay the same
    precision
        in what the network computes, "float32", "bfloat16" or "float16"; by default what is fastest
        on the device, see :mod:`apl.precision`
    graph
        whether a GPU records the step, see :mod:`apl.capture`; by default where network and loss
        are made of modules of torch and apl. It changes the speed, not the numbers
    on_step
        called after each step, see :mod:`apl.turns`

    Returns
    -------
    pandas.DataFrame
        ``epoch``, ``train_loss``, ``test_accuracy`` and the columns of :func:`memorization`,
        accuracies as fractions, all measured at the end of the epoch except the running
        ``train_loss``

    Raises
    ------
    FloatingPointError
        when the training loss is no longer finite
    OutOfTime
        where the deadline of the checkpoint does not leave the time for another epoch
    ValueError
        for an unknown precision

    Examples
    --------
    >>> import apl
    >>> digits = apl.data.load("digits").with_noise(apl.noise.symmetric(10, 0.4), seed=0)
    >>> history = train(apl.models.digits_net(), apl.MAE(), digits, epochs=1, lr=0.01)
    >>> list(history.columns)[:3]
    ['epoch', 'train_loss', 'test_accuracy']
    """
    model.to(data.device)
    if data.images.ndim == 4:  # the layout in which convolutions are fastest, here and on a GPU
        model.to(memory_format=torch.channels_last)
    device, gpu = data.device, on_gpu(data.device)
    precision = precisions.of(device, precision)
    weights = list(model.parameters())
    optimizer = sgd(weights, lr, momentum, weight_decay, nesterov, gpu)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs, eta_min)
    scaler = precisions.scaler(precision, device)
    order = generator(seed, stream=2)
    # On the data's device, so that a step needs no copy to it.
    draws = torch.Generator(device).manual_seed(generator(seed, stream=3).initial_seed())
    bar = {} if progress is None and "CI" not in os.environ else {"disable": not progress}
    rows: list[dict[str, float]] = []
    if checkpoint is not None:
        parts = {"model": model, "optimizer": optimizer, "schedule": schedule, "loss": loss}
        parts |= {"scaler": scaler} if scaler.is_enabled() else {}
        rows = checkpoint.resume(**parts, order=order, draws=draws)
        for group in optimizer.param_groups if gpu else ():  # where it is a tensor
            group["lr"] = torch.as_tensor(group["lr"], dtype=torch.float32, device=device)
    total = torch.zeros((), device=device)

    def step(images: Tensor, labels: Tensor) -> None:
        with precisions.computing(precision, device):
            logits = model(images)
        batch_loss = loss(logits if precision == "float32" else logits.float(), labels)
        optimizer.zero_grad()
        scaler.scale(batch_loss).backward()
        scaler.unscale_(optimizer)
        clip_grad_norm_(weights, clip)
        scaler.step(optimizer)
        scaler.update()
        total.add_(batch_loss.detach() * len(labels))

    recorded = gpu and (capture.known(model, loss) if graph is None else graph)
    do = capture.Replayed(step, loss, device) if recorded else step
    at_once = batch_size * max(1, AHEAD // batch_size) if gpu else batch_size
    done = len(rows)
    for epoch in trange(done, epochs, initial=done, total=epochs, leave=False, unit="epoch", **bar):
        model.train()
        total.zero_()
        shuffled = torch.randperm(len(data.given), generator=order).to(device)
        for part in shuffled.split(at_once):
            images = data.images[part] if augment is None else augment(data.images[part], draws)
            if gpu:
                images = images.contiguous(memory_format=torch.channels_last)
            batches = images.split(batch_size), data.given[part].split(batch_size)
            for batch in zip(*batches, strict=True):
                do(*batch)
                on_step()
        schedule.step()
        train_loss = total.item() / len(data.given)
        if not abs(train_loss) < float("inf"):
            raise FloatingPointError(f"the training loss is {train_loss} in epoch {epoch + 1}")
        size = max(eval_batch_size, 1024) if gpu else eval_batch_size
        with precisions.computing(precision, device):
            predicted, on_training_set = (
                predict(model, x, size) for x in (data.test_images, data.images)
            )
        test = (predicted == data.test_labels).float().mean().item()
        row = {"epoch": epoch + 1, "train_loss": train_loss, "test_accuracy": test}
        rows.append(row | memorization(on_training_set, data))
        if checkpoint is not None:
            checkpoint.after_epoch(rows, epochs)
    return pd.DataFrame(rows)


def on_gpu(device: torch.device) -> bool:
    """Whether a device is one that torch programs as NVIDIA's GPUs."""
    return device.type == "cuda"


def sgd(
    weights: list[nn.Parameter],
    lr: float,
    momentum: float,
    weight_decay: float,
    nesterov: bool,
    gpu: bool,
) -> torch.optim.SGD:
    """The optimizer; on a GPU one whose step reads nothing on the host, and can be replayed."""
    options: dict[str, Any] = {"weight_decay": weight_decay, "nesterov": nesterov}
    if not gpu:
        return torch.optim.SGD(weights, lr, momentum, **options)
    # The learning rate in a tensor: a recorded step reads it anew each time.
    rate = torch.tensor(lr, dtype=torch.float32, device=weights[0].device)
    optimizer = torch.optim.SGD(weights, rate, momentum, fused=True, **options)
    for weight in weights if momentum else ():
        # Where float16 overflows, the step is left out. Were that the first one, torch would leave
        # the momentum's memory as it finds it; starting from zeros is the same first step.
        optimizer.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
    return optimizer


@torch.no_grad()
def predict(model: nn.Module, images: Tensor, batch_size: int = 1024) -> Tensor:
    """The predicted classes of images, with the model in evaluation mode."""
    model.eval()
    return torch.cat([model(part).argmax(-1) for part in images.split(batch_size)])


def memorization(predicted: Tensor, data: Dataset) -> dict[str, float]:
    """What the predictions on the training set say about memorization.

    ``clean`` is the accuracy on samples whose label is right; ``wrong_given`` the fraction of
    samples with a wrong label that are predicted *as labeled*, memorized; ``wrong_true`` the
    fraction of them predicted *as they truly are*, corrected. Without wrong labels the last two
    are NaN. ``train_given`` and ``train_true`` are the accuracies on the whole training set.
    """
    found = memorized(predicted, data.given, data.labels)
    return {name: share.item() for name, share in found.items()}


def memorized(predicted: Tensor, given: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """What :func:`memorization` says, for predictions and labels of shape (..., N), unread."""
    wrong, as_given, as_true = given != labels, predicted == given, predicted == labels
    right = ~wrong
    n_right, n_wrong = right.sum(-1), wrong.sum(-1)
    return {
        "clean": (as_true & right).sum(-1) / n_right,
        "wrong_given": (as_given & wrong).sum(-1) / n_wrong,
        "wrong_true": (as_true & wrong).sum(-1) / n_wrong,
        "train_given": as_given.float().mean(-1),
        "train_true": as_true.float().mean(-1),
    }
