"""Runs spread over the machines of a Ray cluster; the records stay with who started them."""

from __future__ import annotations

import os
import platform
import signal
import threading
import time
import traceback
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from queue import Empty, SimpleQueue
from tempfile import TemporaryDirectory
from threading import Event as Flag
from threading import Thread
from typing import Any

from apl import workers
from apl.files import write_whole
from apl.grid import Cell
from apl.protocols import SMALL
from apl.records import Record, RecordError, Store, digest
from apl.vision import DEFAULT_ROOT
from apl.workers import Conditions, Event, Next, Tell

__all__ = ["on_ray", "places", "share"]

LOSSES = 3
"""How often in a row a run may lose its worker, without having got further, until it failed."""

_EPOCHS_APART = 0.5  # seconds between two reports of the epochs of a run
_LOOK_APART = 5.0  # seconds between two looks at what the cluster has, while nothing happens


def on_ray(next_cell: Next, conditions: Conditions, tell: Tell, *, address: str = "local") -> None:
    """Run cells on a Ray cluster, one in each place it has, until there is none.

    A run takes a CPU core and, on a cluster with GPUs, unless its data set is small, the part
    1 / ``conditions.jobs`` of a GPU. Nodes need this package and, below ``conditions.root``, the
    data; they need not see the folder of the records. Those come back to this process, which writes
    them, and so do checkpoints. This process claims a run in its store as long as it is out.

    Where a worker or its node is lost, the run is sent out again, with the last checkpoint that
    came back. That is done here and not by Ray, which knows nothing of checkpoints and the
    deadline, and would try again for ever or not at all what kills its worker each time. Whatever
    else goes wrong is told as it is of a run here, and not tried again.

    Parameters
    ----------
    next_cell, conditions, tell
        as for :func:`apl.workers.here`
    address
        "local" starts Ray on this machine, and ends it afterwards; "auto" is the cluster this
        machine belongs to, "HOST:PORT" the one there. Where this process is connected already, it
        is "auto" or that address, and the connection stays.

    Raises
    ------
    ValueError
        where Ray is not installed, no cluster answers at the address, or this process is connected
        to another

    Examples
    --------
    >>> from apl.campaign import reproduce
    >>> reproduce([Cell("digits", "ce")], Store("runs"), ray="auto")  # doctest: +SKIP
    """
    # A path means the same on every node only if it says where it begins.
    root = Path(conditions.root or DEFAULT_ROOT).absolute()
    with _connected(address) as ray:
        office = _Office(ray, next_cell, replace(conditions, root=root), tell)
        try:
            office.work()
        finally:
            office.close()


def share(jobs: int) -> float:
    """The part of a GPU that a run gets where ``jobs`` run on one; Ray counts four digits.

    >>> share(1), share(7)
    (1.0, 0.1428)
    """
    return (10_000 // jobs) / 10_000


def places(nodes: Iterable[Mapping[str, Any]], gpu: float = 0.0) -> int:
    """How many runs the nodes, as ``ray.nodes()`` lists them, can do at once; at least 1.

    Where there is no place now, one run asks for it, so that a cluster that can grow does.

    >>> small = {"Alive": True, "Resources": {"CPU": 4.0}}
    >>> large = {"Alive": True, "Resources": {"CPU": 16.0, "GPU": 2.0}}
    >>> places([small, large]), places([small, large], gpu=share(6)), places([])
    (20, 12, 1)
    """
    found = 0
    for node in nodes:
        has = node["Resources"] if node["Alive"] else {}
        cores = int(has.get("CPU", 0))
        found += min(cores, int(has.get("GPU", 0)) * int(1 / gpu)) if gpu else cores
    return max(found, 1)


@dataclass(eq=False)
class _Run:
    """A run that is out, with the claim on it, and where what it tells arrives."""

    cell: Cell
    claim: ExitStack
    told: Any = None
    began: bool = False
    losses: int = 0


class _Office:
    """Sends cells out, and takes in what comes back."""

    def __init__(self, ray: Any, next_cell: Next, conditions: Conditions, tell: Tell) -> None:
        self.ray, self.next_cell, self.conditions, self.tell = ray, next_cell, conditions, tell
        self.store = Store(conditions.folder)
        # Lost runs are sent again from here.
        self.task = ray.remote(num_returns="streaming", max_retries=0)(_serve)
        self.out: list[_Run] = []
        self.gpu = 0.0  # what the cell before took of one
        self.more = True

    def work(self) -> None:
        self._fill()
        looked = time.monotonic()
        while self.out:
            told = [run.told for run in self.out]
            ready, _ = self.ray.wait(told, num_returns=1, timeout=_LOOK_APART, fetch_local=False)
            if ready:
                (run,) = (run for run in self.out if run.told is ready[0])
                self._take(run)
            if self._late():
                for run in [run for run in self.out if not run.began]:
                    self.ray.cancel(run.told)
                    self._end(run, Event(run.cell, "stopped", "the cluster had no place for it"))
            if len(self.out) < len(told) or time.monotonic() - looked > _LOOK_APART:
                self._fill()
                looked = time.monotonic()

    def close(self) -> None:
        """Stop what is out, leave the nodes a moment to tidy up, and give the claims back."""
        told = [run.told for run in self.out if run.told is not None]
        for one in told:
            self.ray.cancel(one)
        until = time.time() + 5
        while told and time.time() < until:
            for one in self.ray.wait(told, num_returns=1, timeout=1, fetch_local=False)[0]:
                try:
                    self.ray.get(next(one))
                except (StopIteration, self.ray.exceptions.RayError):
                    told.remove(one)
        for run in self.out:
            run.claim.close()

    def _fill(self) -> None:
        while self.more and len(self.out) < places(self.ray.nodes(), self.gpu):
            if (cell := self.next_cell()) is None:
                self.more = False
            else:
                self._begin(cell)

    def _begin(self, cell: Cell) -> None:
        settings = cell.settings()
        with ExitStack() as claim:
            if not claim.enter_context(self.store.claim(settings)):
                return self.tell(Event(cell, "elsewhere"))
            try:
                if self.store.read(settings) is not None:
                    return self.tell(Event(cell, "recorded"))
            except RecordError as error:
                self.tell(Event(cell, "note", f"{error}: it is kept beside it, and run again"))
            run = _Run(cell, claim.pop_all())
            self.out.append(run)
            self._send(run)

    def _send(self, run: _Run) -> None:
        there = any(node["Alive"] and node["Resources"].get("GPU") for node in self.ray.nodes())
        wanted = there and run.cell.dataset not in SMALL
        self.gpu = share(self.conditions.jobs) if wanted else 0.0
        saved = self.store.checkpoint(run.cell.settings())
        content = saved.read_bytes() if saved.exists() else None
        task = self.task.options(name=str(run.cell), num_cpus=1, num_gpus=self.gpu)
        run.told, run.began = task.remote(run.cell, content, self.conditions), False

    def _take(self, run: _Run) -> None:
        """Read the next thing that a run tells."""
        errors, cell = self.ray.exceptions, run.cell
        try:
            kind, value = self.ray.get(next(run.told))
        except errors.RayTaskError as error:
            # No run was to blame: the package is not on the node, or is another version.
            self._end(run, Event(cell, "broken", (_last_line(error), str(error))))
        except (errors.RayError, StopIteration) as error:
            self._lost(run, error)
        else:
            run.began = True
            try:
                value = self._kept(run, kind, value)
            except (OSError, ValueError) as error:
                kind, value = "broken", (workers.sentence(error), traceback.format_exc())
            if kind in ("epoch", "note"):
                self.tell(Event(cell, kind, value))
            elif kind != "saved":
                self._end(run, Event(cell, kind, value))

    def _kept(self, run: _Run, kind: str, value: Any) -> Any:
        """Write what came back and is to stay, and return what there is to tell."""
        settings = run.cell.settings()
        if kind == "saved":
            run.losses = 0
            write_whole(self.store.checkpoint(settings), value)
        if kind != "done":
            return value
        record = Record.parse(value)
        if digest(record.settings) != digest(settings):
            raise ValueError("a node ran it with other settings: apl is another version there")
        self.store.write(record)
        self.store.checkpoint(settings).unlink(missing_ok=True)
        return record

    def _lost(self, run: _Run, error: Exception) -> None:
        run.losses += 1
        why = workers.sentence(error).partition(". ")[0]
        if run.losses >= LOSSES:
            what = f"lost its worker {run.losses} times in a row: {why}"
            self._end(run, Event(run.cell, "failed", what))
        elif self._late():
            self._end(run, Event(run.cell, "stopped", f"lost its worker ({why})"))
        else:
            self.tell(Event(run.cell, "note", f"{run.cell}: lost its worker ({why}), sent again"))
            self._send(run)

    def _end(self, run: _Run, event: Event) -> None:
        self.out.remove(run)
        with run.claim:
            self.tell(event)

    def _late(self) -> bool:
        deadline = self.conditions.deadline
        return deadline is not None and time.time() > deadline


def _serve(cell: Cell, saved: bytes | None, conditions: Conditions) -> Iterator[tuple[str, Any]]:
    """What a node does with a cell: train it in a folder of its own, and tell the office."""
    told: SimpleQueue[tuple[str, Any] | BaseException | None] = SimpleQueue()
    gone = Flag()
    with TemporaryDirectory(prefix="apl-run-", ignore_cleanup_errors=True) as folder:
        own = replace(conditions, folder=Path(folder), jobs=1)
        if saved is not None:
            write_whole(Store(folder).checkpoint(cell.settings()), saved)
        # A callback cannot yield, so the training has a thread to itself.
        thread = Thread(target=_train, args=(cell, own, told.put, gone), daemon=True)
        thread.start()
        try:
            while True:
                try:
                    item = told.get(timeout=0.2)  # not for ever: Ray cancels between two looks
                except Empty:
                    continue
                if item is None:
                    break
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            gone.set()
            thread.join(timeout=3)  # of a run that was cancelled, its epoch; else it has ended


def _train(cell: Cell, conditions: Conditions, put: Any, gone: Flag) -> None:
    checkpoint = Store(conditions.folder).checkpoint(cell.settings())
    todo, mark, reported = [cell], _mark(checkpoint), 0.0

    def tell(event: Event) -> None:
        nonlocal mark, reported
        if gone.is_set():
            raise SystemExit
        if event.kind == "epoch":
            if (now := _mark(checkpoint)) != mark:
                mark = now
                put(("saved", checkpoint.read_bytes()))
            ends = event.value in (0, cell.settings()["epochs"])
            if ends or time.monotonic() - reported >= _EPOCHS_APART:
                reported = time.monotonic()
                put(("epoch", event.value))
        elif event.kind == "done":
            put(("done", event.value.text()))
        elif event.kind == "broken":
            sentence, details = event.value
            put(("broken", (f"{sentence} (on {platform.node()})", details)))
        else:
            put((event.kind, event.value))

    try:
        workers.here(lambda: todo.pop() if todo else None, conditions, tell)
    except BaseException as error:
        put(error)
    else:
        put(None)


def _mark(path: Path) -> tuple[int, int] | None:
    """What changes when a file is replaced."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_mtime_ns, status.st_ino


@contextmanager
def _connected(address: str) -> Iterator[Any]:
    """Ray, connected to a cluster, until the context ends."""
    if address.startswith("ray://"):
        raise ValueError(
            f"--ray takes no Ray Client address as {address!r}: start the command on a machine of "
            'the cluster, with the address "auto"'
        )
    # Nothing is to leave this machine unasked.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    with _own_signals():
        try:
            ray: Any = import_module("ray")
        except ModuleNotFoundError as error:
            if error.name != "ray":
                raise
            needed = "--ray needs Ray: pip install 'apl-companion[ray]'"
            raise ValueError(needed) from None
        if there := ray.is_initialized():
            at = ray.get_runtime_context().gcs_address
            if address not in ("auto", at):
                raise ValueError(f"this process is connected to Ray at {at}, not at {address!r}")
        else:
            _connect(ray, address)
    try:
        yield ray
    finally:
        if not there:
            ray.shutdown()


def _connect(ray: Any, address: str) -> None:
    # Quiet: what matters comes back as events.
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address == "local":
        options["include_dashboard"] = False
    try:
        ray.init(address=address, **options)
    except (OSError, RuntimeError, ValueError) as error:
        what = workers.sentence(error)
        raise ValueError(f"no Ray cluster to be had at {address!r}: {what}") from error


@contextmanager
def _own_signals() -> Iterator[None]:
    """What SIGINT and SIGTERM do stays: Ray would let SIGTERM end this process without a word."""
    main = threading.current_thread() is threading.main_thread()
    numbers = (signal.SIGINT, signal.SIGTERM) if main else ()
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _last_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[-1]
