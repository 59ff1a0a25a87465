"""An expression becomes functions that kernels of Triton call, in single precision.

Triton has exp and log, but not all that keeps digits; and its exp takes care of results below
1e-38, which here may be 0.
"""

# What Triton compiles has no types that mypy knows.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, import-untyped"

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from sympy import Add, Expr, Function, Integer, Mul, Pow, Rational, Symbol, lambdify
from sympy import exp as symbolic_exp
from sympy import log as symbolic_log
from sympy.codegen.cfunctions import expm1 as symbolic_expm1
from sympy.codegen.cfunctions import log1p as symbolic_log1p
from sympy.printing.pycode import PythonCodePrinter

from apl.closed_form import C, ClosedForm, P, u
from apl.symbolic import K

__all__ = ["FUNCTIONS", "INTERPRETED", "NVIDIA", "exp", "exp2", "functions", "log1p"]

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
NVIDIA = tl.constexpr(torch.version.cuda is not None)


@triton.jit
def exp(x):
    """By :func:`exp2`."""
    if INTERPRETED or not NVIDIA:
        return tl.exp(x)
    return exp2(x * 1.4426950408889634)


@triton.jit
def exp2(x):
    """2 to the power x; what is below 1e-38 is 0, which takes three instructions less."""
    if INTERPRETED or not NVIDIA:
        return tl.exp2(x)
    asm: tl.constexpr = "ex2.approx.ftz.f32 $0, $1;"
    return tl.inline_asm_elementwise(asm, "=f,f", [x], tl.float32, is_pure=True, pack=1)


@triton.jit
def log(x):
    return tl.log(x)


@triton.jit
def sqrt(x):
    return tl.sqrt(x)


@triton.jit
def log1p(x):
    """With the rounding of 1 + x put right."""
    t = 1.0 + x
    return tl.log(t) - ((t - 1.0) - x) / t


@triton.jit
def expm1(x):
    """A polynomial where exp(x) - 1 would lose digits."""
    q = 1.0 / 40320.0
    q = q * x + 1.0 / 5040.0
    q = q * x + 1.0 / 720.0
    q = q * x + 1.0 / 120.0
    q = q * x + 1.0 / 24.0
    q = q * x + 1.0 / 6.0
    q = q * x + 0.5
    q = q * x + 1.0
    return tl.where(tl.abs(x) < 0.5, q * x, exp(x) - 1.0)


@triton.jit
def tanh(x):
    y = expm1(-2.0 * tl.abs(x))
    return tl.where(x < 0.0, y, -y) / (y + 2.0)


@triton.jit
def power(x, exponent):
    """x to a power, for x above 0: fast, with an error of about 1e-7 times the exponent."""
    if INTERPRETED or not NVIDIA:
        return tl.exp(exponent * tl.log(x))
    asm: tl.constexpr = "lg2.approx.f32 $0, $1;"
    log2 = tl.inline_asm_elementwise(asm, "=f,f", [x], tl.float32, is_pure=True, pack=1)
    return exp2(exponent * log2)


@triton.jit
def log1m(p):
    """log(1 - p) for p up to 1/2: 2 artanh(-p / (2 - p))."""
    s = p / (p - 2.0)
    s2 = s * s
    q = s2 * (1.0 / 13.0) + 1.0 / 11.0
    q = q * s2 + 1.0 / 9.0
    q = q * s2 + 1.0 / 7.0
    q = q * s2 + 1.0 / 5.0
    q = q * s2 + 1.0 / 3.0
    return 2.0 * (s + s * (s2 * q))


FUNCTIONS = {f.__name__: f for f in (exp, log, sqrt, log1p, log1m, expm1, tanh, power)}
"""What the functions of a loss may call."""
FUNCTIONS["tl"] = tl


@lru_cache(maxsize=256)
def functions(form: ClosedForm, steep: tuple[bool, ...]) -> dict[str, Any]:
    """What a kernel of :mod:`apl.triton_rows` is given of a loss: what it has, its functions.

    Parameters
    ----------
    form
        the closed form of the loss
    steep
        of each parameter q, whether 1 - exp(q u) keeps its digits for p = exp(u) up to 1/2

    Returns
    -------
    dict
        ``ROW`` gives, of u, p, 1 - p and log(1 - p) of the label and of class t, of whether t has
        its own term, K, the sums of u and of each function and its slope, and the parameters: the
        value, the slopes by u of the label and of t, the sum of the slopes of all other classes,
        the slope that they have in common, and the slopes by each sum. ``TERMS`` gives the function
        and slope of each sum at one class, ``SLOPE`` the slope at it of all sums, given theirs;
        None where there are none. In a loss that is ``DELICATE`` the slopes of the label and of t
        are times 1 - p. ``LINE`` says that there is a sum of a + b u; ``COUNT`` is how many
        numbers ``TERMS`` gives.
    """
    delicate = form.delicate
    line = next((s for s in form.sums if s.affine is not None), None)
    others = [s for s in form.sums if s is not line]
    given = dict(zip(form.sums, form.of_sums, strict=True))
    # Names that are the same in every process, so that Triton finds what it once compiled.
    own = {s: Symbol(f"own{i}", real=True) for i, s in enumerate(form.parameters)}
    values = [Symbol(f"value{i}") for i in range(len(others))]
    slopes = [Symbol(f"slope{i}") for i in range(len(others))]
    factors = [Symbol(f"factor{i}") for i in range(len(others))]
    numbers = list(own.values()) or [Symbol("own0")]

    # In ``ROW``: of the label and of class t, whose term counts where it is treated in its own way.
    of_t = {u: Symbol("u_t"), P: Symbol("P_t"), C: Symbol("C_t")}
    log_C, log_C_t, apart, total = (Symbol(n) for n in ("w", "w_t", "apart", "total"))
    times_C = _times_C if delicate else (lambda expression: expression)
    far = [s for s, is_steep in zip(form.parameters, steep, strict=False) if is_steep]
    cheap = {
        symbolic_log1p(-P): Function("log1m")(P),
        **{symbolic_expm1(s * u): symbolic_exp(s * u) - 1 for s in far},
    }

    def in_bulk(expression: Expr) -> Expr:
        """In the cheap ways that do for p up to 1/2."""
        return expression.xreplace(cheap)

    sums = {
        s.symbol: value + apart * s.edge_value.xreplace(of_t)
        for s, value in zip(others, values, strict=True)
    }
    shift, of_shift = Integer(0), Integer(0)
    if line is not None and line.affine is not None:
        a, b = line.affine
        sums[line.symbol] = a * (K - 1) + b * total
        shift = b * given[line]
        of_shift = shift * (of_t[C] if delicate else 1)
    of_top = of_shift + sum(given[s] * times_C(s.edge_slope).xreplace(of_t) for s in others)
    rest = shift * (K - 1 - apart) + sum(given[s] * x for s, x in zip(others, slopes, strict=True))
    found = [form.value, times_C(form.of_label), apart * of_top, rest, shift]
    found = [e.xreplace(sums) for e in (*found, *(given[s] for s in others))]
    if delicate:
        found = [_in_logarithms(e, {C: log_C, of_t[C]: log_C_t}) for e in found]
    places = [u, P, C, log_C, *of_t.values(), log_C_t, apart, K, total]
    pairs = [x for pair in zip(values, slopes, strict=True) for x in pair]
    terms = [in_bulk(x) for s in others for x in (s.value, s.slope)]
    slope = sum(f * x for f, x in zip(factors, terms[1::2], strict=True))

    def code(name: str, arguments: list[Symbol], expressions: Expr | list[Expr]) -> Any:
        whole = expressions if isinstance(expressions, list) else [expressions]
        whole = [e.xreplace(own) for e in whole]
        return _code(name, arguments, whole if isinstance(expressions, list) else whole[0])

    return {
        "LINE": line is not None,
        "DELICATE": delicate,
        "COUNT": len(terms),
        "ROW": code("row", [*places, *pairs, *numbers], found),
        "TERMS": code("terms", [u, P, C, K, *numbers], terms) if others else None,
        "SLOPE": code("slope", [u, P, C, K, *factors, *numbers], slope) if others else None,
    }


def _code(name: str, arguments: list[Symbol], expressions: Expr | list[Expr]) -> Any:
    """A function that kernels can call, of numbers in single precision."""
    result = tuple(expressions) if isinstance(expressions, list) else expressions
    function = lambdify(arguments, result, [FUNCTIONS], printer=_Single(), cse=True)
    function.__qualname__ = name  # by which Triton tells functions apart
    return triton.jit(function)


def _times_C(expression: Expr) -> Expr:
    """C times an expression, multiplied into its powers of C."""
    if isinstance(expression, Add):
        return Add(*(_times_C(term) for term in expression.args))
    factors = Mul.make_args(expression)
    powers = [f for f in factors if f.as_base_exp()[0] == C]
    rest = [f for f in factors if f.as_base_exp()[0] != C]
    if not powers:
        for i, factor in enumerate(rest):
            if isinstance(factor, Add) and factor.has(C):
                return Mul(*rest[:i], _times_C(factor), *rest[i + 1 :])
    return Mul(Pow(C, Add(1, *(f.as_base_exp()[1] for f in powers))), *rest)


def _in_logarithms(expression: Expr, logarithms: Mapping[Symbol, Symbol]) -> Expr:
    """Logarithms and roots of 1 - p from its logarithm, which is finite where 1 - p is 0."""
    for base, logarithm in logarithms.items():
        expression = expression.subs(symbolic_log(base), logarithm).replace(
            lambda e, base=base: (
                isinstance(e, Pow)
                and e.base == base
                and not (e.exp.is_integer and e.exp.is_nonnegative)
            ),
            lambda e, logarithm=logarithm: symbolic_exp(e.exp * logarithm),
        )
    return expression


class _Single(PythonCodePrinter):
    """Python in which every number is floating point, and powers are products and exponentials."""

    def __init__(self) -> None:
        names = [name for name in FUNCTIONS if name != "tl"]
        super().__init__(
            {"fully_qualified_modules": False, "user_functions": {n: n for n in names}}
        )

    def _number(self, value: Any) -> str:
        return repr(float(value))

    _print_Integer = _print_Float = _print_Rational = _number
    _print_One = _print_NegativeOne = _print_Zero = _print_Half = _number

    def _print_Pow(self, power: Expr, rational: bool = False) -> str:
        base, exponent = power.as_base_exp()
        if exponent.could_extract_minus_sign():
            return f"(1.0/({self._print(base**-exponent)}))"
        written = f"({self._print(base)})"
        if exponent == Rational(1, 2):
            return f"sqrt{written}"
        if isinstance(exponent, Integer):
            return "(" + "*".join([written] * int(exponent)) + ")"
        return f"power({self._print(base)}, {self._print(exponent)})"
