"""Value and gradient of a loss together on a CPU: its closed form, on blocks of rows.

A block fits the cache, so that the logits are read from memory once and the gradient is written
once. What :mod:`apl.closed_form` found is compiled to torch code by :func:`program`, and
:func:`evaluate` runs it. Digits are kept as in :mod:`apl.kernels`: the label, and a class with p
above 1/2, are measured by what the other classes leave.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from sympy import Expr, Symbol, lambdify
from sympy.codegen.cfunctions import log1p
from torch import Tensor

from apl.closed_form import C, P, derive, u
from apl.symbolic import K

__all__ = ["BLOCK", "Program", "evaluate", "program"]

BLOCK = 1 << 18
"""Logits in a block: 1 MiB of float32."""
SMALL = 1 << 14
"""Up to so many logits, float64 is cheaper than care about digits."""
_LOG2_E = math.log2(math.e)

Plain = Callable[[Tensor, Tensor], Tensor]
"""The plain path: losses (n,) of float32 logits (n, K) and labels (n,)."""


@dataclass(frozen=True)
class Program:
    """A closed form as torch code, the sums of a + b u first.

    ``label`` gives the value, its slope by the label's u and its slopes by the sums; ``affine`` a
    and b of the sums of a + b u, which need no function of each class; ``bulk`` the value and the
    slope of the terms of each other sum for p up to 1/2, and ``edge`` the same for every p.
    ``products`` says of which sums ``bulk`` gives -p for log(1 - p), whose sum is the logarithm of
    one product. ``reads`` are those of u, P and C that ``label`` reads, and u if ``bulk`` does.
    """

    label: Callable[..., list[Any]]
    affine: Callable[..., list[Any]]
    bulk: Callable[..., list[Any]]
    edge: Callable[..., list[Any]]
    affines: int
    bulks: int
    products: tuple[bool, ...]
    reads: frozenset[Symbol]
    delicate: bool


def program(expression: Expr, values: Mapping[str, float], classes: int) -> Program | None:
    """The code of a loss with its parameters set, or None where it has no closed form.

    Examples
    --------
    >>> from apl.catalog import entry
    >>> nce = program(entry("nce").expression, {}, classes=10)
    >>> nce.affines, nce.bulks
    (1, 0)
    """
    return _program(expression, tuple(sorted(values.items())), classes == 2)


@lru_cache(maxsize=256)
def _program(
    expression: Expr, values: tuple[tuple[str, float], ...], pair: bool
) -> Program | None:
    form = derive(expression, dict(values))
    if form is None:
        return None
    # Of two classes the other one may be nearly certain, and its u, alone in the sum, tiny. Of
    # more classes the sum of all u is as exact as its terms.
    affine = [s for s in form.sums if s.affine is not None and not pair]
    bulk = [s for s in form.sums if s not in affine]
    derivatives = dict(zip(form.sums, form.of_sums, strict=True))
    at_label = [form.value, form.of_label, *(derivatives[s] for s in affine + bulk)]
    products = tuple(s.value == log1p(-P) for s in bulk)
    in_bulk = [
        e
        for s, product in zip(bulk, products, strict=True)
        for e in (-P if product else s.value, s.slope)
    ]
    reads = [e.free_symbols for e in at_label] + [e.free_symbols & {u} for e in in_bulk]

    def code(arguments: list[Symbol], results: list[Expr], fast: bool = False) -> Any:
        return lambdify(arguments, results, modules=[_FAST if fast else _TORCH], cse=True)

    return Program(
        label=code([u, P, C, K, *(s.symbol for s in affine + bulk)], at_label),
        affine=code([K], [e for s in affine for e in s.affine or ()]),
        bulk=code([u, P, K], in_bulk, fast=True),
        edge=code([u, P, C, K], [e for s in bulk for e in (s.edge_value, s.edge_slope)]),
        affines=len(affine),
        bulks=len(bulk),
        products=products,
        reads=frozenset({u, P, C}.intersection(*[set().union(*reads)])),
        delicate=form.delicate,
    )


def _exp(x: Tensor) -> Tensor:
    """exp(x) through exp2, of torch's exponentials the fastest on a CPU, by a factor of 3."""
    return torch.mul(x, _LOG2_E).exp2_()


def _log1p(x: Tensor) -> Tensor:
    """log(1 + x) for x of at least -1/2, by correcting log: torch's log1p is not vectorized."""
    whole = x + 1
    lost = (whole - 1).sub_(x).div_(whole)
    return whole.log_().sub_(lost)


_TORCH = {name: getattr(torch, name) for name in ("exp", "log", "expm1", "log1p", "tanh", "sqrt")}
_FAST = {**_TORCH, "exp": _exp, "log1p": _log1p}


def evaluate(
    program: Program,
    plain: Plain,
    logits: Tensor,
    target: Tensor,
    weight: float | Tensor = 1.0,
    *,
    with_gradient: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """The losses of all labels, and the gradient of their weighted sum.

    Parameters
    ----------
    program
        of the loss
    plain
        computes the rows where 1 - p is smaller than any number of the type
    logits
        of shape (N, K) or (N, K, d1, ...)
    target
        of shape (N,) or (N, d1, ...), all of them classes
    weight
        what each loss counts in the gradient: a number, or a tensor of the target's shape
    with_gradient
        whether to compute the gradient; else the second result is None

    Returns
    -------
    tuple
        the losses, of the shape of the target; the gradient, in the type of the logits

    Raises
    ------
    RuntimeError
        for a label that is no class, as ``gather`` does
    """
    gradient = torch.empty_like(logits) if with_gradient else None
    step = max(1, BLOCK * logits.shape[0] // logits.numel())
    if logits.ndim == 2 and step >= logits.shape[0]:
        given = gradient, weight if isinstance(weight, float) else weight.unsqueeze(1)
        return _part(program, plain, logits, target.unsqueeze(1), *given).squeeze(1), gradient
    values = []
    for start in range(0, logits.shape[0], step):
        part = slice(start, start + step)
        z, labels = logits[part].movedim(1, -1), target[part].reshape(-1, 1)
        rows = z.reshape(-1, z.shape[-1])
        given = None if gradient is None else gradient[part].movedim(1, -1)
        if given is not None:
            given = given.flatten(0, -2) if given.is_contiguous() else given
        some = weight if isinstance(weight, float) else weight[part].reshape(-1, 1)
        values.append(_part(program, plain, rows, labels, given, some))
    return torch.cat(values).view(target.shape), gradient


def _part(
    program: Program,
    plain: Plain,
    z: Tensor,
    y: Tensor,
    gradient: Tensor | None,
    weight: float | Tensor,
) -> Tensor:
    """The losses (n, 1) of rows (n, K); the weighted gradient is written."""
    if z.numel() <= SMALL:
        value = _few(program, z, y, gradient, weight)
        if value is not None:
            return value
    rows = z.float() if z.dtype.itemsize < 4 else z
    # Where the gradient's own memory fits, it is where the exponentials are put.
    fits = gradient is not None and gradient.dtype == rows.dtype and gradient.is_contiguous()
    out = gradient if gradient is not None and fits else torch.empty_like(rows)
    value = _block(program, plain, rows, y, weight, out, gradient is not None)
    if gradient is not None and not fits:
        gradient.copy_(out.view(gradient.shape))
    return value


def _few(
    program: Program, z: Tensor, y: Tensor, gradient: Tensor | None, weight: float | Tensor
) -> Tensor | None:
    """The same in float64, in few operations, unless some 1 - p is too small even for that."""
    K = z.shape[1]
    logp = torch.log_softmax(z, 1, torch.float64)
    if z.dtype.itemsize == 8 or logp.amax() > -1e-9:
        return None
    u_y = logp.gather(1, y)
    P_y = u_y.exp() if P in program.reads else None
    C_y = u_y.expm1().neg_() if C in program.reads else None
    values: list[Any] = []
    slopes: list[Any] = []
    if program.affines:
        logs = logp.sum(1, keepdim=True).sub_(u_y)
        for constant, slope in _pairs(program.affine(K)):
            values.append(logs * slope + (K - 1) * constant)
            slopes.append(slope)
    if program.bulks:
        p = logp.exp()
        for i, (value, slope) in enumerate(_pairs(program.bulk(logp, p, K))):
            each = _column(value, logp).scatter(1, y, 0.0)
            sum_ = each.sum(1, keepdim=True) if not program.products[i] else _log_of_product(each)
            values.append(sum_)
            slopes.append(slope)
    value, of_label, *of_sums = program.label(u_y, P_y, C_y, K, *values)
    if gradient is not None:
        of_label = _column(of_label, u_y).mul(weight)
        G = sum(c * slope for c, slope in zip(of_sums, slopes, strict=True))
        G = _column(G, u_y) * weight if of_sums else torch.zeros_like(u_y)
        G = G.expand(logp.shape).scatter(1, y, of_label)
        gradient.copy_(torch._log_softmax_backward_data(G, logp, 1, torch.float64))
    return _column(value, u_y).float()


@dataclass(frozen=True)
class _Top:
    """Nearly certain classes that are not the label: where they are; u, P and C to the last digit.

    At most one in a row, so the shapes are (m,), and (m, 1) for the numbers.
    """

    rows: Tensor
    classes: Tensor
    u: Tensor
    P: Tensor
    C: Tensor


def _take_top(e: Tensor, e_y: Tensor, total: Tensor) -> _Top | None:
    """Take the classes with p above 1/2 out of ``e``, which the labels have left already."""
    rows = ((total < 2) & (e_y < 1)).flatten().nonzero().flatten()
    if not len(rows):
        return None
    # The only 1 of its row: this finds it in a fraction of the time of argmax.
    some = e[rows]
    classes = (some.floor() * torch.arange(e.shape[1], dtype=e.dtype)).sum(1).long()
    some.scatter_(1, classes.unsqueeze(1), 0.0)
    e[rows, classes] = 0.0
    rest = some.sum(1, keepdim=True).add_(e_y[rows])
    return _Top(rows, classes, -rest.log1p(), 1 / (1 + rest), rest / (1 + rest))


def _block(
    program: Program,
    plain: Plain,
    z: Tensor,
    y: Tensor,
    weight: float | Tensor,
    out: Tensor,
    with_gradient: bool,
) -> Tensor:
    """The losses (n, 1) of rows (n, K); the weighted gradient is left in ``out``."""
    K = z.shape[1]
    below = torch.sub(z, z.amax(1, keepdim=True))
    below_y = below.gather(1, y)
    logs = below.sum(1, keepdim=True).sub_(below_y) if program.affines else None
    e = torch.mul(below, _LOG2_E, out=out).exp2_()
    e_y = e.gather(1, y)
    e.scatter_(1, y, 0.0)
    others = e.sum(1, keepdim=True)
    total = others + e_y
    # e_y - 1 is exactly 0 where the label is on top: log p keeps its digits near p = 1.
    log_total = (e_y - 1).add_(others).log1p_()
    top = None
    if program.bulks:
        top = _take_top(e, e_y, total)
    if top is not None:
        log_total[top.rows] = -top.u
    u_y = below_y - log_total if u in program.reads else None
    P_y = e_y / total if P in program.reads else None
    C_y = others / total if C in program.reads else None

    # Of each sum over the classes that are not the label: its value, the slopes of its terms, and
    # their sum, at first without the classes taken out above.
    values: list[Any] = []
    slopes: list[Any] = []
    totals: list[Any] = []
    if logs is not None:
        logs.sub_(log_total, alpha=K - 1)
        for constant, slope in _pairs(program.affine(K)):
            values.append(logs * slope + (K - 1) * constant)
            slopes.append(slope)
            totals.append((K - 1) * slope)
    edges: list[tuple[Any, Any]] = []
    if program.bulks:
        e.div_(total)
        logp = below.sub_(log_total) if u in program.reads else below
        bulk = _own(program.bulk(logp, e, K), logp, e)
        edges = [] if top is None else _pairs(program.edge(top.u, top.P, top.C, K))
        for term in bulk:
            term.scatter_(1, y, 0.0)
            if top is not None:
                term[top.rows, top.classes] = 0.0
        for i, (terms, slope) in enumerate(_pairs(bulk)):
            value = _log_of_product(terms) if program.products[i] else terms.sum(1, keepdim=True)
            if top is not None:
                value[top.rows] += edges[i][0]
            values.append(value)
            slopes.append(slope)
            totals.append(slope.sum(1, keepdim=True))
    value, of_label, *of_sums = program.label(u_y, P_y, C_y, K, *values)
    value = _column(value, total)
    if with_gradient:
        _gradient(
            out,
            y,
            (e_y, others, total),
            of_label * weight,
            list(zip((_column(c, total) * weight for c in of_sums), slopes, totals, strict=True)),
            top,
            edges,
        )
    if program.delicate:
        gone = others / total < torch.finfo(z.dtype).tiny
        if top is not None:
            gone[top.rows] |= top.C < torch.finfo(z.dtype).tiny
        if gone.any():
            rows = gone.flatten().nonzero().flatten()
            value = value.clone()
            with torch.enable_grad():
                some = z[rows].detach().requires_grad_()
                losses = plain(some, y[rows, 0])
            value[rows] = losses.detach().unsqueeze(1)
            if with_gradient:
                (slope,) = torch.autograd.grad(losses, some, torch.ones_like(losses))
                out[rows] = slope * (weight if isinstance(weight, float) else weight[rows])
    return value


def _gradient(
    out: Tensor,
    y: Tensor,
    label: tuple[Tensor, Tensor, Tensor],
    of_label: Any,
    sums: list[tuple[Any, Any, Any]],
    top: _Top | None,
    edges: list[tuple[Any, Any]],
) -> None:
    """dL/dz_j = G_j - p_j sum_k G_k, over what is in ``out``: e of all classes but the label, or p.

    ``sums`` holds for each sum: the slope by it, the slopes of its terms, and their sum.
    """
    e_y, others, total = label
    if not sums:
        ratio = total.reciprocal().mul_(of_label)
        out.mul_(-ratio).scatter_(1, y, ratio.mul_(others))
        return
    # Of all the other classes, and of those but top.
    from_sums = sum(c * t for c, _, t in sums)
    at_top = None
    if top is not None:
        affine = [c[top.rows] * s for c, s, _ in sums if not isinstance(s, Tensor)]
        bulk = [c[top.rows] * e[1] for (c, *_), e in zip(sums[len(affine) :], edges, strict=True)]
        own = sum(affine) + sum(bulk)
        without = (of_label + from_sums)[top.rows] - sum(affine)
        at_top = own * top.C - top.P * without
        from_sums[top.rows] += sum(bulk)
    at_label = (of_label * others - from_sums * e_y).div_(total)
    everywhere = (from_sums + of_label).neg_()
    in_p = any(isinstance(s, Tensor) for _, s, _ in sums)
    out.mul_(everywhere if in_p else everywhere.div_(total))
    for c, slope, _ in sums:
        if isinstance(slope, Tensor):
            out.addcmul_(slope, c)
        else:
            out.add_(c * slope)
    out.scatter_(1, y, at_label)
    if top is not None and at_top is not None:
        out[top.rows, top.classes] = at_top.squeeze(1)


def _log_of_product(x: Tensor) -> Tensor:
    """The sum of log(1 + x) over a row, x = -p: (1 + a)(1 + b) = 1 + (a + b + ab), class by class.

    A logarithm costs ten times a product. As the p add up to at most 1, the product does not fall
    below 1/4 for p up to 1/2.
    """
    while (width := x.shape[1]) > 16:
        a, b = x[:, : width // 2], x[:, width // 2 : width // 2 * 2]
        pairs = torch.addcmul(a + b, a, b)
        if width % 2:
            last = x[:, -1:]
            pairs[:, :1] += last + pairs[:, :1] * last
        x = pairs
    return x.log1p().sum(1, keepdim=True)


def _column(number: Any, like: Tensor) -> Tensor:
    """A number of each row, as a tensor where the loss gives the same for all of them."""
    return number if isinstance(number, Tensor) else torch.full_like(like, number)


def _pairs(results: list[Any]) -> list[tuple[Any, Any]]:
    return list(zip(results[::2], results[1::2], strict=True))


def _own(results: list[Any], *inputs: Tensor) -> list[Tensor]:
    """Tensors that can be written to: none is an input, or another result, or just a number."""
    seen = {x.data_ptr() for x in inputs}
    owned: list[Tensor] = []
    for result in results:
        if not isinstance(result, Tensor):
            result = torch.full_like(inputs[0], result)
        elif result.data_ptr() in seen:
            result = result.clone()
        seen.add(result.data_ptr())
        owned.append(result)
    return owned
