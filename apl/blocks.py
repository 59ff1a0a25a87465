"""Value and gradient of a loss together on a CPU: its closed form, on blocks of rows.

A block fits the cache, so that the logits are read from memory once and the gradient is written
once. Digits are kept as in :mod:`apl.kernels`: the label, and a class with p above 1/2, are
measured by what the other classes leave.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from apl.closed_form import C, P, u
from apl.programs import LOG2_E, Program

__all__ = ["BLOCK", "SMALL", "evaluate"]

BLOCK = 1 << 19
"""Logits in a block: 2 MiB of float32."""
SMALL = 1 << 14
"""Up to so many logits, float64 is cheaper than care about digits."""

Plain = Callable[[Tensor, Tensor], Tensor]
"""The plain path: losses (n,) of float32 logits (n, K) and labels (n,)."""


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
        some = weight if isinstance(weight, float) else weight.unsqueeze(1)
        each = _part(program, plain, logits, target.unsqueeze(1), gradient, some)
        return each.squeeze(1), gradient
    values = []
    _keep_memory()
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


@lru_cache(maxsize=1)
def _keep_memory() -> None:
    """Let glibc keep the memory of a block's results for the next block.

    It returns what is freed at once to the system, whose pages then cost more than the arithmetic,
    up to a size that grows with the largest piece freed so far. This one is never touched.
    """
    torch.empty(16 * BLOCK)


def _part(
    program: Program,
    plain: Plain,
    z: Tensor,
    y: Tensor,
    gradient: Tensor | None,
    weight: float | Tensor,
) -> Tensor:
    """The losses (n, 1) of rows (n, K); the weighted gradient is written."""
    if z.numel() <= SMALL and z.dtype.itemsize < 8:
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
    weight = weight.double() if isinstance(weight, Tensor) else weight
    logp = z.double()
    logp.sub_(logp.amax(1, keepdim=True))
    p = logp.exp()
    total = p.sum(1, keepdim=True)
    if not total.amin().item() > 1 + 1e-9:
        return None
    log_total = total.log()
    u_y = logp.gather(1, y).sub_(log_total)
    P_y = u_y.exp() if P in program.reads else None
    C_y = u_y.expm1().neg_() if C in program.reads else None
    values: list[Any] = []
    slopes: list[Any] = []
    totals: list[Any] = []
    if program.affines:
        logs = logp.sum(1, keepdim=True).sub_(log_total, alpha=K).sub_(u_y)
        for constant, slope in _pairs(program.affine(K)):
            values.append(logs * slope + (K - 1) * constant)
            slopes.append(slope)
            totals.append((K - 1) * slope)
    if program.bulks:
        p.div_(total)
        logp = logp.sub_(log_total) if u in program.reads else logp
        for i, (terms, slope) in enumerate(
            _pairs(_own(program, program.bulk(logp, p, K), logp, p))
        ):
            if program.products[i]:
                values.append(_log_of_product(p.scatter(1, y, 0.0)))
            else:
                values.append(terms.scatter_(1, y, 0.0).sum(1, keepdim=True))
            slopes.append(slope.scatter_(1, y, 0.0))
            totals.append(slope.sum(1, keepdim=True))
    value, of_label, *of_sums = program.label(u_y, P_y, C_y, K, *values)
    if gradient is not None:
        at_label = _column(of_label * weight, u_y)
        whole = at_label
        of_sums = [c * weight for c in of_sums]
        for c, t in zip(of_sums, totals, strict=True):
            whole = whole + c * t
        p.mul_((whole if program.bulks else whole / total).neg_())
        for i, (c, slope) in enumerate(zip(of_sums, slopes, strict=True)):
            if i < program.affines:
                p.add_(c * slope)
                at_label = at_label - c * slope
            else:
                p.addcmul_(slope, _column(c, u_y))
        gradient.copy_(p.scatter_add_(1, y, at_label).view(gradient.shape))
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
    e = torch.mul(below, LOG2_E, out=out).exp2_()
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
        bulk = _own(program, program.bulk(logp, e, K), logp, e)
        edges = [] if top is None else _pairs(program.edge(top.u, top.P, top.C, K))
        for term in bulk:
            if isinstance(term, Tensor):
                term.scatter_(1, y, 0.0)
                if top is not None:
                    term[top.rows, top.classes] = 0.0
        for i, (terms, slope) in enumerate(_pairs(bulk)):
            value = _log_of_product(e) if program.products[i] else terms.sum(1, keepdim=True)
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
        gone = (others / total).lt(torch.finfo(z.dtype).tiny)
        if top is not None:
            gone[top.rows] |= top.C.lt(torch.finfo(z.dtype).tiny)
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


def _log_of_product(p: Tensor) -> Tensor:
    """The sum of log(1 - p) over a row: (1 - a)(1 - b) = 1 - (a + b - ab), class by class.

    A logarithm costs ten times a product. As the p add up to at most 1, the product does not fall
    below 1/4 for p up to 1/2.
    """
    while (width := p.shape[1]) > 16:
        a, b = p[:, : width // 2], p[:, width // 2 : width // 2 * 2]
        pairs = torch.mul(a, b).neg_().add_(a).add_(b)
        if width % 2:
            last = p[:, -1:]
            pairs[:, :1] += last - pairs[:, :1] * last
        p = pairs
    return torch.log1p(-p).sum(1, keepdim=True)


def _column(number: Any, like: Tensor) -> Tensor:
    """A number of each row, as a tensor where the loss gives the same for all of them."""
    return number if isinstance(number, Tensor) else torch.full_like(like, number)


def _pairs(results: list[Any]) -> list[tuple[Any, Any]]:
    return list(zip(results[::2], results[1::2], strict=True))


def _own(program: Program, results: list[Any], *inputs: Tensor) -> list[Any]:
    """Results as tensors that can be written to: none is an input, or another result."""
    seen = {x.data_ptr() for x in inputs}
    owned: list[Any] = []
    for i, result in enumerate(results):
        if isinstance(result, Tensor):
            result = result.clone() if result.data_ptr() in seen else result
            seen.add(result.data_ptr())
        elif i % 2 or not program.products[i // 2]:
            result = torch.full_like(inputs[0], result)
        owned.append(result)
    return owned
