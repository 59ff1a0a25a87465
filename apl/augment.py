"""Augmentation of a whole batch at once, on its device, with a draw of its own for each sample."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from apl.recipes import DATASETS, augmentation
from apl.vision import SETS

__all__ = ["Augment", "paper"]


@dataclass(frozen=True)
class Augment:
    r"""Random crop, horizontal flip and rotation, in this order.

    - ``crop``: pad by so many pixels on each side, cut the original size out at a random place
    - ``flip``: mirror left and right, with probability 1/2
    - ``rotate``: turn about the center by a uniform angle in ``[-rotate, rotate]`` degrees, each
      pixel taken from the nearest one

    What comes from outside has the value ``fill``, one number or one for each channel. The three
    are composed to one index for each pixel, so that a batch is one read and one write.

    Shapes: images (N, C, H, W), any dtype; the result is as images.
    Raises: TypeError or ValueError for a crop that is no int of at least 0, a rotate outside
    0..180; when called, ValueError for images of another shape, or a fill that does not fit.

    >>> images = torch.arange(4.0).expand(2, 1, 1, 4)
    >>> Augment(flip=True)(images, torch.Generator().manual_seed(0)).flatten(1)
    tensor([[3., 2., 1., 0.],
            [0., 1., 2., 3.]])
    """

    crop: int = 0
    flip: bool = False
    rotate: float = 0.0
    fill: float | tuple[float, ...] = 0.0

    def __post_init__(self) -> None:
        if isinstance(self.crop, bool) or not isinstance(self.crop, int):
            raise TypeError(f"crop must be an int, the width of the border, not {self.crop!r}")
        if self.crop < 0:
            raise ValueError(f"crop must be at least 0, not {self.crop}")
        if isinstance(self.rotate, bool) or not isinstance(self.rotate, int | float):
            raise TypeError(f"rotate must be a number of degrees, not {self.rotate!r}")
        if not 0 <= self.rotate <= 180:
            raise ValueError(f"rotate must lie in 0..180 degrees, not {self.rotate}")

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """The images, each changed at random.

        A generator on the images' device makes a step free of copies; one on the CPU gives the same
        draws on every device.
        """
        if images.ndim != 4:
            raise ValueError(f"images must be (N, C, H, W), not {tuple(images.shape)}")
        values = (self.fill,) if isinstance(self.fill, int | float) else tuple(self.fill)
        if len(values) not in (1, images.shape[1]):
            raise ValueError(
                f"fill has {len(values)} values: it must be one, or one for each of the "
                f"{images.shape[1]} channels"
            )
        if not (self.crop or self.flip or self.rotate):
            return images
        N, _, H, W = images.shape
        # Drawn whether used or not: the crop of a seed does not depend on the rotation.
        u = torch.rand(4, N, 1, 1, generator=generator, device=generator.device)
        top, left, mirror, turn = u.to(images.device, non_blocking=True)
        y = torch.arange(H, device=images.device).view(1, H, 1)
        x = torch.arange(W, device=images.device).view(1, 1, W)
        # From the last step back to the first: where does each pixel of the result come from?
        y, x, inside = self._rotated(y, x, turn, H, W)
        if self.flip:
            x = torch.where(mirror < 0.5, W - 1 - x, x)
        if self.crop:
            shifts = 2 * self.crop + 1
            y = y + (top * shifts).long() - self.crop
            x = x + (left * shifts).long() - self.crop
        inside = inside & (y >= 0) & (y < H) & (x >= 0) & (x < W)
        index = (y.clamp(0, H - 1) * W + x.clamp(0, W - 1)).expand(N, H, W).reshape(N, 1, H * W)
        moved = images.flatten(2).gather(2, index.expand(-1, images.shape[1], -1))
        # Filled on the device, number by number: a copy there would make each step wait for it.
        fill = torch.stack([images.new_full((1, 1), value) for value in values])
        return torch.where(inside.expand(N, H, W)[:, None], moved.view_as(images), fill)

    def _rotated(
        self, y: Tensor, x: Tensor, turn: Tensor, H: int, W: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rows and columns before the rotation, and whether they are inside the image."""
        if not self.rotate:
            return y, x, torch.ones((), dtype=torch.bool, device=y.device)
        angle = (2 * turn - 1) * math.radians(self.rotate)
        cos, sin = angle.cos(), angle.sin()
        # Counterclockwise as seen, rows counting downward; pixel centers lie at halves.
        right, down = x + 0.5 - W / 2, y + 0.5 - H / 2
        column = (cos * right - sin * down + W / 2).floor().long()
        row = (sin * right + cos * down + H / 2).floor().long()
        inside = (row >= 0) & (row < H) & (column >= 0) & (column < W)
        return row, column, inside


def paper(dataset: str) -> Augment:
    """The augmentation of the paper's training runs on a data set.

    As :mod:`apl.recipes` has it: CIFAR-10 is cropped with a border of 4 and flipped, CIFAR-100 also
    rotated by up to 20 degrees; MNIST is left as it is, and so are "fashion-mnist" and the digits,
    which the paper does not use. The border is black *before* scaling, so its scaled value is
    -mean / std.

    Raises: ValueError for another data set.
    Source: dataset.py of HanxunH/Active-Passive-Losses, commit 04bce53.

    >>> paper("cifar100").rotate, paper("mnist") == Augment()
    (20.0, True)
    """
    known = [name for name in (*DATASETS, "fashion-mnist") if name != "webvision"]
    if dataset not in known:
        raise ValueError(f"no augmentation is known for {dataset!r}; it is for {', '.join(known)}")
    steps: dict[str, Any] = {} if dataset == "fashion-mnist" else {**augmentation(dataset)}
    if steps:
        source = SETS[dataset]
        black = zip(source.mean, source.std, strict=True)
        steps["fill"] = tuple(-mean / std for mean, std in black)
    return Augment(**steps)
