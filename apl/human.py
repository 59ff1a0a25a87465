"""The labels people gave to the images of CIFAR-10 and CIFAR-100: CIFAR-10N and CIFAR-100N.

Wei et al. (2022) had every training image labeled anew by workers of Amazon Mechanical Turk, those
of CIFAR-10 by three each. What they published is under CC BY-NC 4.0, so apl does not contain it: it
is read from a folder, or downloaded into it from where the authors publish it. Kept here is only
what was counted in it: how often a class was called what, not which image.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any
from urllib.error import URLError

import numpy as np
import torch
from torch import Tensor

from apl.noise import measured
from apl.vision import DEFAULT_ROOT

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    *("LICENSE", "SETS", "HumanLabels", "counted", "is_human", "labels", "noises", "rate"),
    "transition_matrix",
]

LICENSE = "CC BY-NC 4.0, for non-commercial use"
"""Under which CIFAR-10N and CIFAR-100N are published."""

_FOLDER = "cifar-n"
# Of UCSC-REAL/cifar-10-100n: an address with a commit in it always gives the same bytes.
_ADDRESS = (
    "https://raw.githubusercontent.com/UCSC-REAL/cifar-10-100n/"
    "49df7d8a69e355470c77c1c2f2424916325a394b/data/"
)


@dataclass(frozen=True)
class HumanLabels:
    """The human labels of one data set.

    ``file`` and ``md5`` are those of the authors' file, ``archive`` is what it may be called as
    arrays of numpy; ``noises`` has, for each kind of noise, its name in the file and how many of
    the 50,000 labels are wrong.
    """

    title: str
    file: str
    md5: str
    archive: str
    noises: Mapping[str, tuple[str, int]]


SETS: Mapping[str, HumanLabels] = MappingProxyType(
    {
        "cifar10": HumanLabels(
            "CIFAR-10N",
            "CIFAR-10_human.pt",
            "96644db5574813cae939af5f7f2a0aec",
            "cifar10n.npz",
            MappingProxyType(
                {
                    "human-aggregate": ("aggre_label", 4505),
                    "human-random1": ("random_label1", 8617),
                    "human-random2": ("random_label2", 9061),
                    "human-random3": ("random_label3", 8820),
                    "human-worst": ("worse_label", 20104),
                }
            ),
        ),
        "cifar100": HumanLabels(
            "CIFAR-100N",
            "CIFAR-100_human.pt",
            "a67b45c1d7992051865b5c755bd68bb1",
            "cifar100n.npz",
            MappingProxyType({"human-noisy": ("noisy_label", 20100)}),
        ),
    }
)
"""The data sets that people labeled, by the name of the images'.

"human-random1" to "human-random3" are one worker's label for each image; "human-aggregate" is the
majority of the three, at random where all differ; "human-worst" is a wrong one of the three at
random wherever there is one. "human-noisy" is one worker's label for each image of CIFAR-100.
"""

_SIZE = 50_000
_TABLES = ("cifar10n", "cifar10n_opinions", "cifar100n")


def is_human(noise: str) -> bool:
    """Whether a kind of noise is labels that people gave.

    >>> is_human("human-worst"), is_human("symmetric")
    (True, False)
    """
    return any(noise in known.noises for known in SETS.values())


def noises(dataset: str) -> tuple[str, ...]:
    """The kinds of noise that people's labels of a data set are.

    Raises
    ------
    ValueError
        for a data set there are no such labels for; it lists those there are

    >>> noises("cifar100")
    ('human-noisy',)
    """
    if dataset not in SETS:
        raise ValueError(
            f"there are no human labels for {dataset}; there are for {', '.join(SETS)}"
        )
    return tuple(SETS[dataset].noises)


def rate(dataset: str, noise: str) -> float:
    """The share of labels that are wrong, as measured on what the authors published.

    Raises
    ------
    ValueError
        for a data set or noise there are no such labels for; it lists those there are

    Examples
    --------
    >>> rate("cifar10", "human-worst"), rate("cifar100", "human-noisy")
    (0.40208, 0.402)
    """
    _, wrong = _find(dataset, noise)
    return wrong / _SIZE


def labels(dataset: str, noise: str, true: Tensor, root: str | Path | None = None) -> Tensor:
    """The labels that people gave to the training images, in their order: (N,), as ``true``.

    Parameters
    ----------
    dataset, noise
        "cifar10" with "human-aggregate", "human-random1", "human-random2", "human-random3" or
        "human-worst"; "cifar100" with "human-noisy"
    true
        the data set's own labels, (N,) int64: the file's must be the same, in the same order
    root
        the folder of the data sets ("data" where it is None). There, or in "cifar-n" below it, is
        the authors' file, CIFAR-10_human.pt or CIFAR-100_human.pt, or a numpy archive of its
        arrays, cifar10n.npz or cifar100n.npz; where neither is, the authors' is downloaded. It is
        published under CC BY-NC 4.0, for non-commercial use.

    Raises
    ------
    ValueError
        for a data set or noise there are no such labels for, and labels of other images, in another
        order, or other than were published
    FileNotFoundError
        for a named root that does not exist
    ConnectionError
        where there is nothing to read and no network; it says which file to put where
    RuntimeError
        for a broken file, or one with more than arrays in it, which is not unpickled

    Examples
    --------
    >>> labels("digits", "human-worst", torch.arange(10))
    Traceback (most recent call last):
    ValueError: there are no human labels for digits; there are for cifar10, cifar100
    """
    key, wrong = _find(dataset, noise)
    known = SETS[dataset]
    path = _file(known, None if root is None else Path(root))
    arrays = _arrays(path, known, ("clean_label", key))
    own = true.detach().to("cpu", torch.int64)
    theirs, given = (torch.from_numpy(arrays[name].astype(np.int64)) for name in arrays)
    if theirs.shape != own.shape or given.shape != own.shape:
        raise ValueError(
            f"{path} has {len(given)} labels for the {len(own)} training images of {dataset}"
        )
    if (differ := int((theirs != own).sum())) > 0:
        raise ValueError(
            f"the true labels in {path} differ from those of {dataset} for {differ} of {len(own)} "
            "training images: it is for another order of the images than the official one"
        )
    if (found := int((given != own).sum())) != wrong:
        raise ValueError(
            f"{path} is not {known.title} as it was published: {found} labels of {noise} are wrong "
            f"in it, not {wrong}"
        )
    return given.to(true)


def transition_matrix(dataset: str, noise: str, root: str | Path | None = None) -> Tensor:
    """How often people called the images of each class what: (K, K), float64, rows sum to 1.

    For CIFAR-10N it is known without its files, for CIFAR-100N they are counted; root and errors
    are those of :func:`labels`.

    Examples
    --------
    >>> T = transition_matrix("cifar10", "human-worst")
    >>> deer, horse = 4, 7
    >>> round(T[deer, deer].item(), 2), round(T[deer, horse].item(), 2)
    (0.49, 0.15)
    """
    key, _ = _find(dataset, noise)
    known = SETS[dataset]
    if dataset == "cifar10":
        rows = counted("cifar10n").query("noise == @noise").drop(columns=["noise", "true"])
        counts = torch.tensor(rows.to_numpy(), dtype=torch.float64)
        return counts / counts.sum(dim=1, keepdim=True)
    path = _file(known, None if root is None else Path(root))
    clean, given = _arrays(path, known, ("clean_label", key)).values()
    return measured(torch.from_numpy(clean), torch.from_numpy(given), 100)


def counted(table: str) -> pd.DataFrame:
    """What was counted in the authors' files, and is kept here: how often, and not for which image.

    - "cifar10n": for each kind of labels and true class, how many images were called what
    - "cifar10n_opinions": for each class of CIFAR-10, how many images have 0, 1, 2 or 3 of their
      three single labels wrong
    - "cifar100n": for each class of CIFAR-100, how many images were called right, the class it was
      most mistaken for (the first of several) and how often

    Raises
    ------
    ValueError
        for another table; it lists those there are

    Examples
    --------
    >>> counted("cifar10n_opinions").set_index("true").loc["horse"].tolist()
    [3608, 1168, 185, 39]
    """
    import pandas as pd

    if table not in _TABLES:
        raise ValueError(f"there is no table {table!r}; there is {', '.join(_TABLES)}")
    with resources.files("apl.recipes").joinpath(f"{table}.csv").open(encoding="utf-8") as lines:
        return pd.read_csv(lines)


def _find(dataset: str, noise: str) -> tuple[str, int]:
    if noise not in (known := noises(dataset)):
        raise ValueError(
            f"{SETS[dataset].title} has no labels {noise!r}; there is {', '.join(known)}"
        )
    return SETS[dataset].noises[noise]


def _file(known: HumanLabels, root: Path | None) -> Path:
    """Where the labels are; the authors' file is downloaded where they are not."""
    if root is not None and not root.is_dir():
        raise FileNotFoundError(f"there is no folder {str(root)!r} to hold {known.title}")
    folder = DEFAULT_ROOT if root is None else root
    for path in (
        place / name for place in (folder / _FOLDER, folder) for name in (known.file, known.archive)
    ):
        if path.is_file():
            return path
    from torchvision.datasets.utils import download_url

    target = folder / _FOLDER
    try:
        download_url(_ADDRESS + known.file, target, known.file, known.md5)
    except (URLError, ConnectionError, TimeoutError) as error:
        raise ConnectionError(
            f"{known.title} is not in {str(target)!r} and could not be downloaded "
            f"({getattr(error, 'reason', error)}): put {known.file} there, from the folder data of "
            "github.com/UCSC-REAL/cifar-10-100n (not the file _ordered.npy, whose order is "
            f"another); it is published under {LICENSE}"
        ) from error
    except RuntimeError as error:
        raise RuntimeError(
            f"{known.title} came broken: delete {str(target / known.file)!r}, and try again"
        ) from error
    return target / known.file


def _arrays(path: Path, known: HumanLabels, names: tuple[str, ...]) -> dict[str, Any]:
    """Arrays of a file by name, integers of one dimension; nothing else is read from it."""
    try:
        content = _unpacked(path)
        found = {name: np.asarray(content[name]) for name in names}
        if any(a.ndim != 1 or not np.issubdtype(a.dtype, np.integer) for a in found.values()):
            raise ValueError("its labels are no row of integers")
    except (MemoryError, PermissionError):
        raise
    except Exception as error:  # a file that is cut short ends in nearly any exception
        said = f"it has no {error}" if isinstance(error, KeyError) else _line(error)
        raise RuntimeError(
            f"{path} cannot be read as {known.title} ({said}): delete it, and it is downloaded anew"
        ) from error
    return found


def _unpacked(path: Path) -> Mapping[str, Any]:
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as archive:
            return dict(archive)
    # The file was written by a numpy that kept this function under another name.
    rebuild = np.empty(0).__reduce__()[0]
    allowed: list[Any] = [
        *(rebuild, (rebuild, "numpy.core.multiarray._reconstruct")),
        *(np.ndarray, np.dtype, *(type(np.dtype(t)) for t in ("int32", "int64", "uint8"))),
    ]
    if not hasattr(torch.serialization, "get_unsafe_globals_in_checkpoint"):
        raise RuntimeError(f"torch {torch.__version__} cannot read it safely, 2.6 and later can")
    try:
        with torch.serialization.safe_globals(allowed):
            content: Mapping[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise RuntimeError("it holds more than arrays of integers") from error
    if not isinstance(content, dict):
        raise ValueError("it is no dictionary")
    return content


def _line(error: Exception) -> str:
    """What went wrong, in one line without a full stop."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".:") if lines else type(error).__name__
