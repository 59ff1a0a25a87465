"""In what numbers a network computes: half precision where a GPU is fast at it, else float32.

Half precision is for the network's products and activations alone. Its weights, their gradients and
momenta, the statistics of batch normalization, and the loss are in float32 everywhere, see
https://pytorch.org/docs/stable/amp.html. float32 means float32: TF32, which rounds the factors of a
product to 10 bits, is off for convolutions while :func:`apl.training.repeatable` holds.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

__all__ = ["NAMES", "computing", "of", "scaler"]

NAMES = ("float32", "bfloat16", "float16")
"""What a network can compute in."""


def of(device: str | torch.device, wanted: str | None = None) -> str:
    """In what a network computes on a device: what is wanted, else what is fastest there.

    That is bfloat16 on a GPU that has it (compute capability 8, as the A100), float16 on one that
    has only that (7, as the T4), and float32 on older ones and on a CPU.

    Raises
    ------
    ValueError
        for another name than those of :data:`NAMES`

    Examples
    --------
    >>> of("cpu"), of("cpu", "bfloat16")
    ('float32', 'bfloat16')
    """
    if wanted is not None:
        if wanted not in NAMES:
            raise ValueError(f"no precision {wanted!r}; there is {', '.join(NAMES)}")
        return wanted
    device = torch.device(device)
    if device.type != "cuda":
        return "float32"
    # torch also takes bfloat16 on the older ones, where it is imitated, and slow.
    major, _ = torch.cuda.get_device_capability(device)
    return "bfloat16" if major >= 8 else "float16" if major == 7 else "float32"


def computing(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """The context in which a network computes so; in float32 it changes nothing.

    >>> with computing("bfloat16", torch.device("cpu")):
    ...     torch.nn.Linear(2, 2)(torch.zeros(1, 2)).dtype
    torch.bfloat16
    """
    if precision == "float32":
        return nullcontext()
    return torch.autocast(device.type, dtype=getattr(torch, precision))


def scaler(precision: str, device: torch.device) -> torch.amp.GradScaler:
    """What keeps small gradients from vanishing in float16; elsewhere it does nothing.

    >>> scaler("bfloat16", torch.device("cpu")).is_enabled()
    False
    """
    return torch.amp.GradScaler(device.type, enabled=precision == "float16")
