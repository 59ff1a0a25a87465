"""Settings that hold for every test."""

from __future__ import annotations

import os

# Before anything imports matplotlib: tests draw, but never open a window.
os.environ["MPLBACKEND"] = "Agg"

import torch
from hypothesis import settings

# Tests work on small tensors and run side by side: one thread each is fastest, and sums are then
# taken in the same order on every machine.
torch.set_num_threads(1)

# The first example pays for imports and SymPy's caches, so a deadline would only measure those.
settings.register_profile("dev", deadline=None)
settings.register_profile("ci", parent=settings.get_profile("dev"), derandomize=True, database=None)
settings.load_profile("ci" if os.environ.get("CI") else "dev")
