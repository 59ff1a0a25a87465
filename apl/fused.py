"""The closed form behind ordinary ``backward()``: the gradient is there when the value is.

:class:`Fused` is what autograd sees. It takes a call where :func:`applies` says so; everything
else (``torch.func``, ``torch.compile``, forward mode, float64, an expression without a closed
form) runs through the plain path of :mod:`apl.kernels`, and so do second derivatives.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from sympy import Expr
from torch import Tensor

from apl import on_cpu, on_gpu
from apl.checks import label_error
from apl.closed_form import ClosedForm, derive
from apl.kernels import Kernel

__all__ = ["Call", "Fused", "applies", "loss"]

_PLAIN = (Tensor, torch.nn.Parameter)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Call(NamedTuple):
    """What a loss is called with, beside logits and labels; ``plain`` is its plain path, whole."""

    expression: Expr
    parameters: Mapping[str, float]
    reduction: str
    ignore_index: int
    kernel: Kernel
    plain: Callable[[Tensor, Tensor], Tensor]


def applies(logits: Tensor, target: Tensor) -> bool:
    """Whether a call can take the closed form: plain tensors, ordinary first derivatives.

    Examples
    --------
    >>> applies(torch.zeros(2, 3), torch.tensor([0, 1]))
    True
    >>> applies(torch.zeros(2, 3).double(), torch.tensor([0, 1]))
    False
    """
    return (
        type(logits) in _PLAIN
        and type(target) in _PLAIN
        and logits.dtype in _DTYPES
        and target.device == logits.device
        and (logits.is_cpu or on_gpu.available(logits.device))
        and logits.numel() > 0
        and not torch._C._are_functorch_transforms_active()
        and not torch._C._len_torch_dispatch_stack()  # modes that record or imitate calls of torch
        and torch.autograd.forward_ad._current_level < 0
        and torch._C._get_tracing_state() is None
    )


def loss(call: Call, logits: Tensor, target: Tensor) -> Tensor | None:
    """The loss of a call that :func:`applies`, reduced; None where the plain path must run."""
    form = derive(call.expression)
    if form is None or not (on_gpu.available(logits.device) or on_cpu.takes(form)):
        return None
    if logits.requires_grad and torch.is_grad_enabled():
        return Fused.apply(logits, target, form, call)
    return _reduced(form, call, logits, target, with_gradient=False)[0]


class Fused(torch.autograd.Function):
    """A value that knows its gradient. Second derivatives go through the plain path."""

    @staticmethod
    def forward(
        context: Any, logits: Tensor, target: Tensor, form: ClosedForm, call: Call
    ) -> Tensor:
        """The value; its gradient waits."""
        # Half precision would round small gradients to 0 before a GradScaler has made them large.
        at_once = logits.dtype != torch.float16
        value, context.gradient = _reduced(form, call, logits, target, with_gradient=at_once)
        context.save_for_backward(logits, target)
        context.form, context.call = form, call
        return value

    @staticmethod
    def backward(context: Any, *incoming: Tensor) -> tuple[Tensor | None, None, None, None]:
        """The gradient, times what comes in."""
        (given,) = incoming
        gradient, context.gradient = context.gradient, None
        logits, target = context.saved_tensors
        if torch.is_grad_enabled():  # create_graph: a constant would have no derivative
            value = context.call.plain(logits, target)
            (gradient,) = torch.autograd.grad(value, logits, given, create_graph=True)
        elif gradient is not None:
            gradient = _times(gradient, given)
        elif _is_batched(given):
            gradient = _reduced(context.form, context.call, logits.float(), target)[1]
            assert gradient is not None
            gradient = _times(gradient, given).to(logits.dtype)
        else:  # float16, or a second backward: what the first one gave is the caller's now
            gradient = _reduced(context.form, context.call, logits, target, given)[1]
        return gradient, None, None, None


def _reduced(
    form: ClosedForm,
    call: Call,
    logits: Tensor,
    target: Tensor,
    given: Tensor | None = None,
    *,
    with_gradient: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """The loss, and the gradient of it, or of the sum of unreduced losses, times what is given."""
    if logits.ndim == 1:
        logits, target = logits.unsqueeze(0), target.unsqueeze(0)
        call = call._replace(reduction="sum" if call.reduction == "none" else call.reduction)
        value, gradient = _reduced(form, call, logits, target, given, with_gradient=with_gradient)
        return value, None if gradient is None else gradient.squeeze(0)

    if on_gpu.available(logits.device):
        each, gradient = on_gpu.evaluate(
            form,
            call.parameters,
            logits,
            target.long(),
            1.0 if given is None else given.expand(target.shape),
            ignore_index=call.ignore_index,
            mean=call.reduction == "mean",
            with_gradient=with_gradient,
        )
        return each if call.reduction == "none" else each.sum(), gradient

    def plain(rows: Tensor, labels: Tensor) -> Tensor:
        return call.kernel(rows, labels, call.parameters)

    def evaluate(weight: float | Tensor) -> tuple[Tensor, Tensor | None]:
        weight = weight if given is None else weight * given.float()
        return on_cpu.evaluate(
            form, call.parameters, plain, logits, target, weight, with_gradient=with_gradient
        )

    target, classes = target.long(), logits.shape[1]
    mean = call.reduction == "mean"
    if not 0 <= call.ignore_index < classes:
        # A label that does not count is then no class, and the rows say when there is one.
        try:
            each, gradient = evaluate(1 / target.numel() if mean else 1.0)
            return _reduce(each, call.reduction), gradient
        except RuntimeError as error:
            if label_error(error, classes) is None:
                raise
    counted = target != call.ignore_index
    count = int(counted.sum())
    target = torch.where(counted, target, 0)
    try:
        each, gradient = evaluate(counted.float() / (max(count, 1) if mean else 1))
    except RuntimeError as error:
        wrong = label_error(error, classes)
        if wrong is None:
            raise
        raise wrong from None
    each = torch.where(counted, each, 0.0)
    return each.sum() / count if mean else _reduce(each, call.reduction), gradient


def _reduce(each: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return each
    return each.sum() if reduction == "sum" else each.mean()


def _times(gradient: Tensor, given: Tensor) -> Tensor:
    """The gradient times what comes in, one factor or one for each loss, in place if possible."""
    if _is_batched(given):
        return gradient * (given.unsqueeze(1) if given.ndim else given)
    if on_gpu.available(gradient.device) and not given.ndim:
        return on_gpu.times(gradient, given)
    if given.is_cpu and not given.ndim:  # of a mean or a sum: nearly always 1
        return gradient if given.item() == 1 else gradient.mul_(given)
    # From .sum(); to look would make a GPU wait.
    if given.is_cpu and not any(given.stride()) and given.flatten()[0].item() == 1:
        return gradient
    return gradient.mul_(given.unsqueeze(1) if gradient.ndim > given.ndim else given)


def _is_batched(given: Tensor) -> bool:
    functorch = torch._C._functorch
    return bool(functorch.is_batchedtensor(given) or functorch.is_legacy_batchedtensor(given))
