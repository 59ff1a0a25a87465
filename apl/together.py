"""Cells of the grid that are small enough to be trained several at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import pandas as pd

from apl import ensemble
from apl.checkpoints import OutOfTime
from apl.grid import Cell
from apl.training import one_thread

__all__ = ["SECONDS", "alike", "train"]

SECONDS = 40.0
"""At most so many seconds of the plain loop go together; a kill costs less than half of them."""


def alike(cell: Cell) -> tuple[str, int]:
    """What cells have in common that may be trained at once, and how many of them; 1 for none.

    Examples
    --------
    >>> cells = [Cell("digits", "ce"), Cell("digits", "mae", seed=1), Cell("mnist", "ce")]
    >>> [alike(cell) == alike(cells[0]) for cell in cells], [alike(cell)[1] for cell in cells]
    ([True, True, False], [24, 24, 1])
    """
    protocol = cell.protocol()
    common = protocol.together(cell.loss)
    if common is None or not ensemble.available():
        return "", 1
    most = int(SECONDS / (common["epochs"] * protocol.cpu_seconds))
    return f"{protocol.name} {common}", max(1, min(most, ensemble.MOST))


def train(
    cells: Sequence[Cell],
    *,
    deadline: float | None = None,
    on_epoch: Callable[[int], None] | None = None,
) -> tuple[list[pd.DataFrame | FloatingPointError], float]:
    """Train cells that are :func:`alike`: what :func:`apl.ensemble.train` returns, seconds of each.

    ``deadline`` and ``on_epoch`` are those of :class:`apl.checkpoints.Checkpoint`.

    Raises
    ------
    ValueError
        for cells that go one by one
    OutOfTime
        where the deadline does not leave the time for another epoch; nothing is saved

    Examples
    --------
    >>> histories, seconds = train([Cell("digits", "ce", seed=s, epochs=1) for s in range(2)])
    >>> [len(history) for history in histories]
    [1, 1]
    """
    common = cells[0].protocol().together(cells[0].loss)
    if common is None:
        raise ValueError(f"runs on {cells[0].dataset} go one by one")
    began = epoch_began = time.time()
    epochs = common["epochs"]

    def after(epoch: int) -> None:
        nonlocal epoch_began
        now = time.time()
        late = deadline is not None and 2 * now - epoch_began > deadline
        epoch_began = now
        if on_epoch is not None:
            on_epoch(epoch)
        if late and epoch < epochs:
            raise OutOfTime(f"out of time after {epoch} of {epochs} epochs")

    with one_thread():
        runs = [
            cell.protocol().member(
                cell.loss, cell.kind, cell.rate, cell.seed, parameters=cell.parameters()
            )
            for cell in cells
        ]
        histories = ensemble.train(runs, on_epoch=after, **common)
    return histories, (time.time() - began) / len(cells)
