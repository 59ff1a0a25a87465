"""Data sets as tensors on one device, with the true labels beside the given ones."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from apl import noise, vision

__all__ = ["Dataset", "load"]


@dataclass(frozen=True, eq=False, repr=False)
class Dataset:
    """A classification data set, clean and noisy labels side by side.

    `labels` are the true labels of the training part; `given` are the ones training sees.

    Shapes: images (N, C, H, W) float32; labels and given (N,) int64; test_images (M, C, H, W)
    float32; test_labels (M,) int64; N, M >= 1, all on one device, labels in 0..K-1.
    Raises: TypeError for another type or dtype, ValueError for another shape, device or label.

    >>> load("digits").with_noise(noise.symmetric(10, 0.6), seed=0)
    Dataset('digits', 1297 train (60.1% wrong labels), 500 test, 1x8x8 images, K=10, cpu)
    """

    name: str
    classes: tuple[str, ...]
    images: Tensor
    labels: Tensor
    given: Tensor
    test_images: Tensor
    test_labels: Tensor

    def __post_init__(self) -> None:
        if not isinstance(self.classes, tuple) or len(self.classes) < 2:
            raise ValueError(f"classes must be a tuple of at least 2 names, not {self.classes!r}")
        for field in ("images", "test_images"):
            x = self._tensor(field, torch.float32)
            if x.ndim != 4 or not len(x):
                raise ValueError(f"{field} must be (N, C, H, W) with N >= 1, not {_shape(x)}")
        if self.test_images.shape[1:] != self.images.shape[1:]:
            sizes = f"{_shape(self.test_images[0])}, not {_shape(self.images[0])}"
            raise ValueError(f"test_images must be as large as images, but they are {sizes}")
        for field, images in (
            ("labels", self.images),
            ("given", self.images),
            ("test_labels", self.test_images),
        ):
            y = self._tensor(field, torch.int64)
            if y.shape != images.shape[:1]:
                raise ValueError(
                    f"{field} must be ({len(images)},), as its images, not {_shape(y)}"
                )
            if (outside := (y < 0) | (y >= self.K)).any():
                wrong = int(y[outside][0])
                raise ValueError(f"{field} must lie in 0..{self.K - 1}, but {wrong} is among them")

    def _tensor(self, field: str, dtype: torch.dtype) -> Tensor:
        value = getattr(self, field)
        if not isinstance(value, Tensor) or value.dtype != dtype:
            kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"{field} must be a tensor of {dtype}, not {kind}")
        if value.device != self.images.device:
            raise ValueError(
                f"{field} must be on {self.images.device}, as images are, not on {value.device}"
            )
        return value

    def __repr__(self) -> str:
        size = "x".join(map(str, self.images.shape[1:]))
        return (
            f"Dataset({self.name!r}, {len(self.images)} train ({self.noise_rate:.1%} wrong labels),"
            f" {len(self.test_images)} test, {size} images, K={self.K}, {self.device})"
        )

    @property
    def K(self) -> int:
        """The number of classes."""
        return len(self.classes)

    @property
    def device(self) -> torch.device:
        """Where all the tensors are."""
        return self.images.device

    @property
    def corrupted(self) -> Tensor:
        """Which training samples have a wrong given label, as (N,) bool."""
        return self.given != self.labels

    @property
    def noise_rate(self) -> float:
        """The share of training samples whose given label is wrong, as measured."""
        return self.corrupted.double().mean().item()

    def to(self, device: str | torch.device) -> Dataset:
        """Return this data set on a device.

        >>> load("digits").to("cpu").device
        device(type='cpu')
        """
        return replace(
            self,
            images=self.images.to(device),
            labels=self.labels.to(device),
            given=self.given.to(device),
            test_images=self.test_images.to(device),
            test_labels=self.test_labels.to(device),
        )

    def with_noise(self, T: Tensor, seed: int, exact: bool = True) -> Dataset:
        """Return this data set with its given labels replaced by corrupted true labels.

        Noise does not add up over calls, and the test part stays as it is; see `noise.corrupt`.

        Shapes: T is (K, K).
        Raises: as `noise.corrupt`, and ValueError for a T of another size.

        >>> load("digits").with_noise(noise.asymmetric("digits", 0.4), seed=0)
        Dataset('digits', 1297 train (20.0% wrong labels), 500 test, 1x8x8 images, K=10, cpu)
        """
        if isinstance(T, Tensor) and T.shape != (self.K, self.K):
            raise ValueError(
                f"T must be ({self.K}, {self.K}), for the {self.K} classes of {self.name},"
                f" not {_shape(T)}"
            )
        return replace(self, given=noise.corrupt(self.labels, T, seed, exact))

    def first(self, n: int) -> Dataset:
        """Return the first n training and the first n test samples, for trying something out.

        Raises: ValueError unless n is an int of at least 1.

        >>> load("digits").first(100)
        Dataset('digits', 100 train (0.0% wrong labels), 100 test, 1x8x8 images, K=10, cpu)
        """
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise ValueError(f"n = {n!r} is not allowed: it is an int of at least 1")
        return replace(
            self,
            images=self.images[:n],
            labels=self.labels[:n],
            given=self.given[:n],
            test_images=self.test_images[:n],
            test_labels=self.test_labels[:n],
        )

    def hold_out(self, fraction: float, seed: int) -> Dataset:
        """Return a copy for tuning, where a random part of the training samples is the test part.

        The held-out samples are judged by their *given* labels, so that tuning sees neither the
        test set nor a clean label; add noise first, then hold out. Such a split is honest. At a
        symmetric noise rate eta, a classifier of clean accuracy acc on unseen samples has expected
        noisy accuracy

            (1 - eta K / (K - 1)) acc + eta / (K - 1),

        increasing in acc while eta < (K - 1) / K: it ranks classifiers as clean labels would, only
        less sharply. Under any diagonally dominant noise the true labels score best, but the
        order of the others may change.

        Shapes: round(fraction N) samples are held out; both parts must keep at least one.
        Raises: TypeError for a fraction that is no number; ValueError for a fraction outside 0..1
        or one that leaves a part empty; as `noise.generator` for the seed.

        >>> load("digits").hold_out(0.2, seed=0)
        Dataset('digits', 1038 train (0.0% wrong labels), 259 test, 1x8x8 images, K=10, cpu)
        """
        if isinstance(fraction, bool) or not isinstance(fraction, int | float):
            raise TypeError(f"fraction must be a number between 0 and 1, not {fraction!r}")
        if not 0 < fraction < 1:
            raise ValueError(f"fraction must lie strictly between 0 and 1, not {fraction}")
        N = len(self.images)
        held = round(fraction * N)
        if held in (0, N):
            raise ValueError(f"fraction {fraction} of {N} samples leaves one of the parts empty")
        # Another stream than the noise's: the split must not depend on which labels are wrong.
        order = torch.randperm(N, generator=noise.generator(seed, stream=1)).to(self.device)
        test, train = order[:held], order[held:]
        return replace(
            self,
            images=self.images[train],
            labels=self.labels[train],
            given=self.given[train],
            test_images=self.images[test],
            test_labels=self.given[test],
        )


def load(
    name: str = "digits", *, device: str | torch.device = "cpu", root: str | Path | None = None
) -> Dataset:
    """Return a data set by name, without noise, on a device.

    "digits": the 1,797 8x8 digits that come with scikit-learn, nothing to download; a fixed
    stratified split into 1,297 training and 500 test samples, scaled to mean 0 and variance 1 by
    the training part.

    "digit-pairs": two of these digits side by side, 8x16, as one number of two figures: 100
    classes, 5,000 pairs of training digits and 2,000 pairs of test digits, drawn once and for all,
    equally many of every class.

    "mnist", "cifar10", "cifar100": the official parts, scaled by the paper's means and standard
    deviations; "fashion-mnist": likewise, but mean 0 and variance 1 by the training part. All the
    images are on the device as float32, 740 MB for CIFAR.

    `root` is the folder that holds them, as torchvision lays them out; what is not there is
    downloaded into it. Without it they are in the folder "data". The digits need none.

    Raises: ValueError for an unknown name; FileNotFoundError for a root that does not exist,
    ConnectionError where there is nothing to read and no network, RuntimeError for broken files.

    >>> load("digits", device="cpu")
    Dataset('digits', 1297 train (0.0% wrong labels), 500 test, 1x8x8 images, K=10, cpu)
    """
    if name == "digits":
        return _digits().to(device)
    if name == "digit-pairs":
        return _digit_pairs().to(device)
    if not isinstance(name, str) or name not in vision.SETS:
        known = ", ".join(["digits", "digit-pairs", *vision.SETS])
        raise ValueError(f"no data set {name!r}; available: {known}")
    return _from_files(name, None if root is None else Path(root), torch.device(device))


def _shape(x: Tensor) -> tuple[int, ...]:
    return tuple(x.shape)


def _digits() -> Dataset:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    raw = load_digits()
    labels = torch.as_tensor(raw.target, dtype=torch.int64)
    train, test = train_test_split(
        range(len(labels)), test_size=500, stratify=raw.target, random_state=0
    )
    images = torch.as_tensor(raw.images)[:, None]
    std, mean = torch.std_mean(images[train], correction=0)
    images = ((images - mean) / std).float()
    return Dataset(
        name="digits",
        classes=tuple(str(digit) for digit in raw.target_names),
        images=images[train],
        labels=labels[train],
        given=labels[train].clone(),
        test_images=images[test],
        test_labels=labels[test],
    )


def _digit_pairs() -> Dataset:
    digits = _digits()
    images, labels = _pairs(digits.images, digits.labels, each=50, seed=0)
    test_images, test_labels = _pairs(digits.test_images, digits.test_labels, each=20, seed=1)
    return Dataset(
        name="digit-pairs",
        classes=tuple(f"{number:02}" for number in range(100)),
        images=images,
        labels=labels,
        given=labels.clone(),
        test_images=test_images,
        test_labels=test_labels,
    )


def _pairs(images: Tensor, labels: Tensor, each: int, seed: int) -> tuple[Tensor, Tensor]:
    """Pairs of images, drawn with replacement, ``each`` for every two digits, and their numbers."""
    numbers = torch.arange(100).repeat_interleave(each)
    draws = noise.generator(seed)
    sides = []
    for digit in (numbers // 10, numbers % 10):
        order = labels.argsort(stable=True)
        counts = labels.bincount()
        first = counts.cumsum(0) - counts
        place = (torch.rand(len(digit), generator=draws) * counts[digit]).long()
        sides.append(images[order[first[digit] + place]])
    return torch.cat(sides, dim=-1), numbers


def _from_files(name: str, root: Path | None, device: torch.device) -> Dataset:
    train, test = vision.read(name, root)
    source = vision.SETS[name]
    # Bytes go to the device, where scaling takes one copy of the floats and no second.
    pixels = train.images.to(device)
    if source.mean:
        mean, std = (
            torch.tensor(v, device=device)[:, None, None] for v in (source.mean, source.std)
        )
    else:
        values = torch.arange(256, dtype=torch.float64, device=device) / 255
        share = pixels.flatten().bincount(minlength=256) / pixels.numel()
        mean = (share * values).sum().float()
        std = (share * (values - mean) ** 2).sum().sqrt().float()
    labels = train.labels.to(device)
    return Dataset(
        name=name,
        classes=train.classes,
        images=pixels.float().div_(255).sub_(mean).div_(std),
        labels=labels,
        given=labels.clone(),
        test_images=test.images.to(device).float().div_(255).sub_(mean).div_(std),
        test_labels=test.labels.to(device),
    )
