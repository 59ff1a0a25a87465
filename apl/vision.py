"""The image data sets that are kept in files, read through torchvision, which checks them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any
from urllib.error import URLError

import torch
from torch import Tensor

__all__ = ["DEFAULT_ROOT", "SETS", "Pixels", "Source", "read"]

DEFAULT_ROOT = Path("data")
"""Where data sets are looked for, and downloaded to, unless a folder is named."""


@dataclass(frozen=True)
class Source:
    """One data set: torchvision's class, the folder it unpacks into, and the paper's scaling.

    Pixels of 0..1 are scaled to (x - mean) / std per channel. Without mean and std the training
    part's own are taken, one for all channels.
    """

    title: str
    torchvision: str
    folder: str
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()


SETS: Mapping[str, Source] = MappingProxyType(
    {
        # Mean and std as in dataset.py of the official code.
        "mnist": Source("MNIST", "MNIST", "MNIST", (0.1307,), (0.3081,)),
        "fashion-mnist": Source("Fashion-MNIST", "FashionMNIST", "FashionMNIST"),
        "cifar10": Source(
            "CIFAR-10",
            "CIFAR10",
            "cifar-10-batches-py",
            (0.49139968, 0.48215827, 0.44653124),
            (0.24703233, 0.24348505, 0.26158768),
        ),
        "cifar100": Source(
            "CIFAR-100",
            "CIFAR100",
            "cifar-100-python",
            (0.5071, 0.4865, 0.4409),
            (0.2673, 0.2564, 0.2762),
        ),
    }
)
"""The data sets by name."""


@dataclass(frozen=True)
class Pixels:
    """A part of a data set as it is in the files.

    Shapes: images (N, C, H, W) uint8; labels (N,) int64; both on the CPU.
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]


def read(name: str, root: Path | None = None) -> tuple[Pixels, Pixels]:
    """The training and the test part of a data set; it is downloaded unless it is there.

    Raises
    ------
    FileNotFoundError
        for a named folder that does not exist; like the others it says what to do
    ConnectionError
        where it is not in the folder and cannot be downloaded
    RuntimeError
        where its files are broken
    """
    source = SETS[name]
    if root is not None and not root.is_dir():
        # torchvision would make it: one typing error, and everything is downloaded again.
        raise FileNotFoundError(
            f"there is no folder {str(root)!r}: name the one that holds {source.title} "
            f"(as {source.folder}/), or make it first and {source.title} is downloaded into it"
        )
    folder = DEFAULT_ROOT if root is None else root
    try:
        return _part(source, folder, train=True), _part(source, folder, train=False)
    except (ImportError, MemoryError, PermissionError):
        raise
    except Exception as error:
        # A file that is cut short, or holds something else, ends in nearly any exception.
        if _is_network(error):
            raise ConnectionError(_offline(source, folder, error)) from error
        raise RuntimeError(_broken(source, folder, error)) from error


def _part(source: Source, root: Path, train: bool) -> Pixels:
    from torchvision import datasets

    data = getattr(datasets, source.torchvision)(root, train=train, download=True)
    images = torch.as_tensor(data.data)
    images = images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2)
    labels = torch.as_tensor(data.targets, dtype=torch.int64)
    if len(images) != len(labels):
        raise ValueError(f"{len(images)} images have {len(labels)} labels")
    # MNIST's are called "0 - zero" there.
    classes = tuple(name.split(" - ")[0] for name in data.classes)
    return Pixels(images.contiguous(), labels, classes)


def _is_network(error: Exception) -> bool:
    # torchvision tries MNIST's mirrors in turn and puts what they said into a RuntimeError.
    network: tuple[type[Any], ...] = (URLError, ConnectionError, TimeoutError)
    return isinstance(error, network) or str(error).startswith("Error downloading")


def _offline(source: Source, root: Path, error: Exception) -> str:
    return (
        f"{source.title} is not complete in {str(root)!r} and could not be downloaded "
        f"({_reason(error)}): check the network, or copy its files to "
        f"{str(root / source.folder)!r}, and load it again"
    )


def _broken(source: Source, root: Path, error: Exception) -> str:
    return (
        f"the files of {source.title} in {str(root)!r} cannot be read ({_reason(error)}): "
        f"delete {str(root / source.folder)!r} and any {source.title} archive beside it, "
        f"and load it again to download it anew"
    )


def _reason(error: Exception) -> str:
    """What went wrong, in one line without a full stop."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    last = lines[-1].removeprefix("<urlopen error ").rstrip(".:>") if lines else ""
    return last or type(error).__name__
