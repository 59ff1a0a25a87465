"""Networks of one shape as one: weights stacked, (networks, outputs, inputs), gradients by hand.

Backpropagation is written out, because autograd would keep what a step no longer needs, and batch
normalization as torch has it takes the time of a matrix product: :mod:`apl.layers` does it in one
pass. Tests hold all of it against autograd. On a CPU only.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from itertools import pairwise
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Stack", "available", "stackable"]


class Stack:
    """Networks of one shape as one. What goes through it is (networks, features, samples).

    Examples
    --------
    >>> from apl.models import digits_net
    >>> stack = Stack([digits_net(seed) for seed in range(3)])
    >>> stack.forward(torch.zeros(3, 64, 5), training=False).shape
    torch.Size([3, 10, 5])
    """

    def __init__(self, models: Sequence[nn.Module]) -> None:
        columns = list(zip(*(list(model.children())[1:] for model in models), strict=True))
        self.layers: list[_Layer] = []
        for column in columns:
            kind = type(column[0])
            before = self.layers[-1] if self.layers else None
            if kind is nn.ReLU and isinstance(before, _BatchNorm):
                before.relu = True
            else:
                self.layers.append(_LAYERS[kind](column))
        self._velocities = [torch.zeros_like(p) for p in self._parameters()]

    def forward(self, x: Tensor, *, training: bool) -> Tensor:
        """The logits (networks, K, samples)."""
        for layer in self.layers:
            x = layer.forward(x, training)
        return x

    def backward(self, slope: Tensor) -> None:
        """The gradients of all weights, from those in the logits."""
        first, *others = self.layers
        for layer in reversed(others):
            slope = layer.backward(slope)
        first.backward(slope, last=True)

    def predict(self, images: Tensor, size: int = 128) -> Tensor:
        """The predicted classes (networks, N); so many images at once fit the cache of a CPU."""
        parts = (self.forward(part.mT, training=False) for part in images.split(size, 1))
        return torch.cat([logits.max(1).indices for logits in parts], 1)

    def step(
        self, lr: Tensor, momentum: float, nesterov: bool, weight_decay: float, clip: float
    ) -> None:
        """A step of SGD of each network with its own ``lr`` (networks,), its gradient clipped."""
        layers, slopes = compiled(), [_flat(s) for layer in self.layers for s in layer.slopes]
        squares = torch.zeros_like(lr, dtype=torch.float64)
        for slope in slopes:
            layers.squares(slope, squares.numpy())
        scale = (clip / (squares.sqrt() + 1e-6)).clamp_(max=1.0)  # as clip_grad_norm_
        rates = [each.to(self._velocities[0].dtype).numpy() for each in (scale, lr)]
        rest = *rates, momentum, weight_decay, nesterov
        for p, slope, velocity in zip(self._parameters(), slopes, self._velocities, strict=True):
            layers.step(_flat(p), slope, _flat(velocity), *rest)

    def write_back(self) -> None:
        """Give the networks their weights."""
        for layer in self.layers:
            layer.write_back()

    def _parameters(self) -> list[Tensor]:
        return [getattr(layer, name) for layer in self.layers for name in layer.parameters]


def _flat(stacked: Tensor) -> Any:
    return stacked.view(len(stacked), -1).numpy()


class _Layer:
    """A layer of all networks; backward leaves the gradients of its parameters in ``slopes``."""

    parameters: tuple[str, ...] = ()
    buffers: tuple[str, ...] = ()

    def __init__(self, layers: Sequence[Any]) -> None:
        self.layers = layers
        self.slopes: list[Tensor] = []
        for name in (*self.parameters, *self.buffers):
            stacked = torch.stack([getattr(layer, name).detach() for layer in layers])
            # A vector is a column: it goes with (networks, features, samples).
            setattr(self, name, stacked if stacked.ndim == 3 else stacked.unsqueeze(-1))

    def forward(self, x: Tensor, training: bool) -> Tensor:
        raise NotImplementedError

    def backward(self, slope: Tensor, last: bool = False) -> Tensor:
        """The gradient in the input, from that in the output; ``last`` needs none."""
        raise NotImplementedError

    def write_back(self) -> None:
        for name in (*self.parameters, *self.buffers):
            for layer, value in zip(self.layers, getattr(self, name), strict=True):
                own = getattr(layer, name)
                own.copy_(value.view_as(own))


class _Linear(_Layer):
    weight: Tensor
    bias: Tensor

    def __init__(self, layers: Sequence[Any]) -> None:
        self.parameters = ("weight",) if layers[0].bias is None else ("weight", "bias")
        super().__init__(layers)

    def forward(self, x: Tensor, training: bool) -> Tensor:
        self.x = x
        y = self.weight @ x
        return y if len(self.parameters) == 1 else y.add_(self.bias)

    def backward(self, slope: Tensor, last: bool = False) -> Tensor:
        self.slopes = [slope @ self.x.mT]
        if len(self.parameters) == 2:
            self.slopes.append(slope.sum(2, keepdim=True))
        return slope if last else self.weight.mT @ slope


class _BatchNorm(_Layer):
    """Batch normalization, with the ReLU after it if one follows."""

    parameters = ("weight", "bias")
    buffers = ("running_mean", "running_var")
    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, layers: Sequence[Any]) -> None:
        super().__init__(layers)
        self.eps, self.momentum = layers[0].eps, layers[0].momentum
        self.relu = False
        self.steps = 0

    def forward(self, x: Tensor, training: bool) -> Tensor:
        names = (*self.parameters, *self.buffers)
        weights = [getattr(self, name).squeeze(-1).numpy() for name in names]
        if not training:
            compiled().scale(x.numpy(), *weights, self.eps, self.relu)
            return x
        self.x, self.y = torch.empty_like(x), x
        self.inverse = x.new_empty(x.shape[:2])
        rest = self.eps, self.momentum, self.relu, self.x.numpy(), self.inverse.numpy()
        compiled().forward(x.numpy(), *weights, *rest)
        self.steps += 1
        return x

    def backward(self, slope: Tensor, last: bool = False) -> Tensor:
        self.slopes = [torch.empty_like(self.weight), torch.empty_like(self.bias)]
        compiled().backward(
            slope.numpy(),
            self.y.numpy(),
            self.x.numpy(),
            self.weight.squeeze(-1).numpy(),
            self.inverse.numpy(),
            self.relu,
            *(s.squeeze(-1).numpy() for s in self.slopes),
        )
        return slope

    def write_back(self) -> None:
        super().write_back()
        for layer in self.layers:
            layer.num_batches_tracked += self.steps


class _ReLU(_Layer):
    def forward(self, x: Tensor, training: bool) -> Tensor:
        self.y = x.relu_()
        return self.y

    def backward(self, slope: Tensor, last: bool = False) -> Tensor:
        return torch.ops.aten.threshold_backward(slope, self.y, 0)


_LAYERS: dict[type[nn.Module], type[_Layer]] = {
    nn.Linear: _Linear,
    nn.BatchNorm1d: _BatchNorm,
    nn.ReLU: _ReLU,
}


def available() -> bool:
    """Whether there is numba, which comes late to a new Python; without it, runs go one by one.

    >>> available()
    True
    """
    return find_spec("numba") is not None


def compiled() -> ModuleType:
    """:mod:`apl.layers`, which needs numba."""
    return import_module("apl.layers")


def stackable(model: nn.Module) -> bool:
    """Whether a network is ``Flatten``, then ``Linear`` alone or before others, all known here.

    >>> from apl.models import digits_net, mnist_cnn
    >>> stackable(digits_net()), stackable(mnist_cnn())
    (True, False)
    """
    if not isinstance(model, nn.Sequential) or type(next(model.children(), None)) is not nn.Flatten:
        return False
    layers = [type(layer) for layer in model][1:]
    # Batch normalization and ReLU change what they are given, which no other layer may need.
    return bool(layers) and all(
        now is nn.Linear
        or (now is nn.BatchNorm1d and before is nn.Linear)
        or (now is nn.ReLU and before in (nn.Linear, nn.BatchNorm1d))
        for before, now in pairwise([nn.Flatten, *layers])
    )
