"""The memory that value and gradient of a loss take."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from itertools import product
from typing import Any

import pandas as pd
import torch.nn.functional as F

from apl.bench._contenders import one_hot, textbook
from apl.bench._meters import peak
from apl.bench.sizes import UNIT, Say, Size, known, lacking, step_of
from apl.losses import loss

__all__ = ["memory"]

_ERROR = 10**6  # bytes, on a CPU


def memory(
    names: Iterable[str] | None = None,
    sizes: Iterable[Size] | None = None,
    *,
    device: str = "cpu",
    say: Say = lambda line: None,
) -> pd.DataFrame:
    """Measure the most memory that value and gradient take at once, above logits and labels.

    The gradient, which is to stay, is part of it: the least is the size of the logits. On a CPU it
    is measured in a process of its own, whose allocator gives freed memory back at once, and a
    megabyte is within the error, so that smaller logits are left out; the code is warm before.

    Parameters
    ----------
    names
        of losses; by default :data:`apl.bench.sizes.SOME`
    sizes
        by default one, whose logits take 128 MB on a CPU and 1 GB on a GPU

    Returns
    -------
    pandas.DataFrame
        one row a loss, size and contender: ``apl``, ``one-hot``, ``textbook`` and, for all losses
        (``loss`` is then ""), ``F.cross_entropy``; ``bytes``, and ``copies``, the bytes over those
        of the logits; ``note``, why there are no numbers

    Raises
    ------
    ValueError
        for an unknown loss
    """
    names = known(names)
    gpu = device.startswith("cuda")
    default = Size(8192, 32768) if gpu else Size(1024, 32000)
    rows: list[dict[str, Any]] = []
    with ExitStack() as stack:
        pool: ProcessPoolExecutor | None = None
        for size in sizes or [default]:
            if why := _why_not(size, device):
                rows += [_weight(key, size, note=why) for key in _keys(names)]
                continue
            say(f"memory, {size}, {len(names)} losses")
            if gpu:
                rows += _weighed(size, names, device)
                continue
            if pool is None:
                stack.enter_context(_giving_back())
                pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
                stack.enter_context(pool)
            rows += pool.submit(_weighed, size, names, device).result()
    return pd.DataFrame(rows)


def _keys(names: Sequence[str]) -> list[tuple[str, str]]:
    return [("", UNIT), *product(names, ("apl", "one-hot", "textbook"))]


def _why_not(size: Size, device: str) -> str:
    if not device.startswith("cuda") and size.bytes < _ERROR:
        return "not run: the logits are smaller than the error of the measurement, 1 MB"
    return lacking(size, device)


def _weighed(size: Size, names: Sequence[str], device: str) -> list[dict[str, Any]]:
    kinds: dict[str, Callable[[str], Any]]
    kinds = {"apl": loss, "one-hot": one_hot, "textbook": textbook}
    logits, target = size.inputs(device)
    few = logits[:2].detach().requires_grad_(), target[:2]
    rows = []
    for key in _keys(names):
        name, kind = key
        call = F.cross_entropy if kind == UNIT else kinds[kind](name)
        step = step_of(call, logits, target)
        try:
            step_of(call, *few)()
            found = []
            for _ in range(2):
                logits.grad = None
                found.append(peak(step, device))
            most = min(found)  # the first may count what is loaded once
            rows.append(_weight(key, size, bytes=most, copies=most / size.bytes))
        except (OSError, RuntimeError) as error:
            rows.append(_weight(key, size, note=f"not run: {str(error).splitlines()[0][:160]}"))
    return rows


def _weight(key: tuple[str, str], size: Size, **values: Any) -> dict[str, Any]:
    where = {"N": size.N, "K": size.K, "dtype": size.dtype}
    nothing = {"bytes": float("nan"), "copies": float("nan"), "note": ""}
    return {**where, "loss": key[0], "contender": key[1], **nothing, **values}


@contextmanager
def _giving_back() -> Iterator[None]:
    """Processes started in here get an allocator (glibc's) that keeps no freed block of 64 kB."""
    wanted = {"MALLOC_MMAP_THRESHOLD_": str(2**16), "MALLOC_TRIM_THRESHOLD_": "0"}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value
