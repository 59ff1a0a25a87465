"""The risk of predictions under label noise, and its minimizers, on the losses that train.

Everything here is about one input, so a prediction is a probability vector and the noise is a row
of a transition matrix. :func:`minimize` asks what a network with unlimited freedom would learn.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import torch
from scipy import optimize
from torch import Tensor

from apl.losses import Loss

LossFunction = Callable[[Tensor, Tensor], Tensor]


def every_label(loss: LossFunction, p: Tensor) -> Tensor:
    """The loss of predictions for each of the K labels.

    Parameters
    ----------
    loss
        an :class:`apl.Loss` (its reduction is not used), or a function of logits (N, K) and
        labels (N,) that returns N values
    p
        probabilities, of shape (..., K), all positive

    Returns
    -------
    Tensor
        of the shape of ``p``: the last dimension runs over the labels

    Raises
    ------
    ValueError
        for probabilities that are not positive or do not sum to 1

    Examples
    --------
    >>> import apl
    >>> every_label(apl.MAE(), torch.tensor([0.5, 0.25, 0.25]))
    tensor([1.0000, 1.5000, 1.5000])
    """
    if not bool((p > 0).all()):
        raise ValueError("p holds probabilities that are not positive: a softmax has no zeros")
    if not torch.allclose(p.sum(-1), torch.ones_like(p[..., 0]), atol=1e-5):
        raise ValueError("p does not sum to 1 along its last dimension")
    if isinstance(loss, Loss):
        loss = copy.copy(loss)
        loss.reduction = "none"
    K = p.shape[-1]
    logits = p.log().reshape(-1, 1, K).expand(-1, K, K).reshape(-1, K)
    labels = torch.arange(K, device=p.device).repeat(len(logits) // K)
    return loss(logits, labels).reshape(p.shape)


def noisy_risk(loss: LossFunction, p: Tensor, row: Tensor) -> Tensor:
    r"""The expected loss of predictions when the label has the distribution ``row``.

    .. math:: R^\eta(p) = \sum_k T_{yk} L(p, k)

    With a one-hot row this is the clean risk. ``p`` has shape (..., K), ``row`` (K,) or (..., K).

    Examples
    --------
    >>> import apl
    >>> noisy_risk(apl.MAE(), torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0.6, 0.4, 0.0]))
    tensor(1.2000)
    """
    return (every_label(loss, p) * row.to(p)).sum(-1)


def minimize(loss: LossFunction, row: Tensor, floor: float = 1e-6, starts: int = 4) -> Tensor:
    """The prediction of least noisy risk among those with all probabilities at least ``floor``.

    The floor matters: some losses have no minimizer on the open simplex (*Active, passive and
    Lemma 3* in the book). Searches by SLSQP in log-probabilities from the uniform prediction,
    from near every vertex and from ``starts`` random points (seed 0), and keeps the best end.

    Parameters
    ----------
    loss
        as for :func:`every_label`; it must be differentiable
    row
        the distribution of the noisy label, shape (K,)
    floor
        the least probability allowed, above 0 and below 1/K
    starts
        how many random starts

    Raises
    ------
    ValueError
        for a floor outside (0, 1/K)

    Examples
    --------
    >>> import apl
    >>> minimize(apl.CE(), torch.tensor([0.6, 0.3, 0.1])).round(decimals=3)
    tensor([0.6000, 0.3000, 0.1000], dtype=torch.float64)
    """
    row = row.double()
    K = len(row)
    if not 0 < floor < 1 / K:
        raise ValueError(f"floor is {floor}: it must lie between 0 and 1/K = 1/{K}")

    def risk_and_slope(u: np.ndarray) -> tuple[float, np.ndarray]:
        free = torch.tensor(u, requires_grad=True)
        # Predictions off the constraint surface are brought back, so that every loss is defined.
        value = noisy_risk(loss, free.softmax(-1), row)
        (slope,) = torch.autograd.grad(value, free)
        return value.item(), slope.numpy()

    rng = np.random.default_rng(0)
    near_vertex = np.eye(K) * 0.9 + 0.1 / K
    inside = rng.dirichlet(np.ones(K), starts) * (1 - K * floor) + floor
    constraint = {
        "type": "eq",
        "fun": lambda u: np.exp(u).sum() - 1,
        "jac": lambda u: np.exp(u),
    }
    ends = []
    for start in [np.full(K, 1 / K), *near_vertex, *inside]:
        end = optimize.minimize(
            risk_and_slope,
            np.log(np.clip(start, floor, 1)),
            jac=True,
            method="SLSQP",
            bounds=[(np.log(floor), 0)] * K,
            constraints=constraint,
            options={"maxiter": 100, "ftol": 1e-12},
        )
        p = np.clip(np.exp(end.x), floor, 1)
        p /= p.sum()
        ends.append((risk_and_slope(np.log(p))[0], p))
    return torch.tensor(min(ends, key=lambda pair: pair[0])[1])
