"""Every named loss, written once, as a SymPy expression with its parameters and its source.

The book typesets these expressions, :mod:`apl.kernels` compiles them, and the tests hold them
against definitions written independently.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from sympy import Expr, Interval, Symbol, log, oo

from apl.symbolic import mean_over_others, normalize, p_y, twice

alpha = Symbol("alpha", positive=True)
beta = Symbol("beta", positive=True)
gamma = Symbol("gamma", nonnegative=True)
q = Symbol("q", positive=True)
A = Symbol("A", negative=True)


@dataclass(frozen=True)
class Parameter:
    """A parameter of a loss: its symbol, its default, and the values it may take."""

    symbol: Symbol
    default: float
    allowed: Interval
    meaning: str

    def check(self, value: float) -> float:
        """The value as a float, or a ValueError that says what is allowed."""
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not math.isfinite(value) or value not in self.allowed:
            low, high = self.allowed.start, self.allowed.end
            sides = [f"above {low}" if self.allowed.left_open else f"at least {low}"]
            sides = [] if low == -oo else sides
            if high != oo:
                sides.append(f"below {high}" if self.allowed.right_open else f"at most {high}")
            raise ValueError(
                f"{self.symbol} = {value!r} is not allowed: {self.symbol}, {self.meaning}, "
                f"is a finite number {' and '.join(sides)}"
            )
        return float(value)


PARAMETERS: Mapping[str, Parameter] = MappingProxyType(
    {
        "alpha": Parameter(alpha, 1.0, Interval.open(0, oo), "the weight of the first loss"),
        "beta": Parameter(beta, 1.0, Interval.open(0, oo), "the weight of the second loss"),
        "gamma": Parameter(gamma, 0.5, Interval(0, oo), "the focusing parameter"),
        "q": Parameter(q, 0.7, Interval.Lopen(0, 1), "the exponent of GCE"),
        "A": Parameter(A, math.log(1e-4), Interval.open(-oo, 0), "the constant put for log 0"),
    }
)


@dataclass(frozen=True)
class Entry:
    """A named loss.

    ``kind`` is the paper's declaration, "active" (only the label's probability is pushed) or
    "passive" (the other classes' are pushed down); None where the paper declares nothing.
    It belongs to the way a loss is written, not to the function: it cannot be computed.
    """

    name: str
    title: str
    expression: Expr
    kind: str | None = None
    source: str = "ma2020normalized"
    defaults: Mapping[str, float] = field(default_factory=dict)

    @property
    def parameters(self) -> dict[str, float]:
        """Names and defaults of the parameters, in the order of :data:`PARAMETERS`."""
        free = {symbol.name for symbol in self.expression.free_symbols}
        return {
            name: self.defaults.get(name, parameter.default)
            for name, parameter in PARAMETERS.items()
            if name in free
        }


ce = -log(p_y)
fl = -((1 - p_y) ** gamma) * log(p_y)
mae = twice(1 - p_y)
rce = -A * (1 - p_y)
gce = (1 - p_y**q) / q
sce = alpha * ce + beta * rce
nlnl = mean_over_others(-log(1 - p_y))

_PLAIN = (
    Entry("ce", "cross entropy", ce, "active", "ma2020normalized"),
    Entry("fl", "focal loss", fl, "active", "lin2017focal"),
    Entry("mae", "mean absolute error", mae, "passive", "ghosh2017robust"),
    Entry("rce", "reverse cross entropy", rce, "passive", "wang2019sce"),
    Entry("gce", "generalized cross entropy", gce, None, "zhang2018gce"),
    Entry("sce", "symmetric cross entropy", sce, None, "wang2019sce", {"alpha": 0.1}),
    Entry("nlnl", "negative learning", nlnl, None, "kim2019nlnl"),
)
_NORMALIZED = tuple(
    Entry("n" + entry.name, f"normalized {entry.title}", normalize(entry.expression), entry.kind)
    for entry in _PLAIN
    if entry.name in ("ce", "fl", "mae", "rce", "gce")
)
_SINGLE = {entry.name: entry for entry in _PLAIN + _NORMALIZED}

APL = ("nce+mae", "nce+rce", "nfl+mae", "nfl+rce", "ngce+mae", "ngce+rce")
"""The Active Passive Losses."""
ABLATIONS = ("nfl+nce", "mae+rce", "gce+mae", "gce+rce", "gce+nce", "ngce+nce")
"""The paper's other sums, active + active, passive + passive, and GCE with each."""


def _sum(name: str) -> Entry:
    first, second = (_SINGLE[part] for part in name.split("+"))
    title = f"{first.title} + {second.title}"
    return Entry(name, title, alpha * first.expression + beta * second.expression)


CATALOG: Mapping[str, Entry] = MappingProxyType(
    _SINGLE | {name: _sum(name) for name in APL + ABLATIONS}
)
"""Every entry by its name."""


def entry(name: str) -> Entry:
    """The entry of that name (upper or lower case).

    Raises
    ------
    ValueError
        for a name that is not in the catalog.

    Examples
    --------
    >>> entry("nce").expression
    log(p[y])/Sum(log(p[k]), (k, 1, K))
    """
    found = CATALOG.get(name.lower()) if isinstance(name, str) else None
    if found is None:
        raise ValueError(f"no loss is named {name!r}: the names are {', '.join(CATALOG)}")
    return found


def check(values: Mapping[str, float], known: Mapping[str, float], name: str) -> dict[str, float]:
    """The parameters of a loss: the known ones, updated with values that were checked.

    Raises
    ------
    ValueError
        for a parameter the loss does not have, or a value outside its range.

    Examples
    --------
    >>> check({"q": 0.5}, entry("gce").parameters, "gce")
    {'q': 0.5}
    """
    unknown = [parameter for parameter in values if parameter not in known]
    if unknown:
        allowed = f"has {', '.join(known)}" if known else "has no parameters"
        raise ValueError(f"{name} has no parameter {unknown[0]!r}: it {allowed}")
    return {**known, **{key: PARAMETERS[key].check(value) for key, value in values.items()}}
