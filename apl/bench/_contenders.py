"""What the losses are timed against: the same mathematics as others would write it in torch.

For the benchmark and its tests only. Both are functions of logits (N, K) and labels (N,) that
return the mean, and share nothing with the catalog's expressions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from apl.catalog import PARAMETERS, entry

__all__ = ["one_hot", "textbook"]

Call = Callable[[Tensor, Tensor], Tensor]
Values = Mapping[str, float]


def one_hot(name: str) -> Call:
    """The loss as code with one-hot labels computes it, by sums over N x K, in the logits' dtype.

    >>> one_hot("mae")(torch.zeros(1, 4), torch.tensor([2]))
    tensor(1.5000)
    """
    return _weighted(name, _each_one_hot)


def textbook(name: str) -> Call:
    """The textbook formula: log-softmax, the label's entry, a sum over the row where there is one.

    Half precision is computed in float32.

    >>> textbook("mae")(torch.zeros(1, 4), torch.tensor([2]))
    tensor(1.5000)
    """
    return _weighted(name, _each_textbook)


def _weighted(name: str, each: Callable[[str, Tensor, Tensor, Values], Tensor]) -> Call:
    # A cancels from the catalog's NRCE, but code that sums over classes has it.
    values = {key: parameter.default for key, parameter in PARAMETERS.items()}
    values |= entry(name).parameters
    if name == "sce" or "+" in name:
        first, second = ("ce", "rce") if name == "sce" else name.split("+")

        def both(logits: Tensor, target: Tensor) -> Tensor:
            a = values["alpha"] * each(first, logits, target, values).mean()
            return a + values["beta"] * each(second, logits, target, values).mean()

        return both
    return lambda logits, target: each(name, logits, target, values).mean()


def _each_one_hot(name: str, logits: Tensor, target: Tensor, values: Values) -> Tensor:
    K = logits.shape[1]
    q = F.one_hot(target, K).to(logits.dtype)
    if name in ("ce", "nce"):
        u = F.log_softmax(logits, dim=1)
        ce = -(q * u).sum(1)
        return ce / -u.sum(1) if name == "nce" else ce
    if name in ("fl", "nfl"):
        u = F.log_softmax(logits, dim=1)
        every = -((1 - u.exp()) ** values["gamma"]) * u
        fl = (q * every).sum(1)
        return fl / every.sum(1) if name == "nfl" else fl
    p = F.softmax(logits, dim=1)
    if name in ("mae", "nmae"):
        mae = 2 * (1 - (q * p).sum(1))
        return mae / (2 * (1 - p)).sum(1) if name == "nmae" else mae
    if name in ("rce", "nrce"):
        log_q = q.clamp(min=math.exp(values["A"])).log()
        rce = -(p * log_q).sum(1)
        return rce / (-values["A"] * (1 - p)).sum(1) if name == "nrce" else rce
    if name in ("gce", "ngce"):
        power = values["q"]
        gce = (1 - (q * p).sum(1) ** power) / power
        return gce / ((1 - p**power) / power).sum(1) if name == "ngce" else gce
    assert name == "nlnl", name
    return -((1 - q) * (1 - p).log()).sum(1) / (K - 1)


# Of u = log p; -expm1(u) is 1 - p.
_OF_LOG_P: Mapping[str, Callable[[Tensor, Values], Tensor]] = {
    "ce": lambda u, values: -u,
    "fl": lambda u, values: -((-torch.expm1(u)) ** values["gamma"]) * u,
    "mae": lambda u, values: -2 * torch.expm1(u),
    "rce": lambda u, values: values["A"] * torch.expm1(u),
    "gce": lambda u, values: -torch.expm1(values["q"] * u) / values["q"],
    "nlnl": lambda u, values: -torch.log(-torch.expm1(u)),
}


def _each_textbook(name: str, logits: Tensor, target: Tensor, values: Values) -> Tensor:
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    u = F.log_softmax(logits, dim=1)
    u_y = u.gather(1, target[:, None]).squeeze(1)
    if name == "nlnl":
        h = _OF_LOG_P["nlnl"]
        return (h(u, values).sum(1) - h(u_y, values)) / (u.shape[1] - 1)
    if name in _OF_LOG_P:
        return _OF_LOG_P[name](u_y, values)
    h = _OF_LOG_P[name.removeprefix("n")]
    return h(u_y, values) / h(u, values).sum(1)
