"""Value and gradient of a loss together on a CPU: its closed form, row by row, compiled by numba.

Of each row the largest logit, its exponentials and their sum are taken first; what the loss needs
beside them, a few numbers of the label and of the largest class, is computed in double precision,
and the gradient is written while the row is still in the cache. So the logits are read from memory
once, the gradient is written once, and nothing else of that size exists.

With t the class of the largest logit and r the sum of :math:`e^{z_k - z_t}` over the other classes,
:math:`p_t = 1/(1 + r)` and :math:`1 - p_t = r/(1 + r)` keep their digits. Of all other classes p is
at most 1/2, where single precision is enough.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from sympy import Dummy, Expr, Integer, Rational, lambdify
from sympy.codegen.cfunctions import log1p
from sympy.printing.pycode import PythonCodePrinter
from torch import Tensor

from apl import team
from apl.closed_form import C, ClassSum, ClosedForm, P, u
from apl.symbolic import K

__all__ = ["compiled", "evaluate", "takes"]

PIECE = 1 << 14
"""So many logits, or one row, are one piece of work."""
MANY = 1 << 20
"""So many logits at once are brought into single precision, or into rows: 4 MiB."""
DIRECT = (torch.float32, torch.bfloat16)
"""What the rows read as it is."""
MOST = 2
"""So many sums of functions that are not a + b u; no loss of the catalog has more than 1."""

Plain = Callable[[Tensor, Tensor], Tensor]
"""The plain path: losses (n,) of float32 logits (n, K) and labels (n,)."""


@lru_cache(maxsize=256)
def takes(form: ClosedForm) -> bool:
    """Whether :func:`evaluate` can: where numba is missing, which comes late to a new Python, no.

    Examples
    --------
    >>> from apl.catalog import entry
    >>> from apl.closed_form import derive
    >>> takes(derive(entry("nce").expression))
    True
    """
    return find_spec("numba") is not None and len(_sums(form)[1]) <= MOST


def _sums(form: ClosedForm) -> tuple[ClassSum | None, list[ClassSum]]:
    """A sum of a + b u, if there is one, and the other sums."""
    line = next((s for s in form.sums if s.affine is not None), None)
    return line, [s for s in form.sums if s is not line]


def evaluate(
    form: ClosedForm,
    parameters: Mapping[str, float],
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
    form, parameters
        the closed form of the loss, and the values of its parameters
    plain
        computes the few rows that single precision cannot: 1 - p below 1e-30 in a loss that takes
        its logarithm or root, or logits that are not finite
    logits
        float32, bfloat16 or float16, of shape (N, K) or (N, K, d1, ...)
    target
        of shape (N,) or (N, d1, ...), all of them classes
    weight
        what each loss counts in the gradient: a number, or a tensor of the target's shape
    with_gradient
        whether to compute the gradient; else the second result is None

    Returns
    -------
    tuple
        the losses, float32, of the shape of the target; the gradient, in the type of the logits

    Raises
    ------
    RuntimeError
        for a label that is no class, in the words of ``gather``
    """
    values = tuple(float(parameters[s.name]) for s in form.parameters) or (0.0,)
    weight = torch.as_tensor(weight, dtype=torch.float32, device="cpu")
    weight = weight.view(1) if weight.numel() == 1 else weight
    logits, target = logits.detach().resolve_neg(), target.long()
    gradient = torch.empty_like(logits) if with_gradient else None
    losses = torch.empty(target.shape, dtype=torch.float32, device="cpu")
    if logits.dtype in DIRECT and logits.ndim == 2 and logits.is_contiguous():
        _rows(form, values, plain, logits, target, weight, gradient, losses)
        return losses, gradient
    step = max(1, MANY * len(logits) // logits.numel())
    for start in range(0, len(logits), step):
        at = slice(start, start + step)
        z = logits[at].movedim(1, -1)
        own = z.float().reshape(-1, z.shape[-1]).contiguous()
        out = None if gradient is None else torch.empty_like(own)
        w = weight if weight.numel() == 1 else weight[at].reshape(-1)
        y, each = target[at].reshape(-1), losses[at].view(-1)
        _rows(form, values, plain, own, y, w, out, each)
        if gradient is not None and out is not None:
            gradient[at].movedim(1, -1).copy_(out.view(z.shape))
    return losses, gradient


def _rows(
    form: ClosedForm,
    values: tuple[float, ...],
    plain: Plain,
    logits: Tensor,
    target: Tensor,
    weight: Tensor,
    gradient: Tensor | None,
    losses: Tensor,
) -> None:
    """Rows (n, K) as they lie in memory: their losses and their gradient, written in place."""
    work = compiled(form, logits.dtype == torch.bfloat16)
    from apl import rows

    N, classes = logits.shape
    target, weight = target.contiguous(), weight.contiguous()
    if not (len(target) == len(losses) == N and weight.numel() in (1, N)):
        raise RuntimeError(
            f"{N} rows of logits do not go with {len(target)} labels and {weight.numel()} weights"
        )
    threads = torch.get_num_threads()
    odd = torch.zeros(N, dtype=torch.bool, device="cpu")
    size = threads * rows.SPARE * classes
    scratch = torch.empty(size, dtype=torch.float32, device="cpu")
    tensors = logits, target, weight, losses if gradient is None else gradient, losses, odd, scratch
    places = [tensor.data_ptr() for tensor in tensors]
    if 0 in places:  # tensors that have no memory: fake ones, or zeros that are not stored
        raise RuntimeError("a loss in closed form needs logits, labels and weights in memory")
    stored = _stored(values)
    call = np.array(  # in the order of apl.rows
        (
            *(0, max(1, PIECE // classes), N, classes, weight.numel() > 1, gradient is not None),
            *(*places[:-1], *(each.ctypes.data for each in stored), places[-1], 0, 0, 0, 0),
        ),
        np.int64,
    )
    team.run(work.address, call.ctypes.data, logits.numel(), threads)
    # What is at those addresses had to stay until here.
    del tensors, stored
    if call[rows.WRONG]:
        label = target[(target < 0) | (target >= classes)][0].item()
        raise RuntimeError(f"index {label} is out of bounds for dimension 1 with size {classes}")
    if call[rows.DONE] != N:
        raise RuntimeError(f"of {N} rows of a loss {call[rows.DONE]} were computed")
    if call[rows.COUNT]:
        _again(plain, logits, target, weight, gradient, losses, odd)


def _again(
    plain: Plain, z: Tensor, y: Tensor, w: Tensor, out: Tensor | None, each: Tensor, odd: Tensor
) -> None:
    """Those rows by the plain path."""
    if out is None:
        each[odd] = plain(z[odd].float(), y[odd])
        return
    # Also where the caller is in inference mode, as a backward may be.
    with torch.inference_mode(False), torch.enable_grad():
        some = z[odd].float().requires_grad_()
        values = plain(some, y[odd])
        count = w[odd] if w.numel() > 1 else w.expand_as(values)
        (again,) = torch.autograd.grad(values, some, count.to(values))
    each[odd] = values.detach()
    out[odd] = again.to(out.dtype)


@lru_cache(maxsize=256)
def _stored(values: tuple[float, ...]) -> tuple[np.ndarray[Any, Any], ...]:
    """Parameters in double and single precision."""
    return np.array(values, np.float64), np.array(values, np.float32)


@contextmanager
def _no_collector() -> Iterator[None]:
    """Compiling makes many small objects, and looking through them for garbage takes long."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@lru_cache(maxsize=256)
@_no_collector()
def compiled(form: ClosedForm, half: bool) -> Any:
    """The rows of a loss, see :func:`apl.rows.build`."""
    from apl import rows
    from apl.single import SINGLE

    line, others = _sums(form)
    given = dict(zip(form.sums, form.of_sums, strict=True))
    symbols = [Dummy() if line is None else line.symbol, *(s.symbol for s in others)]
    slopes = [Integer(0) if line is None else given[line], *(given[s] for s in others)]
    missing = MOST - len(others)
    symbols += [Dummy() for _ in range(missing)]
    slopes += [Integer(0)] * missing
    at_label = (form.value, form.of_label, *slopes)
    # A tuple that numba can tell the type of, also where there is no parameter.
    own = form.parameters or (Dummy(),)
    double = {"modules": "math", "printer": _Double(), "cse": True}
    single = {"modules": [SINGLE], "printer": _Single(), "cse": True}
    each = [u, P, C, K, own]
    return rows.build(
        lambdify([u, P, C, K, *symbols, own], at_label, **double),
        None if line is None else lambdify([K, own], line.affine, **double),
        [lambdify(each, (s.value, s.slope), **single) for s in others],
        [lambdify(each, (s.edge_value, s.edge_slope), **double) for s in others],
        form.delicate,
        len(own),
        half,
    )


class _Double(PythonCodePrinter):
    """Python that numba divides in as C does; a negative power of 0 would end its thread."""

    def __init__(self) -> None:
        super().__init__({"fully_qualified_modules": False})

    def _print_Pow(self, power: Expr, rational: bool = False) -> str:
        base, exponent = power.as_base_exp()
        if exponent.could_extract_minus_sign():
            return f"(1.0/({self._print(base**-exponent)}))"
        return str(super()._print_Pow(power, rational))


class _Single(PythonCodePrinter):
    """Python in which every number is float32, and powers are products, roots and exponentials."""

    def __init__(self) -> None:
        names = ("exp", "expm1", "log1p", "log", "tanh", "sqrt")
        super().__init__(
            {"fully_qualified_modules": False, "user_functions": {n: n for n in names}}
        )

    def _number(self, value: Any) -> str:
        return f"single({float(value)!r})"

    _print_Integer = _print_Float = _print_Rational = _number
    _print_One = _print_NegativeOne = _print_Zero = _print_Half = _number

    def _print_Pow(self, power: Expr, rational: bool = False) -> str:
        base, exponent = power.as_base_exp()
        if exponent.could_extract_minus_sign():
            return f"(single(1.0)/({self._print(base**-exponent)}))"
        written = f"({self._print(base)})"
        if exponent == Rational(1, 2):
            return f"sqrt{written}"
        if isinstance(exponent, Integer) and exponent <= 8:
            return "(" + "*".join([written] * int(exponent)) + ")"
        if base == C:
            return f"exp({self._print(exponent)}*{self._print(log1p(-P))})"
        return f"exp({self._print(exponent)}*log{written})"
