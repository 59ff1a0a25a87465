"""A part of the grid, run: what is pending, how long it takes, what happened."""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from apl import cluster, together, workers
from apl.checkpoints import Checkpoint
from apl.grid import Cell
from apl.protocols import duration
from apl.provenance import device_name
from apl.records import Record, RecordError, Store

__all__ = ["BrokenRun", "Outcome", "Pace", "pending", "reproduce"]


class BrokenRun(RuntimeError):
    """What would stop every other run too: no data, a full disk. ``details`` is its traceback."""

    def __init__(self, sentence: str, details: str = "") -> None:
        super().__init__(sentence)
        self.details = details


@dataclass
class Outcome:
    """What became of the cells of a campaign."""

    recorded: list[Cell] = field(default_factory=list)
    done: list[Cell] = field(default_factory=list)
    stopped: list[Cell] = field(default_factory=list)
    elsewhere: list[Cell] = field(default_factory=list)
    failed: list[Cell] = field(default_factory=list)
    too_long: list[Cell] = field(default_factory=list)


class Pace:
    """Seconds an epoch takes, as measured by records, for every data set, network and device.

    Examples
    --------
    >>> import pandas as pd
    >>> pace, cell = Pace(), Cell("digits", "ce", epochs=4)
    >>> for seconds in (1.0, 3.0):
    ...     made = {"device": device_name("cpu"), "seconds": seconds}
    ...     pace.add(Record(cell.settings(), pd.DataFrame(), made))
    >>> pace.of(cell), pace.of(cell, epochs_done=3), pace.of(Cell("mnist", "ce"))
    (2.0, 0.5, None)
    """

    def __init__(self, records: Iterable[Record] = ()) -> None:
        self._measured: dict[tuple[str, str, str], list[float]] = {}
        for record in sorted(records, key=lambda record: str(record.made.get("finished"))):
            self.add(record)

    def add(self, record: Record) -> None:
        """Learn from a run."""
        settings, made = record.settings, record.made
        key = settings["dataset"], settings["network"], made["device"]
        self._measured.setdefault(key, []).append(made["seconds"] / settings["epochs"])

    def of(self, cell: Cell, epochs_done: int = 0) -> float | None:
        """Seconds the rest of a run takes here; None where nothing like it was measured."""
        settings = cell.settings()
        device = device_name(cell.protocol().device)
        # The last runs were made beside as many others as the next will be.
        measured = self._measured.get((settings["dataset"], settings["network"], device), [])[-20:]
        left = max(settings["epochs"] - epochs_done, 1)
        return statistics.median(measured) * left if measured else None


def pending(cells: Iterable[Cell], store: Store) -> tuple[list[Cell], list[RecordError]]:
    """The cells without a valid record, and what is wrong with the files that are none.

    A line of a packed file that is no record is named too, whichever run's it was.

    >>> pending([Cell("digits", "ce")], Store("no such folder"))
    ([digits ce clean seed 0], [])
    """
    left, cells = [], list(cells)
    datasets = dict.fromkeys(cell.dataset for cell in cells)
    wrong = [error for dataset in datasets for error in store.damaged(dataset)]
    for cell in cells:
        try:
            if store.read(cell.settings()) is None:
                left.append(cell)
        except RecordError as error:
            left.append(cell)
            wrong.append(error)
    return left, wrong


def reproduce(
    cells: Iterable[Cell],
    store: Store,
    *,
    minutes: float | None = None,
    jobs: int = 1,
    root: str | Path | None = None,
    every: float = 300.0,
    ray: str | None = None,
    say: Callable[[str], None] = print,
) -> Outcome:
    """Run the cells that have no record yet, ``jobs`` at once.

    Small runs, those of digits, are trained several at once, which makes each of them cheaper, see
    :mod:`apl.ensemble`; on a Ray cluster they go one by one.

    Killed at any moment, a long run is continued from its checkpoint the next time. Of several
    small ones at once nothing is saved before they end: what is lost are the seconds they had
    taken, at most about twenty on one core, see :data:`apl.together.SECONDS`.

    With ``minutes``, no run is started that by the pace of earlier ones would not end in time; one
    that is still going at the limit is saved after its epoch, and continued the next time. Several
    calls, on one machine or on several that share the folder, divide the cells among them. With
    ``ray``, the address of a cluster, one call runs them on all its machines, ``jobs`` on each GPU,
    see :func:`apl.cluster.on_ray`.

    Raises
    ------
    BrokenRun
        where no other run would do better: data that is missing, a full disk

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     outcome = reproduce([Cell("digits", "ce", epochs=1)], Store(folder), minutes=0)
    >>> outcome.done, outcome.too_long
    ([], [digits ce clean seed 0 1 epochs])
    """
    cells = list(cells)
    left, _ = pending(cells, store)
    missing = set(left)
    outcome = Outcome(recorded=[cell for cell in cells if cell not in missing])
    if left:
        deadline = None if minutes is None else time.time() + 60 * minutes
        conditions = workers.Conditions(store.folder, root, deadline, every, jobs)
        with tqdm(unit="epoch", disable=None, leave=False) as bar:
            desk = _Desk(left, store, conditions, outcome, bar, say)
            if ray is not None:
                cluster.on_ray(desk.next_cell, conditions, desk.tell, address=ray)
            else:
                go = workers.here if jobs == 1 else workers.side_by_side
                go(desk.next_task, conditions, desk.tell)
    return outcome


class _Desk:
    """Gives out cells while there is time, and says what comes back."""

    def __init__(
        self,
        cells: list[Cell],
        store: Store,
        conditions: workers.Conditions,
        outcome: Outcome,
        bar: Any,
        say: Callable[[str], None],
    ) -> None:
        self.cells, self.waiting = len(cells), deque(cells)
        self.store, self.conditions, self.outcome = store, conditions, outcome
        self.bar, self.say = bar, say
        self.pace = Pace(store.all()[0])
        self.at: dict[Cell, int] = {}  # epochs done of the runs that are going
        self.share: dict[Cell, float] = {}  # of its task
        self.ended = 0
        self.said = time.time()
        bar.total = sum(cell.settings()["epochs"] for cell in cells)

    def next_cell(self) -> Cell | None:
        deadline = self.conditions.deadline
        while self.waiting:
            cell = self.waiting.popleft()
            done = Checkpoint(self.store.checkpoint(cell.settings())).epochs_done()
            if deadline is None or time.time() + (self.pace.of(cell, done) or 0) < deadline:
                self.at[cell] = 0
                return cell
            self.outcome.too_long.append(cell)
        return None

    def next_task(self) -> workers.Task | None:
        """The next cell, with those after it that are best trained along with it."""
        if (first := self.next_cell()) is None:
            return None
        cells, (kind, most) = [first], self._alike(first)
        most = min(most, math.ceil((len(self.waiting) + 1) / self.conditions.jobs))
        seconds, deadline = self.pace.of(first) or 0, self.conditions.deadline
        while self.waiting and len(cells) < most:
            cell = self.waiting[0]
            seconds += self.pace.of(cell) or 0
            late = deadline is not None and time.time() + seconds >= deadline
            if late or self._alike(cell)[0] != kind:
                break
            self.at[self.waiting.popleft()] = 0
            cells.append(cell)
        self.share |= dict.fromkeys(cells, 1 / len(cells))
        return first if len(cells) == 1 else tuple(cells)

    def _alike(self, cell: Cell) -> tuple[str, int]:
        # One that has a checkpoint is continued, alone.
        saved = self.store.checkpoint(cell.settings()).exists()
        return (f"{cell}", 1) if saved else together.alike(cell)

    def tell(self, event: workers.Event) -> None:
        cell, kind, value = event.cell, event.kind, event.value
        if kind == "broken":
            raise BrokenRun(f"{cell}: {value[0]}", value[1])
        if kind == "epoch":
            self.bar.update(value - self.at[cell])
            self.at[cell] = value
            # Where there is no bar, a long run says now and then that it is alive.
            if self.bar.disable and value and time.time() - self.said > 60:
                self._print(f"  {cell}: epoch {value} of {cell.settings()['epochs']}")
            return
        if kind == "note":
            return self._print(f"  {value}")
        self.ended += 1
        self.bar.total -= cell.settings()["epochs"] - self.at.pop(cell)
        group = {"lost": "failed", "late": "too_long"}.get(kind, kind)
        getattr(self.outcome, group).append(cell)
        if kind == "done":
            what = self._done(cell, value)
        else:
            what = {
                "recorded": "recorded meanwhile",
                "elsewhere": "another process is at it",
                "stopped": f"{value}, to be continued",
                "late": f"{value}, to be done anew",
                "failed": value,
                "lost": f"its process died (exit status {value})",
            }[kind]
        self._print(f"[{self.ended}/{self.cells}] {cell}: {what}")

    def _done(self, cell: Cell, record: Record) -> str:
        self.pace.add(record)
        accuracy = record.history["test_accuracy"].iloc[-1]
        what = f"{100 * accuracy:.2f} % in {duration(record.made['seconds'])}"
        rest = [self.pace.of(c) for c in self.waiting]
        rest += [self.pace.of(c, epochs) for c, epochs in self.at.items()]
        times = [time for time in rest if time is not None]
        # On a cluster, jobs are those of each GPU, and this run had a place too.
        at_once = max(self.conditions.jobs, sum(self.share.get(c, 1) for c in (*self.at, cell)))
        if times and len(times) == len(rest):
            what += f"; about {duration(sum(times) / at_once)} left"
        return what

    def _print(self, line: str) -> None:
        self.said = time.time()
        with self.bar.external_write_mode():
            self.say(line)
