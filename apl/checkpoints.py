"""A long run on disk, from epoch to epoch, so that a killed one continues where it was."""

from __future__ import annotations

import hashlib
import io
import pickle
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from apl.files import write_whole

__all__ = ["Checkpoint", "OutOfTime"]

_MARK = b"apl checkpoint 1, epochs: "


class OutOfTime(Exception):
    """A run stopped at its deadline, and its state is in its checkpoint."""


class Checkpoint:
    """What :func:`apl.training.train` saves now and then, and continues from.

    A continued run gives the numbers of an uninterrupted one on the same device with the same
    torch: the state is everything that changes between epochs, the random generators included. A
    file that is damaged, or of another run, device or torch, is named in a warning and not used.

    Parameters
    ----------
    path
        the file; it holds tensors and plain values, and is read without unpickling anything else
    key
        what the run is, for example a hash of its settings and the device
    every
        seconds between two savings, made at the end of an epoch; 0 saves after every epoch
    deadline
        a time, as ``time.time()`` counts, after which no epoch should end: the run is saved and
        stopped before an epoch that, taking as long as the one before, would
    on_epoch
        called with the number of epochs done, at the start of the run and after each epoch

    Examples
    --------
    >>> import apl, tempfile
    >>> digits = apl.data.load("digits")
    >>> def run(checkpoint):
    ...     net, loss = apl.models.digits_net(), apl.CE()
    ...     return apl.training.train(net, loss, digits, epochs=3, lr=0.1, checkpoint=checkpoint)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = Path(folder, "run.pt")
    ...     try:
    ...         run(Checkpoint(file, deadline=0.0))
    ...     except OutOfTime:
    ...         print("stopped after its first epoch")
    ...     continued = run(Checkpoint(file))
    stopped after its first epoch
    >>> continued["train_loss"].tolist() == run(None)["train_loss"].tolist()
    True
    """

    def __init__(
        self,
        path: str | Path,
        key: str = "",
        *,
        every: float = 300.0,
        deadline: float | None = None,
        on_epoch: Callable[[int], None] | None = None,
    ) -> None:
        self.path = Path(path)
        self.key = key
        self.every = every
        self.deadline = deadline
        self.on_epoch = on_epoch or (lambda epochs: None)
        self.seconds = 0.0
        self.continued: list[int] = []
        self._parts: dict[str, Any] = {}
        self._started = self._saved = self._epoch_began = time.time()

    @property
    def elapsed(self) -> float:
        """Seconds the run has taken, those before it was continued included."""
        return self.seconds + time.time() - self._started

    def epochs_done(self) -> int:
        """How many epochs the file says it holds, without reading the rest; 0 where there is none.

        >>> Checkpoint("no such file").epochs_done()
        0
        """
        try:
            with self.path.open("rb") as file:
                head = file.readline(100)
        except FileNotFoundError:
            return 0
        count = head.removeprefix(_MARK).strip()
        return int(count) if head.startswith(_MARK) and count.isdigit() else 0

    def resume(self, **parts: object) -> list[dict[str, float]]:
        """Put the saved state into the parts of the run; return the history so far, [] for none.

        Parts have a state if they are generators or have ``state_dict``, as modules do; a loss that
        is a plain function has none.
        """
        self._parts = {
            name: part
            for name, part in parts.items()
            if isinstance(part, torch.Generator) or hasattr(part, "state_dict")
        }
        rows: list[dict[str, float]] = []
        if (found := self._read()) is not None:
            for name, part in self._parts.items():
                if isinstance(part, torch.Generator):
                    part.set_state(found["parts"][name])
                else:
                    part.load_state_dict(found["parts"][name])
            rows = found["rows"]
            self.seconds = found["seconds"]
            self.continued = [*found["continued"], len(rows)]
        self._started = self._saved = self._epoch_began = time.time()
        self.on_epoch(len(rows))
        return rows

    def after_epoch(self, rows: list[dict[str, float]], epochs: int) -> None:
        """Save if it is time to.

        Raises
        ------
        OutOfTime
            where the deadline does not leave the time for another epoch; the run is saved
        OSError
            where it cannot be saved; what was saved before is whole
        """
        now = time.time()
        late = self.deadline is not None and 2 * now - self._epoch_began > self.deadline
        self._epoch_began = now
        done = len(rows) == epochs
        if not done and (late or now - self._saved >= self.every):
            self._write(rows)
            self._saved = time.time()
        self.on_epoch(len(rows))
        if late and not done:
            raise OutOfTime(f"stopped after {len(rows)} of {epochs} epochs")

    def remove(self) -> None:
        """Delete the file, when its run is recorded."""
        self.path.unlink(missing_ok=True)

    def _write(self, rows: list[dict[str, float]]) -> None:
        parts = {
            name: part.get_state() if isinstance(part, torch.Generator) else part.state_dict()
            for name, part in self._parts.items()
        }
        state: dict[str, Any] = {"key": self.key, "rows": rows, "parts": parts}
        state |= {"seconds": self.elapsed, "continued": self.continued}
        buffer = io.BytesIO()
        torch.save(state, buffer)
        content = buffer.getvalue()
        head = _MARK + b"%d\n" % len(rows)
        write_whole(self.path, head + hashlib.sha256(content).digest() + content)

    def _read(self) -> dict[str, Any] | None:
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            return None
        head, _, rest = content.partition(b"\n")
        digest, state_bytes = rest[:32], rest[32:]
        if not head.startswith(_MARK) or hashlib.sha256(state_bytes).digest() != digest:
            return self._without("is damaged")
        try:
            state = torch.load(io.BytesIO(state_bytes), map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError):
            return self._without("holds more than numbers")
        if state["key"] != self.key:
            return self._without("is of another run, device or version")
        return dict(state)

    def _without(self, why: str) -> dict[str, Any] | None:
        warnings.warn(f"{self.path} {why}: the run starts anew", stacklevel=4)
        return None
