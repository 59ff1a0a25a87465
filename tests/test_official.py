"""The official noise: its counts, its flaws, and the very labels it makes wrong."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from apl.noise import CIFAR100_COARSE, official
from apl.official import RING

SIZES = {
    # Class counts of the training parts.
    "mnist": (5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949),
    "cifar10": (5000,) * 10,
    "cifar100": (500,) * 100,
}
MNIST = {7: 1, 2: 7, 5: 6, 6: 5, 3: 8}


def clean(dataset: str) -> Tensor:
    labels = np.repeat(np.arange(len(SIZES[dataset])), SIZES[dataset])
    return torch.from_numpy(np.random.RandomState(7).permutation(labels))


def rows(labels: Tensor, noisy: Tensor) -> Tensor:
    """Row i: which share of class i became what."""
    K = int(labels.max()) + 1
    counts = torch.bincount(K * labels + noisy, minlength=K * K).view(K, K).double()
    return counts / counts.sum(1, keepdim=True)


@pytest.mark.parametrize(
    ("dataset", "kind", "expected"),
    [
        # sum_i (i mod 1009) y_i of the labels the official code made of these, at seed 123.
        ("mnist", "symmetric", 134204948),
        ("mnist", "asymmetric", 138660404),
        ("cifar10", "symmetric", 112798009),
        ("cifar10", "asymmetric", 104980824),
        ("cifar100", "symmetric", 1240933283),
        ("cifar100", "asymmetric", 1240812737),
    ],
)
def test_the_labels_are_the_official_codes(dataset: str, kind: str, expected: int) -> None:
    noisy = official(dataset, clean(dataset), kind, 0.4, seed=123)
    assert (noisy * (torch.arange(len(noisy)) % 1009)).sum().item() == expected


@pytest.mark.parametrize("dataset", SIZES)
@pytest.mark.parametrize("rate", [0.0, 0.2, 0.4, 0.6, 0.8])
def test_symmetric_noise_hits_equally_many_of_each_class(dataset: str, rate: float) -> None:
    labels = clean(dataset)
    K = len(SIZES[dataset])
    noisy = official(dataset, labels, "symmetric", rate, seed=0)
    each = int(int(rate * len(labels)) / K)
    assert torch.bincount(labels[noisy != labels], minlength=K).tolist() == [each] * K
    share = rows(labels, noisy)[0, 1:] * SIZES[dataset][0]
    # Five standard deviations of a class's count.
    assert (share - each / (K - 1)).abs().max() <= 5 * (each / (K - 1)) ** 0.5


def test_counts_are_cut_off_not_rounded() -> None:
    labels = torch.arange(10).repeat(10)
    noisy = official("cifar10", labels, "symmetric", 0.39, seed=0)
    assert torch.bincount(labels[noisy != labels]).tolist() == [3] * 10
    noisy = official("cifar10", labels, "asymmetric", 0.39, seed=0)
    assert torch.bincount(labels[noisy != labels], minlength=10)[[9, 2, 4]].tolist() == [3] * 3


@pytest.mark.parametrize(("rate", "five", "one"), [(0.4, 0.443, 0.356), (0.8, 0.885, 0.712)])
def test_symmetric_noise_on_mnist_is_unequal(rate: float, five: float, one: float) -> None:
    labels = clean("mnist")
    kept = rows(labels, official("mnist", labels, "symmetric", rate, seed=0)).diagonal()
    assert 1 - kept[5].item() == pytest.approx(five, abs=5e-4)
    assert 1 - kept[1].item() == pytest.approx(one, abs=5e-4)


@pytest.mark.parametrize(
    ("rate", "cats", "overall"), [(0.2, 0.16, 0.096), (0.3, 0.21, 0.141), (0.4, 0.24, 0.184)]
)
def test_cats_turned_dogs_are_turned_back(rate: float, cats: float, overall: float) -> None:
    labels = clean("cifar10")
    for seed in range(3):
        noisy = official("cifar10", labels, "asymmetric", rate, seed)
        T = rows(labels, noisy)
        assert T[3, 5].item() == pytest.approx(cats, abs=0.02)
        assert T[3, 3].item() == pytest.approx(1 - cats, abs=0.02)
        assert T[5, 3].item() == pytest.approx(rate, abs=0.02)
        for source, wrong in ((9, 1), (2, 0), (4, 7)):
            assert T[source, wrong].item() == pytest.approx(rate)
        assert (noisy != labels).double().mean().item() == pytest.approx(overall, abs=0.003)
        # Exact, since each step takes an exact share of the labels as they are by then.
        cats_to_dogs = int(rate * 5000)
        dogs_to_cats = int(rate * (5000 + cats_to_dogs))
        assert (noisy == 3).sum().item() == 5000 - cats_to_dogs + dogs_to_cats


def test_asymmetric_noise_on_mnist() -> None:
    labels = clean("mnist")
    for rate, overall in ((0.1, 0.0495), (0.2, 0.099), (0.3, 0.1485), (0.4, 0.198)):
        noisy = official("mnist", labels, "asymmetric", rate, seed=0)
        assert (noisy != labels).double().mean().item() == pytest.approx(overall, abs=0.004)
        T = rows(labels, noisy)
        for i in range(10):
            assert T[i].count_nonzero() == (2 if i in MNIST else 1)
        assert all(T[i, j].item() == pytest.approx(rate, abs=0.033) for i, j in MNIST.items())
    # Drawn, so the counts of a class are not exact.
    counts = {
        int(((official("mnist", labels, "asymmetric", 0.4, s) != labels) & (labels == 7)).sum())
        for s in range(3)
    }
    assert len(counts) == 3


def test_six_of_a_hundred_ring_steps_stay_in_a_superclass() -> None:
    inside = {i: j for i, j in RING.items() if CIFAR100_COARSE[i] == CIFAR100_COARSE[j]}
    assert inside == {6: 7, 19: 15, 42: 43, 63: 64, 86: 87, 89: 85}
    assert sorted(RING) == sorted(RING.values()) == list(range(100))


def test_asymmetric_noise_on_cifar100_follows_the_ring() -> None:
    labels = clean("cifar100")
    noisy = official("cifar100", labels, "asymmetric", 0.4, seed=0)
    wrong = noisy != labels
    pairs = set(zip(labels[wrong].tolist(), noisy[wrong].tolist(), strict=True))
    assert pairs == set(RING.items())
    assert wrong.double().mean().item() == pytest.approx(0.4, abs=0.011)


@pytest.mark.parametrize("dataset", SIZES)
@pytest.mark.parametrize("kind", ["symmetric", "asymmetric"])
def test_seeds_types_and_rate_zero(dataset: str, kind: str) -> None:
    labels = clean(dataset).to(torch.uint8)
    numbers, torchs = np.random.get_state()[1].copy(), torch.get_rng_state()
    first, again, other = (official(dataset, labels, kind, 0.2, seed) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.dtype == torch.uint8
    assert torch.equal(official(dataset, labels, kind, 0, seed=0), labels)
    assert (np.random.get_state()[1] == numbers).all()
    assert torch.equal(torch.get_rng_state(), torchs)


@pytest.mark.parametrize(
    ("changes", "error", "sentence"),
    [
        (
            {"dataset": "digits"},
            ValueError,
            "the official code has no noise for 'digits'; it has for mnist, cifar10, cifar100",
        ),
        (
            {"kind": "asym"},
            ValueError,
            "the kind of noise is 'asym': it must be 'symmetric' or 'asymmetric'",
        ),
        (
            {"rate": 0.95},
            ValueError,
            "at rate 0.95 the official procedure changes 5700 labels of every class, "
            "but only 5421 are of class 5",
        ),
        ({"rate": 2}, ValueError, "rate must lie between 0 and 1, not 2"),
        ({"rate": "0.4"}, TypeError, "rate must be a number from 0 to 1, not '0.4'"),
        ({"seed": -1}, ValueError, "seed must lie in 0..2**32-1, not -1"),
        ({"seed": 0.5}, TypeError, "seed must be an int, not 0.5"),
        (
            {"labels": torch.tensor([10])},
            ValueError,
            "labels must lie in 0..9, but labels[0] is 10",
        ),
        ({"labels": [0]}, TypeError, "labels must be a tensor of integers, not list"),
    ],
)
def test_what_does_not_fit_is_said(
    changes: dict[str, Any], error: type[Exception], sentence: str
) -> None:
    arguments = {"labels": clean("mnist"), "kind": "symmetric", "rate": 0.4, "seed": 0}
    with pytest.raises(error) as raised:
        official(**{"dataset": "mnist", **arguments, **changes})
    assert str(raised.value) == sentence
