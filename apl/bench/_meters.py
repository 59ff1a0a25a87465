"""The clock and the scales of the benchmark: paired times, and peak memory.

A machine that others use is fast one second and slow the next. So what is compared is timed back to
back, over and over, and what is reported is the median over repetitions of ratios of times from the
same repetition.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from tqdm import tqdm

__all__ = ["against", "peak", "race"]

Key = TypeVar("Key", bound=Hashable)
_SAMPLE = 2e-3  # seconds of calls that one reading of the clock covers, at least
_FEWEST, _MOST = 3, 101  # repetitions
_CACHE = 2**28  # bytes written to empty a GPU's cache


def race(
    calls: Mapping[Key, Callable[[], Any]],
    *,
    device: str = "cpu",
    large: bool = False,
    repeats: int | None = None,
    seconds: float = 10.0,
    title: str = "",
) -> tuple[dict[Key, list[float]], dict[Key, str]]:
    """Seconds a call, for each contender a list with one value a repetition; and who failed, why.

    In each repetition every contender is timed once, in the order given and in the next one
    backwards. Each is called twice before, to warm up; one that raises then is left out.

    Parameters
    ----------
    calls
        the contenders
    device
        where they run; on a GPU a reading waits until the device is done
    large
        on a GPU, whether to time single calls by its own events, the cache emptied before
    repeats
        how many repetitions; by default as many as fit into ``seconds``, 3 to 101

    Examples
    --------
    >>> times, failed = race({"short": lambda: time.sleep(0.001), "odd": lambda: 1 / 0}, repeats=3)
    >>> len(times["short"]), failed
    (3, {'odd': 'division by zero'})
    """
    gpu = device.startswith("cuda")
    numbers: dict[Key, int] = {}
    failed: dict[Key, str] = {}
    round_trip = 0.0
    for key, call in calls.items():
        try:
            for _ in range(2):
                once = _wall(call, 1, gpu)
        except Exception as error:  # whatever it is, the others can be timed
            failed[key] = _reason(error)
            continue
        if once < _SAMPLE and not (gpu and large):
            once = _wall(call, 10, gpu)  # one call is too short to read off the clock
        numbers[key] = 1 if gpu and large else max(1, round(_SAMPLE / max(once, 1e-9)))
        round_trip += once * numbers[key]
    fitting = int(seconds / max(round_trip, 1e-9))
    repeats = repeats or min(max(fitting, _FEWEST), _MOST)
    cache = torch.empty(_CACHE, dtype=torch.uint8, device=device) if gpu and large else None
    times: dict[Key, list[float]] = {key: [] for key in numbers}
    order = list(numbers)
    bar = tqdm(range(repeats), desc=title, unit="round", leave=False, disable=None)
    for _ in bar:
        for key in order:
            if cache is None:
                found = _wall(calls[key], numbers[key], gpu)
            else:
                found = _events(calls[key], cache)
            times[key].append(found)
        order.reverse()
    return times, failed


def _wall(call: Callable[[], Any], number: int, gpu: bool) -> float:
    if gpu:
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(number):
        call()
    if gpu:
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / number


def _events(call: Callable[[], Any], cache: torch.Tensor) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    cache.zero_()  # meanwhile the host sends what is timed, so that it is not waited for
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def against(times: list[float], base: list[float]) -> dict[str, float]:
    """Median seconds; the median and the quartiles of the ratios to a base, pair by pair.

    >>> found = against([2.0, 6.0, 4.0], [1.0, 2.0, 4.0])
    >>> {name: float(value) for name, value in found.items()}
    {'seconds': 4.0, 'ratio': 2.0, 'low': 1.5, 'high': 2.5}
    """
    low, middle, high = np.quantile(np.divide(times, base), (0.25, 0.5, 0.75))
    return {
        "seconds": float(np.median(times)),
        "ratio": float(middle),
        "low": float(low),
        "high": float(high),
    }


def peak(call: Callable[[], Any], device: str = "cpu") -> int:
    """The most bytes that a call holds at once, above what there is before it.

    On a GPU what torch allocates; on a CPU what the system gives to the process, whoever asks for
    it, torch, numpy or a compiled kernel. The system counts in pages and roughly: a megabyte is
    within its error, and more where the process has other things going on. An allocator that keeps
    freed memory hides what it hands out again, so this is to be called where it does not, see
    :func:`apl.bench.weighing.memory`.

    Raises
    ------
    OSError
        on a CPU where the system does not keep such a count (it does on Linux)

    Examples
    --------
    >>> round(peak(lambda: torch.ones(2**28)) / 2**30, 1)  # float32 takes 4 bytes
    1.0
    """
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize()
        return int(torch.cuda.max_memory_allocated(device) - before)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the highest so far is what there is now
        before = _status("VmRSS")
        call()
        return max(_status("VmHWM") - before, 0)
    except (OSError, StopIteration):
        raise OSError("peak memory on a CPU is counted by Linux, not by this system") from None


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:160] if lines else type(error).__name__
