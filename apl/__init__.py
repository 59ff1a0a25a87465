"""Losses that learn from wrong labels: the companion to Active Passive Losses (Ma et al., 2020).

>>> import apl
>>> apl.loss("nce+rce", alpha=1.0, beta=1.0)
NCE+RCE(alpha=1, beta=1, A=-9.21034)
>>> apl.normalize(apl.CE()) + 2.0 * apl.MAE()
NCE + 2 * MAE
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from apl import (
        augment,
        bench,
        catalog,
        comparison,
        data,
        experiments,
        grid,
        losses,
        models,
        noise,
        plots,
        recipes,
        records,
        risk,
        symbolic,
        testing,
        training,
    )
    from apl.losses import CE, FL, GCE, MAE, NLNL, RCE, SCE, Loss, loss, normalize
    from apl.paper import paper_loss
    from apl.protocols import protocol

__version__ = "0.1.0"
_process = os.getpid()  # a process that forked from this one has another number
__all__ = [
    "CE",
    "FL",
    "GCE",
    "MAE",
    "NLNL",
    "RCE",
    "SCE",
    "Loss",
    "augment",
    "bench",
    "catalog",
    "comparison",
    "data",
    "experiments",
    "grid",
    "loss",
    "losses",
    "models",
    "noise",
    "normalize",
    "paper_loss",
    "plots",
    "protocol",
    "recipes",
    "records",
    "risk",
    "symbolic",
    "testing",
    "training",
]


def __getattr__(name: str) -> Any:
    # Rooms open when they are entered: `apl.symbolic` works without importing torch.
    if name not in __all__:
        raise AttributeError(f"module 'apl' has no attribute {name!r}")
    if name in ("loss", "normalize", "Loss") or name.isupper():
        return getattr(import_module("apl.losses"), name)
    if name == "paper_loss":
        return import_module("apl.paper").paper_loss
    if name == "protocol":
        return import_module("apl.protocols").protocol
    return import_module(f"apl.{name}")


def __dir__() -> list[str]:
    return sorted(__all__)
