"""Single precision on a CPU: elementary functions, and sums, that LLVM turns into vectors."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, types

from apl.intrinsics import bits, larger, smaller

__all__ = [
    "SINGLE",
    "exp_below",
    "largest",
    "narrow",
    "place_of",
    "single",
    "sum_below",
    "sum_of",
    "widen",
]

# Sums may be taken in any order, as whole vectors; nothing else is rewritten.
ANY_ORDER = {"contract", "reassoc", "nsz"}
# Only compiled code calls these: what would let Python do so need not be compiled.
CALLED: dict[str, Any] = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}
CHUNK = 4096  # terms that are added in single precision before their sum is
STEP = 64  # so many logits are looked through at once

single = np.float32

_of_bits = bits(types.int32, types.float32)
_to_bits = bits(types.float32, types.int32)


@njit(inline="always")
def _reduced(x):
    """2^n and exp(r) - 1 with x = n log 2 + r; the polynomial is a Chebyshev fit."""
    x = smaller(larger(x, single(-87.0)), single(88.0))
    n = np.floor(x * single(1.44269504) + single(0.5))
    r = (x - n * single(0.693359375)) + n * single(2.12194440e-4)
    q = single(1.9891247e-4)
    q = q * r + single(1.3933881e-3)
    q = q * r + single(8.3333105e-3)
    q = q * r + single(4.1666463e-2)
    q = q * r + single(1.6666667e-1)
    q = q * r + single(0.5)
    power = _of_bits((np.int32(n) + np.int32(127)) << np.int32(23))
    return power, q * r * r + r


@njit(inline="always")
def _exp(x):
    power, rest = _reduced(x)
    return power * rest + power


@njit(inline="always")
def exp_below(x):
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


@njit(fastmath=ANY_ORDER, **CALLED)
def largest(row):
    """The largest number; any, if one is NaN."""
    found = row[0]
    for j in range(len(row)):
        found = larger(found, row[j])
    return found


@njit(fastmath=ANY_ORDER, **CALLED)
def place_of(row, number):
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


@njit(fastmath=ANY_ORDER, **CALLED)
def sum_of(row):
    """The sum."""
    found = 0.0
    for start in range(0, len(row), CHUNK):
        part, s = row[start : start + CHUNK], single(0.0)
        for j in range(len(part)):
            s += part[j]
        found += s
    return found


@njit(fastmath=ANY_ORDER, **CALLED)
def sum_below(row, top):
    """The sum of the differences from a number."""
    found = 0.0
    for start in range(0, len(row), CHUNK):
        part, s = row[start : start + CHUNK], single(0.0)
        for j in range(len(part)):
            s += part[j] - top
        found += s
    return found


@njit(**CALLED)
def widen(halves, row):
    """Bfloat16, by its bits, to single precision."""
    for j in range(len(row)):
        row[j] = _of_bits(np.int32(halves[j]) << np.int32(16))


@njit(**CALLED)
def narrow(row, halves):
    """Single precision to the nearest bfloat16, of two the even one."""
    for j in range(len(row)):
        x = _to_bits(row[j])
        even = (x >> np.int32(16)) & np.int32(1)
        near = (x + np.int32(0x7FFF) + even) >> np.int32(16)
        halves[j] = np.uint16(near if row[j] == row[j] else np.int32(0x7FC0))
