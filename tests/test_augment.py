"""Augmentation of a batch, held against Pillow's, one image at a time."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch import Tensor

from apl.augment import Augment, paper


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def one_by_one(images: Tensor, augment: Augment, seed: int) -> Tensor:
    """The same draws, applied by Pillow in the official order: crop, flip, rotation."""
    size = images.shape[-1]
    changed = []
    for image, draw in zip(images, torch.rand(4, len(images), generator=rng(seed)).T, strict=True):
        top, left, mirror, turn = draw.tolist()
        picture = Image.fromarray(image.permute(1, 2, 0).numpy())
        border = augment.crop
        padded = ImageOps.expand(picture, border)
        y, x = (math.floor(u * (2 * border + 1)) for u in (top, left))
        picture = padded.crop((x, y, x + size, y + size))
        if augment.flip and mirror < 0.5:
            picture = ImageOps.mirror(picture)
        picture = picture.rotate((2 * turn - 1) * augment.rotate)
        changed.append(torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1))
    return torch.stack(changed)


def pictures(N: int) -> Tensor:
    return torch.randint(1, 256, (N, 3, 32, 32), dtype=torch.uint8, generator=rng(9))


@pytest.mark.parametrize(
    "augment",
    [
        Augment(crop=4),
        Augment(flip=True),
        Augment(rotate=20),
        Augment(rotate=180),
        Augment(crop=4, flip=True),
        Augment(crop=4, flip=True, rotate=20),
    ],
)
def test_a_batch_is_what_pillow_makes_of_each_image(augment: Augment) -> None:
    images = pictures(60)
    ours, theirs = augment(images, rng(3)), one_by_one(images, augment, seed=3)
    assert ours.dtype == torch.uint8
    # Pillow turns by numbers rounded to 1/65536 of a pixel, so a pixel on an edge may differ.
    share = (ours == theirs).double().mean().item()
    assert share > 0.999 if augment.rotate else share == 1


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_the_papers_border_is_black_before_scaling(name: str) -> None:
    from apl.vision import SETS

    mean, std = (torch.tensor(x)[:, None, None] for x in (SETS[name].mean, SETS[name].std))
    images = pictures(20)
    augment = paper(name)
    plain = Augment(augment.crop, augment.flip, augment.rotate)
    assert (plain.crop, plain.flip, plain.rotate) == (4, True, 20 if name == "cifar100" else 0)
    after = augment((images / 255 - mean) / std, rng())
    before = (plain(images, rng()) / 255 - mean) / std
    torch.testing.assert_close(after, before, rtol=0, atol=1e-6)
    assert (plain(images, rng()) == 0).any()


def test_each_sample_has_its_own_draw() -> None:
    images = torch.arange(32.0 * 32).view(1, 1, 32, 32).expand(4000, -1, -1, -1)
    cropped = Augment(crop=4)(images, rng())[:, 0, 16, 16].long()
    counts = torch.bincount(cropped - images[0, 0, 12, 12].long(), minlength=265)
    offsets = counts[torch.arange(9)[:, None] * 32 + torch.arange(9)]
    assert offsets.sum() == 4000
    # 4000 / 81 = 49 each, give or take five standard deviations.
    assert (offsets - 4000 / 81).abs().max() < 36
    flipped = Augment(flip=True)(images, rng())[:, 0, 0, 0] == 31
    assert flipped.double().mean().item() == pytest.approx(0.5, abs=0.04)
    # Turned by up to 90 degrees, the middle of the top row ends on a half circle, evenly.
    turned = Augment(rotate=90, fill=-1)(images, rng())[:, 0, 0, 16]
    assert len(turned.unique()) > 40
    quarter = (turned % 32 < 4).double().mean().item()
    other = (turned % 32 > 27).double().mean().item()
    assert quarter == pytest.approx(other, abs=0.05)


def test_the_generator_decides_and_nothing_else() -> None:
    images = pictures(8)
    augment = Augment(crop=4, flip=True, rotate=20)
    before = torch.get_rng_state()
    generator = rng(1)
    first, second = augment(images, generator), augment(images, generator)
    assert torch.equal(first, augment(images, rng(1)))
    assert not torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), before)
    # Which one is cropped where does not depend on what else is done.
    flipped = Augment(crop=4)(images, rng(1)), Augment(crop=4, flip=True)(images, rng(1))
    same = [torch.equal(a, b) or torch.equal(a.flip(-1), b) for a, b in zip(*flipped, strict=True)]
    assert all(same)


def test_images_that_are_not_square() -> None:
    images = torch.arange(2.0 * 5 * 9).view(2, 1, 5, 9)
    assert Augment(crop=2, flip=True, rotate=30)(images, rng()).shape == images.shape
    assert torch.equal(Augment(flip=True)(images, rng(0))[0], images[0].flip(-1))


@pytest.mark.parametrize("name", ["digits", "mnist", "fashion-mnist"])
def test_no_augmentation_returns_the_images(name: str) -> None:
    images = torch.zeros(2, 1, 8, 8)
    assert paper(name)(images, rng()) is images


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_batch_on_the_gpu_is_the_batch_on_the_cpu() -> None:
    images = pictures(60)
    for augment in (Augment(crop=4, flip=True), Augment(crop=4, flip=True, rotate=20)):
        here, there = augment(images, rng()), augment(images.cuda(), rng())
        assert there.is_cuda
        assert (here == there.cpu()).double().mean().item() > 0.999
    on_device = Augment(crop=4)(images.cuda(), torch.Generator("cuda").manual_seed(0))
    assert on_device.is_cuda


@pytest.mark.parametrize(
    ("changes", "error", "sentence"),
    [
        ({"crop": -1}, ValueError, "crop must be at least 0, not -1"),
        ({"crop": 0.5}, TypeError, "crop must be an int, the width of the border, not 0.5"),
        ({"rotate": 200}, ValueError, "rotate must lie in 0..180 degrees, not 200"),
        ({"rotate": "20"}, TypeError, "rotate must be a number of degrees, not '20'"),
    ],
)
def test_settings_that_are_refused(
    changes: dict[str, Any], error: type[Exception], sentence: str
) -> None:
    with pytest.raises(error) as raised:
        Augment(**changes)
    assert str(raised.value) == sentence


def test_images_that_are_refused() -> None:
    with pytest.raises(ValueError, match=r"images must be \(N, C, H, W\), not \(3, 32, 32\)"):
        Augment(crop=4)(torch.zeros(3, 32, 32), rng())
    message = "fill has 2 values: it must be one, or one for each of the 3 channels"
    with pytest.raises(ValueError, match=message):
        Augment(crop=4, fill=(0.0, 1.0))(torch.zeros(1, 3, 32, 32), rng())
    with pytest.raises(ValueError, match="no augmentation is known for 'svhn'; it is for digits"):
        paper("svhn")
