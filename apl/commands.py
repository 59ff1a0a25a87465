"""What the command ``apl`` does, one function for each of its commands."""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from apl import human, processes, workers
from apl.campaign import Pace, pending
from apl.campaign import reproduce as run_all
from apl.catalog import CATALOG
from apl.comparison import compare as compare_records
from apl.comparison import layout, summarize
from apl.grid import Cell, grid
from apl.protocols import NAMES, Protocol, default_name, duration
from apl.records import Record, RecordError, Store

__all__ = ["COMMANDS", "bench", "compare", "list_", "pack", "reproduce", "train"]

_say: Callable[[str], None] = partial(print, flush=True)


def list_(options: Namespace) -> int:
    """Print the losses, the data sets and their protocols, and what has been run."""
    _say("losses")
    for entry in CATALOG.values():
        defaults = ", ".join(f"{name}={value:g}" for name, value in entry.parameters.items())
        kind = f", {entry.kind}" if entry.kind else ""
        _say(f"  {entry.name:<10} {entry.title}{kind}{f' ({defaults})' if defaults else ''}")
    _say("\ndata sets (with symmetric noise .2 to .8, asymmetric noise .1 to .4, and clean;")
    _say("webvision with its own, real)")
    for name in NAMES:
        for source in ("code",) if name in ("digits", "webvision") else ("code", "2020"):
            _say(f"  {Protocol.of(name, source=source)}")
    _say(f"\nlabels that people gave, as noise ({human.LICENSE}), with the share that is wrong")
    for name, known in human.SETS.items():
        shares = ", ".join(f"{noise} {human.rate(name, noise):g}" for noise in known.noises)
        _say(f"  {name}: {shares}")
    records, wrong = Store(options.out).all()
    _say(f"\nruns in {options.out}")
    table = summarize(records)
    for (dataset, source, epochs), rows in table.groupby(["dataset", "source", "epochs"]):
        _say(
            f"  {dataset} ({source}), {epochs} epochs: {rows['n'].sum()} runs, {len(rows)} cells, "
            f"losses {' '.join(rows['loss'].unique())}"
        )
    if not records:
        _say("  none")
    _name(wrong)
    return 0


def train(options: Namespace) -> int:
    """Do one run unless it is recorded, and print its last epoch."""
    cell = Cell(
        options.dataset,
        options.loss,
        options.noise,
        options.rate,
        options.seed,
        options.source,
        options.epochs,
        tuple(_changes(options.set).items()),
    )
    store = Store(options.out)
    outcome = run_all([cell], store, root=options.root, say=_say)
    if outcome.recorded:
        _say(f"{cell}: recorded before")
    if outcome.failed:
        return 1
    if not outcome.elsewhere:
        path = store.path(cell.settings())
        record = store.read(cell.settings())
        assert record is not None
        _say(record.history.tail(1).to_string(index=False, float_format="{:.4f}".format))
        _say(str(path))
    return 0


def reproduce(options: Namespace) -> int:
    """Do the runs of a slice of the grid that have no record."""
    cells = grid(
        _datasets(options.dataset) or [default_name()],
        losses=options.loss,
        noises=options.noise,
        rates=options.rate,
        seeds=options.seed,
        source=options.source,
        epochs=options.epochs,
        changes=_changes(options.set),
    )
    if not cells:
        raise ValueError("no table has such cells: the noise and the rate do not go together")
    store = Store(options.out)
    left, wrong = pending(cells, store)
    _name(wrong)
    _say(_forecast(cells, left, store, options.jobs if options.ray is None else None))
    if options.dry_run:
        for cell in left:
            _say(f"  {cell}")
        return 0
    outcome = run_all(
        cells,
        store,
        minutes=options.minutes,
        jobs=options.jobs,
        root=options.root,
        every=options.save_every,
        ray=options.ray,
        say=_say,
    )
    counts = {
        "done": outcome.done,
        "recorded before": outcome.recorded,
        "saved, to be continued": outcome.stopped,
        "being done by another process": outcome.elsewhere,
        "not started, for lack of time": outcome.too_long,
        "failed": outcome.failed,
    }
    _say("; ".join(f"{len(group)} {what}" for what, group in counts.items() if group))
    return 1 if outcome.failed else 0


def compare(options: Namespace) -> int:
    """Print what was run beside what was published."""
    records, wrong = Store(options.out).all()
    _name(wrong)
    table = compare_records([r for r in records if _chosen(r, options)], options.published)
    _say(layout(table))
    if options.csv:
        table.to_csv(options.csv, index=False)
    return 0


def pack(options: Namespace) -> int:
    """Put the records into the packed files of another folder, a line each."""
    store = Store(options.out)
    _name(store.all()[1])
    packed = store.pack(options.to)
    for dataset, n in packed.items():
        _say(f"{options.to}/{dataset}.jsonl: {n} runs")
    if not packed:
        _say(f"no records in {options.out}")
    return 0


def bench(options: Namespace) -> int:
    """Measure what losses and training cost, print it, and keep it where that is asked for."""
    from apl import bench as benches  # for this command only: it takes time to import
    from apl.bench.sizes import known as known_names

    names = [*CATALOG] if options.loss == ["all"] else options.loss
    parts = [*benches.PARTS] if options.parts == ["all"] else options.parts or ["losses", "memory"]
    for part in parts:
        if part not in benches.PARTS:
            known = ", ".join(benches.PARTS)
            raise ValueError(f"there is no part {part!r} to measure; there is {known}, or all")
    if options.dtype and not options.size:
        raise ValueError("--dtype goes with --size, which says of how many rows and classes")
    sizes = [
        benches.Size.parse(size, dtype)
        for size in options.size or ()
        for dtype in options.dtype or ["float32"]
    ]
    known_names(names)
    compiled = () if options.compile is None else tuple(options.compile or names or benches.SOME)
    known_names(compiled)
    if options.out and Path(options.out).exists():
        benches.read(options.out)  # a file that is something else is said before anything is done
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    pace = {"repeats": options.repeats, "seconds": options.seconds}
    pace = {name: value for name, value in pace.items() if value is not None}
    training = {"images": options.images, "epochs": options.epochs, "runs": options.runs}
    training |= {"workers": options.workers, "repeats": options.repeats or 3}
    given: dict[str, dict[str, Any]] = {
        "losses": {"names": names, "sizes": sizes or None, "compiled": compiled, **pace},
        "memory": {"names": names, "sizes": sizes or None},
        "first-call": {"names": names},
        "growth": {"names": names, **pace},
        "grid": training,
    }
    _busy()
    for part in dict.fromkeys(parts):
        measured = benches.measure(
            part, device=device, threads=options.threads, say=_progress, **given[part]
        )
        if options.out:
            benches.Bench({part: measured}).write(options.out)
        made = measured.made
        where = f"{made['device']}, {made['threads']} threads, torch {made['torch']}"
        _say(f"{part} ({where}; {duration(made['seconds'])})\n")
        _say(f"{benches.table(part, measured)}\n")
    if options.out:
        _say(options.out)
    return 0


def _progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _busy() -> None:
    """Say where other processes disturb what is timed."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if load > (os.cpu_count() or 1) / 4:
        _progress(f"the machine is busy (load {load:.1f}): times will be less certain")


def _chosen(record: Record, options: Namespace) -> bool:
    wanted = {
        "dataset": _datasets(options.dataset),
        "loss": options.loss,
        "noise": options.noise,
        "rate": options.rate,
        "seed": options.seed,
    }
    return all(record.settings[name] in values for name, values in wanted.items() if values)


def _forecast(cells: list[Cell], left: list[Cell], store: Store, jobs: int | None) -> str:
    line = f"{len(cells)} runs: {len(cells) - len(left)} recorded, {len(left)} to do"
    if not left:
        return line
    if jobs is None:  # how many a cluster runs at once, it says when it is asked to
        return f"{line}, with Ray"
    pace = Pace(store.all()[0])
    times = [pace.of(cell) for cell in left]
    known = [time for time in times if time is not None]
    if len(known) < len(times):
        return f"{line}; how long they take, the first ones will show"
    return f"{line}, about {duration(sum(known) / jobs)} by the runs before"


def _datasets(named: list[str] | None) -> list[str]:
    if named and "all" in named:
        return [*NAMES]
    for name in named or ():
        if name not in NAMES:
            raise ValueError(f"no data set {name!r}; there is {', '.join(NAMES)}, or all")
    return named or []


def _changes(pairs: Iterable[str]) -> dict[str, Any]:
    changes: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not (name and equals and text):
            raise ValueError(f"--set takes NAME=VALUE, not {pair!r}")
        if name == "epochs":
            raise ValueError("epochs are set with --epochs")
        changes[name] = _value(text)
    return changes


def _value(text: str) -> Any:
    if text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _name(wrong: Iterable[RecordError]) -> None:
    for error in wrong:
        print(f"not used: {error}", file=sys.stderr)


def _together(command: Callable[[Namespace], int]) -> Callable[[Namespace], int]:
    """The command by the first process that torchrun started; the others take part in its runs."""

    def run(options: Namespace) -> int:
        with processes.joined() as team:
            if not team.leads:
                workers.follow(team)
                return 0
            if team.size > 1 and (getattr(options, "jobs", 1) > 1 or getattr(options, "ray", None)):
                team.share(None)
                raise ValueError("--jobs and --ray do several runs at once, torchrun does one")
            try:
                return command(options)
            finally:
                processes.team().share(None)

    return run


COMMANDS: Mapping[str, Callable[[Namespace], int]] = MappingProxyType(
    {
        "list": list_,
        "train": _together(train),
        "reproduce": _together(reproduce),
        "compare": compare,
        "pack": pack,
        "bench": bench,
    }
)
"""Every command by its name."""
