"""Losses as SymPy expressions: one function of the class probabilities, and four operations on it.

A loss is an expression in ``p[y]``, the predicted probability of the label, and in sums over the
classes of functions of ``p[k]``. The number of classes ``K`` stays a symbol. Nothing here imports
torch: the same expressions are proved about in the book and compiled in :mod:`apl.kernels`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sympy import (
    Add,
    Expr,
    IndexedBase,
    KroneckerDelta,
    Mul,
    Poly,
    PolynomialError,
    Rational,
    Sum,
    Symbol,
    cancel,
    factor_terms,
    simplify,
    sympify,
)
from sympy.printing.latex import LatexPrinter
from sympy.tensor.indexed import Indexed

K = Symbol("K", integer=True, positive=True)
"""The number of classes."""
y = Symbol("y", integer=True, positive=True)
"""The label."""
k = Symbol("k", integer=True, positive=True)
"""A class; the index of every sum."""
j = Symbol("j", integer=True, positive=True)
"""A class other than the label."""
p = IndexedBase("p", positive=True)
"""The predicted class probabilities, the softmax of the logits."""
p_y = p[y]
"""The predicted probability of the label."""


def sum_over_labels(loss: Expr) -> Expr:
    r"""The sum of a loss over all labels, :math:`\sum_{k=1}^K L(p, k)`, for a general K.

    What is known about probabilities is used: :math:`\sum_k p_k = 1`.

    >>> sum_over_labels(1 - p_y)
    K - 1
    """
    loss = sympify(loss)
    if not loss.has(Sum):
        total = sum_over_classes(loss.subs(p_y, p[k]))
        return total if total.has(Sum) else factor_terms(total)
    if isinstance(loss, Add):
        return Add(*(sum_over_labels(term) for term in loss.args))
    factor, rest = loss.as_independent(y, as_Add=False)
    if rest != loss:
        return factor * sum_over_labels(rest)
    if isinstance(loss, Sum) and loss.function.has(KroneckerDelta(k, y)):
        return (K - 1) * Sum(loss.function.subs(KroneckerDelta(k, y), 0), (k, 1, K))
    raise ValueError(
        f"cannot sum {loss} over the labels: a loss is a sum of terms f(p[y]) times "
        "factors that do not depend on y, or of sums over the other classes"
    )


def sum_over_classes(function: Expr, *, others: bool = False) -> Expr:
    r"""The sum of a function of ``p[k]`` over all classes, or all but the label.

    >>> sum_over_classes(2 * p[k] + 1, others=True)
    K - 2*p[y] + 1
    """
    affine = _affine(sympify(function), p[k])
    if affine is not None:
        constant, slope = affine
        return (K - 1) * constant + slope * (1 - p_y) if others else K * constant + slope
    factor, rest = sympify(function).as_independent(k, p, as_Add=False)
    return factor * Sum((1 - KroneckerDelta(k, y)) * rest if others else rest, (k, 1, K))


def normalize(loss: Expr) -> Expr:
    r"""Divide a loss by its sum over all labels, :math:`L(p, y) / \sum_k L(p, k)` (Ma et al. 2020).

    >>> normalize(1 - p_y)
    (1 - p[y])/(K - 1)
    >>> sum_over_labels(normalize(1 - p_y**2))
    1
    """
    loss = sympify(loss)
    total = sum_over_labels(loss)
    if loss.has(Sum) or total.has(Sum):
        return loss / total
    return factor_terms(cancel(loss / total))


def mean_over_others(loss: Expr) -> Expr:
    r"""The mean of a pointwise loss over the labels not given, :math:`\sum_{k\ne y} L(p,k)/(K-1)`.

    >>> mean_over_others(p_y**2)
    Sum((1 - KroneckerDelta(k, y))*p[k]**2, (k, 1, K))/(K - 1)
    """
    factor, rest = sympify(loss).as_independent(p_y, as_Add=False)
    return factor * Sum((1 - KroneckerDelta(k, y)) * rest.subs(p_y, p[k]), (k, 1, K)) / (K - 1)


def negate(loss: Expr, bound: Expr | float) -> Expr:
    """A bounded loss turned over, ``bound - loss``: small where the loss is large."""
    return sympify(bound) - sympify(loss)


def is_symmetric(loss: Expr) -> bool | None:
    r"""Whether :math:`\sum_k L(p, k)` is the same for every prediction: True, False or None.

    True is decided for a general K. False means that two predictions with K = 3 give different
    sums, exactly. None means undecided, for example because a parameter is still a symbol.

    >>> is_symmetric(2 * (1 - p_y)), is_symmetric(p_y**2)
    (True, False)
    """
    total = sum_over_labels(loss)
    if not total.has(Indexed):
        return True
    points = ([Rational(1, 3)] * 3, [Rational(1, 2), Rational(1, 3), Rational(1, 6)])
    difference = at(total, points[0]) - at(total, points[1])
    return None if difference.free_symbols or difference.equals(0) is not False else False


def at(expression: Expr, probabilities: Sequence[Any], label: int | None = None) -> Expr:
    """An expression at given class probabilities, exactly. Labels count from 0, as in code.

    >>> at(normalize(1 - p_y), [Rational(1, 2), Rational(1, 4), Rational(1, 4)], label=0)
    1/4
    """
    classes = len(probabilities)
    written_out = sympify(expression).subs(K, classes).doit()
    if label is not None:
        written_out = written_out.subs(y, label + 1).doit()
    return written_out.subs({p[i + 1]: sympify(v) for i, v in enumerate(probabilities)})


def rest_uniform(expression: Expr, label: Any) -> Expr:
    r"""An expression where the label has one probability and the other classes share the rest.

    K stays a symbol: every :math:`p_k` with :math:`k \ne y` is (1 - label)/(K - 1). With
    ``label=1/K`` this is the uniform prediction.

    >>> rest_uniform(normalize(-p_y), 1 / K)
    1/K
    """
    label = sympify(label)
    rest = cancel((1 - label) / (K - 1))  # 1/K at the uniform prediction, not a fraction of it
    others = 1 - KroneckerDelta(k, y)

    def evaluate(total: Sum) -> Expr:
        function = total.function
        of_rest = (K - 1) * function.subs(others, 1).subs(p[k], rest)
        return of_rest if function.has(others) else function.subs(p[k], label) + of_rest

    expression = sympify(expression)
    sums = {total: evaluate(total) for total in expression.atoms(Sum)}
    return simplify(expression.xreplace(sums).subs({p_y: label, p[j]: rest}))


def latex(expression: Expr) -> str:
    r"""An expression as LaTeX, in the book's notation.

    >>> print(latex(-p_y**2))
    - p_{y}^{2}
    """
    return _LossPrinter().doprint(sympify(expression))


def _affine(expression: Expr, variable: Expr) -> tuple[Expr, Expr] | None:
    """(constant, slope) of an expression affine in the variable, else None."""
    try:
        polynomial = Poly(expression, variable)
    except PolynomialError:
        return None
    if polynomial.degree() > 1 or any(c.has(variable) for c in polynomial.all_coeffs()):
        return None
    return polynomial.coeff_monomial(1), polynomial.coeff_monomial(variable)


class _LossPrinter(LatexPrinter):
    """LaTeX with plain subscripts, and sums over the other classes written as such."""

    def _print_Indexed(self, expr: Indexed, exp: str | None = None) -> str:
        indices = ",".join(self._print(i) for i in expr.indices)
        base = f"{self._print(expr.base.label)}_{{{indices}}}"
        return base if exp is None else f"{base}^{{{exp}}}"

    def _print_Sum(self, expr: Sum) -> str:
        others = 1 - KroneckerDelta(k, y)
        function, below, above = expr.function, r"k=1", self._print(K)
        if function.has(others):
            function, below, above = function.subs(others, 1), r"k \ne y", ""
        body = self._print(function)
        if isinstance(function, Add):
            body = rf"\left({body}\right)"
        upper = f"^{{{above}}}" if above else ""
        return rf"\sum_{{{below}}}{upper} {body}"


def pointwise(loss: Expr) -> Expr | None:
    """h with L(p, y) = h(p[y]), as a function of one symbol ``p``; None for other losses.

    >>> pointwise(1 - p_y)
    1 - p
    """
    function = sympify(loss)
    if function.has(Sum) or function.has(K):
        return None
    return function.subs(p_y, Symbol("p", positive=True))


def twice(expression: Expr) -> Expr:
    """2 times an expression, kept as a product (SymPy would multiply it out)."""
    return Mul(2, expression, evaluate=False)
