"""The largest and the smallest value of a loss over all predictions, for a general K.

Every bound here is approached along predictions in which the label's probability goes to 0 or 1,
so the question comes down to how the other classes share the rest. What decides it is the sign of
a first or second derivative on (0, 1); where SymPy cannot tell the sign, the answer is None.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from sympy import (
    Add,
    Expr,
    KroneckerDelta,
    PoleError,
    Sum,
    Symbol,
    expand,
    expand_log,
    factor,
    limit,
    oo,
    simplify,
    sympify,
)
from sympy.core.function import AppliedUndef

from apl.symbolic.expressions import K, is_symmetric, k, p, p_y, sum_over_labels, y

_x = Symbol("p", positive=True)
_t = Symbol("t", positive=True)
_OTHERS = 1 - KroneckerDelta(k, y)


@dataclass(frozen=True)
class _Bound:
    """A value, the end (0 or 1) p_y goes to, and where the rest must lie: "uniform" or "vertex"."""

    value: Expr
    end: int
    rest: str | None = None


def supremum(loss: Expr) -> Expr | None:
    r"""The least upper bound of a loss over all labels and predictions, for a general K >= 3.

    Decided for functions of ``p_y`` that rise or fall on (0, 1); for normalized losses
    :math:`h(p_y) / \sum_k h(p_k)` with h falling to h(1) = 0, and h unbounded, convex or concave;
    for means over the other classes; and for sums of these that are largest in the same place.
    Parameters need values, or symbols whose assumptions decide the signs.

    Returns
    -------
    Expr or None
        ``oo`` for an unbounded loss; None if undecided

    Examples
    --------
    >>> from sympy import Rational, log
    >>> from apl.symbolic import normalize
    >>> supremum(2 * (1 - p_y)), supremum(-log(p_y)), supremum(normalize(-log(p_y)))
    (2, oo, 1)
    >>> supremum(normalize(1 - p_y ** Rational(1, 2)))
    1/(K - sqrt(K - 1))
    """
    return _collect(sympify(loss), upper=True)


def infimum(loss: Expr) -> Expr | None:
    """The greatest lower bound of a loss, as :func:`supremum`.

    >>> infimum(3 - p_y)
    2
    """
    return _collect(sympify(loss), upper=False)


def is_within_bound(loss: Expr) -> bool | None:
    r"""Whether a symmetric loss obeys :math:`L(p, k) \le C/(K-1)` for all p and k, for K >= 3.

    That is the condition of Lemma 2 of Ma et al. (2020), asked for every prediction. False for a
    loss that is not symmetric or that breaks the bound with K = 3; None if undecided.

    Examples
    --------
    >>> from sympy import log
    >>> from apl.symbolic import normalize
    >>> is_within_bound(2 * (1 - p_y)), is_within_bound(normalize(-log(p_y)))
    (True, False)
    """
    loss = sympify(loss)
    symmetric, largest = is_symmetric(loss), supremum(loss)
    if not symmetric or largest is None:
        return None if symmetric is not False else False
    excess = simplify(largest - sum_over_labels(loss) / (K - 1))
    if excess.equals(0):
        return True
    if excess is oo or excess.subs(K, 3).is_positive:
        return False
    beyond = simplify(excess.subs(K, _t + 2))
    return True if beyond.is_nonpositive else None


def _collect(loss: Expr, *, upper: bool) -> Expr | None:
    """The bounds of all terms added up, if one path leads to all of them."""
    bounds = [_bound(term, upper=upper) for term in _terms(loss)]
    found = [bound for bound in bounds if bound is not None]
    ends = {bound.end for bound in found}
    rests = {bound.rest for bound in found} - {None}
    if len(found) < len(bounds) or len(ends) > 1 or len(rests) > 1:
        return None
    total = Add(*(bound.value for bound in found))
    return oo if total.has(oo) else simplify(total)


def _terms(loss: Expr) -> list[Expr]:
    """The loss as one function of p_y, and each term with a sum by itself."""
    terms = Add.make_args(loss if loss.has(Sum) and not isinstance(loss, Add) else expand(loss))
    if any(term.has(Sum) for term in terms):
        terms = Add.make_args(loss)
    plain = Add(*(term for term in terms if not term.has(Sum)))
    return ([plain] if plain != 0 else []) + [term for term in terms if term.has(Sum)]


def _bound(term: Expr, *, upper: bool) -> _Bound | None:
    if not term.has(Sum):
        return _of_function(term.subs(p_y, _x), upper=upper)
    outer, inner = term.as_independent(y, p, as_Add=False)
    if outer.subs(K, _t + 1).is_negative:
        outer = -outer
        inner = Sum(-inner.function, *inner.limits) if isinstance(inner, Sum) else -inner
    if not outer.subs(K, _t + 1).is_positive:
        return None
    if isinstance(inner, Sum) and inner.function.has(_OTHERS):
        bound = _of_others(inner.function.subs(_OTHERS, 1).subs(p[k], _x), upper=upper)
    else:
        bound = _of_normalized(inner, upper=upper)
    return bound and _Bound(outer * bound.value, bound.end, bound.rest)


def _of_function(h: Expr, *, upper: bool) -> _Bound | None:
    others = Symbol("K - 1", positive=True)
    h = h.subs(K, others + 1)
    slope = _sign(h.diff(_x))
    if slope is None:
        return None
    end = 1 if (slope > 0) == upper else 0
    value = _limit(h, end)
    return None if value is None else _Bound(value.subs(others, K - 1), end)


def _of_others(g: Expr, *, upper: bool) -> _Bound | None:
    """Of the sum of g over the other classes, g rising from g(0) = 0."""
    if _sign(g.diff(_x)) != 1 or _limit(g, 0) != 0:
        return None
    if not upper:
        return _Bound(sympify(0), 1)
    top, bend = _limit(g, 1), _sign(g.diff(_x, 2))
    # Where g is convex one other class takes everything.
    return _Bound(top, 0, "vertex") if top is not None and (top is oo or bend == 1) else None


def _of_normalized(ratio: Expr, *, upper: bool) -> _Bound | None:
    """Of h(p_y) / sum_k h(p_k), h falling to h(1) = 0."""
    # The factors with p_y are h, whatever remains must be one over its sum.
    rest, h = ratio.as_independent(p_y, as_Add=False)
    if not simplify(rest * sum_over_labels(h)).equals(1):
        return None
    h = h.subs(p_y, _x)
    if _sign(h.diff(_x)) == 1:
        h = -h  # numerator and denominator may both carry the minus sign
    if h.has(Sum) or _sign(h.diff(_x)) != -1 or _limit(h, 1) != 0:
        return None
    if not upper:
        return _Bound(sympify(0), 1, "uniform")
    top, bend = _limit(h, 0), _sign(h.diff(_x, 2))
    if top is oo:
        return _Bound(sympify(1), 0)
    if top is not None and bend == 1:  # Jensen: the sum is smallest where the rest is uniform
        return _Bound(simplify(top / (top + (K - 1) * h.subs(_x, 1 / (K - 1)))), 0, "uniform")
    if top is not None and bend is not None:  # h(p) >= h(0) (1 - p), so the sum is >= (K-1) h(0)
        return _Bound(1 / (K - 1), 0, "vertex" if bend else None)
    return None


@cache
def _limit(h: Expr, end: int) -> Expr | None:
    try:
        value = limit(h, _x, end, "+" if end == 0 else "-")
    except (NotImplementedError, PoleError, ValueError):
        return None
    return value if value.is_extended_real and not value.has(_x) else None


@cache
def _sign(function: Expr) -> int | None:
    """1, -1 or 0 if the function has that sign on all of (0, 1), else None."""
    if function.has(AppliedUndef):
        return None
    # p = 1/(1 + t) with t > 0, so that SymPy's own assumptions can decide.
    moved = function.subs(_x, 1 / (1 + _t))
    for form in (expand_log, simplify, factor, expand):
        written = expand_log(form(moved), force=True)
        if written.is_zero or written.equals(0):
            return 0
        if written.is_positive:
            return 1
        if written.is_negative:
            return -1
    return None
