"""Images that stay in files: opened one by one, and changed at random for training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

__all__ = ["BrokenImage", "Images", "Transforms"]


class BrokenImage(RuntimeError):
    r"""An image file that cannot be read; the message is one sentence, which names it.

    >>> BrokenImage("Caught in a worker\nTraceback\napl.images.BrokenImage: cannot read a.jpg")
    BrokenImage('cannot read a.jpg')
    """

    def __init__(self, message: str) -> None:
        # A reader process's error comes back as the text of its traceback.
        super().__init__(message.strip().splitlines()[-1].rpartition("BrokenImage: ")[2])


@dataclass(frozen=True)
class Transforms:
    """What is done to an image: random changes for training, none for evaluation.

    Training: a random part of the image, resized to ``crop`` x ``crop``; mirrored with probability
    1/2; its brightness, contrast, saturation and hue changed by up to these amounts. Evaluation:
    the shorter side resized to ``resize``, the center ``crop`` x ``crop`` of it. Pixels of 0..1 are
    then scaled to (x - mean) / std per channel.

    Source: dataset.py of HanxunH/Active-Passive-Losses, commit 04bce53.

    Examples
    --------
    >>> from PIL import Image
    >>> image = Image.new("RGB", (300, 400))
    >>> Transforms().training()(image).shape, Transforms().evaluation()(image).shape
    (torch.Size([3, 224, 224]), torch.Size([3, 224, 224]))
    """

    crop: int = 224
    resize: int = 256
    flip: bool = True
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.4
    hue: float = 0.2
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)

    def training(self) -> Callable[[Any], Tensor]:
        """The changes of a training image, drawn from torch's global generator."""
        from torchvision.transforms import v2

        jitter = v2.ColorJitter(self.brightness, self.contrast, self.saturation, self.hue)
        flip = [v2.RandomHorizontalFlip()] if self.flip else []
        return v2.Compose([v2.RandomResizedCrop(self.crop), *flip, jitter, *self._tensor()])

    def evaluation(self) -> Callable[[Any], Tensor]:
        """What a test image gets."""
        from torchvision.transforms import v2

        return v2.Compose([v2.Resize(self.resize), v2.CenterCrop(self.crop), *self._tensor()])

    def _tensor(self) -> list[Any]:
        from torchvision.transforms import v2

        scaled = v2.ToDtype(torch.float32, scale=True)
        return [v2.ToImage(), scaled, v2.Normalize(self.mean, self.std), v2.ToPureTensor()]


class Images(Dataset[tuple[Tensor, int]]):
    """Image files with labels, opened when they are asked for.

    Raises, when an item is read: BrokenImage for a file that is not a whole image.
    """

    def __init__(
        self, paths: Sequence[str], labels: Sequence[int], transform: Callable[[Any], Tensor]
    ) -> None:
        self.paths, self.labels, self.transform = list(paths), list(labels), transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        from PIL import Image

        path = self.paths[index]
        try:
            with Image.open(path) as file:
                image = file.convert("RGB")
        except (OSError, SyntaxError, ValueError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise BrokenImage(f"cannot read the image {path} ({reason})") from None
        return self.transform(image), self.labels[index]
