"""Training as the official code does it, in our own words: what apl is timed against.

Images are read one by one through torchvision's transforms, in worker processes; the network
computes in float32, convolutions as torch does them by default, with TF32 where a GPU has it; the
loss works with one-hot labels; every step waits for the device to note its loss and accuracies.
cuDNN may try out which of its kernels are fastest (``cudnn.benchmark``).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.utils import data as torch_data
from torchvision import transforms

from apl import models
from apl.bench._contenders import one_hot
from apl.vision import SETS

__all__ = ["BATCH", "CLIP", "LOSS", "SGD", "Pixels", "made_up", "train"]

Pixels = tuple[Tensor, Tensor]
"""Images (N, 32, 32, 3) of bytes, and labels (N,)."""

LOSS = "nce+rce"
SGD: dict[str, Any] = {"lr": 0.01, "momentum": 0.9, "nesterov": False, "weight_decay": 1e-4}
BATCH, CLIP = 128, 5.0


class _Pictures(torch_data.Dataset[tuple[Tensor, int]]):
    """Images that become tensors one by one, when they are asked for."""

    def __init__(self, pixels: Tensor, labels: Tensor, change: Callable[[Any], Tensor]) -> None:
        self.pixels, self.labels = pixels.numpy(), labels.tolist()
        self.change = change

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, place: int) -> tuple[Tensor, int]:
        return self.change(Image.fromarray(self.pixels[place])), self.labels[place]


@contextmanager
def _tried_out() -> Iterator[None]:
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


@_tried_out()
def train(
    images_and_labels: Pixels,
    tests: Pixels,
    device: str,
    epochs: int,
    workers: int,
) -> float:
    """Train one run the usual way; images a second, over the epochs after a first one.

    Raises
    ------
    RuntimeError
        where a worker process cannot do its part
    """
    source = SETS["cifar10"]
    scale = [transforms.ToTensor(), transforms.Normalize(source.mean, source.std)]
    change = [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip()]
    options: dict[str, Any] = {"num_workers": workers, "pin_memory": device.startswith("cuda")}
    loader: Any = torch_data.DataLoader(
        _Pictures(*images_and_labels, transforms.Compose([*change, *scale])),
        BATCH,
        shuffle=True,
        **options,
    )
    test_loader: Any = torch_data.DataLoader(
        _Pictures(*tests, transforms.Compose(scale)), BATCH, **options
    )
    net, criterion = models.cifar10_cnn(0).to(device), one_hot(LOSS)
    optimizer = torch.optim.SGD(net.parameters(), **SGD)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs + 1)
    noted: list[tuple[float, ...]] = []
    start = 0.0
    for epoch in range(epochs + 1):
        if epoch == 1:
            start = time.perf_counter()
        net.train()
        for images, labels in loader:
            images = images.to(device, non_blocking=True)
            labels = labels.to(device, non_blocking=True)
            optimizer.zero_grad()
            logits = net(images)
            value = criterion(logits, labels)
            value.backward()
            clip_grad_norm_(net.parameters(), CLIP)
            optimizer.step()
            first, five = _top(logits, labels)
            noted.append((value.item(), first, five))
        schedule.step()
        _evaluate(net, criterion, test_loader, device)
    return epochs * len(images_and_labels[1]) / (time.perf_counter() - start)


@torch.no_grad()
def _evaluate(net: nn.Module, criterion: Any, loader: Any, device: str) -> float:
    net.eval()
    right = 0.0
    for images, labels in loader:
        images = images.to(device, non_blocking=True)
        labels = labels.to(device, non_blocking=True)
        logits = net(images)
        criterion(logits, labels).item()
        right += _top(logits, labels)[0] * len(labels)
    return right


def _top(logits: Tensor, labels: Tensor) -> tuple[float, float]:
    """The accuracies among the first one and the first five, read from the device."""
    hits = logits.topk(5, dim=1).indices == labels[:, None]
    return hits[:, :1].any(1).float().mean().item(), hits.any(1).float().mean().item()


def made_up(N: int) -> Pixels:
    """Images (N, 32, 32, 3) of random bytes, and labels."""
    draws = np.random.default_rng(0)
    pixels = draws.integers(0, 256, (N, 32, 32, 3), dtype=np.uint8)
    return torch.from_numpy(pixels), torch.from_numpy(draws.integers(0, 10, N))
