"""The rows of a loss on a CPU: a skeleton that numba compiles with the functions of one loss.

Nothing is compiled at import; the first call of a loss compiles it, in about a second.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

__all__ = ["SINGLE", "build"]

# Arithmetic as it is written, but for fused multiply and add; and sums, which alone may be taken
# in any order, as whole vectors.
EXACT = {"contract"}
ANY_ORDER = {"contract", "reassoc", "nsz"}
CHUNK = 4096  # terms that are added in single precision before their sum is
STEP = 64  # so many logits are looked through at once

single = np.float32


@intrinsic
def _from_bits(typing: Any, bits: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.int32), generate


@intrinsic
def _to_bits(typing: Any, number: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.IntType(64))

    return types.int64(types.float64), generate


def _either(name: str) -> Any:
    """The larger or smaller number, also of a whole vector: NaN is looked for elsewhere."""

    def function(typing: Any, a: Any, b: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            kind = ir.FloatType()
            both = ir.FunctionType(kind, [kind, kind])
            code = builder.module.declare_intrinsic(name, [kind], both)
            return builder.call(code, arguments, fastmath=("nnan", "nsz"))

        return types.float32(types.float32, types.float32), generate

    return intrinsic(function)


_larger, _smaller = _either("llvm.maxnum"), _either("llvm.minnum")


@njit(inline="always")
def _is_finite(number):
    # By its bits: no arithmetic that is free to assume finite numbers.
    return (_to_bits(number) & 0x7FF0000000000000) != 0x7FF0000000000000


@njit(inline="always")
def _reduced(x):
    """2^n and exp(r) - 1 with x = n log 2 + r; the polynomial is a Chebyshev fit."""
    x = _smaller(_larger(x, single(-87.0)), single(88.0))
    n = np.floor(x * single(1.44269504) + single(0.5))
    r = (x - n * single(0.693359375)) + n * single(2.12194440e-4)
    q = single(1.9891247e-4)
    q = q * r + single(1.3933881e-3)
    q = q * r + single(8.3333105e-3)
    q = q * r + single(4.1666463e-2)
    q = q * r + single(1.6666667e-1)
    q = q * r + single(0.5)
    power = _from_bits((np.int32(n) + np.int32(127)) << np.int32(23))
    return power, q * r * r + r


@njit(inline="always")
def _exp(x):
    power, rest = _reduced(x)
    return power * rest + power


@njit(inline="always")
def _exp_below(x):
    """exp(x) for x up to 0: 0 where float32 ends, and NaN of NaN."""
    e = _exp(x) if x > single(-87.0) else single(0.0)
    return e if x == x else x


@njit(inline="always")
def _expm1(x):
    power, rest = _reduced(x)
    return power * rest + (power - single(1.0))


@njit(inline="always")
def _log1p(x):
    """log(1 + x) for x from -1/2 to 1: 2 artanh(x / (2 + x)), by its series."""
    s = x / (single(2.0) + x)
    s2 = s * s
    q = single(1 / 17)
    q = q * s2 + single(1 / 15)
    q = q * s2 + single(1 / 13)
    q = q * s2 + single(1 / 11)
    q = q * s2 + single(1 / 9)
    q = q * s2 + single(1 / 7)
    q = q * s2 + single(1 / 5)
    q = q * s2 + single(1 / 3)
    return single(2.0) * (s + s * s2 * q)


SINGLE: dict[str, Any] = {
    "single": single,
    "exp": _exp,
    "expm1": _expm1,
    "log1p": _log1p,
    "log": np.log,
    "sqrt": np.sqrt,
    "tanh": np.tanh,
}
"""The functions of a class's term, in single precision."""


def build(
    label: Callable[..., Any],
    line: Callable[..., Any] | None,
    terms: Sequence[Callable[..., Any]],
    edges: Sequence[Callable[..., Any]],
    delicate: bool,
) -> Callable[..., tuple[int, int]]:
    """Compile the rows of a loss.

    Parameters
    ----------
    label
        of (u, P, C, K, three sums, parameters): the value, its slope by u, its slopes by the sums
    line
        of (K, parameters): a and b of the first sum, of a + b u, if there is such a sum
    terms, edges
        of (u, P, C, K, parameters) in single precision, and in double:
        the term of a class in each other sum, at most two, and its slope
    delicate
        whether 1 - p must not be 0

    Returns
    -------
    callable
        of logits (n, K), labels (n,), weights (n,) or (1,), the gradient (n, K) or scratch (1, K),
        losses (n,), and rows (n,) to be marked that must be computed otherwise; whether there is a
        gradient; the parameters. It returns the place of a label that is no class, or -1, and how
        many rows are marked.
    """
    has_line, has_a, has_b = line is not None, len(terms) > 0, len(terms) > 1
    of_label, of_line = _inlined(label), _inlined(line or _nothing)
    edge_a, edge_b = (_inlined(edges[i] if i < len(edges) else _nothing) for i in range(2))
    each_a, each_b = (_each(_inlined(terms[i] if i < len(terms) else _nothing)) for i in range(2))

    @njit(nogil=True, fastmath=EXACT, error_model="numpy")
    def rows(logits, labels, weights, gradients, losses, marked, with_gradient, own, own_single):
        n, width = logits.shape
        K = float(width)
        for i in range(n):
            if labels[i] < 0 or labels[i] >= width:
                return i, 0
        terms = np.empty(width if has_a else 1, np.float32)
        slopes_a = np.empty(width if has_a else 1, np.float32)
        slopes_b = np.empty(width if has_b else 1, np.float32)
        count = 0
        for i in range(n):
            z, y = logits[i], labels[i]
            e = gradients[i if with_gradient else 0]
            weight = float(weights[min(i, weights.size - 1)])

            # Exponentials of the classes that are neither on top nor the label, and their sum.
            top = _largest(z)
            below_y = float(z[y]) - float(top)
            on_top = below_y == 0.0
            t = y if on_top else _place(z, top)
            for j in range(width):
                e[j] = _exp_below(z[j] - top)
            e[y] = e[t] = single(0.0)
            others = _total(e)
            e_y = 1.0 if on_top else math.exp(below_y)
            r = others if on_top else others + e_y
            logs = 0.0
            if has_line:
                logs = _total_below(z[:y], top) + _total_below(z[y + 1 :], top)
            if not _is_finite(r + logs + top) or (delicate and r < 1e-30):
                marked[i] = True
                count += 1
                continue
            total = 1.0 + r
            log_total = math.log1p(r)
            P_t, C_t = 1.0 / total, r / total

            # Sums over the classes that are not the label, and of the slopes of their terms; at
            # the top class these are separate.
            sum_line = sum_a = sum_b = slope_line = rest_a = rest_b = top_a = top_b = 0.0
            if has_line:
                constant, slope_line = of_line(K, own)
                sum_line = (K - 1.0) * constant + slope_line * (logs - (K - 1.0) * log_total)
            if has_a:
                each_a(z, e, top, log_total, total, own_single, terms, slopes_a)
                terms[y] = terms[t] = slopes_a[y] = slopes_a[t] = single(0.0)
                sum_a, rest_a = _total(terms), _total(slopes_a)
                if not on_top:
                    value, top_a = edge_a(-log_total, P_t, C_t, K, own)
                    sum_a += value
            if has_b:
                each_b(z, e, top, log_total, total, own_single, terms, slopes_b)
                terms[y] = terms[t] = slopes_b[y] = slopes_b[t] = single(0.0)
                sum_b, rest_b = _total(terms), _total(slopes_b)
                if not on_top:
                    value, top_b = edge_b(-log_total, P_t, C_t, K, own)
                    sum_b += value

            # The label, and the gradient.
            u_y, P_y = below_y - log_total, e_y / total
            C_y = C_t if on_top else (1.0 + others) / total
            value, at_label, by_line, by_a, by_b = of_label(
                u_y, P_y, C_y, K, sum_line, sum_a, sum_b, own
            )
            losses[i] = value
            if not with_gradient:
                continue
            by_line *= slope_line
            below_top = by_a * rest_a + by_b * rest_b
            if on_top:
                at_top = at_label
                below_top += (K - 1.0) * by_line
            else:
                at_top = by_line + by_a * top_a + by_b * top_b
                below_top += (K - 2.0) * by_line + at_label
            whole = (below_top + at_top) / total
            factor, shift = single(whole * weight), single(by_line * weight)
            c_a, c_b = single(by_a * weight), single(by_b * weight)
            for j in range(width):
                g = shift - e[j] * factor
                if has_a:
                    g += c_a * slopes_a[j]
                if has_b:
                    g += c_b * slopes_b[j]
                e[j] = g
            e[y] = (at_label - e_y * whole) * weight
            e[t] = (at_top * C_t - P_t * below_top) * weight
        return -1, count

    return rows


@njit(fastmath=ANY_ORDER)
def _largest(row):
    largest = row[0]
    for j in range(len(row)):
        largest = _larger(largest, row[j])
    return largest


@njit(fastmath=ANY_ORDER)
def _place(row, number):
    """Where the number is, looked for in whole vectors; the last place if it is NaN."""
    last = len(row) - 1
    for start in range(0, last, STEP):
        part = row[start : start + STEP]
        found = 0
        for j in range(len(part)):
            found |= part[j] == number
        if found:
            for j in range(len(part)):
                if part[j] == number:
                    return start + j
    return last


@njit(fastmath=ANY_ORDER)
def _total(row):
    total = 0.0
    for start in range(0, len(row), CHUNK):
        part, s = row[start : start + CHUNK], single(0.0)
        for j in range(len(part)):
            s += part[j]
        total += s
    return total


@njit(fastmath=ANY_ORDER)
def _total_below(row, top):
    total = 0.0
    for start in range(0, len(row), CHUNK):
        part, s = row[start : start + CHUNK], single(0.0)
        for j in range(len(part)):
            s += part[j] - top
        total += s
    return total


def _inlined(function: Callable[..., Any]) -> Any:
    return njit(inline="always")(function)


def _nothing(*arguments):
    return 0.0, 0.0


def _each(term: Any) -> Any:
    """The terms of all classes of a row, and their slopes."""

    @njit(inline="always")
    def run(z, e, top, log_total, total, own, terms, slopes):
        K, scale, log_scale = single(len(z)), single(1.0 / total), single(log_total)
        for j in range(len(z)):
            P = e[j] * scale
            u = (z[j] - top) - log_scale
            terms[j], slopes[j] = term(u, P, single(1.0) - P, K, own)

    return run
