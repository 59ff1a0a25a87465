"""CIFAR itself, where it is at hand: APL_DATA names the folder that torchvision reads it from."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch

from apl.protocols import Protocol

ROOT = os.environ.get("APL_DATA")
pytestmark = pytest.mark.skipif(
    not ROOT, reason="needs CIFAR's files in a folder named by APL_DATA"
)


@pytest.mark.parametrize(
    ("name", "noise", "rate", "wrong"),
    [
        ("cifar10", "symmetric", 0.2, 10_000),
        ("cifar10", "symmetric", 0.8, 40_000),
        ("cifar10", "asymmetric", 0.1, 2_452),
        ("cifar10", "asymmetric", 0.4, 9_160),
        ("cifar100", "symmetric", 0.2, 10_000),
        ("cifar100", "symmetric", 0.8, 40_000),
        ("cifar100", "asymmetric", 0.1, 4_945),
        ("cifar100", "asymmetric", 0.4, 19_885),
    ],
)
def test_the_official_noise_on_the_real_labels(name, noise, rate, wrong):
    data = Protocol.of(name, source="2020", root=ROOT).data(noise, rate, seed=0)
    assert len(data.labels) == 50_000 and len(data.test_labels) == 10_000
    assert int((data.given != data.labels).sum()) == wrong


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_images_are_scaled_by_their_own_mean_and_deviation(name):
    images = Protocol.of(name, root=ROOT).data().images
    assert images.shape == (50_000, 3, 32, 32)
    mean, deviation = images.mean((0, 2, 3)), images.std((0, 2, 3))
    # CIFAR-10's usual deviation is the mean of the images' own, less than that of all pixels.
    torch.testing.assert_close(mean, torch.zeros(3), rtol=0, atol=0.02)
    torch.testing.assert_close(deviation, torch.ones(3), rtol=0, atol=0.3)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_one_short_epoch_of_the_protocol(name):
    protocol = replace(Protocol.of(name, source="2020", root=ROOT), samples=256)
    history = protocol.train("nce+rce", "asymmetric", 0.4, epochs=1, progress=False)
    assert history.train_loss.notna().all() and 0 <= history.test_accuracy.item() <= 1
