"""One run, one file: what was run, what came out, and what made it.

A record is JSON that reads well, and carries a hash of its own content: one that was cut short,
edited, or copied from another run is named and not used. To be passed on, the records of a data set
are packed into one file, a line each.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pandas as pd
from filelock import FileLock, Timeout

from apl.files import write_whole

__all__ = ["DIGITS", "Record", "RecordError", "Store", "digest"]

FORMAT = "apl record 1"

DIGITS = 6
"""How many digits a packed curve keeps: an accuracy is a count of at most 60,000 images."""


class RecordError(ValueError):
    """A file that is not a whole, unchanged record of the run it is named for."""


@dataclass(frozen=True, eq=False)
class Record:
    """A finished run.

    ``settings`` say all that its numbers depend on, device and versions apart; ``made`` who made
    them: versions, commit, device, seconds. ``history`` is what :func:`apl.training.train` returns.

    Examples
    --------
    >>> history = pd.DataFrame({"epoch": [1, 2], "test_accuracy": [0.5, 0.25]})
    >>> record = Record({"loss": "ce", "epochs": 2}, history, {"device": "some cpu"})
    >>> Record.parse(record.text()).history["test_accuracy"].tolist()
    [0.5, 0.25]
    >>> Record.parse(record.text().replace("0.25", "0.75"))
    Traceback (most recent call last):
    apl.records.RecordError: was changed after it was written
    """

    settings: Mapping[str, Any]
    history: pd.DataFrame
    made: Mapping[str, Any]

    def text(self) -> str:
        """The content of its file."""
        return _layout(self._content())

    def line(self) -> str:
        """The content in one line, for a packed file; curves are rounded to ``DIGITS`` digits."""
        short = self.history.map(lambda value: float(f"{value:.{DIGITS}g}"))
        short = short.astype(dict(self.history.dtypes))
        return json.dumps(replace(self, history=short)._content(), separators=(",", ":"))

    def _content(self) -> dict[str, Any]:
        parts = {"format": FORMAT, "settings": self.settings, "made": self.made}
        content = parts | {"history": {c: _plain(self.history[c]) for c in self.history}}
        return content | {"sha256": digest(content)}

    @classmethod
    def parse(cls, text: str) -> Record:
        """Read the content of a file.

        Raises
        ------
        RecordError
            for text that is not whole, was changed, or is something else; it begins with a verb
        """
        try:
            content = json.loads(text)
        except ValueError:
            raise RecordError("is cut short or no JSON") from None
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise RecordError(f"is no {FORMAT!r}")
        if content.pop("sha256", None) != digest(content):
            raise RecordError("was changed after it was written")
        curves = {
            name: [math.nan if value is None else value for value in values]
            for name, values in content["history"].items()
        }
        return cls(content["settings"], pd.DataFrame(curves), content["made"])


class Store:
    """The records of a folder, one file a run, named for what was run.

    A folder may hold packed records too, in ``DATASET.jsonl``; they count as those in files of
    their own. Beside them, in ``.work``, are the checkpoints of unfinished runs and the files that
    processes lock while they are at a run. The lock is the system's: it ends with its process,
    however that ends, and on a file system that several machines share it holds between them as far
    as that system's locks do.

    Examples
    --------
    >>> import tempfile
    >>> settings = {"dataset": "digits", "loss": "ce", "noise": "clean", "rate": 0.0, "seed": 0}
    >>> history = pd.DataFrame({"epoch": [1], "test_accuracy": [0.5]})
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     store = Store(folder)
    ...     store.write(Record(settings, history, {}))
    ...     store.path(settings).name, store.read(settings).history["test_accuracy"].tolist()
    ('digits-ce-clean-0-seed0-e064d642.json', [0.5])
    """

    def __init__(self, folder: str | Path = "runs") -> None:
        self.folder = Path(folder)

    def path(self, settings: Mapping[str, Any]) -> Path:
        """Where the record of a run is, or will be."""
        return self.folder / settings["dataset"] / f"{_name(settings)}.json"

    def checkpoint(self, settings: Mapping[str, Any]) -> Path:
        """Where the checkpoint of a run is while it is unfinished."""
        return self.folder / ".work" / f"{_name(settings)}.pt"

    def read(self, settings: Mapping[str, Any]) -> Record | None:
        """The record of a run; None where there is none.

        Raises
        ------
        RecordError
            where the file is not its record
        """
        path = self.path(settings)
        if not path.exists():
            return self._packed(settings["dataset"])[0].get(path.stem)
        record = _read(path)
        if digest(record.settings) != digest(settings):
            raise RecordError(f"{path} is the record of other settings")
        return record

    def write(self, record: Record) -> None:
        """Write a record; a file in its place that is not its record is kept beside it.

        Raises
        ------
        OSError
            where it cannot be written; nothing is left of it then
        """
        path = self.path(record.settings)
        content = record.text().encode()
        try:
            self.read(record.settings)
        except RecordError:
            path.replace(path.with_suffix(".json.damaged"))
        write_whole(path, content)

    def all(self) -> tuple[list[Record], list[RecordError]]:
        """Every record, and what is wrong with the files that are none."""
        records: dict[str, Record] = {}
        wrong: list[RecordError] = []
        for pack in sorted(self.folder.glob("*.jsonl")):
            packed, damaged = self._packed(pack.stem)
            records.update(packed)
            wrong += damaged
        for path in sorted(self.folder.glob("*/*.json")):
            try:
                record = _read(path)
                if self.path(record.settings).name != path.name:
                    raise RecordError(f"{path} is the record of other settings")
                records[path.stem] = record
            except RecordError as error:
                wrong.append(error)
        return [records[name] for name in sorted(records)], wrong

    def pack(self, folder: str | Path) -> dict[str, int]:
        """Add all records to the packed files of a folder; how many each of them holds then.

        Raises
        ------
        RecordError
            where a packed file holds something else too; nothing is written then
        OSError
            where one cannot be written; it is what it was before
        """
        there = Store(folder)
        records, _ = self.all()
        datasets = sorted({record.settings["dataset"] for record in records})
        packs = {}
        for dataset in datasets:
            packed, wrong = there._packed(dataset)
            for error in wrong:
                raise error
            own = {_name(r.settings): r for r in records if r.settings["dataset"] == dataset}
            packs[dataset] = {**packed, **own}
        for dataset, pack in packs.items():
            lines = [pack[name].line() + "\n" for name in sorted(pack)]
            write_whole(there._pack(dataset), "".join(lines).encode())
        return {dataset: len(pack) for dataset, pack in packs.items()}

    def damaged(self, dataset: str) -> Sequence[RecordError]:
        """What is wrong with the lines of a packed file that are no records."""
        return self._packed(dataset)[1]

    def _pack(self, dataset: str) -> Path:
        return self.folder / f"{dataset}.jsonl"

    def _packed(self, dataset: str) -> tuple[Mapping[str, Record], Sequence[RecordError]]:
        path = self._pack(dataset)
        try:
            return _unpack(path, path.stat().st_mtime_ns)
        except FileNotFoundError:
            return {}, ()

    @contextmanager
    def claim(self, settings: Mapping[str, Any]) -> Iterator[bool]:
        """Whether this process may do the run; nobody else may while the context is open."""
        path = self.folder / ".work" / f"{_name(settings)}.lock"
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path, timeout=0)
        try:
            lock.acquire()
        except Timeout:
            yield False
            return
        try:
            yield True
        finally:
            lock.release()


def digest(content: Mapping[str, Any]) -> str:
    """The SHA-256 of plain values, whatever the order of their names.

    Raises
    ------
    ValueError
        for NaN and infinities, which JSON does not have

    >>> digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    True
    """
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _name(settings: Mapping[str, Any]) -> str:
    readable = f"{settings['dataset']}-{settings['loss']}-{settings['noise']}-{settings['rate']:g}"
    return f"{readable}-seed{settings['seed']}-{digest(settings)[:8]}"


def _read(path: Path) -> Record:
    try:
        return Record.parse(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        raise RecordError(f"{path} is no text") from None
    except RecordError as error:
        raise RecordError(f"{path} {error}") from None
    except (KeyError, TypeError, ValueError) as error:
        raise RecordError(f"{path} has no such parts as a record ({error})") from None


@lru_cache(maxsize=8)
def _unpack(path: Path, changed: int) -> tuple[Mapping[str, Record], Sequence[RecordError]]:
    """The records of a packed file by name, as of its last change, and the lines that are none."""
    records, wrong = {}, []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            record = Record.parse(line)
            records[_name(record.settings)] = record
        except RecordError as error:
            wrong.append(RecordError(f"line {number} of {path} {error}"))
        except (KeyError, TypeError, ValueError) as error:
            wrong.append(RecordError(f"line {number} of {path} has not a record's parts ({error})"))
    return MappingProxyType(records), tuple(wrong)


def _plain(column: pd.Series) -> list[float | int | None]:
    """The numbers of a column for JSON, NaN as null."""
    return [None if value != value else value for value in column.tolist()]


def _layout(content: Mapping[str, Any]) -> str:
    """JSON with a line for every value, and one for every curve."""
    blocks = []
    for key, value in content.items():
        if isinstance(value, Mapping):
            lines = [f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in value.items()]
            blocks.append(f" {json.dumps(key)}: {{\n" + ",\n".join(lines) + "\n }")
        else:
            blocks.append(f" {json.dumps(key)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(blocks) + "\n}\n"
