"""On what losses are measured, and which; what all measurements share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from apl.catalog import entry

__all__ = ["DTYPES", "SOME", "UNIT", "Say", "Size", "known", "lacking", "sizes_of", "step_of"]

DTYPES = ("float32", "bfloat16", "float16", "float64")
"""What logits can be made of."""

SOME = ("mae", "nce", "nfl", "nce+rce")
"""Losses that stand for the others: linear in p, normalized without and with powers, a sum."""

UNIT = "F.cross_entropy"
"""What ratios are to."""

Say = Callable[[str], None]
# Copies of float32 logits that code with one-hot labels may hold at once, its int64 one-hot too.
_COPIES = 10


@dataclass(frozen=True)
class Size:
    """Logits of N rows, K classes and a dtype.

    Examples
    --------
    >>> Size.parse("1024x1000", "bfloat16")
    Size(N=1024, K=1000, dtype='bfloat16')
    >>> Size.parse("1024")
    Traceback (most recent call last):
    ValueError: a size is rows x classes with at least 1 and 2 of them, as 1024x1000, not '1024'
    """

    N: int
    K: int
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.N < 1 or self.K < 2:
            raise ValueError(
                f"a size is rows x classes with at least 1 and 2 of them, as 1024x1000, "
                f"not '{self.N}x{self.K}'"
            )
        if self.dtype not in DTYPES:
            raise ValueError(f"no dtype {self.dtype!r}; there is {', '.join(DTYPES)}")

    @classmethod
    def parse(cls, text: str, dtype: str = "float32") -> Size:
        """The size that a text names."""
        N, x, K = text.partition("x")
        if not (x and N.isdecimal() and K.isdecimal()):
            raise ValueError(
                f"a size is rows x classes with at least 1 and 2 of them, as 1024x1000, "
                f"not {text!r}"
            )
        return cls(int(N), int(K), dtype)

    def __str__(self) -> str:
        return f"{self.N} x {self.K} {self.dtype}"

    @property
    def bytes(self) -> int:
        """Of the logits."""
        return self.N * self.K * getattr(torch, self.dtype).itemsize

    def inputs(self, device: str) -> tuple[Tensor, Tensor]:
        """Normal logits and labels, the same each time."""
        draws = torch.Generator(device).manual_seed(0)
        logits = torch.randn(self.N, self.K, generator=draws, device=device)
        target = torch.randint(self.K, (self.N,), generator=draws, device=device)
        return logits.to(getattr(torch, self.dtype)).requires_grad_(), target


def sizes_of(device: str) -> tuple[Size, ...]:
    """The sizes that are timed on a device unless others are named: large, middle and small ones.

    >>> [str(size) for size in sizes_of("cpu")][:2]
    ['4096 x 32000 float32', '1024 x 1000 float32']
    """
    if device.startswith("cuda"):
        large = (Size(8192, 32768), Size(8192, 32768, "bfloat16"))
        return (*large, Size(128, 10), Size(128, 100))
    small = (Size(128, 10), Size(1024, 100, "bfloat16"))
    return (Size(4096, 32000), Size(1024, 1000), *small)


def step_of(
    call: Callable[[Tensor, Tensor], Tensor], logits: Tensor, target: Tensor
) -> Callable[[], None]:
    """Value and gradient in one call; it drops the gradient of the last one, as zero_grad does."""

    def step() -> None:
        logits.grad = None
        call(logits, target).backward()

    return step


def known(names: Iterable[str] | None) -> list[str]:
    """The names of losses as the catalog has them, of :data:`SOME` by default.

    Raises
    ------
    ValueError
        for one that the catalog does not have

    >>> known(["NCE"])
    ['nce']
    """
    return [entry(name).name for name in (SOME if names is None else names)]


def lacking(size: Size, device: str) -> str:
    """Why a size cannot be measured: it needs more memory than there is; else nothing."""
    needed = _COPIES * size.N * size.K * 4
    if device.startswith("cuda"):
        free: float = torch.cuda.mem_get_info(device)[0]
    else:
        free = _available()
    if needed <= free:
        return ""
    return f"not run: it may need {needed / 2**30:.1f} GB, and {free / 2**30:.1f} GB are free"


def _available() -> float:
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        return float(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return float("inf")
