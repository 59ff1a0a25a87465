"""Gradients with respect to the logits, for a general number of classes."""

from __future__ import annotations

from sympy import Add, Dummy, Expr, KroneckerDelta, Sum, expand, simplify, sympify

from apl.symbolic.expressions import K, j, k, p, p_y, rest_uniform, sum_over_classes, y

_OTHERS = 1 - KroneckerDelta(k, y)


def logit_gradient(loss: Expr, wrt: Expr = y) -> Expr:
    r"""The derivative with respect to the logit of the label, or of another class ``j``.

    With log-probabilities :math:`u = \log p` and :math:`G_k = \partial L / \partial u_k`, taken as
    if the u were free, :math:`\partial L / \partial z_j = G_j - p_j \sum_k G_k`.

    Parameters
    ----------
    loss
        an expression in ``p_y`` and sums over the classes
    wrt
        ``y`` for the label's own logit, ``j`` for the logit of a class that is not the label

    Raises
    ------
    ValueError
        for another ``wrt``

    Examples
    --------
    >>> from sympy import log
    >>> logit_gradient(-log(p_y))
    p[y] - 1
    >>> logit_gradient(-log(p_y), j)
    p[j]
    """
    if wrt not in (y, j):
        raise ValueError(f"wrt is {wrt}: it must be y, the label, or j, another class")
    loss = sympify(loss)
    held = {total: Dummy() for total in loss.atoms(Sum)}
    free = loss.xreplace(held)
    # G_k is `of_label` more for k = y; sum_k G_k collects every term once.
    of_label = p_y * free.diff(p_y)
    of_class, total = sympify(0), of_label
    for whole, dummy in held.items():
        outer, over_others = free.diff(dummy), whole.function.has(_OTHERS)
        each = p[k] * whole.function.subs(_OTHERS, 1).diff(p[k])
        total += outer * sum_over_classes(each, others=over_others)
        if wrt == j or not over_others:
            of_class += outer * each.subs(p[k], p[wrt])
    G = of_class + (of_label if wrt == y else 0)
    back = {dummy: whole for whole, dummy in held.items()}
    gradient = (G - p[wrt] * total).xreplace(back)
    return gradient if held else simplify(expand(gradient))


def weight(loss: Expr) -> Expr | None:
    r"""How much a sample counts beside cross entropy: w with dL/dz = w (p - one-hot), or None.

    For a pointwise loss :math:`w = |h'(p_y)|\, p_y`: 1 for CE, :math:`2 p_y` for MAE,
    :math:`p_y^q` for GCE. None says that the gradient is not a multiple of that of cross entropy,
    as for most normalized losses, or that SymPy cannot tell.

    Examples
    --------
    >>> weight(2 * (1 - p_y))
    2*p[y]
    >>> from sympy import log
    >>> from apl.symbolic import normalize
    >>> print(weight(normalize(-log(p_y))))
    None
    """
    loss = sympify(loss)
    of_label, of_class = logit_gradient(loss), logit_gradient(loss, j)
    # simplify fails on some products of sums, so sums are symbols while it works.
    held = {total: Dummy() for total in (of_label + of_class).atoms(Sum)}
    back = {dummy: total for total, dummy in held.items()}
    candidate = simplify(of_class.xreplace(held) / p[j])
    if candidate.has(p[j]) or not isinstance(candidate, Expr):
        return None
    along = of_label.xreplace(held) + candidate * (1 - p_y)
    zero = along.equals(0) or simplify(along) == 0
    return candidate.xreplace(back) if zero else None


def initial_gradient(loss: Expr) -> Expr:
    r"""The pull on the label's logit at the uniform prediction, -dL/dz_y at p = 1/K.

    The gradients with respect to the other logits are -1/(K - 1) of it each.

    Examples
    --------
    >>> initial_gradient(2 * (1 - p_y))
    2*(K - 1)/K**2
    """
    return simplify(rest_uniform(Add(-logit_gradient(loss)), 1 / K))
