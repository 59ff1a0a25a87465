from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from apl.noise import (
    CIFAR100_COARSE,
    asymmetric,
    corrupt,
    generator,
    is_diagonally_dominant,
    symmetric,
)

INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]
RATES = st.floats(0, 1) | st.sampled_from([0, 1, 0.5, 0.6])
MNIST = {7: 1, 2: 7, 5: 6, 6: 5, 3: 8}
CIFAR10 = {9: 1, 2: 0, 3: 5, 5: 3, 4: 7}


def table(labels: Tensor, noisy: Tensor, K: int) -> Tensor:
    """counts[i, j]: how many labels i became j."""
    return torch.bincount(K * labels.long() + noisy.long(), minlength=K * K).view(K, K)


def image(T: Tensor) -> dict[int, int]:
    """The map of an asymmetric T of rate 1, without the classes that it keeps."""
    return {i: j for i, j in enumerate(T.argmax(dim=1).tolist()) if i != j}


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, Tensor, int]:
    """Labels, empty classes among them, a T with zeros and ties, and a seed."""
    K = draw(st.integers(2, 7))
    row = st.lists(st.integers(0, 5), min_size=K, max_size=K).filter(any)
    weights = torch.tensor([draw(row) for _ in range(K)], dtype=torch.float64)
    labels = torch.tensor(draw(st.lists(st.integers(0, K - 1), max_size=80)), dtype=torch.int64)
    return labels, weights / weights.sum(dim=1, keepdim=True), draw(st.integers(0, 2**32 - 1))


# --- transition matrices ---


@given(st.integers(2, 30), RATES)
@settings(deadline=None)
def test_symmetric_has_the_rate_off_the_diagonal(K: int, rate: float) -> None:
    T = symmetric(K, rate)
    assert T.shape == (K, K)
    assert T.dtype == torch.float64
    assert (T >= 0).all()
    torch.testing.assert_close(T.sum(dim=1), torch.ones(K, dtype=torch.float64))
    for i in range(K):
        for j in range(K):
            assert T[i, j].item() == pytest.approx(1 - rate if i == j else rate / (K - 1))


@given(st.sampled_from(["mnist", "digits", "cifar10", "cifar100"]), RATES)
@settings(deadline=None)
def test_asymmetric_keeps_a_class_or_splits_it_in_two(dataset: str, rate: float) -> None:
    T = asymmetric(dataset, rate)
    flips = image(asymmetric(dataset, 1))
    assert T.dtype == torch.float64
    for i in range(len(T)):
        expected = torch.zeros(len(T), dtype=torch.float64)
        expected[i] = 1 - rate if i in flips else 1
        if i in flips:
            expected[flips[i]] = rate
        torch.testing.assert_close(T[i], expected)


@pytest.mark.parametrize(
    ("dataset", "flips"), [("mnist", MNIST), ("digits", MNIST), ("cifar10", CIFAR10)]
)
def test_asymmetric_maps_are_the_papers(dataset: str, flips: dict[int, int]) -> None:
    T = asymmetric(dataset, 1)
    assert T.shape == (10, 10)
    assert image(T) == flips


def test_cifar100_has_20_superclasses_of_5() -> None:
    assert Counter(Counter(CIFAR100_COARSE).values()) == {5: 20}
    assert set(CIFAR100_COARSE) == set(range(20))


def test_cifar100_ring_goes_once_around_each_superclass_in_order() -> None:
    ring = image(asymmetric("cifar100", 1))
    assert sorted(ring) == sorted(ring.values()) == list(range(100))
    assert all(CIFAR100_COARSE[i] == CIFAR100_COARSE[j] for i, j in ring.items())
    # One step down per superclass, from its last label to its first: one cycle, in label order.
    assert sum(j < i for i, j in ring.items()) == 20
    # Superclass 0, the aquatic mammals: beaver, dolphin, otter, seal, whale.
    assert [ring[i] for i in (4, 30, 55, 72, 95)] == [30, 55, 72, 95, 4]


def test_cifar100_only_six_edges_of_the_official_blocks_stay_in_a_superclass() -> None:
    blocks = {i: i // 5 * 5 + (i + 1) % 5 for i in range(100)}
    inside = {i: j for i, j in blocks.items() if CIFAR100_COARSE[i] == CIFAR100_COARSE[j]}
    assert inside == {6: 7, 19: 15, 42: 43, 63: 64, 86: 87, 89: 85}


@pytest.mark.parametrize("K", [2, 3, 10, 100])
def test_symmetric_dominance_ends_where_all_labels_are_equally_likely(K: int) -> None:
    boundary = (K - 1) / K
    assert is_diagonally_dominant(symmetric(K, boundary - 1e-6))
    assert not is_diagonally_dominant(symmetric(K, boundary))
    assert not is_diagonally_dominant(symmetric(K, boundary + 1e-6))


def test_dominance_needs_every_row() -> None:
    assert is_diagonally_dominant(asymmetric("cifar10", 0.49))
    assert not is_diagonally_dominant(asymmetric("cifar10", 0.5))


# --- corrupt ---


@given(problems())
@settings(max_examples=200, deadline=None)
def test_exact_counts_follow_largest_remainders(problem: tuple[Tensor, Tensor, int]) -> None:
    labels, T, seed = problem
    noisy = corrupt(labels, T, seed)
    counts = table(labels, noisy, len(T))
    expected = labels.bincount(minlength=len(T))[:, None] * T
    assert (counts.sum(dim=1) == labels.bincount(minlength=len(T))).all()
    assert ((counts - expected).abs() < 1 - 1e-10).all()
    assert (counts[T == 0] == 0).all()
    for got, want in zip(counts, expected, strict=True):
        remainder = want - (want + 1e-9).floor()
        up = got > want + 1e-9
        if up.any():
            assert remainder[up].min() >= remainder[~up].max() - 1e-9


@given(problems(), st.booleans())
@settings(deadline=None)
def test_same_seed_same_labels_and_the_global_state_untouched(
    problem: tuple[Tensor, Tensor, int], exact: bool
) -> None:
    labels, T, seed = problem
    before, kept = torch.get_rng_state(), labels.clone()
    first = corrupt(labels, T, seed, exact)
    torch.rand(3)
    state = torch.get_rng_state()
    assert not torch.equal(before, state)
    assert torch.equal(first, corrupt(labels, T, seed, exact))
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(labels, kept)


def test_global_seed_does_not_matter_and_is_not_consumed() -> None:
    labels, T = torch.arange(10).repeat(10), symmetric(10, 0.5)
    noisy = []
    for global_seed in (1, 2):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(global_seed)
            before = torch.get_rng_state()
            noisy.append(corrupt(labels, T, seed=0))
            assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(*noisy)


@pytest.mark.parametrize("exact", [True, False])
def test_other_seeds_give_other_labels(exact: bool) -> None:
    labels, T = torch.arange(10).repeat(20), symmetric(10, 0.5)
    results = {tuple(corrupt(labels, T, seed, exact).tolist()) for seed in range(20)}
    assert len(results) == 20


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("dtype", INTEGERS)
def test_dtype_and_shape_are_kept(dtype: torch.dtype, exact: bool) -> None:
    labels = torch.arange(10).repeat(7)
    noisy = corrupt(labels.to(dtype), symmetric(10, 0.5), 3, exact)
    assert noisy.dtype == dtype
    assert noisy.shape == labels.shape
    assert torch.equal(noisy.long(), corrupt(labels, symmetric(10, 0.5), 3, exact))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("exact", [True, False])
def test_labels_do_not_depend_on_the_device(exact: bool) -> None:
    labels, T = torch.arange(10).repeat(50), symmetric(10, 0.6)
    noisy = corrupt(labels.cuda(), T.cuda(), 0, exact)
    assert noisy.is_cuda
    assert torch.equal(noisy.cpu(), corrupt(labels, T, 0, exact))


@pytest.mark.parametrize("exact", [True, False])
def test_rate_zero_changes_nothing_and_rate_one_everything(exact: bool) -> None:
    labels = torch.arange(10).repeat(30)
    assert torch.equal(corrupt(labels, symmetric(10, 0), 0, exact), labels)
    assert (corrupt(labels, symmetric(10, 1), 0, exact) != labels).all()
    flips = torch.tensor([MNIST.get(i, i) for i in range(10)])
    assert torch.equal(corrupt(labels, asymmetric("mnist", 1), 0, exact), flips[labels])


@pytest.mark.parametrize("exact", [True, False])
def test_two_classes_no_labels_and_an_empty_class(exact: bool) -> None:
    two = torch.tensor([0, 1] * 10)
    assert torch.equal(corrupt(two, symmetric(2, 1), 0, exact), 1 - two)
    assert corrupt(two[:0], symmetric(2, 0.5), 0, exact).shape == (0,)
    gap = torch.tensor([0, 2] * 15)
    noisy = corrupt(gap, asymmetric("mnist", 1), 0, exact)
    assert torch.equal(noisy, torch.where(gap == 2, 7, 0))


@pytest.mark.parametrize(
    ("n", "row"),
    [(10, [0.4, 0.15, 0.15, 0.15, 0.15]), (25, [0.58, 0.42]), (2, [0.25, 0.25, 0.25, 0.25])],
    ids=["four of equal probability", "equal but for rounding errors", "none gets a whole one"],
)
def test_equal_remainders_are_broken_evenly(n: int, row: list[float]) -> None:
    T = torch.tensor([row] * len(row), dtype=torch.float64)
    labels = torch.zeros(n, dtype=torch.int64)
    seeds = 400
    extra = sum(table(labels, corrupt(labels, T, seed), len(row))[0] for seed in range(seeds))
    extra = extra - seeds * (n * T[0] + 1e-9).floor()
    tied = torch.tensor([abs(n * p % 1 - 0.5) < 1e-9 for p in row])
    assert (extra[~tied] == 0).all()
    # Each of the ties wins half the time; 50 is five standard deviations.
    assert ((extra[tied] - seeds / 2).abs() < 50).all()


@pytest.mark.parametrize("exact", [True, False])
def test_each_sample_is_equally_likely_to_get_each_label(exact: bool) -> None:
    K, n, seeds = 4, 10, 400
    T = symmetric(K, 0.6)
    labels = torch.arange(K).repeat(n)
    hits = torch.zeros(K * n, K)
    for seed in range(seeds):
        hits += torch.nn.functional.one_hot(corrupt(labels, T, seed, exact), K)
    # 0.12 is about five standard deviations of the share of 400 draws.
    assert ((hits / seeds - T[labels]).abs() < 0.12).all()


def test_independent_labels_follow_T_but_not_exactly() -> None:
    labels = torch.arange(10).repeat(10_000)
    T = torch.rand(10, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    T[T < 0.3] = 0
    T = (T + torch.eye(10)) / (T + torch.eye(10)).sum(dim=1, keepdim=True)
    counts = table(labels, corrupt(labels, T, 0, exact=False), 10)
    assert (counts[T == 0] == 0).all()
    assert ((counts / 10_000 - T).abs() < 0.025).all()
    assert ((counts - 10_000 * T).abs() > 1).any()


@given(problems())
@settings(deadline=None)
def test_independent_labels_never_take_a_zero(problem: tuple[Tensor, Tensor, int]) -> None:
    labels, T, seed = problem
    assert (T[labels, corrupt(labels, T, seed, exact=False)] > 0).all()


@pytest.mark.parametrize("draw", [0, 2**32 - 1])
def test_extreme_draws_stay_in_their_row_and_off_its_zeros(
    draw: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "randint", lambda _, size, generator: torch.full(size, draw))
    labels = torch.arange(100)
    noisy = corrupt(labels, asymmetric("cifar100", 1), 0, exact=False)
    assert sorted(noisy.tolist()) == list(range(100))
    T = torch.tensor([[0, 0.1, 0.2, 0.7, 0]] * 5, dtype=torch.float64)
    assert set(corrupt(labels % 5, T, 0, exact=False).tolist()) == {3 if draw else 1}
    # The first row adds up to 1 + 2e-16 in double precision.
    T = torch.tensor([[9, 6, 6], [21, 0, 0], [21, 0, 0]], dtype=torch.float64) / 21
    noisy = corrupt(torch.arange(3), T, 0, exact=False)
    assert noisy.tolist() == [2 if draw else 0, 0, 0]


def test_single_precision_T_is_as_good_as_double() -> None:
    labels, T = torch.arange(10).repeat(100), symmetric(10, 0.6)
    assert torch.equal(corrupt(labels, T.float(), 0), corrupt(labels, T, 0))


def test_a_row_short_of_1_within_the_tolerance_does_not_spill_into_its_zeros() -> None:
    T = torch.tensor([[1 - 9e-7, 0], [0.5, 0.5]], dtype=torch.float64)
    labels = torch.zeros(2_000_000, dtype=torch.uint8)
    assert torch.equal(corrupt(labels, T, 0), labels)


def test_streams_of_a_seed_differ_and_repeat() -> None:
    def first(seed: int, stream: int) -> float:
        return torch.rand(1, generator=generator(seed, stream)).item()

    assert len({first(seed, stream) for seed in range(20) for stream in range(5)}) == 100
    assert first(2**32 - 1, 3) == first(2**32 - 1, 3)


# --- refusals ---


@pytest.mark.parametrize(
    ("K", "rate", "error", "message"),
    [
        (1, 0.5, ValueError, "K, the number of classes, must be at least 2, not 1"),
        (2.0, 0.5, TypeError, "K, the number of classes, must be an int, not 2.0"),
        (True, 0.5, TypeError, "K, the number of classes, must be an int, not True"),
        (3, -0.1, ValueError, "rate must lie between 0 and 1, not -0.1"),
        (3, 60, ValueError, "rate must lie between 0 and 1, not 60"),
        (3, float("nan"), ValueError, "rate must lie between 0 and 1, not nan"),
        (3, "0.5", TypeError, "rate must be a number from 0 to 1, not '0.5'"),
        (3, True, TypeError, "rate must be a number from 0 to 1, not True"),
    ],
)
def test_symmetric_refuses(K: Any, rate: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as raised:
        symmetric(K, rate)
    assert str(raised.value) == message


@pytest.mark.parametrize("dataset", ["svhn", "CIFAR10", None, ["mnist"]])
def test_asymmetric_refuses_an_unknown_data_set(dataset: Any) -> None:
    with pytest.raises(ValueError, match="it is for mnist, digits, cifar10, cifar100") as raised:
        asymmetric(dataset, 0.4)
    assert repr(dataset) in str(raised.value)


def test_asymmetric_refuses_a_rate_out_of_range() -> None:
    with pytest.raises(ValueError, match=r"between 0 and 1, not 1\.5$"):
        asymmetric("mnist", 1.5)


@pytest.mark.parametrize(
    ("T", "error", "message"),
    [
        ([[1.0, 0.0], [0.0, 1.0]], TypeError, "T must be a tensor of floats, not list"),
        (torch.eye(3).long(), TypeError, "T must be a tensor of floats, not torch.int64"),
        (torch.ones(3), ValueError, "T must be square, (K, K) with K >= 2, not (3,)"),
        (torch.ones(2, 3) / 3, ValueError, "T must be square, (K, K) with K >= 2, not (2, 3)"),
        (torch.ones(1, 1), ValueError, "T must be square, (K, K) with K >= 2, not (1, 1)"),
        (
            torch.tensor([[1.0, 0.0], [1.5, -0.5]]),
            ValueError,
            "T must hold probabilities, but T[1, 1] is -0.5",
        ),
        (
            torch.tensor([[1.0, torch.nan], [0.0, 1.0]]),
            ValueError,
            "T must hold probabilities, but T[0, 1] is nan",
        ),
        (
            torch.tensor([[1.0, 0.0], [torch.inf, 1.0]]),
            ValueError,
            "T must hold probabilities, but T[1, 0] is inf",
        ),
        (
            torch.tensor([[1.0, 0.0], [0.25, 0.5]]),
            ValueError,
            "each row of T must sum to 1, but row 1 sums to 0.75",
        ),
        (
            torch.tensor([[1.00001, 0.0], [0.0, 1.0]]),
            ValueError,
            "each row of T must sum to 1, but row 0 sums to 1.00001",
        ),
    ],
)
def test_a_T_that_is_no_transition_matrix_is_refused(
    T: Any, error: type[Exception], message: str
) -> None:
    for use in (lambda: corrupt(torch.tensor([0, 1]), T, 0), lambda: is_diagonally_dominant(T)):
        with pytest.raises(error) as raised:
            use()
        assert str(raised.value) == message


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        ([0, 1], TypeError, "labels must be a tensor of integers, not list"),
        (torch.zeros(2), TypeError, "labels must be a tensor of integers, not torch.float32"),
        (
            torch.zeros(2, dtype=torch.bool),
            TypeError,
            "labels must be a tensor of integers, not torch.bool",
        ),
        (torch.zeros(2, 1).long(), ValueError, "labels must be 1-D, (N,), not (2, 1)"),
        (torch.tensor(0), ValueError, "labels must be 1-D, (N,), not ()"),
        (torch.tensor([0, 2, 3]), ValueError, "labels must lie in 0..2, but labels[2] is 3"),
        (torch.tensor([0, -1, 3]), ValueError, "labels must lie in 0..2, but labels[1] is -1"),
    ],
)
def test_corrupt_refuses_labels(labels: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as raised:
        corrupt(labels, symmetric(3, 0.5), 0)
    assert str(raised.value) == message


def test_corrupt_refuses_a_dtype_too_small_for_the_classes() -> None:
    message = "labels of torch.int8 cannot hold the 129 classes of T"
    with pytest.raises(ValueError, match=message):
        corrupt(torch.zeros(3, dtype=torch.int8), symmetric(129, 1), 0)
    assert corrupt(torch.zeros(3, dtype=torch.int8), symmetric(128, 1), 0).min() > 0


@pytest.mark.parametrize(
    ("seed", "error", "message"),
    [
        (0.0, TypeError, "seed must be an int, not 0.0"),
        (None, TypeError, "seed must be an int, not None"),
        (True, TypeError, "seed must be an int, not True"),
        (-1, ValueError, "seed must lie in 0..2**32-1, not -1"),
        (2**32, ValueError, "seed must lie in 0..2**32-1, not 4294967296"),
    ],
)
def test_corrupt_refuses_a_seed(seed: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as raised:
        corrupt(torch.tensor([0]), symmetric(2, 0.5), seed)
    assert str(raised.value) == message
