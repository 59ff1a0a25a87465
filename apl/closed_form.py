r"""A loss in closed form: what of a row of logits its value and its gradient need. No torch.

Write u = log p and :math:`G_k = \partial L/\partial u_k`, taken as if the u were free. Then

.. math:: \partial L / \partial z_j = G_j - p_j \sum_k G_k.

A loss of :mod:`apl.symbolic` is a function of :math:`u_y` and of sums over the classes, so
:math:`G_k` is one number of the row times a function of :math:`p_k`, and one more number at k = y.
:func:`derive` finds these by differentiating the expression; :mod:`apl.fused` evaluates them.
Sums run over the classes other than the label: beside a label's share of nearly 1 they keep the
digits that a difference from the whole sum would lose.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from sympy import (
    Dummy,
    Expr,
    Function,
    Integer,
    KroneckerDelta,
    Mul,
    Pow,
    Sum,
    Symbol,
    exp,
    log,
)
from sympy.codegen.cfunctions import expm1
from sympy.codegen.rewriting import expm1_opt, log1p_opt, optimize

from apl.symbolic import K, k, p, p_y, y

__all__ = ["C", "ClassSum", "ClosedForm", "P", "Reduction", "derive", "split", "u"]

u = Symbol("u", real=True)
"""log p of one class."""
P = Symbol("P", positive=True)
"""p of that class."""
C = Symbol("C", positive=True)
"""1 - p of that class, measured and not subtracted."""

FUNCTIONS = frozenset({"exp", "log", "expm1", "log1p", "tanh", "Abs"})
"""What an expression may hold beside powers."""


@dataclass(frozen=True)
class Reduction:
    """What a loss needs of a whole row: a sum over classes, or the label's share of one.

    ``kind`` is "sum", "others" (the sum without the label) or "share" (f_y / sum_k f_k);
    ``function`` is f as an expression in ``u``; ``symbol`` stands for the number in the rest.
    """

    kind: str
    function: Expr
    symbol: Symbol


@dataclass(frozen=True)
class ClassSum:
    """A sum over the classes other than the label: of ``value``, with the slope of each term.

    ``slope`` is the derivative by u. Both are expressions in ``u``, ``P`` and ``C`` for classes
    with p at most 1/2, of which C = 1 - P; ``edge_value`` and ``edge_slope``, in the same, hold for
    every p. Where the function is a + b u, ``affine`` is (a, b), else None.
    """

    symbol: Symbol
    value: Expr
    slope: Expr
    edge_value: Expr
    edge_slope: Expr
    affine: tuple[Expr, Expr] | None


@dataclass(frozen=True, eq=False)
class ClosedForm:
    """A loss and its derivatives by the u of the label and by the sums over the other classes.

    ``value``, ``of_label`` and each of ``of_sums`` are expressions in ``u``, ``P`` and ``C`` of the
    label, in ``K``, ``parameters`` and the symbols of ``sums``. ``delicate`` says that 1 - p must
    not round to 0, because a logarithm or a root of it is taken.
    """

    value: Expr
    of_label: Expr
    of_sums: tuple[Expr, ...]
    sums: tuple[ClassSum, ...]
    parameters: tuple[Symbol, ...]
    delicate: bool


def split(expression: Expr) -> tuple[Expr, tuple[Reduction, ...]]:
    """A loss as a function of the label's u, of K and of reductions over the row.

    Examples
    --------
    >>> from sympy import log
    >>> from apl.symbolic import normalize
    >>> outer, (reduction,) = split(normalize(-log(p_y)))
    >>> outer == reduction.symbol, reduction.kind, reduction.function
    (True, 'share', u)
    """
    reductions = []
    for total in sorted(expression.atoms(Sum), key=str):
        each = total.function.subs(1 - KroneckerDelta(k, y), 1)
        symbol = Dummy("reduced")
        shared = _with_share(expression, each.subs(p[k], p_y), total, symbol)
        kind = "sum" if each == total.function else "others"
        if kind == "sum" and not shared.has(total):
            kind, expression = "share", shared
        expression = expression.subs(total, symbol)
        reductions.append(Reduction(kind, each.subs(p[k], exp(u)), symbol))
    return expression.subs(p_y, exp(u)), tuple(reductions)


def _with_share(expression: Expr, f: Expr, total: Expr, symbol: Symbol) -> Expr:
    """The expression with a symbol for f / total, however f is written (``subs`` misses some)."""
    inner, varying = f.as_independent(p_y, as_Add=False)

    def share(product: Expr) -> Expr:
        outer, rest = product.as_independent(p_y, as_Add=False)
        return outer * total / inner * symbol if (rest - varying).expand() == 0 else product

    return expression.replace(lambda e: isinstance(e, Mul) and 1 / total in e.args, share)


@lru_cache(maxsize=256)
def derive(expression: Expr) -> ClosedForm | None:
    """The closed form of a loss, or None where there is none.

    There is none for an expression with sums of something else than functions of one probability,
    or with functions that are not differentiated in closed form here, such as Abs.

    Examples
    --------
    >>> from apl.catalog import entry
    >>> form = derive(entry("mae").expression)
    >>> form.value, form.of_label
    (2*C, -2*P)
    >>> form = derive(entry("gce").expression)
    >>> form.of_label, form.parameters
    (-exp(q*u), (q,))
    """
    outer, reductions = split(expression)
    of_label, of_sums, sums, back = outer.diff(u), [], [], {}
    parameters = sorted(expression.atoms(Symbol) - {K, y, k, p.label}, key=str)
    for reduction in reductions:
        h, x = reduction.function, reduction.symbol
        if h.has(Sum) or h.has(p) or h.free_symbols - {u, K, *parameters}:
            return None
        slope, of_x = h.diff(u), outer.diff(x)
        here, others = Dummy("here"), Dummy("others")
        total = here + others
        back[x], by_here, by_others = {
            "sum": (total, Integer(1), Integer(1)),
            "others": (others, Integer(0), Integer(1)),
            # Written so that no difference of nearly equal numbers is left.
            "share": (here / total, others / total**2, -here / total**2),
        }[reduction.kind]
        of_label += of_x * by_here * slope
        of_sums.append(of_x * by_others)
        sums.append((here, others, h, slope))
    label = {here: h for here, _, h, _ in sums}
    free = (outer, of_label, *of_sums)
    written = [_at_edge(e.xreplace(back).xreplace(label)) for e in free]
    class_sums = tuple(
        ClassSum(x, _in_bulk(h), _in_bulk(g), _at_edge(h), _at_edge(g), _affine(h))
        for _, x, h, g in sums
    )
    pieces = [*written, *(e for s in class_sums for e in (s.edge_value, s.edge_slope))]
    functions = {type(f).__name__ for e in pieces for f in e.atoms(Function)}
    known = {u, P, C, K, *parameters, *(s.symbol for s in class_sums)}
    if functions - (FUNCTIONS - {"Abs"}) or any(e.free_symbols - known for e in pieces):
        return None
    delicate = any(_delicate(e) for e in pieces)
    return ClosedForm(
        written[0], written[1], tuple(written[2:]), class_sums, tuple(parameters), delicate
    )


def _at_edge(expression: Expr) -> Expr:
    """In u, P and C: no 1 - p is computed from p, where digits would be lost."""
    stable = optimize(expression, [expm1_opt, log1p_opt])
    return stable.replace(expm1(u), -C).xreplace({exp(u): P})


def _in_bulk(expression: Expr) -> Expr:
    """In u, P and C for p up to 1/2, where 1 - p is exact enough, and cheaper than expm1."""
    gentle = expression.xreplace({exp(u): P})
    kept = {e: Dummy("power", positive=True) for e in gentle.atoms(exp) if _is_steep(e)}
    stable = optimize(gentle.xreplace(kept), [expm1_opt, log1p_opt])
    return stable.xreplace({dummy: e for e, dummy in kept.items()} | {1 - P: C, P - 1: -C})


def _is_steep(power: Expr) -> bool:
    """Whether 1 - exp(c u) keeps its digits for u at most log(1/2)."""
    factor = power.args[0] / u
    return bool(factor.is_number and abs(factor) > 0.1)


def _affine(h: Expr) -> tuple[Expr, Expr] | None:
    slope = h.diff(u)
    return None if slope.has(u) else (h.subs(u, 0), slope)


def _delicate(expression: Expr) -> bool:
    roots = (e for e in expression.atoms(Pow) if e.base == C)
    return expression.has(log(C)) or any(
        not (e.exp.is_integer and e.exp.is_nonnegative) for e in roots
    )
