"""How fast a grid of runs trains, beside a loop written as the official code trains.

The images are made up: what they show changes no time. A baseline reads them as files are read,
image by image, through torchvision's transforms in worker processes, computes in float32, and waits
for the device in every step, to note loss and accuracy. What is counted is whole epochs, evaluation
included, after a first one in which workers start and kernels are chosen.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import pandas as pd
import torch

from apl import augment, ensemble, models, noise, training
from apl.bench._baseline import BATCH, CLIP, LOSS, SGD, Pixels, made_up, train
from apl.bench._meters import against
from apl.bench.sizes import Say
from apl.catalog import APL
from apl.data import Dataset, load
from apl.losses import loss
from apl.paper import paper_loss
from apl.protocols import Protocol
from apl.turns import in_turns
from apl.vision import SETS

__all__ = ["cifar", "digits", "grid"]

BLOCK = 9 * 9 * 120
"""The epochs of the paper's CIFAR-10 block: losses, noise settings, epochs; one seed."""

_EPOCH = 50_000  # images of CIFAR-10


def grid(
    *,
    device: str = "cpu",
    images: int | None = None,
    epochs: int = 1,
    runs: Sequence[int] | None = None,
    workers: int | None = None,
    repeats: int = 3,
    say: Say = lambda line: None,
) -> pd.DataFrame:
    """Measure both :func:`cifar` and, on a CPU, :func:`digits`, in one table.

    ``images`` are by default the 50,000 of CIFAR-10 on a GPU, 512 on a CPU. ``runs`` at once are by
    default 1, 2, 4 and 8 of the CIFAR-10 network on a GPU, one on a CPU, where there are 1 to 24 of
    the digits'.
    """
    gpu = device.startswith("cuda")
    tables = [
        cifar(
            device=device,
            images=images or (_EPOCH if gpu else 512),
            epochs=epochs,
            runs=runs or ((1, 2, 4, 8) if gpu else (1,)),
            workers=workers,
            repeats=repeats,
            say=say,
        )
    ]
    if not gpu and ensemble.available():
        tables.append(digits(runs=runs or (1, 2, 4, 8, 16, 24), repeats=repeats, say=say))
    return pd.concat(tables, ignore_index=True)


def cifar(
    *,
    device: str = "cpu",
    images: int = _EPOCH,
    epochs: int = 1,
    runs: Sequence[int] = (1,),
    workers: int | None = None,
    repeats: int = 3,
    say: Say = lambda line: None,
) -> pd.DataFrame:
    """Time the training of the paper's CIFAR-10 network, by apl and by the baseline, in turn.

    Both train with crop and flip, batches of 128, SGD with Nesterov momentum, gradients clipped at
    norm 5, and test after each epoch on a fifth as many images. apl also predicts the whole
    training set then, which the baseline does not; it is not taken out.

    Parameters
    ----------
    device
        where both train
    images
        how many a training set has
    epochs
        that are timed, after one that is not
    runs
        how many are trained at once by apl, see :mod:`apl.turns`; one or several numbers
    workers
        of the baseline's loader; by default 8, or as many as there are processors
    repeats
        how often baseline and apl are timed in turn

    Returns
    -------
    pandas.DataFrame
        one row for the baseline and each number of runs: ``task``, ``path``, ``runs``, ``images``
        of an epoch, ``images_per_second`` of training, all runs together; ``ratio``, that over the
        baseline's, and its quartiles ``low`` and ``high``; ``epoch_seconds``, the time of an
        epoch of all runs; ``repeats``; ``block_hours``, what the
        paper's CIFAR-10 block takes at that pace: 9 losses, 9 noise settings, 120 epochs

    Raises
    ------
    ValueError
        for fewer than two batches of images, epochs, runs or repeats below 1, or fewer than 0
        workers
    """
    workers = min(8, os.cpu_count() or 1) if workers is None else workers
    _check(images, epochs, runs, repeats, workers)
    say(f"CIFAR-10 network, {images} images, baseline with {workers} workers, runs {_list(runs)}")
    pixels, labels = made_up(images)
    tests = made_up(max(images // 5, 2))
    paths: dict[tuple[str, int], Callable[[], float]] = {
        ("baseline", 1): partial(train, (pixels, labels), tests, device, epochs, workers)
    }
    dataset = _as_dataset((pixels, labels), tests).to(device)
    for J in runs:
        paths["apl", J] = partial(_runs, dataset, J, epochs)
    rows = _compare(paths, images, repeats, say)
    for row in rows:
        row["block_hours"] = BLOCK * _EPOCH / row["images_per_second"] / 3600
    return pd.DataFrame([{"task": "cifar10_cnn", "images": images} | row for row in rows])


def digits(
    *,
    runs: Sequence[int] = (1, 2, 4, 8, 16, 24),
    epochs: int = 10,
    repeats: int = 3,
    say: Say = lambda line: None,
) -> pd.DataFrame:
    """Time runs on digits, stacked as :mod:`apl.ensemble` trains them and one after the other.

    Both on one thread, which is fastest for so small a network, from the untrained networks to the
    tables. The losses of the runs are :data:`apl.catalog.APL`'s in turn.

    Returns
    -------
    pandas.DataFrame
        as :func:`cifar`, two rows for each number of runs: the ``path`` "loop", and "ensemble" with
        its ``ratio`` to that loop

    Raises
    ------
    ValueError
        for epochs, runs or repeats below 1
    """
    dataset = load("digits").with_noise(noise.symmetric(10, 0.6), seed=0)
    images = len(dataset.images)
    _check(images, epochs, runs, repeats, 0)
    rows: list[dict[str, Any]] = []
    for warm_up in (_loop, _stacked):  # losses and layers are compiled once
        warm_up(dataset, APL, 1)
    for M in runs:
        say(f"digits network, {M} runs")
        names = [APL[m % len(APL)] for m in range(M)]
        paths: dict[tuple[str, int], Callable[[], float]] = {
            ("loop", M): partial(_loop, dataset, names, epochs),
            ("ensemble", M): partial(_stacked, dataset, names, epochs),
        }
        rows += _compare(paths, images, repeats, lambda line: None)
    return pd.DataFrame([{"task": "digits_net", "images": images} | row for row in rows])


def _compare(
    paths: dict[tuple[str, int], Callable[[], float]], images: int, repeats: int, say: Say
) -> list[dict[str, Any]]:
    """Run all paths ``repeats`` times, every other time backwards; each says images a second."""
    found: dict[tuple[str, int], list[float]] = {key: [] for key in paths}
    order = list(paths)
    base = order[0]
    for repeat in range(repeats):
        for key in order:
            found[key].append(paths[key]())
            say(f"  {repeat + 1} of {repeats}: {key[0]}, {key[1]} at once: {found[key][-1]:.0f}/s")
        order.reverse()
    rows = []
    for (path, J), paces in found.items():
        numbers = against(paces, found[base])
        numbers["images_per_second"] = numbers.pop("seconds")
        numbers["epoch_seconds"] = J * images / numbers["images_per_second"]
        rows.append({"path": path, "runs": J} | numbers | {"repeats": repeats})
    return rows


def _runs(dataset: Dataset, J: int, epochs: int) -> float:
    """Train J runs at once; images a second of all of them together."""
    steps = -(-len(dataset.given) // BATCH)
    starts: list[float] = []

    def job(seed: int) -> Callable[[Callable[[], None]], pd.DataFrame]:
        def run(on_step: Callable[[], None]) -> pd.DataFrame:
            done = 0

            def count() -> None:
                nonlocal done
                done += 1
                if done == steps + 1:  # the first step of the second epoch is sent
                    starts.append(time.perf_counter())
                on_step()

            return training.train(
                models.cifar10_cnn(seed),
                paper_loss("cifar10", LOSS),
                dataset,
                epochs=epochs + 1,
                augment=augment.paper("cifar10"),
                batch_size=BATCH,
                clip=CLIP,
                seed=seed,
                progress=False,
                on_step=count,
                **SGD,
            )

        return run

    for result in in_turns([job(seed) for seed in range(J)], dataset.device):
        if isinstance(result, Exception):
            raise result
    seconds = time.perf_counter() - max(starts)
    return J * (epochs * len(dataset.given) - BATCH) / seconds


def _loop(dataset: Dataset, names: Iterable[str], epochs: int) -> float:
    start = time.perf_counter()
    with training.one_thread():
        for seed, name in enumerate(names):
            net = Protocol.of("digits").model(seed)
            options: dict[str, Any] = {"epochs": epochs, "seed": seed, "progress": False}
            training.train(net, loss(name), dataset, lr=0.01, **options)
    return (seed + 1) * epochs * len(dataset.given) / (time.perf_counter() - start)


def _stacked(dataset: Dataset, names: Iterable[str], epochs: int) -> float:
    start = time.perf_counter()
    with training.one_thread():
        runs = [
            ensemble.Run(Protocol.of("digits").model(seed), loss(name), dataset, 0.01, seed)
            for seed, name in enumerate(names)
        ]
        ensemble.train(runs, epochs=epochs)
    return len(runs) * epochs * len(dataset.given) / (time.perf_counter() - start)


def _as_dataset(train: Pixels, tests: Pixels) -> Dataset:
    source = SETS["cifar10"]
    mean, std = (torch.tensor(v)[:, None, None] for v in (source.mean, source.std))
    images, test_images = (
        ((pixels.permute(0, 3, 1, 2).float() / 255 - mean) / std).contiguous()
        for pixels, _ in (train, tests)
    )
    classes = tuple(map(str, range(10)))
    labels, test_labels = train[1], tests[1]
    return Dataset("made-up", classes, images, labels, labels.clone(), test_images, test_labels)


def _check(images: int, epochs: int, runs: Sequence[int], repeats: int, workers: int) -> None:
    if images < 2 * BATCH:
        raise ValueError(f"{images} images are too few: it takes two batches, {2 * BATCH}")
    if images % BATCH == 1:
        raise ValueError(f"of {images} images, batches of {BATCH} leave one over: two are needed")
    if min(epochs, repeats, *runs) < 1 or workers < 0:
        raise ValueError(
            f"epochs, runs and repeats are at least 1, workers at least 0, not {epochs}, "
            f"{_list(runs)}, {repeats} and {workers}"
        )


def _list(numbers: Iterable[int]) -> str:
    return " ".join(map(str, numbers))
