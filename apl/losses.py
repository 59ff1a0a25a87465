"""The losses as modules of torch, by name or composed, called as ``F.cross_entropy`` is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from sympy import Expr, Float, Integer, Mul, Symbol
from torch import Tensor, nn

from apl import catalog, fused, symbolic
from apl.checks import check_call, check_settings, label_error
from apl.kernels import compile_loss


class Loss(nn.Module):
    r"""A loss: a SymPy expression that trains.

    Called as ``loss(logits, target)``, with logits of shape (N, K), (K,) or (N, K, d1, ...) and
    labels of shape (N,), () or (N, d1, ...), counted from 0. float16 and bfloat16 logits are
    computed in float32. Losses add up and take positive weights: ``2 * apl.CE() + apl.MAE()``.

    Logits are finite numbers. A class other than the label may be ruled out by a logit of -inf,
    except in NCE, NFL and sums with them: what they divide by is infinite then, and their gradient
    NaN. Leave such a class out instead.

    Parameters
    ----------
    expression
        the loss in ``p_y`` and sums over the classes, see :mod:`apl.symbolic`
    hyperparameters
        the values of its symbols, by name
    name
        what ``repr`` calls it
    reduction
        "mean" over the labels that count, "sum", or "none"
    ignore_index
        the label of positions that do not count
    weight
        refused: class weights break the symmetric condition

    Raises
    ------
    ValueError
        for an expression that is not a loss, an unknown reduction, and, when called, for shapes
        that do not fit or a label that is no class
    TypeError
        for class weights, and, when called, for logits that are not floating point or labels
        that are not integers

    Examples
    --------
    >>> import sympy, torch
    >>> from apl.symbolic import p_y
    >>> brier_like = Loss((1 - p_y) ** 2, name="brier-like")
    >>> brier_like(torch.zeros(2, 4), torch.tensor([0, 3]))
    tensor(0.5625)
    """

    def __init__(
        self,
        expression: Expr,
        hyperparameters: Mapping[str, float] | None = None,
        *,
        name: str = "loss",
        reduction: str = "mean",
        ignore_index: int = -100,
        weight: None = None,
    ) -> None:
        super().__init__()
        check_settings(reduction, weight)
        self.expression = expression
        self.hyperparameters = dict(hyperparameters or {})
        self.name = name
        self.reduction = reduction
        self.ignore_index = ignore_index
        self._kernel = compile_loss(expression)
        missing = [s for s in self._kernel.parameters if s not in self.hyperparameters]
        if missing:
            raise ValueError(f"{name} needs a value for {missing[0]!r}")

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """The loss of logits and labels, reduced."""
        check_call(logits, target)
        if torch.compiler.is_compiling() or not fused.applies(logits, target):
            return self._plain(logits, target)
        call = fused.Call(
            self.expression,
            self.hyperparameters,
            self.reduction,
            self.ignore_index,
            self._kernel,
            self._plain,
        )
        value = fused.loss(call, logits, target)
        return self._plain(logits, target) if value is None else value

    def _plain(self, logits: Tensor, target: Tensor) -> Tensor:
        """The loss as torch operations, which autograd and all that builds on it see through."""
        if logits.dtype in (torch.float16, torch.bfloat16):
            logits = logits.float()
        rows = logits.movedim(1, -1) if logits.ndim > 1 else logits
        target = target.long()
        counted = target != self.ignore_index
        each = self._each(rows, torch.where(counted, target, 0))
        each = torch.where(counted, each, 0.0)
        if self.reduction == "none":
            return each
        return each.sum() if self.reduction == "sum" else each.sum() / counted.sum()

    def _each(self, rows: Tensor, target: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return self._kernel(rows, target, self.hyperparameters)
        try:
            return self._kernel(rows, target, self.hyperparameters)
        except RuntimeError as error:
            wrong = label_error(error, rows.shape[-1])
            if wrong is None:
                raise
            raise wrong from None

    def __add__(self, other: Loss) -> Loss:
        """The sum of two losses."""
        if not isinstance(other, Loss):
            return NotImplemented
        if (self.reduction, self.ignore_index) != (other.reduction, other.ignore_index):
            raise ValueError(
                f"cannot add a loss with reduction {self.reduction!r}, ignore_index "
                f"{self.ignore_index} and one with {other.reduction!r}, {other.ignore_index}"
            )
        mine, theirs = self.hyperparameters, other.hyperparameters
        # One symbol cannot stand for two values: the second loss then keeps its numbers.
        clash = {name for name in theirs if name in mine and mine[name] != theirs[name]}
        symbols = [s for s in other.expression.atoms(Symbol) if s.name in clash]
        numbers = {symbol: Float(theirs[symbol.name]) for symbol in symbols}
        return Loss(
            self.expression + other.expression.subs(numbers),
            {**theirs, **mine},
            name=f"{self.name} + {other.name}",
            reduction=self.reduction,
            ignore_index=self.ignore_index,
        )

    def __mul__(self, weight: float) -> Loss:
        """The loss times a positive number."""
        if not isinstance(weight, (int, float)) or isinstance(weight, bool):
            return NotImplemented
        if not (math.isfinite(weight) and weight > 0):
            raise ValueError(f"a loss takes the weight {weight}: weights are positive and finite")
        if weight == 1:
            return self
        number = Integer(int(weight)) if weight == int(weight) else Float(weight)
        name = f"({self.name})" if " + " in self.name else self.name
        return Loss(
            Mul(number, self.expression, evaluate=False),
            self.hyperparameters,
            name=f"{weight:g} * {name}",
            reduction=self.reduction,
            ignore_index=self.ignore_index,
        )

    __rmul__ = __mul__

    def __repr__(self) -> str:
        values = [f"{key}={value:g}" for key, value in self.hyperparameters.items()]
        if self.reduction != "mean":
            values.append(f"reduction={self.reduction!r}")
        return f"{self.name}({', '.join(values)})" if values else self.name

    def _repr_latex_(self) -> str:
        formula = symbolic.latex(self.expression)
        values = [
            rf"{symbolic.latex(Symbol(name))} = {value:.6g}"
            for name, value in self.hyperparameters.items()
        ]
        shown = r", \quad ".join([formula, *values])
        return rf"$\displaystyle {shown}$"

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_kernel"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._kernel = compile_loss(self.expression)


def loss(
    name: str,
    *,
    reduction: str = "mean",
    ignore_index: int = -100,
    weight: None = None,
    **parameters: float,
) -> Loss:
    r"""A loss of the catalog, by name.

    Parameters
    ----------
    name
        one of :func:`names`
    reduction, ignore_index, weight
        as for :class:`Loss`
    parameters
        those the loss has: ``alpha`` and ``beta``, the weights of a sum (1, 1; SCE .1, 1);
        ``gamma`` of the focal losses (.5); ``q`` of the GCE losses (.7); ``A``, the constant RCE
        puts for log 0 (log 1e-4)

    Raises
    ------
    ValueError
        for an unknown name or parameter, or a value outside its range
    TypeError
        for class weights

    Examples
    --------
    >>> loss("nce+rce", alpha=1.0, beta=0.5)
    NCE+RCE(alpha=1, beta=0.5, A=-9.21034)
    >>> loss("gce", q=0.5)(torch.zeros(1, 4), torch.tensor([2]))
    tensor(1.)
    """
    found = catalog.entry(name)
    values = catalog.check(parameters, found.parameters, found.name)
    return Loss(
        found.expression,
        values,
        name=found.name.upper(),
        reduction=reduction,
        ignore_index=ignore_index,
        weight=weight,
    )


def normalize(loss: Loss | Expr) -> Loss:
    r"""Divide a loss by its sum over all labels, :math:`L(p, y) / \sum_k L(p, k)`.

    The result is symmetric, hence robust to symmetric label noise (Ma et al. 2020, Lemma 1).
    Takes a loss, or an expression in ``apl.symbolic.p_y``.

    Examples
    --------
    >>> normalize(CE())(torch.zeros(1, 4), torch.tensor([2]))
    tensor(0.2500)
    """
    if not isinstance(loss, Loss):
        loss = Loss(loss, name="L")
    plain = loss.name.isalpha() and loss.name.lower() in catalog.CATALOG
    expression = symbolic.normalize(loss.expression)
    kept = {str(s) for s in expression.free_symbols}
    return Loss(
        expression,
        {name: value for name, value in loss.hyperparameters.items() if name in kept},
        name=f"N{loss.name}" if plain else f"N[{loss.name}]",
        reduction=loss.reduction,
        ignore_index=loss.ignore_index,
    )


def names() -> tuple[str, ...]:
    """The names :func:`loss` knows.

    Examples
    --------
    >>> names()[:5]
    ('ce', 'fl', 'mae', 'rce', 'gce')
    """
    return tuple(catalog.CATALOG)


def CE(**keywords: Any) -> Loss:
    """Cross entropy, ``loss("ce")``.

    >>> CE(reduction="sum")
    CE(reduction='sum')
    """
    return loss("ce", **keywords)


def FL(gamma: float = 0.5, **keywords: Any) -> Loss:
    """Focal loss, ``loss("fl")``; the modulating factor is differentiated.

    >>> FL(gamma=2)
    FL(gamma=2)
    """
    return loss("fl", gamma=gamma, **keywords)


def MAE(**keywords: Any) -> Loss:
    """Mean absolute error, 2(1 - p_y), ``loss("mae")``.

    >>> MAE()
    MAE
    """
    return loss("mae", **keywords)


def RCE(A: float = math.log(1e-4), **keywords: Any) -> Loss:
    """Reverse cross entropy, ``loss("rce")``; A stands for log 0.

    >>> RCE(A=-4)
    RCE(A=-4)
    """
    return loss("rce", A=A, **keywords)


def GCE(q: float = 0.7, **keywords: Any) -> Loss:
    """Generalized cross entropy, ``loss("gce")``.

    >>> GCE()
    GCE(q=0.7)
    """
    return loss("gce", q=q, **keywords)


def SCE(alpha: float = 0.1, beta: float = 1.0, **keywords: Any) -> Loss:
    """Symmetric cross entropy, alpha CE + beta RCE, ``loss("sce")``.

    >>> SCE()
    SCE(alpha=0.1, beta=1, A=-9.21034)
    """
    return loss("sce", alpha=alpha, beta=beta, **keywords)


def NLNL(**keywords: Any) -> Loss:
    """Negative learning in expectation, the mean of -log(1 - p_k) over k != y, ``loss("nlnl")``.

    >>> NLNL()
    NLNL
    """
    return loss("nlnl", **keywords)
