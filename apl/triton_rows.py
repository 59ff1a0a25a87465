"""The rows of a loss on a GPU: two kernels of Triton that call the functions of one loss.

:func:`whole_rows` holds rows in registers: the logits are read once and the gradient is written
once. :func:`long_rows` goes over a row in parts, for rows that do not fit. Both start with the
largest logit m and the sum r of :math:`e^{z_k - m}` over all classes but one that has it, t. Then
:math:`p_t = 1/(1 + r)` and :math:`1 - p_t = r/(1 + r)` keep their digits, and where r is at least 1
no class has p above 1/2 and none is treated in its own way.

A loss that takes a logarithm or a root of 1 - p (``DELICATE``) must not see r become 0. There the
exponentials are taken from the second largest logit (``base``), log(1 - p_t) is their logarithm,
and the slope of class t is given times 1 - p_t, as nothing else is finite.

A label that is no class reads nothing and gives NaN.
"""

# What Triton compiles has no types that mypy knows.
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from apl.triton_code import INTERPRETED, NVIDIA, exp, exp2, log1p

__all__ = ["long_rows", "times", "whole_rows"]

SCALARS = [
    "weight", "ignore", "N", "inner",
    "z_outer", "z_inner", "z_class", "g_outer", "g_inner", "g_class",
]  # fmt: skip
"""Numbers that change from call to call: no kernel is compiled anew for them."""
SMALL = ["y_ptr", "w_ptr", "count_ptr"]
"""Of these no kernel may expect that they start at a multiple of 16 bytes."""


@triton.jit
def _afresh(z):
    """The same numbers, of which the compiler does not know that it has seen them before.

    Else it keeps what it once computed of each, and a row fills more registers than there are.
    """
    if INTERPRETED or not NVIDIA:
        return z
    # A row in half precision stays as it was read, two numbers in one register.
    pack: tl.constexpr = 32 // z.dtype.primitive_bitwidth
    return tl.inline_asm_elementwise("", "=r,0", [z], z.dtype, is_pure=False, pack=pack)


@triton.jit
def _offsets(rows, inner, by_outer, by_inner, SPATIAL: tl.constexpr, ALIGNED: tl.constexpr):
    """Where rows start: row i is at place i % inner of sample i // inner."""
    if SPATIAL:
        return (rows // inner) * by_outer + (rows % inner) * by_inner
    return tl.multiple_of(rows * by_outer, ALIGNED)


@triton.jit
def _share(y_ptr, count_ptr, N, ignore, MEAN: tl.constexpr):
    """What one loss counts: 1, or in a mean 1 over the number of labels that count.

    Few labels are counted by every program, which saves the launch of another kernel.
    """
    if MEAN == 0:
        return 1.0
    if count_ptr is not None:
        return 1.0 / tl.load(count_ptr)
    found = tl.zeros((1024,), tl.float32)
    for start in range(0, N, 1024):
        places = start + tl.arange(0, 1024)
        y = tl.load(y_ptr + places, mask=places < N, other=0)
        found += tl.where((places < N) & (y != ignore), 1.0, 0.0)
    return 1.0 / tl.sum(found, 0)


@triton.jit
def _labels(
    z_ptr, y_ptr, w_ptr, count_ptr, weight, ignore, N, rows, inside, z_rows, z_class,
    K: tl.constexpr, MEAN: tl.constexpr,
):  # fmt: skip
    """Labels, their logits, the weights of their losses, and what the losses are multiplied by."""
    y = tl.load(y_ptr + rows, mask=inside, other=0)
    counts = inside & (y != ignore)
    known = counts & (y >= 0) & (y < K)
    z_y = tl.load(z_ptr + z_rows + y * z_class, mask=known, other=float("nan")).to(tl.float32)
    w = weight if w_ptr is None else tl.load(w_ptr + rows, mask=inside, other=0.0)
    share = _share(y_ptr, count_ptr, N, ignore, MEAN)
    return y, z_y, tl.where(counts, w * share, 0.0), counts, share


@triton.jit
def _store_loss(loss_ptr, rows, inside, value, counts, share):
    # Where no label counts, share is infinite, and a mean is NaN, as torch has it.
    tl.store(loss_ptr + rows, tl.where(counts, value, 0.0) * share, mask=inside)


@triton.jit
def _above(base, z):
    """exp(z - base), the same wherever it is computed; written as :func:`exp` never is."""
    return exp2((base - z) * -1.4426950408889634)


@triton.jit
def _top(m, base, of_base, DELICATE: tl.constexpr):
    """Of class t: log(1 + r), p, 1 - p, its logarithm; r; whether t is treated in its own way."""
    r = of_base * exp(base - m) if DELICATE else of_base
    log_total = log1p(r) + (m - m)  # NaN for an infinite logit
    P = 1.0 / (1.0 + r)
    C = r * P
    w = P
    if DELICATE:
        w = tl.where(P < 0.5, log1p(-P), (base - m) + tl.log(of_base) - log_total)
    return log_total, P, C, w, r, _above(base, m) > of_base


@triton.jit
def _weighted(x, weight):
    """A label that does not count has no gradient, even if its logit is -inf."""
    return tl.where(weight == 0.0, 0.0, x * weight)


@triton.jit
def _row(
    m, base, of_base, top, z_y, line, sums, weight, own,
    K: tl.constexpr, DELICATE: tl.constexpr, ROW: tl.constexpr,
):  # fmt: skip
    """The value of a loss and what its gradient needs, see :func:`_gradient`."""
    log_total, P_t, C_t, w_t, r, single = top
    on_top = z_y == m
    e_y = exp(z_y - m)
    P_y = e_y * P_t
    C_y = tl.where(on_top, C_t, (1.0 + (r - e_y)) * P_t)
    w_y = P_y
    if DELICATE:
        w_y = tl.where(on_top, w_t, log1p(-tl.where(on_top, 0.0, P_y)))
    apart = tl.where(single & (z_y < m), 1.0, 0.0)
    found = ROW(
        (z_y - m) - log_total, P_y, C_y, w_y, -log_total, P_t, C_t, w_t,
        apart, K * 1.0, line - (K - 1) * log_total, *sums, *own,
    )  # fmt: skip
    value, of_label, of_top, rest, shift = found[0], found[1], found[2], found[3], found[4]
    # The slope of class t, if that is treated in its own way, and of all classes below it. In a
    # delicate loss the slopes of the label and of t come times 1 - p.
    label_on_top = single & on_top
    of_top = tl.where(label_on_top, of_label, of_top)
    if DELICATE:
        of_label = of_label / tl.where(label_on_top, 1.0, C_y)
    below = rest + tl.where(label_on_top, 0.0, of_label)
    if DELICATE:
        times_C = of_top
        all_slopes = C_t * below + of_top
        share = exp(z_y - base) / of_base
    else:
        times_C = of_top * C_t
        all_slopes = below + of_top
        share = P_y
    at_top = times_C - P_t * below
    at_label = tl.where(label_on_top, at_top, of_label - share * all_slopes)
    slopes = [_weighted(c, weight)[:, None] for c in found[5:]]
    row = [_weighted(x, weight) for x in (at_label, at_top, shift, all_slopes)]
    value = tl.where(z_y == z_y, value, z_y)  # a label that is no class
    return value, row[0], row[1], row[2], row[3], slopes


@triton.jit
def _columns(start, PART: tl.constexpr):
    return start + tl.arange(0, PART)


@triton.jit
def _part(z_ptr, z_rows, z_class, inside, columns, K: tl.constexpr, UNIT: tl.constexpr):
    """Logits of some columns, as they are stored."""
    at = columns if UNIT else columns * z_class
    mask = inside[:, None] & (columns < K)[None, :]
    return tl.load(z_ptr + z_rows[:, None] + at[None, :], mask=mask, other=float("-inf"))


@triton.jit
def _two_largest(first, second):
    """Of the two largest of each lane those of the row."""
    m = tl.max(first, 1)
    on_top = first == m[:, None]
    tied = tl.sum(tl.where(on_top, 1.0, 0.0), 1) > 1.0
    second = tl.max(tl.maximum(second, tl.where(on_top, float("-inf"), first)), 1)
    return m, tl.where(tied, m, second)


@triton.jit
def _without_top(below, whole, e_t):
    """The sum of exponentials of all classes but one on top, from the sums of each lane.

    The class on top is the only one with as much as ``e_t``, or others have 1 too.
    """
    below, whole = tl.split(tl.sum(tl.join(below, whole), 1))
    return tl.where((e_t <= 1.0) & (whole >= 2.0), whole - 1.0, below)


@triton.jit
def _sums(
    found, z, columns, m, top, y, own,
    K: tl.constexpr, TERMS: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """The terms and slopes of a tile are added to those of each lane."""
    below = z - m[:, None]
    u = below - top[0][:, None]
    P = exp(u)
    terms = TERMS(u, P, 1.0 - P, K * 1.0, *own)
    counted = (columns < K)[None, :] & (columns[None, :] != y[:, None].to(tl.int32))
    counted = counted & (below < tl.where(top[5], 0.0, float("inf"))[:, None])
    more = ()
    for i in tl.static_range(COUNT):
        more = more + (found[i] + tl.where(counted, terms[i], 0.0),)
    return more


@triton.jit
def _gradient(
    z, e, m, base, of_base, top, row, own,
    K: tl.constexpr, DELICATE: tl.constexpr, LINE: tl.constexpr, SLOPE: tl.constexpr,
):  # fmt: skip
    """The gradient of a tile but for the label: slopes less their share of all slopes.

    The shares are exp(z - base) over the sum of it, in a delicate loss without class t. Without
    ``SLOPE`` they come from e = exp(z - base), and z need not be kept; with it, they are computed
    in another way than before, so that no compiler keeps what it once computed.
    """
    at_top, shift, all_slopes, slopes = row[2], row[3], row[4], row[5]
    C_t, w_t, r, single = top[2], top[3], top[4], top[5]
    of_all = of_base if DELICATE else 1.0 + r
    if SLOPE is None:
        g = shift[:, None] - e * (all_slopes / of_all)[:, None]
        # By e, so that the logits need not be kept: of t alone it is above the sum of the others.
        on_top = e > tl.where(single, of_base, float("inf"))[:, None]
    else:
        below = z - base[:, None]
        log2 = tl.log(of_all) * 1.4426950408889634
        log2 = below * 1.4426950408889634 - log2[:, None]
        share = exp2(log2)
        u = log2 * 0.6931471805599453
        P = share
        if DELICATE:
            P = share * C_t[:, None]
            u += w_t[:, None]
        g = shift[:, None] - share * all_slopes[:, None]
        g += SLOPE(u, P, 1.0 - P, K * 1.0, *slopes, *own)
        on_top = below >= tl.where(single, m - base, float("inf"))[:, None]
    if DELICATE or LINE or SLOPE is not None:
        g = tl.where(on_top, at_top[:, None], g)
    return g


@triton.jit
def _store(g_ptr, g_rows, g_class, inside, columns, g, K: tl.constexpr, UNIT: tl.constexpr):
    at = columns if UNIT else columns * g_class
    mask = inside[:, None] & (columns < K)[None, :]
    tl.store(g_ptr + g_rows[:, None] + at[None, :], g.to(g_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _store_label(g_ptr, g_rows, g_class, inside, y, g, K: tl.constexpr):
    """In the place of what was stored there, when all threads have stored theirs."""
    tl.debug_barrier()
    known = inside & (y >= 0) & (y < K)
    tl.store(g_ptr + g_rows + y * g_class, g.to(g_ptr.dtype.element_ty), mask=known)


@triton.jit(do_not_specialize=SCALARS, do_not_specialize_on_alignment=SMALL)
def whole_rows(
    z_ptr, y_ptr, w_ptr, count_ptr, g_ptr, loss_ptr, weight, ignore, own,
    N: tl.int64, inner: tl.int64,
    z_outer: tl.int64, z_inner: tl.int64, z_class: tl.int64,
    g_outer: tl.int64, g_inner: tl.int64, g_class: tl.int64,
    K: tl.constexpr, ROWS: tl.constexpr, PART: tl.constexpr, PARTS: tl.constexpr,
    UNIT: tl.constexpr, SPATIAL: tl.constexpr, ALIGNED: tl.constexpr,
    LINE: tl.constexpr, DELICATE: tl.constexpr, COUNT: tl.constexpr, MEAN: tl.constexpr,
    ROW: tl.constexpr, TERMS: tl.constexpr, SLOPE: tl.constexpr,
):  # fmt: skip
    """Losses and gradients of ROWS rows, each read once, in PARTS that stay in registers."""
    own = [tl.cast(number, tl.float32) for number in own]
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = rows < N
    z_rows = _offsets(rows, inner, z_outer, z_inner, SPATIAL, ALIGNED)
    y, z_y, w, counts, share = _labels(
        z_ptr, y_ptr, w_ptr, count_ptr, weight, ignore, N, rows, inside, z_rows, z_class, K, MEAN
    )
    lanes = tl.zeros((ROWS, PART), tl.float32)
    read = ()
    for i in tl.static_range(PARTS):
        columns = _columns(i * PART, PART)
        read = read + (_part(z_ptr, z_rows, z_class, inside, columns, K, UNIT),)

    first = read[0].to(tl.float32)
    second = lanes - float("inf")
    for i in tl.static_range(1, PARTS):
        z = read[i].to(tl.float32)
        if DELICATE:
            second = tl.maximum(second, tl.minimum(first, z))
        first = tl.maximum(first, z)
    if DELICATE:
        m, base = _two_largest(first, second)
    else:
        m = tl.max(first, 1)
        base = m

    read = [_afresh(part) for part in read]
    e_t = _above(base, m)
    below, whole, line = lanes, lanes, lanes
    kept = ()
    for i in tl.static_range(PARTS):
        z = read[i].to(tl.float32)
        e = _above(base[:, None], z)
        below += tl.where(e >= e_t[:, None], 0.0, e)
        whole += e
        if LINE:
            columns = _columns(i * PART, PART)
            counted = (columns < K)[None, :] & (columns[None, :] != y[:, None].to(tl.int32))
            line += tl.where(counted, z - m[:, None], 0.0)
        if TERMS is None:
            kept = kept + (e,)
    of_base = _without_top(below, whole, e_t)
    top = _top(m, base, of_base, DELICATE)

    sums = ()
    for _ in tl.static_range(COUNT):
        sums = sums + (lanes,)
    if TERMS is not None:
        read = [_afresh(part) for part in read]
        for i in tl.static_range(PARTS):
            z = read[i].to(tl.float32)
            columns = _columns(i * PART, PART)
            sums = _sums(sums, z, columns, m, top, y, own, K, TERMS, COUNT)
    sums = [tl.sum(lane, 1) for lane in sums]
    line = tl.sum(line, 1) if LINE else m * 0.0
    row = _row(m, base, of_base, top, z_y, line, sums, w, own, K, DELICATE, ROW)
    _store_loss(loss_ptr, rows, inside, row[0], counts, share)

    if g_ptr is not None:
        g_rows = _offsets(rows, inner, g_outer, g_inner, SPATIAL, ALIGNED)
        if TERMS is not None:
            read = [_afresh(part) for part in read]
        for i in tl.static_range(PARTS):
            if TERMS is None:
                z = lanes
                e = kept[i]
            else:
                z = read[i].to(tl.float32)
                e = z
            g = _gradient(z, e, m, base, of_base, top, row, own, K, DELICATE, LINE, SLOPE)
            _store(g_ptr, g_rows, g_class, inside, _columns(i * PART, PART), g, K, UNIT)
        _store_label(g_ptr, g_rows, g_class, inside, y, row[1], K)


@triton.jit(do_not_specialize=SCALARS, do_not_specialize_on_alignment=SMALL)
def long_rows(
    z_ptr, y_ptr, w_ptr, count_ptr, g_ptr, loss_ptr, weight, ignore, own,
    N: tl.int64, inner: tl.int64,
    z_outer: tl.int64, z_inner: tl.int64, z_class: tl.int64,
    g_outer: tl.int64, g_inner: tl.int64, g_class: tl.int64,
    K: tl.constexpr, ROWS: tl.constexpr, PART: tl.constexpr, PARTS: tl.constexpr,
    UNIT: tl.constexpr, SPATIAL: tl.constexpr, ALIGNED: tl.constexpr,
    LINE: tl.constexpr, DELICATE: tl.constexpr, COUNT: tl.constexpr, MEAN: tl.constexpr,
    ROW: tl.constexpr, TERMS: tl.constexpr, SLOPE: tl.constexpr,
):  # fmt: skip
    """Losses and gradients of ROWS rows, read in parts: twice, or three times with TERMS."""
    own = [tl.cast(number, tl.float32) for number in own]
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = rows < N
    z_rows = _offsets(rows, inner, z_outer, z_inner, SPATIAL, ALIGNED)
    y, z_y, w, counts, share = _labels(
        z_ptr, y_ptr, w_ptr, count_ptr, weight, ignore, N, rows, inside, z_rows, z_class, K, MEAN
    )
    lanes = tl.zeros((ROWS, PART), tl.float32)

    # Of the classes seen in each lane: the largest logit, the second largest, and the sum of
    # exponentials, taken from the second, of all but the largest.
    first = lanes - float("inf")
    second = first
    total, line, seen = lanes, lanes, lanes
    for start in range(0, K, PART):
        columns = _columns(start, PART)
        z = _part(z_ptr, z_rows, z_class, inside, columns, K, UNIT).to(tl.float32)
        largest = tl.maximum(first, z, propagate_nan=tl.PropagateNan.ALL)
        if LINE:
            counted = (columns < K)[None, :] & (columns[None, :] != y[:, None].to(tl.int32))
            line += tl.where(seen > 0.0, seen * (first - largest), 0.0)
            line += tl.where(counted, z - largest, 0.0)
            seen += tl.where(counted, 1.0, 0.0)
        other = tl.minimum(first, z)
        step = tl.where(other == float("-inf"), 0.0, exp(-tl.abs(other - second)))
        total = tl.where(other > second, total * step + 1.0, total + step)
        second = tl.maximum(second, other)
        first = largest

    m, base = _two_largest(first, second)
    tied = base == m
    on_top = first == m[:, None]
    others = total * exp(second - base[:, None])
    others += tl.where(on_top, 0.0, exp(first - base[:, None]))
    of_base = tl.sum(others, 1)
    of_base += tl.where(tied, tl.sum(tl.where(on_top, 1.0, 0.0), 1) - 1.0, 0.0)
    if LINE:
        line = tl.where(seen > 0.0, line + seen * (first - m[:, None]), 0.0)
    if not DELICATE:
        of_base = of_base * _above(m, base)
        base = m
    top = _top(m, base, of_base, DELICATE)

    sums = ()
    for _ in tl.static_range(COUNT):
        sums = sums + (lanes,)
    if TERMS is not None:
        for start in range(0, K, PART):
            columns = _columns(start, PART)
            z = _part(z_ptr, z_rows, z_class, inside, columns, K, UNIT).to(tl.float32)
            sums = _sums(sums, z, columns, m, top, y, own, K, TERMS, COUNT)
    sums = [tl.sum(lane, 1) for lane in sums]
    line = tl.sum(line, 1) if LINE else m * 0.0
    row = _row(m, base, of_base, top, z_y, line, sums, w, own, K, DELICATE, ROW)
    _store_loss(loss_ptr, rows, inside, row[0], counts, share)

    if g_ptr is not None:
        g_rows = _offsets(rows, inner, g_outer, g_inner, SPATIAL, ALIGNED)
        for start in range(0, K, PART):
            columns = _columns(start, PART)
            z = _part(z_ptr, z_rows, z_class, inside, columns, K, UNIT).to(tl.float32)
            e = _above(base[:, None], z)
            g = _gradient(z, e, m, base, of_base, top, row, own, K, DELICATE, LINE, SLOPE)
            _store(g_ptr, g_rows, g_class, inside, columns, g, K, UNIT)
        _store_label(g_ptr, g_rows, g_class, inside, y, row[1], K)


@triton.jit
def times(x_ptr, factor_ptr, size, PART: tl.constexpr):
    """Numbers times one factor, in place; where that is 1, nothing is read or written."""
    factor = tl.load(factor_ptr)
    if factor != 1.0:
        start = tl.program_id(0).to(tl.int64) * PART
        step = tl.num_programs(0).to(tl.int64) * PART
        for first in range(start, size, step):
            at = first + tl.arange(0, PART)
            x = tl.load(x_ptr + at, mask=at < size).to(tl.float32)
            tl.store(x_ptr + at, (x * factor).to(x_ptr.dtype.element_ty), mask=at < size)
