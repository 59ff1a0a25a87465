"""Several runs at once in one process: each takes a step in its turn, on a GPU stream of its own.

A small network leaves most of a large GPU idle. The kernels of streams run side by side where there
is room, and a recorded step, see :mod:`apl.capture`, is launched sooner than it is done; so one
process keeps several runs going. Only one of them is ever in Python, and the numbers of each are
those it has alone. Processes that share a GPU do not run side by side, they alternate, unless
NVIDIA's multi-process service runs (``nvidia-cuda-mps-control -d``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from threading import Semaphore, Thread
from typing import Any

import torch

from apl.checkpoints import OutOfTime
from apl.training import repeatable

__all__ = ["in_turns"]

Job = Callable[[Callable[[], None]], Any]
"""A run, which calls what it is given after each of its steps."""


class _Stopped(BaseException):
    """The others are not going on."""


@repeatable()
def in_turns(jobs: Sequence[Job], device: str | torch.device = "cpu") -> list[Any]:
    """Do all jobs, a step of each in turn; what each of them returns.

    A run that diverges or is out of time has its error in place of the result, and the others go
    on.

    Parameters
    ----------
    jobs
        functions that pass their argument on as ``on_step`` of :func:`apl.training.train`
    device
        where they train

    Raises
    ------
    Exception
        any other error of a job; the others are ended

    Examples
    --------
    >>> import apl
    >>> from apl.training import train
    >>> digits = apl.data.load("digits")
    >>> def job(loss):
    ...     settings = {"epochs": 1, "lr": 0.1}
    ...     return lambda on_step: train(
    ...         apl.models.digits_net(), loss, digits, on_step=on_step, **settings
    ...     )
    >>> [len(history) for history in in_turns([job(apl.CE()), job(apl.MAE())])]
    [1, 1]
    """
    device = torch.device(device)
    turns = [Semaphore(0) for _ in jobs]
    back = Semaphore(0)
    results: dict[int, Any] = {}
    stopped = False

    def wait(i: int) -> None:
        turns[i].acquire()
        if stopped:
            raise _Stopped

    def work(i: int) -> None:
        def on_step() -> None:
            back.release()
            wait(i)

        try:
            wait(i)
            with _own_stream(device):
                results[i] = jobs[i](on_step)
        except _Stopped:
            return
        except Exception as error:
            results[i] = error
        back.release()

    threads = [Thread(target=work, args=(i,), daemon=True) for i in range(len(jobs))]
    for thread in threads:
        thread.start()
    try:
        while len(results) < len(jobs):
            for i in range(len(jobs)):
                if i not in results:
                    turns[i].release()
                    back.acquire()
                    _raise_unless_its_own(results.get(i))
    finally:
        stopped = True
        for turn, thread in zip(turns, threads, strict=True):
            turn.release()
            thread.join()
    return [results[i] for i in range(len(jobs))]


@contextmanager
def _own_stream(device: torch.device) -> Iterator[None]:
    """Work on a new stream, which begins when what was sent before is done; on a CPU nothing."""
    if device.type != "cuda":
        yield
        return
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.default_stream(device))
    with torch.cuda.stream(stream):
        yield


def _raise_unless_its_own(result: object) -> None:
    if isinstance(result, Exception) and not isinstance(result, FloatingPointError | OutOfTime):
        raise result
