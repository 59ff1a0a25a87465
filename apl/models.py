"""The networks: a small one for digits, and the paper's.

Each is built from a seed and leaves torch's global random state alone. The paper's networks start
with kaiming-uniform convolutions (fan-in, ReLU) and xavier-uniform linear layers, biases as torch
has them, as in models.py of HanxunH/Active-Passive-Losses, commit 04bce53.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn

__all__ = ["cifar10_cnn", "digits_net", "imagenet_resnet50", "mnist_cnn", "resnet34", "resnet50"]


def digits_net(seed: int = 0, *, width: int = 256, K: int = 10, pixels: int = 64) -> nn.Sequential:
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
            nn.Linear(pixels, width, bias=False),
            nn.BatchNorm1d(width),
            nn.ReLU(),
            nn.Linear(width, width, bias=False),
            nn.BatchNorm1d(width),
            nn.ReLU(),
            nn.Linear(width, K),
        )


def mnist_cnn(seed: int = 0, *, K: int = 10) -> nn.Sequential:
    """The paper's 4-layer network for 28x28 gray images: 422,090 parameters with 10 classes.

    Shapes: images (N, 1, 28, 28) to logits (N, K).

    >>> sum(weights.numel() for weights in mnist_cnn().parameters())
    422090
    """
    return _seeded(
        seed,
        lambda: nn.Sequential(
            *_conv(1, 32),
            nn.MaxPool2d(2),
            *_conv(32, 64),
            nn.MaxPool2d(2),
            *_head(7 * 7 * 64, 128, K),
        ),
    )


def cifar10_cnn(seed: int = 0, *, K: int = 10) -> nn.Sequential:
    """The paper's 8-layer network for 32x32 color images: 1,639,794 parameters with 10 classes.

    Shapes: images (N, 3, 32, 32) to logits (N, K).

    >>> sum(weights.numel() for weights in cifar10_cnn().parameters())
    1639794
    """
    widths = (3, 64, 128, 196)

    def build() -> nn.Sequential:
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(widths):
            layers += [*_conv(inputs, outputs), *_conv(outputs, outputs), nn.MaxPool2d(2)]
        return nn.Sequential(*layers, *_head(4 * 4 * 196, 256, K))

    return _seeded(seed, build)


def resnet34(seed: int = 0, *, K: int = 100) -> nn.Sequential:
    """ResNet-34 for 32x32 images, the paper's for CIFAR-100: 21,328,292 parameters.

    The stem is one 3x3 convolution of stride 1, without pooling (He et al., 2016).

    Shapes: images (N, 3, 32, 32) to logits (N, K).
    """
    return _seeded(seed, lambda: _resnet(_basic, 1, (3, 4, 6, 3), K))


def resnet50(seed: int = 0, *, K: int = 100) -> nn.Sequential:
    """ResNet-50 for 32x32 images: 23,705,252 parameters with 100 classes.

    The official configurations for CIFAR-100 name it; the published numbers are ResNet-34's.

    Shapes: images (N, 3, 32, 32) to logits (N, K).
    """
    return _seeded(seed, lambda: _resnet(_bottleneck, 4, (3, 4, 6, 3), K))


def imagenet_resnet50(seed: int = 0, *, K: int = 50) -> nn.Module:
    """torchvision's ResNet-50 for 224x224 images, untrained: 23,610,482 parameters with 50 classes.

    The paper's for WebVision; its weights start as torchvision has them, not as the paper's others.

    Shapes: images (N, 3, 224, 224) to logits (N, K).
    """
    from torchvision.models import resnet50 as build

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net: nn.Module = build(weights=None, num_classes=K)
        return net


class _Residual(nn.Module):
    """ReLU of the body plus the shortcut."""

    def __init__(self, body: nn.Module, shortcut: nn.Module) -> None:
        super().__init__()
        self.body = body
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


def _resnet(
    body: Callable[[int, int, int], nn.Module], expansion: int, depths: tuple[int, ...], K: int
) -> nn.Sequential:
    layers: list[nn.Module] = [*_bare(3, 64, 3), nn.ReLU()]
    inputs = 64
    for width, depth, stage_stride in zip((64, 128, 256, 512), depths, (1, 2, 2, 2), strict=True):
        for block in range(depth):
            stride = stage_stride if block == 0 else 1
            outputs = width * expansion
            same = stride == 1 and inputs == outputs
            shortcut = nn.Identity() if same else nn.Sequential(*_bare(inputs, outputs, 1, stride))
            layers.append(_Residual(body(inputs, width, stride), shortcut))
            inputs = outputs
    return nn.Sequential(*layers, nn.AvgPool2d(4), nn.Flatten(), nn.Linear(inputs, K))


def _basic(inputs: int, width: int, stride: int) -> nn.Sequential:
    return nn.Sequential(*_bare(inputs, width, 3, stride), nn.ReLU(), *_bare(width, width, 3))


def _bottleneck(inputs: int, width: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        *_bare(inputs, width, 1),
        nn.ReLU(),
        *_bare(width, width, 3, stride),
        nn.ReLU(),
        *_bare(width, 4 * width, 1),
    )


def _bare(inputs: int, outputs: int, size: int, stride: int = 1) -> tuple[nn.Module, ...]:
    """Convolution and batch normalization; the normalization takes the bias's place."""
    convolution = nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False)
    return convolution, nn.BatchNorm2d(outputs)


def _conv(inputs: int, outputs: int) -> tuple[nn.Module, ...]:
    # With a bias although batch normalization follows: the paper's parameter counts have it.
    return nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()


def _head(inputs: int, width: int, K: int) -> tuple[nn.Module, ...]:
    hidden = nn.Linear(inputs, width)
    return nn.Flatten(), hidden, nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, K)


def _seeded(seed: int, build: Callable[[], nn.Sequential]) -> nn.Sequential:
    """A network whose weights depend on nothing but the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = build()
        for layer in net.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_uniform_(layer.weight, mode="fan_in", nonlinearity="relu")
            elif isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
        return net
