"""What was measured, in one file: tables, and for each what made it."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pandas as pd
import torch

from apl import results
from apl.bench import _layout, starting, timing, training, weighing
from apl.bench.sizes import Say
from apl.files import write_whole
from apl.provenance import commit, device_name, versions
from apl.records import RecordError, digest

__all__ = ["PARTS", "Bench", "Part", "measure", "read", "table"]

FORMAT = "apl bench 1"

_MEASURES: Mapping[str, Callable[..., pd.DataFrame]] = MappingProxyType(
    {
        "losses": timing.losses,
        "memory": weighing.memory,
        "first-call": starting.first_call,
        "growth": timing.growth,
        "grid": training.grid,
    }
)
PARTS = tuple(_MEASURES)
"""What can be measured."""


@dataclass(frozen=True, eq=False)
class Part:
    """A table that was measured; ``made`` says by what: device, versions, commit, threads, load.

    ``load`` is how many threads wanted a processor in the minute before it began, those of a part
    measured before it included. Where it is not near 0 for the first part, others disturbed it.
    """

    table: pd.DataFrame
    made: Mapping[str, Any]


@dataclass(frozen=True)
class Bench:
    """The parts that were measured, by name.

    Examples
    --------
    >>> rows = pd.DataFrame({"loss": ["nce"], "seconds": [0.5], "ratio": [math.nan]})
    >>> bench = Bench({"losses": Part(rows, {"device": "some cpu"})})
    >>> Bench.parse(bench.text()).parts["losses"].table["seconds"].tolist()
    [0.5]
    >>> Bench.parse(bench.text().replace("0.5", "0.1"))
    Traceback (most recent call last):
    apl.records.RecordError: was changed after it was written
    """

    parts: Mapping[str, Part] = field(default_factory=dict)

    def text(self) -> str:
        """The content of its file: JSON, a line for each row."""
        content = self._content()
        parts = []
        for name, part in content["parts"].items():
            rows = ",\n".join(f"   {json.dumps(row)}" for row in part["rows"])
            made = json.dumps(part["made"])
            parts.append(f'  {json.dumps(name)}: {{\n   "made": {made},\n   "rows": [\n{rows}]}}')
        body = ",\n".join(parts)
        first = f'"format": {json.dumps(FORMAT)}'
        return f'{{\n {first},\n "parts": {{\n{body}\n }},\n "sha256": "{digest(content)}"\n}}\n'

    def _content(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "parts": {
                name: {"made": dict(part.made), "rows": _rows(part.table)}
                for name, part in self.parts.items()
            },
        }

    @classmethod
    def parse(cls, text: str) -> Bench:
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
        parts = {}
        for name, part in content["parts"].items():
            rows = [
                {key: math.nan if value is None else value for key, value in row.items()}
                for row in part["rows"]
            ]
            parts[name] = Part(pd.DataFrame(rows), part["made"])
        return cls(parts)

    def write(self, path: str | Path) -> None:
        """Write the file; parts that it held before and that are not measured anew stay.

        Raises
        ------
        RecordError
            where the file is there and is something else; it is left as it is
        OSError
            where it cannot be written
        """
        path = Path(path)
        before = read(path).parts if path.exists() else {}
        parts = {**before, **self.parts}
        ordered = {name: parts[name] for name in PARTS if name in parts}
        write_whole(path, Bench(ordered).text().encode())


def read(name: str | Path) -> Bench:
    """Read what was measured: a file, or by its name one of this project, "bench-cpu".

    Raises
    ------
    FileNotFoundError
        where there is none
    RecordError
        where the file is something else, or was changed

    Examples
    --------
    >>> read("bench-abacus")
    Traceback (most recent call last):
    FileNotFoundError: nothing measured is recorded as 'bench-abacus'
    """
    own = results.folder() / f"{name}.json"
    path = own if own.exists() else Path(name)
    try:
        return Bench.parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"nothing measured is recorded as {str(name)!r}") from None
    except UnicodeDecodeError:
        raise RecordError(f"{path} is no text") from None
    except RecordError as error:
        raise RecordError(f"{path} {error}") from None


def measure(
    part: str,
    *,
    device: str = "cpu",
    threads: int | None = None,
    say: Say = lambda line: None,
    **options: Any,
) -> Part:
    """Measure a part of :data:`PARTS` on this machine.

    Parameters
    ----------
    part
        "losses", "memory", "first-call", "growth" or "grid"
    device
        "cpu" or "cuda"
    threads
        of torch while it measures; by default as many as it has
    options
        of the function of that part, see :mod:`apl.bench`

    Raises
    ------
    ValueError
        for another part or device, and what the function of that part raises

    Examples
    --------
    >>> measure("growth", names=["mae"], most=10**4, repeats=3).table["vary"].unique().tolist()
    ['K']
    """
    if part not in _MEASURES:
        raise ValueError(f"there is no part {part!r} to measure; there is {', '.join(PARTS)}")
    try:
        kind = torch.device(device).type
    except RuntimeError:
        kind = device
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"no device {device!r}; there is cpu and cuda")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError("torch finds no GPU here: the device can only be cpu")
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        made: dict[str, Any] = versions() | {"commit": commit(), "device": device_name(device)}
        made |= {"cpu": device_name("cpu"), "processors": os.cpu_count()}
        made |= {"threads": torch.get_num_threads(), "load": _load(), "settings": _settings()}
        start = time.perf_counter()
        found = _MEASURES[part](device=device, say=say, **options)
        made["seconds"] = round(time.perf_counter() - start, 1)
        made["finished"] = datetime.now(UTC).isoformat(timespec="seconds")
    finally:
        torch.set_num_threads(before)
    return Part(found, made)


def table(part: str, measured: Part) -> str:
    """A part as text, as ``apl bench`` prints it: ratios, and the limit beside them.

    Raises
    ------
    ValueError
        for no part of :data:`PARTS`

    Examples
    --------
    >>> rows = pd.DataFrame({"loss": ["nce"], "cache": ["empty"], "import_seconds": [1.0],
    ...                      "losses_seconds": [0.4], "first_seconds": [0.5],
    ...                      "second_seconds": [0.001]})
    >>> print(table("first-call", Part(rows, {})))
    loss compiled code import s losses s first s  second s
     nce         empty    1.000    0.400   0.500     0.001
    """
    if part not in _MEASURES:
        raise ValueError(f"there is no part {part!r} to measure; there is {', '.join(PARTS)}")
    return _layout.LAYOUTS[part](measured.table)


def _settings() -> dict[str, str]:
    """What the environment tells the allocator and the threads."""
    kinds = ("MALLOC_", "OMP_", "GOMP_", "KMP_", "MKL_")
    return {name: value for name, value in sorted(os.environ.items()) if name.startswith(kinds)}


def _load() -> float | None:
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def _rows(table: pd.DataFrame) -> list[dict[str, Any]]:
    return [
        {str(name): _plain(value) for name, value in row.items()}
        for row in table.to_dict(orient="records")
    ]


def _plain(value: Any) -> Any:
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value
