"""Value and gradient of a loss together on a GPU: its closed form, as one kernel of Triton.

Its functions come from the expression (:mod:`apl.triton_code`), what is around them is
:mod:`apl.triton_rows`. Nothing waits for the device, and nothing of the size of the logits exists
beside the gradient. Nothing is compiled at import; the first call of a loss, at a number of
classes, compiles it in seconds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from apl.closed_form import ClosedForm

__all__ = ["available", "evaluate", "times"]

WHOLE = 32768
"""Up to so many classes a row is held in registers."""
STEEP = 0.1
"""From here on 1 - exp(c u) keeps its digits for p = exp(u) up to 1/2."""

LARGE = 1 << 20
"""From so many numbers on a kernel that does nothing is faster than one that reads and writes."""
FEW = 4096
"""So many labels are counted by every program of a kernel."""

OLDEST = (3, 5)
"""The oldest Triton that compiles :mod:`apl.triton_rows`."""

_launches: dict[tuple[Any, ...], _Launch] = {}
"""By all that a compiled kernel depends on. A form is known by its id, and kept alive."""


class _Launch(NamedTuple):
    """How a loss is computed: the kernel, what it is compiled with, rows of one program."""

    form: ClosedForm
    kernel: Any
    compiled: Any
    constants: tuple[Any, ...]
    rows: int
    warps: int


@lru_cache(maxsize=16)
def available(device: torch.device) -> bool:
    """Whether losses of logits on that device are computed here: CUDA with Triton.

    Examples
    --------
    >>> available(torch.device("cpu"))
    False
    """
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (7, 5):
        return False
    try:
        version = import_module("triton").__version__
    except ImportError:
        return False
    return tuple(int(number) for number in version.split(".")[:2]) >= OLDEST


def evaluate(
    form: ClosedForm,
    parameters: Mapping[str, float],
    logits: Tensor,
    target: Tensor,
    weight: float | Tensor = 1.0,
    *,
    ignore_index: int = -100,
    mean: bool = False,
    with_gradient: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """The losses of all labels, and the gradient of their weighted sum.

    Parameters
    ----------
    form, parameters
        the closed form of the loss, and the values of its parameters
    logits
        float32, bfloat16 or float16, of shape (N, K) or (N, K, d1, ...), in any layout
    target
        int64, of shape (N,) or (N, d1, ...); a label that is no class gives NaN
    weight
        what each loss counts in the gradient: a number, or a tensor of the target's shape
    ignore_index
        the label of what does not count: its loss and its gradient are 0
    mean
        whether losses and gradient are divided by the number of labels that count
    with_gradient
        whether to compute the gradient; else the second result is None

    Returns
    -------
    tuple
        the losses, float32, of the shape of the target; the gradient, in the type of the logits
    """
    device = logits.device
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            return evaluate(
                form, parameters, logits, target, weight,
                ignore_index=ignore_index, mean=mean, with_gradient=with_gradient,
            )  # fmt: skip
    z = logits if logits.ndim == 2 else logits.flatten(2)
    gradient = torch.empty_like(z) if with_gradient else None
    losses = torch.empty(target.shape, dtype=torch.float32, device=device)
    count = losses.numel()
    if not count:
        return losses, None if gradient is None else gradient.view(logits.shape)
    values = tuple([float(parameters[s.name]) for s in form.parameters]) or (0.0,)
    weights = None
    if isinstance(weight, Tensor):
        weights, weight = weight.to(torch.float32).contiguous(), 1.0
    counted = None
    if mean and count > FEW:
        counted = (target != ignore_index).sum(dtype=torch.float32)
    g = z if gradient is None else gradient
    z_strides, g_strides, steep = z.stride(), g.stride(), tuple([v >= STEEP for v in values])
    aligned = (z.data_ptr() | g.data_ptr()) % 16 == 0
    key = (
        id(form), z.dtype, z.shape[1], z_strides, g_strides, aligned,
        with_gradient, weights is None, steep, mean, counted is None, device.index,
    )  # fmt: skip
    launch = _launches.get(key) or _plan(form, z, g_strides, steep, mean)
    inner = 1 if z.ndim == 2 else z.shape[2]
    arguments = (
        z, target.contiguous(), weights, counted, gradient, losses, float(weight), ignore_index,
        values, count, inner,
        z_strides[0], z_strides[-1], z_strides[1], g_strides[0], g_strides[-1], g_strides[1],
        *launch.constants,
    )  # fmt: skip
    grid = (-(-count // launch.rows), 1, 1)
    if launch.compiled is not None:  # the short way, past all of Triton's looking at arguments
        launch.compiled[grid](*arguments)
    else:
        compiled = launch.kernel[grid](*arguments, num_warps=launch.warps)
        if len(_launches) >= 1024:
            _launches.clear()
        _launches[key] = launch._replace(compiled=compiled)
    return losses, gradient if gradient is None or z is logits else gradient.view(logits.shape)


def times(gradient: Tensor, factor: Tensor) -> Tensor:
    """A gradient times a number that is on the device, in place; times 1 it is not touched.

    A mean or a sum that is differentiated itself brings a 1, and nearly all are. To look would make
    the processor wait, and to multiply would take as long as the gradient took.
    """
    dense = gradient.untyped_storage().nbytes() == gradient.nbytes
    if gradient.numel() < LARGE or not dense:
        return gradient.mul_(factor)
    from apl import triton_rows

    size, part = gradient.numel(), 4096
    with torch.cuda.device_of(gradient):
        triton_rows.times[(min(-(-size // part), 2048),)](gradient, factor, size, PART=part)
    return gradient


def _plan(
    form: ClosedForm, z: Tensor, g_strides: tuple[int, ...], steep: tuple[bool, ...], mean: bool
) -> _Launch:
    """Which kernel computes a loss, of how many rows and columns at once.

    A thread holds 64 numbers of a row at most. Where that is too much for what must be computed
    of each, ``ptxas -v`` tells of spilled registers.
    """
    from apl import triton_code, triton_rows

    classes, strides = z.shape[1], z.stride()
    given = triton_code.functions(form, steep)
    block = max(16, 1 << (classes - 1).bit_length())
    heavy = given["TERMS"] is not None and given["DELICATE"] and z.element_size() == 4
    whole = classes <= (WHOLE // 2 if heavy else WHOLE)
    part = min(block, 4096 if whole or z.element_size() == 4 else 8192)
    constants = {
        "K": classes,
        "ROWS": max(1, 512 // block),
        "PART": part,
        "PARTS": block // part,
        "UNIT": strides[1] == g_strides[1] == 1,
        "SPATIAL": z.ndim > 2,
        "ALIGNED": math.gcd(16, strides[0], g_strides[0]),
        "MEAN": int(mean),
        **given,
    }
    kernel = triton_rows.whole_rows if whole else triton_rows.long_rows
    ordered = tuple(constants[n] for n in kernel.arg_names if n in constants)
    warps = 4 if block <= 128 else min(16, max(1, block // 1024))
    return _Launch(form, kernel, None, ordered, constants["ROWS"], warps)
