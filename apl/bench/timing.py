"""What a loss costs, value and gradient in one call: time, and how time and memory grow.

The unit is ``F.cross_entropy`` in the same conditions. The limit is a copy of the logits: a loss
must read them once and write their gradient once, as many bytes as a copy reads and writes, so the
time of ``copy_`` is those bytes over the bandwidth that the machine shows for them. It copies to
memory that is there already, where every call of a loss is given new memory for the gradient; so
``clone``, a copy into new memory, is timed too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import product
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F

from apl.bench._contenders import one_hot, textbook
from apl.bench._meters import against, race
from apl.bench.sizes import DTYPES, SOME, UNIT, Say, Size, known, lacking, sizes_of, step_of
from apl.bench.weighing import memory
from apl.losses import loss

__all__ = ["growth", "losses"]

COPY, CLONE = "copy", "clone"
_CONTENDERS = ("apl", "one-hot", "textbook", "compiled")
_LARGE = 2**26  # bytes of logits from which a GPU's caches do not hold them
_FEW = 3  # rounds of what takes long


def losses(
    names: Iterable[str] | None = None,
    sizes: Iterable[Size] | None = None,
    *,
    device: str = "cpu",
    compiled: Iterable[str] = (),
    repeats: int | None = None,
    seconds: float = 10.0,
    say: Say = lambda line: None,
) -> pd.DataFrame:
    """Time losses, forward and backward in one call, against others and against the limit.

    For each size all are timed in turn, over and over, and what is reported are medians over these
    rounds. A call drops the gradient of the last one, as ``zero_grad`` does, and leaves a new one
    in ``logits.grad``. Of logits from 64 MB on, where code with one-hot labels takes seconds a
    call, it and the textbook formula have 3 rounds of their own, beside F.cross_entropy, except for
    the losses of :data:`apl.bench.sizes.SOME`.

    Parameters
    ----------
    names
        of losses; by default :data:`apl.bench.sizes.SOME`
    sizes
        by default :func:`apl.bench.sizes.sizes_of` the device
    compiled
        of which of them the textbook formula is also compiled by ``torch.compile``, which takes
        seconds to a minute for each loss and size
    repeats, seconds
        how many repetitions, or about how long all of them may take for a size

    Returns
    -------
    pandas.DataFrame
        one row a loss, size and contender: ``apl``, ``one-hot``, ``textbook`` (log-softmax, label,
        sum), ``compiled``, and for all losses (``loss`` is then "") ``F.cross_entropy``, ``copy``,
        the limit, and ``clone``, the same into new memory. ``seconds`` a call;
        ``ratio``, its time over that of F.cross_entropy, and its quartiles ``low`` and ``high``;
        ``repeats``; ``note``, why there are no numbers

    Raises
    ------
    ValueError
        for an unknown loss

    Examples
    --------
    >>> table = losses(["nce"], [Size(8, 4)], repeats=3)
    >>> table["contender"].tolist()
    ['F.cross_entropy', 'copy', 'clone', 'apl', 'one-hot', 'textbook', 'compiled']
    """
    names, compiled = known(names), known(compiled)
    tables = []
    for size in sizes_of(device) if sizes is None else sizes:
        say(f"{size}, {len(names)} losses{', compiling' if compiled else ''}")
        rows = _timed(names, size, device, compiled, repeats, seconds)
        tables.append(pd.DataFrame(rows))
    return pd.concat(tables, ignore_index=True)


def _timed(
    names: Sequence[str],
    size: Size,
    device: str,
    compiled: Sequence[str],
    repeats: int | None,
    seconds: float,
) -> list[dict[str, Any]]:
    keys = [("", UNIT), ("", COPY), ("", CLONE), *product(names, _CONTENDERS)]
    where = {"N": size.N, "K": size.K, "dtype": size.dtype}
    if why := lacking(size, device):
        return [_row(key, where, note=why) for key in keys]
    torch.compiler.reset()
    logits, target = size.inputs(device)
    other = torch.empty_like(logits, requires_grad=False)
    source = logits.detach()
    calls: dict[tuple[str, str], Callable[[], Any]] = {
        ("", UNIT): step_of(F.cross_entropy, logits, target),
        ("", COPY): lambda: other.copy_(source),
        ("", CLONE): source.clone,
    }
    rare: dict[tuple[str, str], Callable[[], Any]] = {("", UNIT): calls["", UNIT]}
    for name in names:
        calls[name, "apl"] = step_of(loss(name), logits, target)
        others = calls if size.bytes < _LARGE or name in SOME else rare
        others[name, "one-hot"] = step_of(one_hot(name), logits, target)
        others[name, "textbook"] = step_of(textbook(name), logits, target)
        if name in compiled:
            made = torch.compile(textbook(name), dynamic=False)
            calls[name, "compiled"] = step_of(made, logits, target)
    options: dict[str, Any] = {"device": device, "large": size.bytes >= _LARGE}
    options |= {"seconds": seconds, "title": str(size)}
    times, failed = race(calls, repeats=repeats, **options)
    bases = dict.fromkeys(times, times.get(("", UNIT)))
    if len(rare) > 1:
        more, wrong = race(rare, repeats=min(repeats or _FEW, _FEW), **options)
        base = more.pop(("", UNIT), None)
        times |= more
        bases |= dict.fromkeys(more, base)
        failed |= wrong
    rows = []
    for key in keys:
        if key in times and (base := bases[key]) is not None:
            numbers = against(times[key], base)
            rows.append(_row(key, where, **numbers, repeats=len(times[key])))
        else:
            why = failed.get(key, "no unit" if key in {**calls, **rare} else "not asked for")
            rows.append(_row(key, where, note=f"not run: {why}"))
    return rows


def growth(
    names: Iterable[str] | None = None,
    *,
    device: str = "cpu",
    most: int = 2**25,
    repeats: int | None = None,
    seconds: float = 3.0,
    say: Say = lambda line: None,
) -> pd.DataFrame:
    """Measure how time and memory grow with N, with K from 10 to 131,072, and with the dtype.

    Parameters
    ----------
    names
        of losses; by default :data:`apl.bench.sizes.SOME`
    most
        the largest number of logits; larger sizes are left out
    repeats, seconds
        as in :func:`losses`

    Returns
    -------
    pandas.DataFrame
        the rows of :func:`losses` with ``vary``, "N", "K" or "dtype", and ``bytes`` and ``copies``
        of :func:`memory`
    """
    names = known(names)
    curves = {
        "N": [Size(N, 1000) for N in (16, 64, 256, 1024, 4096, 16384)],
        "K": [Size(256, K) for K in (10, 100, 1000, 10_000, 32_768, 131_072)],
        "dtype": [Size(1024, 10_000, dtype) for dtype in DTYPES],
    }
    within = [
        (vary, size) for vary, sizes in curves.items() for size in sizes if most >= size.N * size.K
    ]
    if not within:
        raise ValueError(f"no size has at most {most} logits")
    keys = ["N", "K", "dtype", "loss", "contender"]
    every = list(dict.fromkeys(size for _, size in within))
    options: dict[str, Any] = {"device": device, "say": say}
    times = losses(names, every, repeats=repeats, seconds=seconds, **options)
    weights = memory(names, every, **options)[[*keys, "bytes", "copies"]]
    found = times[times["contender"] != "compiled"].merge(weights, how="left", on=keys)
    places = [{"vary": vary, "N": s.N, "K": s.K, "dtype": s.dtype} for vary, s in within]
    return pd.DataFrame(places).merge(found, on=["N", "K", "dtype"])


def _row(key: tuple[str, str], where: Mapping[str, Any], **values: Any) -> dict[str, Any]:
    numbers = dict.fromkeys(("seconds", "ratio", "low", "high"), float("nan"))
    names = {"loss": key[0], "contender": key[1]}
    return {**where, **names, **numbers, "repeats": 0, "note": "", **values}
