"""The networks."""

from __future__ import annotations

import torch
from torch import nn


def digits_net(seed: int = 0, *, width: int = 256, K: int = 10) -> nn.Sequential:
    """A small network for 8x8 digits: two hidden layers with batch normalization.

    Large enough to memorize wrong labels (85,514 parameters at the default width, 1,297 training
    images), small enough to train in a second. The same seed gives the same weights.

    Examples
    --------
    >>> net = digits_net(seed=0)
    >>> net(torch.zeros(5, 1, 8, 8)).shape
    torch.Size([5, 10])
    >>> sum(weights.numel() for weights in net.parameters())
    85514
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Flatten(),
            nn.Linear(64, width, bias=False),
            nn.BatchNorm1d(width),
            nn.ReLU(),
            nn.Linear(width, width, bias=False),
            nn.BatchNorm1d(width),
            nn.ReLU(),
            nn.Linear(width, K),
        )
