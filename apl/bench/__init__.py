"""What a loss and a grid of runs cost on this machine, beside others, and beside the limit.

:func:`measure` measures a part, :func:`read` reads what was measured before. ``apl bench`` is both
on the command line.
"""

from apl.bench.record import PARTS, Bench, Part, measure, read, table
from apl.bench.sizes import SOME, Size
from apl.bench.starting import first_call
from apl.bench.timing import growth, losses
from apl.bench.training import cifar, digits, grid
from apl.bench.weighing import memory

__all__ = [
    "PARTS",
    "SOME",
    "Bench",
    "Part",
    "Size",
    "cifar",
    "digits",
    "first_call",
    "grid",
    "growth",
    "losses",
    "measure",
    "memory",
    "read",
    "table",
]
