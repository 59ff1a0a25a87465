"""Turn a loss, a SymPy expression, into torch code on logits.

The expression is rewritten in ``u = log p`` and ``w = log(1 - p)``, both taken from the logits in a
way that keeps every digit: no probability is rounded to 0 or 1 on the way. What runs is ordinary
torch code, so autograd, double backward, ``torch.func`` and ``torch.compile`` all see through it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from sympy import Expr, Function, Symbol, exp, lambdify
from sympy.codegen.cfunctions import expm1
from sympy.codegen.rewriting import expm1_opt, log1p_opt, optimize
from torch import Tensor

from apl.closed_form import split
from apl.closed_form import u as _u
from apl.symbolic import K, k, p, p_y, y

_w = Symbol("w", real=True)


@dataclass(frozen=True)
class _Function:
    """A function of one class probability as torch code, and which of u and w it reads."""

    code: Callable[..., Any]
    reads: frozenset[Symbol]

    def __call__(self, u: Callable[[], Tensor], w: Callable[[], Tensor], values: list[Any]) -> Any:
        return self.code(
            u() if _u in self.reads else None, w() if _w in self.reads else None, *values
        )


@dataclass(frozen=True)
class _Reduction:
    """What a loss needs of a whole row: a sum over classes, or the label's share of one.

    ``kind`` is "sum", "others" (the sum without the label) or "share" (f_y / sum_k f_k).
    """

    kind: str
    function: _Function


@dataclass(frozen=True)
class Kernel:
    """A compiled loss: ``kernel(logits, target, parameters)`` is the loss of each row.

    ``outer`` combines the label's u and w with the reductions over the row.
    """

    parameters: tuple[str, ...]
    reductions: tuple[_Reduction, ...]
    outer: _Function

    def __call__(self, logits: Tensor, target: Tensor, parameters: Mapping[str, Any]) -> Tensor:
        """Losses of shape (...) from logits of shape (..., K) and labels of shape (...)."""
        row = LogProbabilities(logits)
        index = target.unsqueeze(-1)
        values = [parameters[name] for name in self.parameters]
        u_y = row.u().gather(-1, index)
        reduced = []
        for reduction in self.reductions:
            each = reduction.function(row.u, row.w, values)
            if reduction.kind == "sum":
                reduced.append(each.sum(-1, keepdim=True))
                continue
            # scatter, unlike a mask, refuses a label that is no class, in compiled code too.
            others = each.scatter(-1, index, 0.0).sum(-1, keepdim=True)
            share = reduction.kind == "share"
            reduced.append(_share(each.gather(-1, index), others) if share else others)
        w_y = row.w_of(index, u_y) if _w in self.outer.reads else u_y
        result = self.outer(lambda: u_y, lambda: w_y, [*values, logits.shape[-1], *reduced])
        return torch.as_tensor(result, device=u_y.device).to(u_y).expand(u_y.shape).squeeze(-1)


class LogProbabilities:
    """``u = log p`` and ``w = log(1 - p)`` of logits (..., K), each accurate to the last digits.

    Everything is measured from the largest logit: with r the sum of exp(z_k - z_top) over the
    *other* classes, log p_top = -log(1 + r) and log(1 - p_top) = log r - log(1 + r), which stay
    exact where 1 - p_top is far below the resolution of the floating point type. The largest
    logit keeps terms of its own because their derivatives, 1 - p_top and p_top, are then never
    found as a difference of nearly equal numbers.
    """

    def __init__(self, logits: Tensor) -> None:
        top = logits.argmax(-1, keepdim=True)
        self.classes = torch.arange(logits.shape[-1], device=logits.device)
        self._is_top = self.classes == top
        below = logits - logits.detach().gather(-1, top)
        z_top = below.gather(-1, top)  # 0, but it carries the gradient of the largest logit
        others = below.masked_fill(self._is_top, torch.finfo(logits.dtype).min)
        z_others = torch.logsumexp(others, -1, keepdim=True)
        self._log_r = z_others - z_top
        self._log_p_top = -_softplus(self._log_r)
        self._log_p_others = below - torch.logaddexp(z_top, z_others)
        self._u: Tensor | None = None
        self._w: Tensor | None = None

    def u(self) -> Tensor:
        """log p of every class."""
        if self._u is None:
            self._u = torch.where(self._is_top, self._log_p_top, self._log_p_others)
        return self._u

    def w(self) -> Tensor:
        """log(1 - p) of every class."""
        if self._w is None:
            self._w = self._complement(self.u(), self._is_top)
        return self._w

    def w_of(self, index: Tensor, u: Tensor) -> Tensor:
        """log(1 - p) of one class in each row, given its u."""
        if self._w is not None:
            return self._w.gather(-1, index)
        return self._complement(u, self._is_top.gather(-1, index))

    def _complement(self, u: Tensor, is_top: Tensor) -> Tensor:
        # log(1 - e^u) loses digits as p nears 1; only the top class, with r < 1, can be past 1/2.
        past_half = is_top & (self._log_r < 0)
        small = torch.where(past_half, -1.0, u)
        return torch.where(past_half, self._log_r + self._log_p_top, torch.log1p(-small.exp()))


@lru_cache(maxsize=256)
def compile_loss(expression: Expr) -> Kernel:
    """The torch code of a loss.

    Raises
    ------
    ValueError
        for an expression that is not a loss, or holds a function torch code is not written for.

    Examples
    --------
    >>> from apl.symbolic import p_y
    >>> kernel = compile_loss(1 - p_y)
    >>> kernel(torch.zeros(2, 4), torch.tensor([0, 3]), {})
    tensor([0.7500, 0.7500])
    """
    parameters = sorted(expression.atoms(Symbol) - {K, y, k, p.label}, key=str)
    expression, split_off = split(expression)
    reductions = tuple(_Reduction(r.kind, _function(r.function, parameters)) for r in split_off)
    outer = _function(expression, [*parameters, K, *(r.symbol for r in split_off)])
    return Kernel(tuple(s.name for s in parameters), reductions, outer)


def _function(expression: Expr, arguments: list[Symbol]) -> _Function:
    """Torch code for an expression in u, with log(1 - e^u) read from w."""
    stable = optimize(expression, [expm1_opt, log1p_opt]).replace(expm1(_u), -exp(_w))
    constants = {e: e.evalf(20) for e in stable.atoms(Function) if not e.free_symbols}
    stable = stable.xreplace(constants)
    unknown = {type(e).__name__ for e in stable.atoms(Function)} - set(_TORCH)
    if unknown or stable.has(p.label) or stable.free_symbols - {_u, _w, *arguments}:
        raise ValueError(
            f"cannot compile {expression.subs(exp(_u), p_y)}: a loss is made of p[y], K, sums "
            f"over k = 1 to K of functions of p[k], powers and {', '.join(_TORCH)}"
        )
    code = lambdify([_u, _w, *arguments], stable, modules=[_TORCH], cse=True)
    return _Function(code, frozenset({_u, _w}) & stable.free_symbols)


def _softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)), exact in float64 too (torch's default returns x from 20 on)."""
    return F.softplus(x, threshold=40.0)


def _share(f: Tensor, others: Tensor) -> Tensor:
    """f / (f + others), for f and others of one sign, in the form whose derivative keeps digits."""
    total = f + others
    return torch.where(f.abs() > others.abs(), 1 - others / total, f / total)


def _expm1(x: Tensor) -> Tensor:
    """exp(x) - 1 whose derivative is exp(x) to the last digit (torch's rounds exp(-20) to 0)."""
    far = x < -1
    return torch.where(far, x.exp() - 1, torch.expm1(torch.where(far, 0.0, x)))


_TORCH: dict[str, Callable[..., Any]] = {
    "exp": torch.exp,
    "log": torch.log,
    "expm1": _expm1,
    "log1p": torch.log1p,
    "tanh": torch.tanh,
    "Abs": torch.abs,
}
