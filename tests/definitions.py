"""The losses of the paper as their sources state them: one-hot sums over classes, to 50 digits.

This file is a witness against the package and shares nothing with it: no torch, no closed form in
the labelled class, no hand-derived gradient.  K classes, logits z, p = softmax(z), q the one-hot
vector of the label y.  Each loss is a sum over the classes k of one term in (q_k, p_k):

    ce    -sum_k q_k log p_k                       cross entropy
    fl    -sum_k q_k (1 - p_k)^gamma log p_k       Lin et al., ICCV 2017; factor differentiated
    mae    sum_k |p_k - q_k|                       Ghosh et al., AAAI 2017; equals 2 (1 - p_y)
    rce   -sum_k p_k log q_k,  log 0 := A          Wang et al., ICCV 2019
    gce    sum_k q_k (1 - p_k^q) / q               Zhang & Sabuncu, NeurIPS 2018; the exponent is q
    nlnl  -sum_k (1 - q_k) log(1 - p_k) / (K - 1)  Kim et al., ICCV 2019; q-bar uniform

and from these

    n*    L(z, y) / sum_j L(z, j), for nce nfl nmae nrce ngce     Ma et al., ICML 2020
    sce   alpha ce + beta rce                                     Wang et al., ICCV 2019
    a+b   alpha a + beta b, an active and a passive loss, or any  Ma et al., ICML 2020

Defaults: gamma = .5, q = .7, A = log 10^-4 (natural, -9.21034...), sce alpha = .1, beta = 1,
a+b alpha = beta = 1.  Logits and parameters are taken as the exact numbers they are: .7 is the
double nearest to 7/10.

Derivatives come from the terms themselves by dual numbers (value, d/dp_k); then the quotient rule
for n* and the softmax Jacobian dp_k/dz_i = p_i (delta_ik - p_k) for the logits.

Digits: 1 - p_k is formed as the sum of the other p_j, so it does not cancel, and every result is
computed at growing precision until two rounds agree: right to 50 digits, however small it is, save
that an entry whose terms cancel to less than 1e-450 is right to 1e-450 only (doubles end at
5e-324).  Results are rounded to 50 digits; do arithmetic on them under `mpmath.mp.workdps(50)`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from mpmath import mp, mpf

DIGITS, FLOOR, ROUNDS = 50, 450, (80, 100, 250, 500)
PLAIN = ("ce", "fl", "mae", "rce", "gce", "nlnl")
NORMALIZED = ("nce", "nfl", "nmae", "nrce", "ngce")
ACTIVE_PASSIVE = tuple(f"{a}+{b}" for a in ("nce", "nfl", "ngce") for b in ("mae", "rce"))
OTHER_PAIRS = ("nfl+nce", "mae+rce", "gce+mae", "gce+rce", "gce+nce", "ngce+nce")
NAMES: tuple[str, ...] = (*PLAIN, "sce", *NORMALIZED, *ACTIVE_PASSIVE, *OTHER_PAIRS)


@dataclass(frozen=True, slots=True)
class Dual:
    """A quantity of one class: its value and its derivative with respect to that class's p_k."""

    value: mpf
    slope: mpf

    def __rmul__(self, c: mpf) -> Dual:
        return Dual(c * self.value, c * self.slope)

    def __mul__(self, other: Dual) -> Dual:
        slope = self.slope * other.value + self.value * other.slope
        return Dual(self.value * other.value, slope)

    def __pow__(self, e: mpf) -> Dual:
        power = self.value**e
        return Dual(power, e * power / self.value * self.slope)


def log(x: Dual, rest: Dual) -> Dual:
    """log x, where rest = 1 - x holds the digits that x has lost when it is near 1."""
    value = mp.log(x.value) if 2 * x.value < 1 else mp.log1p(-rest.value)
    return Dual(value, x.slope / x.value)


def expm1(x: Dual) -> Dual:
    """exp(x) - 1, without cancellation for small x."""
    return Dual(mp.expm1(x.value), mp.exp(x.value) * x.slope)


# One class's term of each plain loss: q is 0 or 1, p the probability, r = 1 - p, n classes.
TERMS: dict[str, Callable[[int, Dual, Dual, dict[str, mpf], int], Dual]] = {
    "ce": lambda q, p, r, par, n: -q * log(p, r),  # -q log p
    "fl": lambda q, p, r, par, n: -q * (r ** par["gamma"] * log(p, r)),  # -q (1-p)^gamma log p
    "mae": lambda q, p, r, par, n: r if q else p,  # |p - q|, with |p - 1| = 1 - p
    "rce": lambda q, p, r, par, n: -(0 if q else par["A"]) * p,  # -p log q, with log 0 := A
    "gce": lambda q, p, r, par, n: -q / par["q"] * expm1(par["q"] * log(p, r)),  # q (1 - p^q) / q
    "nlnl": lambda q, p, r, par, n: mpf(q - 1) / (n - 1) * log(r, p),  # -(1-q) log(1-p) / (n-1)
}


def all_but_one(x: Sequence[mpf]) -> list[mpf]:
    """sum_{j != k} x_j for every k, by sums from both ends: nothing is subtracted."""
    before = accumulate(x[:-1], initial=mpf(0))
    after = list(accumulate(x[:0:-1], initial=mpf(0)))
    return [a + b for a, b in zip(before, reversed(after), strict=True)]


def loss(
    name: str, p: list[Dual], r: list[Dual], y: int, par: dict[str, mpf]
) -> tuple[mpf, list[mpf]]:
    """L and dL/dp_k for every k, in the working precision."""
    if name == "sce" or "+" in name:  # alpha a + beta b
        a, b = (loss(n, p, r, y, par) for n in parts(name))
        pairs = zip((a[0], *a[1]), (b[0], *b[1]), strict=True)
        total, *slopes = (par["alpha"] * u + par["beta"] * v for u, v in pairs)
        return total, slopes
    n, term = len(p), TERMS[name.removeprefix("n") if name in NORMALIZED else name]
    if name in PLAIN:
        terms = [term(int(k == y), p[k], r[k], par, n) for k in range(n)]
        return sum(t.value for t in terms), [t.slope for t in terms]
    # N = L_y / (L_y + M), M = sum_{j != y} L_j; on[k], off[k] are the terms for q_k = 1, 0.
    on, off = ([term(q, p[k], r[k], par, n) for k in range(n)] for q in (1, 0))
    every = [t.value + o for t, o in zip(on, all_but_one([t.value for t in off]), strict=True)]
    here, others = every[y], sum(every[:y] + every[y + 1 :])
    slopes = []
    for k in range(n):  # dN = (M dL_y - L_y dM) / (L_y + M)^2; dM/dp_k sums over the K - 1 j != y
        d_here = (on if k == y else off)[k].slope
        d_others = (n - 1) * off[k].slope if k == y else on[k].slope + (n - 2) * off[k].slope
        slopes.append((others * d_here - here * d_others) / (here + others) ** 2)
    return here / (here + others), slopes


def parts(name: str) -> list[str]:
    """The one or two losses that a name is made of."""
    return ["ce", "rce"] if name == "sce" else name.split("+")


def complete(name: str, given: dict[str, float]) -> dict[str, mpf]:
    """The parameters of a loss: those given, else the defaults; a foreign one is an error."""
    known: dict[str, mpf] = {}
    if len(parts(name)) == 2:
        known |= {"alpha": mpf(0.1 if name == "sce" else 1), "beta": mpf(1)}
    for part in parts(name):
        known |= {"gamma": mpf(0.5)} if part in ("fl", "nfl") else {}
        known |= {"q": mpf(0.7)} if part in ("gce", "ngce") else {}
        known |= {"A": -4 * mp.log(10)} if part in ("rce", "nrce") else {}
    if foreign := set(given) - set(known):
        raise TypeError(f"{name} has no parameter {sorted(foreign)}")
    return {key: mpf(given.get(key, default)) for key, default in known.items()}


def row(name: str, logits: Sequence[float], y: int, given: dict[str, float]) -> list[mpf]:
    """[L, dL/dz_1, ..., dL/dz_K] in the working precision."""
    z = [mpf(x) for x in logits]
    top = max(range(len(z)), key=z.__getitem__)
    e = [mp.exp(x - z[top]) for x in z]
    total = sum(e)
    p = [x / total for x in e]
    r = all_but_one(p)
    duals = [Dual(x, mpf(1)) for x in p], [Dual(x, mpf(-1)) for x in r]
    value, g = loss(name, *duals, y, complete(name, given))
    # dL/dz_i = p_i (g_i - sum_k p_k g_k) = p_i (h_i (1 - p_i) - sum_{k != i} p_k h_k) with
    # h = g - g_top: a constant added to g changes nothing, since sum_k dp_k = 0.
    h = [x - g[top] for x in g]
    pull = all_but_one([a * b for a, b in zip(p, h, strict=True)])
    return [value, *(a * (b * c - d) for a, b, c, d in zip(p, h, r, pull, strict=True))]


def settle(compute: Callable[[], list[mpf]]) -> list[mpf]:
    """Recompute with more and more digits until two rounds agree to 50, entry by entry.

    An exact 0 counts as unsettled: it may be a small number whose digits all cancelled.
    """
    old: list[mpf] = []
    for digits in ROUNDS:
        with mp.workdps(digits):
            new = compute()
            near, floor = mpf(10) ** -(DIGITS + 1), mpf(10) ** -FLOOR
            pairs = zip(old, new, strict=False)
            if old and all(b and abs(a - b) < max(near * abs(b), floor) for a, b in pairs):
                break
        old = new
    with mp.workdps(DIGITS):
        return [+x for x in new]


def value_and_gradient(
    name: str, logits: Sequence[float], target: int, **parameters: float
) -> tuple[mpf, list[mpf]]:
    """The loss of one row and its gradient with respect to the logits, to 50 digits."""
    if not 0 <= target < len(logits):
        raise ValueError(f"target {target} is not one of {len(logits)} classes")
    if not {*parts(name)} <= {*PLAIN, *NORMALIZED}:
        raise ValueError(f"unknown loss {name!r}")
    out = settle(lambda: row(name, logits, target, parameters))
    return out[0], out[1:]


def value(name: str, logits: Sequence[float], target: int, **parameters: float) -> mpf:
    """The loss of one row, to 50 digits."""
    return value_and_gradient(name, logits, target, **parameters)[0]


def gradient(name: str, logits: Sequence[float], target: int, **parameters: float) -> list[mpf]:
    """The gradient of one row's loss with respect to its logits, to 50 digits."""
    return value_and_gradient(name, logits, target, **parameters)[1]
