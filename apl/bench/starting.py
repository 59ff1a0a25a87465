"""How long the first call of a loss takes in a new process, as in a notebook just opened."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable

import pandas as pd

from apl.bench.sizes import Say, known

__all__ = ["first_call"]

_FIRST = """\
import sys, time
start = time.perf_counter()
import torch
import apl
opened = time.perf_counter()
apl.loss
imported = time.perf_counter()
logits = torch.randn(128, 10, device=sys.argv[2]).requires_grad_()
target = torch.randint(10, (128,), device=sys.argv[2])
logits.detach().sum().item()
ready = time.perf_counter()
loss = apl.loss(sys.argv[1])
loss(logits, target).backward()
logits.grad.sum().item()
first = time.perf_counter()
loss(logits, target).backward()
logits.grad.sum().item()
second = time.perf_counter()
print(opened - start, imported - opened, first - ready, second - first)
"""


def first_call(
    names: Iterable[str] | None = None, *, device: str = "cpu", say: Say = lambda line: None
) -> pd.DataFrame:
    """Time the first call of a loss in a new process, and the second one, on 128 x 10 logits.

    Each twice: with empty folders for compiled code ("empty"), as after an installation, and with
    what the first process left in them ("kept").

    Returns
    -------
    pandas.DataFrame
        one row a loss and state of the folders: ``loss``, ``cache``, and the seconds
        ``import_seconds`` of torch and apl; ``losses_seconds`` of :mod:`apl.losses` and SymPy,
        which the first mention of a loss imports; ``first_seconds`` of making the loss and its
        first value and gradient; ``second_seconds`` of the next ones

    Raises
    ------
    ValueError
        for an unknown loss
    RuntimeError
        where the process fails; its last line
    """
    rows = []
    for name in known(names):
        say(f"first call of {name}")
        with tempfile.TemporaryDirectory() as folder:
            caches = ("NUMBA_CACHE_DIR", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")
            own = os.environ | dict.fromkeys(caches, folder)
            for cache in ("empty", "kept"):
                command = [sys.executable, "-c", _FIRST, name, device]
                done = subprocess.run(command, capture_output=True, text=True, env=own)
                if done.returncode:
                    raise RuntimeError(f"the first call failed: {done.stderr.splitlines()[-1]}")
                spent = [float(word) for word in done.stdout.split()]
                kinds = [f"{n}_seconds" for n in ("import", "losses", "first", "second")]
                rows.append({"loss": name, "cache": cache} | dict(zip(kinds, spent, strict=True)))
    return pd.DataFrame(rows)
