"""A run trained and recorded; many, one after the other or several at once in own processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import traceback
import warnings
from collections.abc import Callable
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from apl import precision, processes, webvision
from apl.checkpoints import Checkpoint, OutOfTime
from apl.grid import Cell
from apl.protocols import SMALL
from apl.provenance import commit, device_name, versions
from apl.records import Record, RecordError, Store, digest
from apl.together import train
from apl.training import one_thread

__all__ = ["Conditions", "Event", "follow", "here", "run", "sentence", "side_by_side"]


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
    done already), "elsewhere" (another process is at it), "stopped" (at the deadline), "late"
    (likewise, and nothing of it is saved), "failed" (this run, with a sentence), "broken" (all of
    them will: a sentence and a traceback), "lost" (its process died), or "note" (a sentence).
    """

    cell: Cell
    kind: str
    value: Any = None


Tell = Callable[[Event], None]
Next = Callable[[], Cell | None]
Task = Cell | tuple[Cell, ...]
"""A run, or several that are trained at once."""
NextTask = Callable[[], Task | None]


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
    are those of :class:`apl.checkpoints.Checkpoint`. Under ``torchrun`` the first process calls it,
    and the others :func:`follow`.

    Raises
    ------
    OutOfTime
        when it was stopped at the deadline, its state saved
    FloatingPointError
        when the loss diverges
    OSError
        when the record cannot be written
    ValueError
        where there are several processes, for a data set that one process trains on
    """
    protocol, settings = cell.protocol(root), cell.settings()
    team = processes.team()
    if team.size > 1:
        if cell.dataset != "webvision":
            raise ValueError(f"{cell.dataset} is for one process: start it without torchrun")
        webvision.read(root)  # what is missing is said once, before the others are called
        team.share((cell, root))
    device = device_name(protocol.device)
    key = digest(settings | {"device": device, "torch": str(torch.__version__)})
    checkpoint = Checkpoint(
        store.checkpoint(settings), key, every=every, deadline=deadline, on_epoch=on_epoch
    )
    # So small a network as the digits' is fastest on one thread, and its numbers are then the same
    # however many cores there are.
    try:
        with one_thread() if cell.dataset in SMALL else nullcontext():
            threads = torch.get_num_threads()
            history = cell.train(root, checkpoint)
    except (OutOfTime, FloatingPointError):
        raise  # as in all processes
    except BaseException:
        processes.leave()
        raise
    made = _made(device, threads, checkpoint.elapsed, checkpoint.continued)
    made |= {"precision": precision.of(protocol.device, protocol.precision)}
    if cell.dataset == "webvision":
        made |= {"processes": team.size}
    record = Record(settings, history, made)
    store.write(record)
    checkpoint.remove()
    return record


def _made(device: str, threads: int, seconds: float, continued: list[int]) -> dict[str, Any]:
    made: dict[str, Any] = {**versions(), "commit": commit(), "device": device}
    made |= {"threads": threads, "finished": datetime.now(UTC).isoformat(timespec="seconds")}
    return made | {"seconds": round(seconds, 3), "continued": continued}


def follow(team: processes.Team) -> None:
    """Take part in the runs of the first process, until it says that there are no more.

    Raises: as training does; what ends a run in all processes, such as a deadline, is not raised.
    """
    with processes.reworded():
        while (called := team.share(None)) is not None:
            cell, root = called
            with suppress(OutOfTime, FloatingPointError):
                cell.train(root)


def here(next_task: NextTask, conditions: Conditions, tell: Tell) -> None:
    """Run cells in this process, one or several at once, until there is none."""
    while (task := next_task()) is not None:
        _work(task, conditions, tell)


def side_by_side(next_task: NextTask, conditions: Conditions, tell: Tell) -> None:
    """Run cells in ``conditions.jobs`` processes at once until there is none.

    A process that dies takes nothing with it but its task, and the others go on; they end with this
    process, however it ends. On a GPU they take turns, unless NVIDIA's multi-process service is
    running (``nvidia-cuda-mps-control -d``): then the kernels of several run at the same time.
    """
    context = multiprocessing.get_context("spawn")  # a forked process cannot use the GPU
    busy: dict[Connection, tuple[BaseProcess, list[Cell]]] = {}

    def start() -> None:
        if (task := next_task()) is not None:
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, conditions), daemon=True)
            process.start()
            theirs.close()
            ours.send(task)
            busy[ours] = process, _cells(task)

    try:
        for _ in range(conditions.jobs):
            start()
        while busy:
            for ready in wait(list(busy)):
                assert isinstance(ready, Connection)
                process, left = busy[ready]
                try:
                    event = ready.recv()
                except (EOFError, ConnectionError):
                    process.join()
                    del busy[ready]
                    for cell in left:
                        tell(Event(cell, "lost", process.exitcode))
                    start()
                    continue
                if event is not None:
                    if event.kind not in ("epoch", "note"):
                        left.remove(event.cell)
                    tell(event)
                elif (following := next_task()) is not None:
                    ready.send(following)
                    busy[ready] = process, _cells(following)
                else:
                    ready.close()
                    del busy[ready]
                    process.join()
    finally:
        for process, _ in busy.values():
            process.terminate()
            process.join()


def _serve(pipe: Connection, conditions: Conditions) -> None:
    """What a worker does: each task it is sent, then None for ready."""
    # Ctrl-C reaches every process of the terminal; the one that started this one decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // conditions.jobs))
    try:
        while True:
            _work(pipe.recv(), conditions, pipe.send)
            pipe.send(None)
    except (EOFError, ConnectionError):
        return  # there is no more to do, or nobody to do it for


def _work(task: Task, conditions: Conditions, tell: Tell) -> None:
    store, cells = Store(conditions.folder), _cells(task)
    with ExitStack() as claims:
        try:
            free = [cell for cell in cells if _free(cell, store, claims, tell)]
            if not free:
                return
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("default")
                do = _one if len(free) == 1 else _several
                ended = do(free, store, conditions, tell)
            for warning in caught:
                tell(Event(free[0], "note", str(warning.message)))
            for event in ended:
                tell(event)
        except (EOFError, BrokenPipeError, ConnectionResetError):
            raise
        except (OSError, ValueError, RuntimeError) as error:
            tell(Event(cells[0], "broken", (sentence(error), traceback.format_exc())))


def _free(cell: Cell, store: Store, claims: ExitStack, tell: Tell) -> bool:
    """Claim a cell; whether it is ours and to be done, else it is told what it is."""
    settings = cell.settings()
    if not claims.enter_context(store.claim(settings)):
        tell(Event(cell, "elsewhere"))
        return False
    try:
        if store.read(settings) is not None:
            tell(Event(cell, "recorded"))
            return False
    except RecordError as error:
        tell(Event(cell, "note", f"{error}: it is kept beside it, and run again"))
    return True


def _one(cells: list[Cell], store: Store, conditions: Conditions, tell: Tell) -> list[Event]:
    (cell,) = cells
    try:
        record = run(
            cell,
            store,
            root=conditions.root,
            deadline=conditions.deadline,
            every=conditions.every,
            on_epoch=lambda epochs: tell(Event(cell, "epoch", epochs)),
        )
    except OutOfTime as stopped:
        return [Event(cell, "stopped", str(stopped))]
    except FloatingPointError as error:
        return [Event(cell, "failed", str(error))]
    return [Event(cell, "done", record)]


def _several(cells: list[Cell], store: Store, conditions: Conditions, tell: Tell) -> list[Event]:
    def on_epoch(epochs: int) -> None:
        for cell in cells:
            tell(Event(cell, "epoch", epochs))

    try:
        histories, seconds = train(cells, deadline=conditions.deadline, on_epoch=on_epoch)
    except OutOfTime as stopped:
        return [Event(cell, "late", str(stopped)) for cell in cells]
    made = _made(device_name("cpu"), 1, seconds, []) | {
        "precision": "float32",
        "together": len(cells),
    }
    events = []
    for cell, history in zip(cells, histories, strict=True):
        if isinstance(history, FloatingPointError):
            events.append(Event(cell, "failed", str(history)))
            continue
        record = Record(cell.settings(), history, made)
        store.write(record)
        events.append(Event(cell, "done", record))
    return events


def _cells(task: Task) -> list[Cell]:
    return [task] if isinstance(task, Cell) else list(task)


def sentence(error: Exception) -> str:
    r"""What went wrong, in one line.

    >>> sentence(ValueError("no such loss\nat all"))
    'no such loss'
    """
    if isinstance(error, OSError) and error.strerror and not isinstance(error, ConnectionError):
        at = f" {error.filename}" if error.filename else ""
        return f"cannot write or read{at}: {error.strerror}"
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
