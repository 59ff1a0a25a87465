"""What a loss refuses, each with one sentence that says what was given and what is allowed."""

from __future__ import annotations

import re

import torch
from torch import Tensor

REDUCTIONS = ("mean", "sum", "none")


def check_settings(reduction: str, weight: object) -> None:
    """Refuse an unknown reduction, and class weights.

    Raises
    ------
    ValueError
        for an unknown reduction
    TypeError
        for class weights: they break the symmetric condition

    Examples
    --------
    >>> check_settings("average", None)
    Traceback (most recent call last):
    ValueError: reduction is 'average': it must be one of ('mean', 'sum', 'none')
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction is {reduction!r}: it must be one of {REDUCTIONS}")
    if weight is not None:
        raise TypeError(
            "class weights are not taken: with weights w a loss sums over the labels to "
            "sum_k w_k L(p, k), which depends on the prediction p even where sum_k L(p, k) does "
            "not, so the symmetric condition, and with it noise tolerance, is lost"
        )


def check_call(logits: Tensor, target: Tensor) -> None:
    """Refuse logits and labels whose types or shapes do not fit. No label is looked at.

    Raises
    ------
    TypeError
        for logits that are not floating point, or labels that are not integers
    ValueError
        for shapes that do not fit, or fewer than two classes

    Examples
    --------
    >>> check_call(torch.zeros(2, 4), torch.tensor([0, 3, 1]))
    Traceback (most recent call last):
    ValueError: target has shape (3,): with logits of shape (2, 4) it must be (2,)
    """
    if not logits.is_floating_point():
        raise TypeError(f"logits are {logits.dtype}: they must be floating point")
    if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
        raise TypeError(
            f"target is {target.dtype}: it must hold integer labels, one for each row "
            "(the noise-tolerance results are about labels, so soft targets are not taken)"
        )
    if logits.ndim == 0:
        raise ValueError("logits are a single number: their shape must be (N, K)")
    classes = logits.shape[1] if logits.ndim > 1 else logits.shape[0]
    if classes < 2:
        raise ValueError(
            f"logits of shape {tuple(logits.shape)} have {classes} class: at least 2 are needed"
        )
    expected = logits.shape[:1] + logits.shape[2:] if logits.ndim > 1 else logits.shape[:0]
    if target.shape != expected:
        raise ValueError(
            f"target has shape {tuple(target.shape)}: with logits of shape "
            f"{tuple(logits.shape)} it must be {tuple(expected)}"
        )


def label_error(error: RuntimeError, classes: int) -> ValueError | None:
    """What torch said of a label that is no class, as a sentence; None where it said other things.

    Looking at the labels first would cost a pass, and a GPU synchronization, in every step; under
    vmap they cannot be looked at. torch's own words name the label in either case.

    >>> label_error(RuntimeError("index 7 is out of bounds for dimension 1 with size 3"), 3)
    ValueError('target holds the label 7: with 3 classes labels are 0 to 2')
    """
    found = re.search(r"index (-?\d+) is out of bounds", str(error))
    if found is None:
        return None
    return ValueError(
        f"target holds the label {found[1]}: with {classes} classes labels are 0 to {classes - 1}"
    )
