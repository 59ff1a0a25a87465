"""A run trained and recorded; many, one after the other or several at once in own processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from apl.checkpoints import Checkpoint, OutOfTime
from apl.grid import Cell
from apl.protocols import SMALL
from apl.provenance import commit, device_name, versions
from apl.records import Record, RecordError, Store, digest

__all__ = ["Conditions", "Event", "here", "run", "side_by_side"]


@dataclass(frozen=True)
class Conditions:
    """What holds for all runs: where records and data are, the deadline, the seconds between saves.

    ``jobs`` is how many run at once.
    """

    folder: Path
    root: str | Path | None = None
    deadline: float | None = None
    every: float = 300.0
    jobs: int = 1


@dataclass(frozen=True)
class Event:
    """Something that happened to a run.

    ``kind`` is "epoch" (``value`` are the epochs done), "done" (the record), "recorded" (it was
    done already), "elsewhere" (another process is at it), "stopped" (at the deadline), "failed"
    (this run, with a sentence), "broken" (all of them will: a sentence and a traceback), "lost"
    (its process died), or "note" (a sentence).
    """

    cell: Cell
    kind: str
    value: Any = None


Tell = Callable[[Event], None]
Next = Callable[[], Cell | None]


def run(
    cell: Cell,
    store: Store,
    *,
    root: str | Path | None = None,
    deadline: float | None = None,
    every: float = 300.0,
    on_epoch: Callable[[int], None] | None = None,
) -> Record:
    """Train a cell, continuing from its checkpoint if there is one, and write its record.

    To be called by who holds the store's claim on the run; ``deadline``, ``every`` and ``on_epoch``
    are those of :class:`apl.checkpoints.Checkpoint`.

    Raises
    ------
    OutOfTime
        when it was stopped at the deadline, its state saved
    FloatingPointError
        when the loss diverges
    OSError
        when the record cannot be written
    """
    protocol, settings = cell.protocol(root), cell.settings()
    device = device_name(protocol.device)
    key = digest(settings | {"device": device, "torch": str(torch.__version__)})
    checkpoint = Checkpoint(
        store.checkpoint(settings), key, every=every, deadline=deadline, on_epoch=on_epoch
    )
    # So small a network as the digits' is fastest on one thread, and its numbers are then the same
    # however many cores there are.
    before = torch.get_num_threads()
    threads = 1 if cell.dataset in SMALL else before
    torch.set_num_threads(threads)
    try:
        history = protocol.train(
            cell.loss,
            cell.kind,
            cell.rate,
            cell.seed,
            parameters=cell.parameters(),
            progress=False,
            checkpoint=checkpoint,
        )
    finally:
        torch.set_num_threads(before)
    made: dict[str, Any] = {**versions(), "commit": commit(), "device": device}
    made |= {"threads": threads, "finished": datetime.now(UTC).isoformat(timespec="seconds")}
    made |= {"seconds": round(checkpoint.elapsed, 3), "continued": checkpoint.continued}
    record = Record(settings, history, made)
    store.write(record)
    checkpoint.remove()
    return record


def here(next_cell: Next, conditions: Conditions, tell: Tell) -> None:
    """Run cells in this process until there is none."""
    while (cell := next_cell()) is not None:
        _work(cell, conditions, tell)


def side_by_side(next_cell: Next, conditions: Conditions, tell: Tell) -> None:
    """Run cells in ``conditions.jobs`` processes at once until there is none.

    A process that dies takes nothing with it but its run, and the others go on; they end with this
    process, however it ends.
    """
    context = multiprocessing.get_context("spawn")  # a forked process cannot use the GPU
    busy: dict[Connection, tuple[BaseProcess, Cell]] = {}

    def start() -> None:
        if (cell := next_cell()) is not None:
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, conditions), daemon=True)
            process.start()
            theirs.close()
            ours.send(cell)
            busy[ours] = process, cell

    try:
        for _ in range(conditions.jobs):
            start()
        while busy:
            for ready in wait(list(busy)):
                assert isinstance(ready, Connection)
                process, cell = busy[ready]
                try:
                    event = ready.recv()
                except (EOFError, ConnectionError):
                    process.join()
                    del busy[ready]
                    tell(Event(cell, "lost", process.exitcode))
                    start()
                    continue
                if event is not None:
                    tell(event)
                elif (following := next_cell()) is not None:
                    ready.send(following)
                    busy[ready] = process, following
                else:
                    ready.close()
                    del busy[ready]
                    process.join()
    finally:
        for process, _ in busy.values():
            process.terminate()
            process.join()


def _serve(pipe: Connection, conditions: Conditions) -> None:
    """What a worker does: each cell it is sent, then None for ready."""
    # Ctrl-C reaches every process of the terminal; the one that started this one decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // conditions.jobs))
    try:
        while True:
            _work(pipe.recv(), conditions, pipe.send)
            pipe.send(None)
    except (EOFError, ConnectionError):
        return  # there is no more to do, or nobody to do it for


def _work(cell: Cell, conditions: Conditions, tell: Tell) -> None:
    store, settings = Store(conditions.folder), cell.settings()
    try:
        with store.claim(settings) as ours:
            if not ours:
                return tell(Event(cell, "elsewhere"))
            try:
                if store.read(settings) is not None:
                    return tell(Event(cell, "recorded"))
            except RecordError as error:
                tell(Event(cell, "note", f"{error}: it is kept beside it, and run again"))
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("default")
                record = run(
                    cell,
                    store,
                    root=conditions.root,
                    deadline=conditions.deadline,
                    every=conditions.every,
                    on_epoch=lambda epochs: tell(Event(cell, "epoch", epochs)),
                )
            for warning in caught:
                tell(Event(cell, "note", str(warning.message)))
            tell(Event(cell, "done", record))
    except OutOfTime as stopped:
        tell(Event(cell, "stopped", str(stopped)))
    except FloatingPointError as error:
        tell(Event(cell, "failed", str(error)))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        raise
    except (OSError, ValueError, RuntimeError) as error:
        tell(Event(cell, "broken", (_sentence(error), traceback.format_exc())))


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror and not isinstance(error, ConnectionError):
        at = f" {error.filename}" if error.filename else ""
        return f"cannot write or read{at}: {error.strerror}"
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
