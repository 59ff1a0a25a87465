"""What losses are tested on, and what is asked of them: the ground of :mod:`apl.testing`."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]
close = torch.testing.assert_close


def rows(N: int, K: int, scale: float = 2.0, dtype: torch.dtype = torch.float64) -> Pair:
    """Normal logits (N, K) and labels (N,): the first confident and right, the last wrong."""
    generator = torch.Generator().manual_seed(N + K)
    logits = scale * torch.randn(N, K, generator=generator, dtype=torch.float64)
    target = torch.randint(K, (N,), generator=generator)
    target[0], target[-1] = logits[0].argmax(), logits[-1].argmin()
    return logits.to(dtype), target


def extreme(dtype: torch.dtype = torch.float32) -> list[Pair]:
    """Logits up to 10^4: where careless code overflows, divides 0 by 0 or loses its digits."""
    big, tied, near = [1e4, 0.0, -1e4], [-1e4, 1e4, 1e4], [1e4, 9999.5, 0.0]
    sure, unsure, flat = [60.0, 0.0, -1.0], [17.0, 0.0, 0.0], [1e4, 1e4, 1e4]
    tiny, edge = [0.0, 104.0, -104.0], [88.0, -88.0, 0.0]
    few = torch.tensor([big, tied, near, sure, unsure, flat, tiny, edge])
    many = torch.cat([few, (torch.linspace(-1e4, 1e4, 57) * 0.999).expand(8, -1)], 1)[::4]
    cases = [(z, torch.full((len(z),), label)) for z in (few, many) for label in range(3)]
    logits, target = rows(16, 10, 1.0, torch.float32)
    cases.append(((logits * torch.logspace(0, 4, 16).unsqueeze(1)).clamp(-1e4, 1e4), target))
    return [(logits.to(dtype), target) for logits, target in cases]


def value_and_gradient(loss: Callable[..., Tensor], logits: Tensor, target: Tensor) -> Pair:
    """What a loss gives, and the gradient of its sum; the layout of the logits is kept."""
    logits = logits.detach().requires_grad_()
    value = loss(logits, target)
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    return value.detach(), gradient


def refuses(kind: type[Exception], word: str, call: Callable[..., Any], *inputs: Any) -> None:
    """A call raises an error of that kind, whose message is one line with that word."""
    try:
        call(*inputs)
    except kind as error:
        assert word in str(error), f"the error should say {word!r}: {error}"
        assert "\n" not in str(error) or kind is Exception, f"the error is not one line: {error}"
    else:
        raise AssertionError(f"nothing was raised: it should be a {kind.__name__} with {word!r}")


def torch_may_warn() -> warnings.catch_warnings[None]:
    """Forward mode warns of torch's own use of ``torch.jit``, and so does looking for waits."""
    return warnings.catch_warnings(action="ignore")
