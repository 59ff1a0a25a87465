from __future__ import annotations

import subprocess
import sys
from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from apl.data import Dataset, load
from apl.noise import asymmetric, generator, symmetric

TENSORS = ("images", "labels", "given", "test_images", "test_labels")


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load("digits")


def tagged(labels: Tensor, K: int) -> Dataset:
    """A data set whose one-pixel images are the samples' own numbers."""
    N = len(labels)
    images = torch.arange(N, dtype=torch.float32).view(N, 1, 1, 1)
    classes = tuple(map(str, range(K)))
    return Dataset("tagged", classes, images, labels, labels, images[:1], labels[:1])


# --- load ---


def test_digits_has_the_documented_shapes(digits: Dataset) -> None:
    assert digits.images.shape == (1297, 1, 8, 8)
    assert digits.test_images.shape == (500, 1, 8, 8)
    assert digits.classes == tuple("0123456789")
    assert digits.K == 10
    assert digits.device == torch.device("cpu")
    assert torch.equal(digits.given, digits.labels)
    assert digits.noise_rate == 0


def test_digits_is_scaled_by_the_training_part(digits: Dataset) -> None:
    assert digits.images.mean().item() == pytest.approx(0, abs=1e-5)
    assert digits.images.std(correction=0).item() == pytest.approx(1, abs=1e-5)
    # Both parts hold blank and full pixels; scaled apart, these would differ.
    assert digits.test_images.aminmax() == digits.images.aminmax()


def test_digits_split_is_stratified_and_fixed(digits: Dataset) -> None:
    share = digits.labels.bincount() / 1297 - digits.test_labels.bincount() / 500
    assert share.abs().max() < 0.002
    again = load()
    assert all(torch.equal(getattr(digits, field), getattr(again, field)) for field in TENSORS)


def test_digits_split_is_a_partition_with_the_right_labels(digits: Dataset) -> None:
    from sklearn.datasets import load_digits

    raw = load_digits()
    images = torch.cat([digits.images, digits.test_images]).flatten(1)
    labels = torch.cat([digits.labels, digits.test_labels])
    scale = 16 / (images.max() - images.min())
    pixels = ((images - images.min()) * scale).round().int().tolist()
    ours = sorted(zip(pixels, labels.tolist(), strict=True))
    assert ours == sorted(zip(raw.data.astype(int).tolist(), raw.target.tolist(), strict=True))


@pytest.mark.parametrize("name", ["imagenet", "Digits", None, ["digits"]])
def test_load_refuses_an_unknown_name(name: Any) -> None:
    with pytest.raises(ValueError, match="available: digits") as raised:
        load(name)
    assert repr(name) in str(raised.value)


def test_importing_the_module_does_not_import_sklearn() -> None:
    code = "import sys, apl.data; sys.exit('sklearn' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- noise ---


def test_symmetric_noise_on_digits(digits: Dataset) -> None:
    noisy = digits.with_noise(symmetric(10, 0.6), seed=0)
    # Each class's count of right labels is within one of the expected count.
    assert noisy.noise_rate == pytest.approx(0.6, abs=10 / 1297)
    for i in range(10):
        of_class = digits.labels == i
        kept = (noisy.given[of_class] == i).sum().item()
        assert abs(kept - 0.4 * of_class.sum().item()) < 1
    assert noisy.corrupted.dtype == torch.bool
    assert noisy.corrupted.sum().item() == round(noisy.noise_rate * 1297)


def test_asymmetric_noise_on_digits(digits: Dataset) -> None:
    noisy = digits.with_noise(asymmetric("digits", 0.4), seed=0)
    # Five of ten classes are flipped at rate .4, and they are nearly half of the samples.
    size = digits.labels.bincount()
    expected = 0.4 * size[[2, 3, 5, 6, 7]].sum().item()
    assert abs(noisy.noise_rate * 1297 - expected) < 5
    assert noisy.noise_rate == pytest.approx(0.2, abs=0.005)
    assert set(noisy.labels[noisy.corrupted].tolist()) == {2, 3, 5, 6, 7}


def test_noise_touches_only_the_given_labels(digits: Dataset) -> None:
    noisy = digits.with_noise(symmetric(10, 0.6), seed=0)
    for field in ("images", "labels", "test_images", "test_labels"):
        assert torch.equal(getattr(noisy, field), getattr(digits, field))
    assert digits.noise_rate == 0


def test_noise_does_not_add_up(digits: Dataset) -> None:
    T = symmetric(10, 0.4)
    once = digits.with_noise(T, seed=1)
    assert torch.equal(once.given, digits.with_noise(T, seed=0).with_noise(T, seed=1).given)
    assert not torch.equal(once.given, digits.with_noise(T, seed=0).given)


def test_noise_can_be_drawn_independently(digits: Dataset) -> None:
    rates = [digits.with_noise(symmetric(10, 0.6), s, exact=False).noise_rate for s in range(5)]
    # Exact counts would be within one per class of the expected ones.
    assert max(abs(rate - 0.6) for rate in rates) > 10 / 1297
    assert rates == pytest.approx([0.6] * 5, abs=0.07)


@pytest.mark.parametrize("K", [9, 11])
def test_noise_of_another_size_is_refused(digits: Dataset, K: int) -> None:
    with pytest.raises(ValueError, match="for the 10 classes of digits, not") as raised:
        digits.with_noise(symmetric(K, 0.5), seed=0)
    assert str(raised.value).endswith(f"not ({K}, {K})")


# --- holding out ---


def test_hold_out_splits_the_training_part() -> None:
    data = tagged(torch.arange(5).repeat(20), K=5).with_noise(symmetric(5, 0.5), seed=0)
    split = data.hold_out(0.25, seed=0)
    train = split.images.flatten().long()
    test = split.test_images.flatten().long()
    assert len(test) == 25
    assert torch.cat([train, test]).sort().values.tolist() == list(range(100))
    assert test.tolist() != sorted(test.tolist())
    assert torch.equal(split.labels, data.labels[train])
    assert torch.equal(split.given, data.given[train])
    assert torch.equal(split.test_labels, data.given[test])
    assert not torch.equal(split.test_labels, data.labels[test])


def test_hold_out_repeats_by_seed_and_leaves_the_global_state() -> None:
    data = tagged(torch.arange(5).repeat(20), K=5)
    before = torch.get_rng_state()
    first, again, other = (data.hold_out(0.2, seed).test_images for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    of_the_noise = torch.randperm(100, generator=generator(0))[:20]
    assert not torch.equal(first, data.images[of_the_noise])
    assert torch.equal(before, torch.get_rng_state())


def test_hold_out_holds_out_each_sample_equally_often() -> None:
    data = tagged(torch.arange(2).repeat(10), K=2)
    hits = torch.zeros(20)
    for seed in range(400):
        hits[data.hold_out(0.25, seed).test_images.flatten().long()] += 1
    # 45 is about five standard deviations.
    assert (hits - 100).abs().max() < 45


@pytest.mark.parametrize("exact", [True, False])
def test_noise_of_the_same_seed_does_not_decide_who_is_held_out(exact: bool) -> None:
    data = tagged(torch.arange(10).repeat(100), K=10)
    rates = []
    for seed in range(20):
        noisy = data.with_noise(symmetric(10, 0.5), seed, exact)
        held = noisy.hold_out(0.5, seed).test_images.flatten().long()
        rates.append(noisy.corrupted[held].double().mean().item())
    assert sum(rates) / 20 == pytest.approx(0.5, abs=0.025)


@pytest.mark.parametrize(("K", "eta"), [(2, 0.3), (10, 0.2), (10, 0.6), (10, 0.9)])
def test_noisy_accuracy_follows_the_formula(K: int, eta: float) -> None:
    N = 40_000
    data = tagged(torch.arange(K).repeat(N // K), K).with_noise(symmetric(K, eta), seed=0)
    split = data.hold_out(0.5, seed=0)
    held = split.test_images.flatten().long()
    rng = torch.Generator().manual_seed(5)
    scores = []
    for acc in (0.1, 0.5, 0.9, 1.0):
        wrong = (data.labels + torch.randint(1, K, (N,), generator=rng)) % K
        right = torch.rand(N, generator=rng) < acc
        prediction = torch.where(right, data.labels, wrong)[held]
        clean = (prediction == data.labels[held]).double().mean().item()
        noisy = (prediction == split.test_labels).double().mean().item()
        formula = (1 - eta * K / (K - 1)) * clean + eta / (K - 1)
        # About five standard deviations of the share of 20,000 samples.
        assert noisy == pytest.approx(formula, abs=0.018)
        scores.append(noisy)
    if eta < (K - 1) / K:
        assert scores == sorted(scores)
    else:
        assert max(scores) - min(scores) < 0.02


@pytest.mark.parametrize(
    ("fraction", "error", "message"),
    [
        (0, ValueError, "fraction must lie strictly between 0 and 1, not 0"),
        (1.0, ValueError, "fraction must lie strictly between 0 and 1, not 1.0"),
        (float("nan"), ValueError, "fraction must lie strictly between 0 and 1, not nan"),
        ("0.1", TypeError, "fraction must be a number between 0 and 1, not '0.1'"),
        (0.01, ValueError, "fraction 0.01 of 10 samples leaves one of the parts empty"),
        (0.99, ValueError, "fraction 0.99 of 10 samples leaves one of the parts empty"),
    ],
)
def test_hold_out_refuses(fraction: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as raised:
        tagged(torch.arange(2).repeat(5), K=2).hold_out(fraction, seed=0)
    assert str(raised.value) == message


def test_hold_out_refuses_a_seed_that_is_no_int(digits: Dataset) -> None:
    with pytest.raises(TypeError, match=r"seed must be an int, not 0\.5"):
        digits.hold_out(0.2, seed=0.5)  # type: ignore[arg-type]


# --- the class itself ---


def test_repr_says_what_there_is(digits: Dataset) -> None:
    noisy = replace(digits, given=(digits.labels + (torch.arange(1297) < 130)) % 10)
    assert repr(noisy) == (
        "Dataset('digits', 1297 train (10.0% wrong labels), 500 test, 1x8x8 images, K=10, cpu)"
    )


def test_fields_cannot_be_assigned(digits: Dataset) -> None:
    with pytest.raises(FrozenInstanceError):
        digits.name = "other"  # type: ignore[misc]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_everything_moves_and_noise_is_the_same_there(digits: Dataset) -> None:
    there = load("digits", device="cuda").with_noise(symmetric(10, 0.6), 0).hold_out(0.2, 0)
    here = digits.with_noise(symmetric(10, 0.6), 0).hold_out(0.2, 0)
    assert there.device.type == "cuda"
    back = there.to("cpu")
    assert all(getattr(there, field).is_cuda for field in TENSORS)
    assert all(torch.equal(getattr(back, field), getattr(here, field)) for field in TENSORS)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"classes": ["0", "1"]}, ValueError, "classes must be a tuple of at least 2 names"),
        ({"classes": ("0",)}, ValueError, "classes must be a tuple of at least 2 names"),
        (
            {"images": torch.zeros(6, 1, 1, 1).double()},
            TypeError,
            "images must be a tensor of torch.float32, not torch.float64",
        ),
        ({"images": [0.0]}, TypeError, "images must be a tensor of torch.float32, not list"),
        (
            {"images": torch.zeros(6, 8)},
            ValueError,
            "images must be (N, C, H, W) with N >= 1, not (6, 8)",
        ),
        (
            {"test_images": torch.zeros(0, 1, 1, 1)},
            ValueError,
            "test_images must be (N, C, H, W) with N >= 1, not (0, 1, 1, 1)",
        ),
        (
            {"test_images": torch.zeros(1, 3, 1, 1)},
            ValueError,
            "test_images must be as large as images, but they are (3, 1, 1), not (1, 1, 1)",
        ),
        (
            {"labels": torch.zeros(6, dtype=torch.int32)},
            TypeError,
            "labels must be a tensor of torch.int64, not torch.int32",
        ),
        (
            {"given": torch.zeros(5).long()},
            ValueError,
            "given must be (6,), as its images, not (5,)",
        ),
        (
            {"test_labels": torch.zeros(6).long()},
            ValueError,
            "test_labels must be (1,), as its images, not (6,)",
        ),
        (
            {"given": torch.tensor([0, 1, 2, 0, 1, 2])},
            ValueError,
            "given must lie in 0..1, but 2 is among them",
        ),
        (
            {"labels": torch.tensor([0, 1, -1, 0, 1, 0])},
            ValueError,
            "labels must lie in 0..1, but -1 is among them",
        ),
        (
            {"given": torch.zeros(6).long().to("meta")},
            ValueError,
            "given must be on cpu, as images are, not on meta",
        ),
    ],
)
def test_parts_that_do_not_fit_are_refused(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    good = tagged(torch.tensor([0, 1] * 3), K=2)
    with pytest.raises(error) as raised:
        replace(good, **changes)
    assert str(raised.value).startswith(message)


def test_digit_pairs_are_two_digits_of_their_own_part():
    digits, pairs = load("digits"), load("digit-pairs")
    assert pairs.K == 100 and pairs.images.shape[1:] == (1, 8, 16)
    for images, labels, singles, their in (
        (pairs.images, pairs.labels, digits.images, digits.labels),
        (pairs.test_images, pairs.test_labels, digits.test_images, digits.test_labels),
    ):
        assert len(set(labels.bincount().tolist())) == 1
        whole = singles.flatten(1)
        for side, figure in ((images[..., :8], labels // 10), (images[..., 8:], labels % 10)):
            distance = torch.cdist(side.flatten(1), whole)
            nearest = distance.argmin(1)
            assert (side.flatten(1) == whole[nearest]).all()
            assert (their[nearest] == figure).all()
    assert (load("digit-pairs").images == pairs.images).all()
