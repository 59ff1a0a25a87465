"""The rows of a loss on a CPU: a skeleton that numba compiles with the functions of one loss.

Nothing is compiled at import; the first call of a loss compiles it, in about a second. What comes
out is a function of C, which any thread can run that knows nothing of Python.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from numba import cfunc, njit, types

from apl.intrinsics import add, bits, pointer, row, tuple_of
from apl.single import (
    exp_below,
    largest,
    narrow,
    place_of,
    single,
    sum_below,
    sum_of,
    widen,
)

__all__ = ["COUNT", "DONE", "SPARE", "WRONG", "build"]

# What a call is told, and tells: integers, some of them addresses.
(
    TAKEN,  # rows that a thread has taken so far
    STEP,  # how many it takes at once
    ROWS,
    CLASSES,
    WEIGHTED,  # whether each row has its own weight
    SLOPED,  # whether there is a gradient
    LOGITS,  # (rows, classes), as is the gradient
    LABELS,
    WEIGHTS,
    GRADIENT,
    LOSSES,
    MARKED,  # rows that must be computed otherwise, as bytes
    OWN,  # the parameters in double precision
    OWN_SINGLE,  # and in single
    SCRATCH,  # of SPARE rows for each thread
    THREADS,  # how many have come so far
    DONE,  # how many rows threads have come through
    WRONG,  # how many labels are no class
    COUNT,  # how many rows are marked
) = range(19)

SPARE = 5
# Arithmetic as it is written, but for fused multiply and add.
EXACT = {"contract"}

_integers, _bytes = pointer(types.int64), pointer(types.uint8)
_singles, _halves = row(types.float32), row(types.uint16)
_floats = pointer(types.float32)
_to_bits = bits(types.float64, types.int64)


@njit(inline="always")
def _is_finite(number):
    # By its bits: no arithmetic that is free to assume finite numbers.
    return (_to_bits(number) & 0x7FF0000000000000) != 0x7FF0000000000000


def build(
    label: Callable[..., Any],
    line: Callable[..., Any] | None,
    terms: Sequence[Callable[..., Any]],
    edges: Sequence[Callable[..., Any]],
    delicate: bool,
    parameters: int,
    half: bool,
) -> Any:
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
    parameters
        how many there are
    half
        whether logits and gradient are bfloat16, else float32

    Returns
    -------
    callable
        a function of C, of the address of those integers; ``address`` is its own
    """
    has_line, has_a, has_b = line is not None, len(terms) > 0, len(terms) > 1
    of_label, of_line = _inlined(label), _inlined(line or _nothing)
    edge_a, edge_b = (_inlined(edges[i] if i < len(edges) else _nothing) for i in range(2))
    doubles, singles = tuple_of(types.float64, parameters), tuple_of(types.float32, parameters)
    each_a, each_b = (_each(_inlined(terms[i] if i < len(terms) else _nothing)) for i in range(2))

    @cfunc(types.void(types.CPointer(types.int64)), fastmath=EXACT, error_model="numpy")
    def rows(call):
        n, width, sloped = call[ROWS], call[CLASSES], call[SLOPED] != 0
        K = float(width)
        labels, marked = _integers(call[LABELS]), _bytes(call[MARKED])
        losses, weights = _floats(call[LOSSES]), _floats(call[WEIGHTS])
        own, own_single = doubles(call[OWN]), singles(call[OWN_SINGLE])
        thread = SPARE * add(call, THREADS, 1)
        wide = _singles(call[SCRATCH], thread, width)
        spare = _singles(call[SCRATCH], thread + 1, width)
        terms = _singles(call[SCRATCH], thread + 2, width)
        slopes_a = _singles(call[SCRATCH], thread + 3, width)
        slopes_b = _singles(call[SCRATCH], thread + 4, width)
        first = following = stop = 0
        while True:
            if following == stop:
                add(call, DONE, stop - first)
                first = following = add(call, TAKEN, call[STEP])
                if following >= n:
                    return
                stop = following + call[STEP]
                stop = stop if stop < n else n
            i = following
            following += 1
            y = labels[i]
            if y < 0 or y >= width:
                add(call, WRONG, 1)
                continue
            if half:
                z, e = wide, spare
                widen(_halves(call[LOGITS], i, width), z)
            else:
                z = _singles(call[LOGITS], i, width)
                e = _singles(call[GRADIENT], i, width) if sloped else spare
            weight = float(weights[i if call[WEIGHTED] else 0])

            # Exponentials of the classes that are neither on top nor the label, and their sum.
            top = largest(z)
            below_y = float(z[y]) - float(top)
            on_top = below_y == 0.0
            t = y if on_top else place_of(z, top)
            for j in range(width):
                e[j] = exp_below(z[j] - top)
            e[y] = e[t] = single(0.0)
            others = sum_of(e)
            e_y = 1.0 if on_top else math.exp(below_y)
            r = others if on_top else others + e_y
            logs = 0.0
            if has_line:
                logs = sum_below(z[:y], top) + sum_below(z[y + 1 :], top)
            if not _is_finite(r + logs + top + below_y) or (delicate and r < 1e-30):
                marked[i] = 1
                add(call, COUNT, 1)
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
                sum_a, rest_a = sum_of(terms), sum_of(slopes_a)
                if not on_top:
                    value, top_a = edge_a(-log_total, P_t, C_t, K, own)
                    sum_a += value
            if has_b:
                each_b(z, e, top, log_total, total, own_single, terms, slopes_b)
                terms[y] = terms[t] = slopes_b[y] = slopes_b[t] = single(0.0)
                sum_b, rest_b = sum_of(terms), sum_of(slopes_b)
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
            if not sloped:
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
            if half:
                narrow(e, _halves(call[GRADIENT], i, width))

    return rows


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
