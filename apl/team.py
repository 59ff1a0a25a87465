"""Native work on the processors that torch computes with: in torch's own threads if possible.

After a call of torch its threads wait for the next one, and at first they wait by keeping their
processors busy. Threads of one's own would stand in line behind them. So the work
goes where torch's goes, to the team of its OpenMP (GNU's, in torch for Linux), and elsewhere to
threads of one's own.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

import apl

__all__ = ["run"]

Work = Callable[[int], None]

_FEW = 1 << 15
"""As few numbers as torch does not share either."""
_MANY = 1 << 21
"""So many numbers take longer than torch's threads keep their processors busy."""

_native: Callable[[int], Work] = lru_cache(maxsize=256)(ctypes.CFUNCTYPE(None, ctypes.c_void_p))


def run(work: int, data: int, size: int, threads: int) -> None:
    """Let threads call a function of C, all with the same pointer; return when all have.

    Parameters
    ----------
    work
        the address of the function, which knows nothing of Python and returns when nothing is left
    data
        the address that it is called with, by each thread once
    size
        the numbers it is to work on; for few of them more threads than this one do not pay
    threads
        how many there may be, this one included: as many as torch has
    """
    if threads == 1 or size < _FEW:
        _native(work)(data)
    elif (team := _team()) is not None and os.getpid() == apl._process:
        team(work, data, threads, 0)
    elif size < _MANY:
        _native(work)(data)
    else:
        _in_pool(_native(work), data, threads - 1)


@lru_cache(maxsize=1)
def _team() -> Any:
    """The function of GNU's OpenMP that runs one function in all threads of its team, or None.

    In a process that forked they are gone, and it waits for them for ever.
    """
    for path in (Path(torch.__file__).parent / "lib").glob("libgomp*.so*"):
        parallel = ctypes.CDLL(str(path)).GOMP_parallel
        parallel.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
        parallel.restype = None
        return parallel
    return None


def _in_pool(work: Work, data: int, helpers: int) -> None:
    futures: list[Future[None]] = []
    try:
        try:
            pool = _pool(helpers, os.getpid())
            for _ in range(helpers):
                futures.append(pool.submit(work, data))
        except RuntimeError:  # the interpreter ends, and starts no more threads
            pass
        work(data)
    finally:  # who has not begun by now is not needed
        _wait([future for future in futures if not future.cancel()])


def _wait(futures: list[Future[None]]) -> None:
    """Wait for all of them, also where Ctrl-C ends the call: they work on its memory."""
    try:
        wait(futures)
    except BaseException:
        _wait(futures)
        raise


@lru_cache(maxsize=8)
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    """Threads of this process: they stay behind when it forks."""
    return ThreadPoolExecutor(threads, thread_name_prefix="apl")
