"""The risk of one prediction under label noise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sympy import Add, Expr, sympify

from apl.symbolic.expressions import K, at, p, sum_over_labels


def noisy_risk(loss: Expr, noise: Any) -> Expr:
    r"""The expected loss of one prediction when the label is noisy.

    Parameters
    ----------
    loss
        an expression in ``p_y`` and sums over the classes
    noise
        a rate, a number or a symbol: symmetric noise on the true label y, for a general K,
        :math:`(1-\eta) L(p, y) + \frac{\eta}{K-1} \sum_{k \ne y} L(p, k)`. Or the row of a
        transition matrix, a sequence of K probabilities: :math:`\sum_k T_{yk} L(p, k)`, written
        out in ``p[1]`` to ``p[K]``; the true label is then in the row

    Raises
    ------
    ValueError
        for a row with fewer than two classes, with a negative entry, or that does not sum to 1

    Examples
    --------
    >>> from sympy import Symbol
    >>> from apl.symbolic import p_y
    >>> eta = Symbol("eta")
    >>> noisy_risk(1 - p_y, eta).equals((1 - eta) * (1 - p_y) + eta / (K - 1) * (K - 2 + p_y))
    True
    >>> noisy_risk(-p_y, ["3/5", "2/5", 0])
    -3*p[1]/5 - 2*p[2]/5
    """
    loss = sympify(loss)
    if isinstance(noise, Sequence) and not isinstance(noise, str):
        row = [sympify(entry) for entry in noise]
        if len(row) < 2:
            raise ValueError(f"the row has {len(row)} entry: there are at least 2 classes")
        if any(entry.is_negative for entry in row) or not (sum(row) - 1).equals(0):
            raise ValueError(f"the row {row} is not a probability vector: it must sum to 1")
        classes = [p[i + 1] for i in range(len(row))]
        return Add(*(t * at(loss, classes, label=i) for i, t in enumerate(row) if t != 0))
    eta = sympify(noise)
    return (1 - eta) * loss + eta / (K - 1) * (sum_over_labels(loss) - loss)
