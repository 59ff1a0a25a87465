"""The paper's networks: sizes, shapes, seeds, and where their weights start."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from apl.models import cifar10_cnn, mnist_cnn, resnet34, resnet50

NETWORKS = [
    (mnist_cnn, 422_090, (1, 28, 28), 10),
    (cifar10_cnn, 1_639_794, (3, 32, 32), 10),
    (resnet34, 21_328_292, (3, 32, 32), 100),
    (resnet50, 23_705_252, (3, 32, 32), 100),
]
SMALL = [mnist_cnn, cifar10_cnn]


@pytest.mark.parametrize(("build", "parameters", "image", "K"), NETWORKS)
def test_size_and_shape(build: Any, parameters: int, image: tuple[int, ...], K: int) -> None:
    with torch.device("meta"):
        net = build()
        logits = net(torch.zeros(2, *image))
        other = build(K=7)(torch.zeros(2, *image))
    assert sum(weights.numel() for weights in net.parameters()) == parameters
    assert logits.shape == (2, K)
    assert other.shape == (2, 7)


def layers(net: nn.Module) -> tuple[int, int]:
    weighted = [m for m in net.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    return len(weighted), len([m for m in weighted if getattr(m, "kernel_size", 0) == (1, 1)])


def test_depth() -> None:
    with torch.device("meta"):
        assert layers(mnist_cnn()) == (4, 0)
        assert layers(cifar10_cnn()) == (8, 0)
        # Shortcuts of 1x1 apart, the layers are as many as the name says.
        assert layers(resnet34()) == (34 + 3, 3)
        assert layers(resnet50()) == (50 + 4, 2 * 16 + 4)


@pytest.mark.parametrize("build", SMALL)
def test_the_same_seed_gives_the_same_weights(build: Any) -> None:
    before = torch.get_rng_state()
    first, again, other = (build(seed).state_dict() for seed in (0, 0, 1))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["0.weight"], other["0.weight"])


@pytest.mark.parametrize("build", [*SMALL, resnet34])
def test_weights_start_uniform_within_the_bounds(build: Any) -> None:
    for layer in build().modules():
        if isinstance(layer, nn.Conv2d):
            bound = math.sqrt(6 / layer.weight[0].numel())
        elif isinstance(layer, nn.Linear):
            bound = math.sqrt(6 / (layer.in_features + layer.out_features))
        else:
            continue
        largest = layer.weight.abs().max().item()
        assert 0.97 * bound < largest <= bound
        # The standard deviation of a uniform one is bound / sqrt 3; the smallest has 288 weights.
        assert layer.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)


@pytest.mark.parametrize(("build", "parameters", "image", "K"), NETWORKS)
def test_every_weight_learns(build: Any, parameters: int, image: tuple[int, ...], K: int) -> None:
    net = build()
    rng = torch.Generator().manual_seed(0)
    images = torch.randn(4, *image, generator=rng)
    nn.functional.cross_entropy(net(images), torch.arange(4)).backward()
    for name, weights in net.named_parameters():
        # Batch normalization subtracts the bias before it, so that gradient is rounding alone.
        assert weights.grad is not None and weights.grad.any(), name
