"""Label noise: transition matrices, and corrupting labels with them.

A transition matrix ``T`` is row-stochastic, with ``T[i, j] = P(given label j | true label i)``.
"""

from __future__ import annotations

from numbers import Integral, Real

import numpy as np
import torch
from torch import Tensor

from apl.official import CLASSES, relabel

__all__ = [
    "CIFAR100_COARSE",
    "asymmetric",
    "corrupt",
    "generator",
    "is_diagonally_dominant",
    "measured",
    "official",
    "symmetric",
]

# Decimals kept of the remainders of expected counts: so few that 25 * .58 = 14.499999999999998
# and 25 * .42 = 10.5 count as the tie they are, so many that nothing else does.
_DECIMALS = 9

# The true superclass (0..19) of each fine label, from the official pickle. Fine labels are
# alphabetical, so blocks of five consecutive ones are not superclasses.
CIFAR100_COARSE: tuple[int, ...] = (
    *(4, 1, 14, 8, 0, 6, 7, 7, 18, 3, 3, 14, 9, 18, 7, 11, 3, 9, 7, 11),
    *(6, 11, 5, 10, 7, 6, 13, 15, 3, 15, 0, 11, 1, 10, 12, 14, 16, 9, 11, 5),
    *(5, 19, 8, 8, 15, 13, 14, 17, 18, 10, 16, 4, 17, 4, 2, 0, 17, 4, 18, 17),
    *(10, 3, 2, 12, 12, 16, 12, 1, 9, 19, 2, 10, 0, 1, 16, 12, 9, 13, 15, 13),
    *(16, 19, 2, 4, 6, 19, 5, 5, 8, 19, 18, 1, 2, 15, 6, 0, 17, 8, 14, 13),
)


def _rings(coarse: tuple[int, ...]) -> dict[int, int]:
    """Each fine label to the next one of its superclass, the last to the first."""
    rings: dict[int, int] = {}
    for superclass in set(coarse):
        members = [fine for fine, group in enumerate(coarse) if group == superclass]
        rings |= dict(zip(members, members[1:] + members[:1], strict=True))
    return rings


_MNIST = {7: 1, 2: 7, 5: 6, 6: 5, 3: 8}
_FLIPS: dict[str, tuple[int, dict[int, int]]] = {
    "mnist": (10, _MNIST),
    "digits": (10, _MNIST),
    # truck -> automobile, bird -> airplane, cat <-> dog, deer -> horse
    "cifar10": (10, {9: 1, 2: 0, 3: 5, 5: 3, 4: 7}),
    "cifar100": (100, _rings(CIFAR100_COARSE)),
    # A ring in every ten, as if the ten were a superclass.
    "digit-pairs": (100, _rings(tuple(number // 10 for number in range(100)))),
}


def symmetric(K: int, rate: float) -> Tensor:
    """Return the transition matrix of symmetric (uniform) noise.

    ``T[i, i] = 1 - rate`` and ``T[i, j] = rate / (K - 1)`` for j != i: the true class is excluded
    from the random label, so `rate` is the probability that a label is wrong.

    Shapes: the result is (K, K), float64, on the CPU.
    Raises: TypeError unless K is an int and rate a number; ValueError unless K >= 2 and
    0 <= rate <= 1.
    Source: Ma et al. (2020), section 4.

    >>> symmetric(3, 0.5)
    tensor([[0.5000, 0.2500, 0.2500],
            [0.2500, 0.5000, 0.2500],
            [0.2500, 0.2500, 0.5000]], dtype=torch.float64)
    """
    K = _check_int("K, the number of classes,", K)
    if K < 2:
        raise ValueError(f"K, the number of classes, must be at least 2, not {K}")
    rate = _check_rate(rate)
    T = torch.full((K, K), rate / (K - 1), dtype=torch.float64)
    return T.fill_diagonal_(1 - rate)


def asymmetric(dataset: str, rate: float) -> Tensor:
    """Return the transition matrix of the paper's asymmetric (class-conditional) noise.

    ``T[i, i] = 1 - rate`` and ``T[i, m(i)] = rate`` where the map m confuses similar classes; a
    class without an image under m keeps its labels.

    - "mnist", "digits": 7 -> 1, 2 -> 7, 5 <-> 6, 3 -> 8
    - "cifar10": truck -> automobile, bird -> airplane, cat <-> dog, deer -> horse
    - "cifar100": i -> the next fine label of its true superclass, the last -> the first. (Official
      code: blocks of five consecutive fine labels; only 6 of 100 edges stay in a superclass.)
    - "digit-pairs": the last figure goes up by one, 9 to 0: 10 -> 11, 19 -> 10

    Shapes: the result is (K, K), float64, on the CPU.
    Raises: ValueError for another data set or a rate outside 0..1, TypeError for another type.
    Source: Ma et al. (2020), section 4, after Patrini et al. (2017).

    >>> asymmetric("mnist", 0.25)[7].tolist()
    [0.0, 0.25, 0.0, 0.0, 0.0, 0.0, 0.0, 0.75, 0.0, 0.0]
    """
    if not isinstance(dataset, str) or dataset not in _FLIPS:
        known = ", ".join(_FLIPS)
        raise ValueError(f"no asymmetric noise is defined for {dataset!r}; it is for {known}")
    rate = _check_rate(rate)
    K, flips = _FLIPS[dataset]
    T = torch.eye(K, dtype=torch.float64)
    for true, wrong in flips.items():
        T[true, true] = 1 - rate
        T[true, wrong] = rate
    return T


def is_diagonally_dominant(T: Tensor) -> bool:
    """Tell whether the true label is the likeliest in every row: T[i, i] > T[i, j] for all j != i.

    The condition of the paper's lemmas. Differences below 1e-9 count as ties, so that rounding
    does not decide at the boundary, a symmetric rate of (K - 1) / K.

    Shapes: T is (K, K).
    Raises: TypeError or ValueError where T is not a transition matrix, as in `corrupt`.

    >>> is_diagonally_dominant(symmetric(3, 0.6)), is_diagonally_dominant(symmetric(3, 2 / 3))
    (True, False)
    """
    T = _check_transition(T)
    wrong = T.clone().fill_diagonal_(-torch.inf)
    return bool((T.diagonal() - wrong.amax(dim=1) > 1e-9).all())


def corrupt(labels: Tensor, T: Tensor, seed: int, exact: bool = True) -> Tensor:
    """Return labels corrupted at random by the transition matrix T.

    exact=True: of the n_i labels of class i, n_i T[i, j] become j, rounded by largest remainder
    (so each count is within one of n_i T[i, j], and is zero where T[i, j] is); which ones is
    random, and so is the winner among equal remainders.
    exact=False: each label is drawn independently, j with probability T[i, j].

    The same seed gives the same labels on every device, and torch's global random state is left
    alone.

    Shapes: labels (N,), any integers; T (K, K), any floats; the result is as labels.
    Raises: TypeError for labels or a T of another type, or a seed that is no int; ValueError for
    labels not 1-D or outside 0..K-1, a T that is not square and row-stochastic, or a seed outside
    0..2**32-1.

    >>> labels = torch.arange(2).repeat_interleave(5)
    >>> noisy = corrupt(labels, symmetric(2, 0.4), seed=0)
    >>> [int((noisy[labels == i] != i).sum()) for i in range(2)]
    [2, 2]
    """
    T = _check_transition(T)
    y = _check_labels(labels, len(T))
    draw = _exact if exact else _independent
    return draw(y, T, generator(seed)).to(labels)


def measured(labels: Tensor, given: Tensor, K: int) -> Tensor:
    """Return the transition matrix of labels that are there: which share of class i is called j.

    Shapes: labels and given (N,), any integers; the result is (K, K), float64, on the CPU.
    Raises: TypeError or ValueError for labels that are not 1-D integers in 0..K-1 and equally many,
    and where a class has no sample.

    >>> measured(torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 1, 1]), 2)
    tensor([[0.5000, 0.5000],
            [0.0000, 1.0000]], dtype=torch.float64)
    """
    K = _check_int("K, the number of classes,", K)
    true, called = _check_labels(labels, K), _check_labels(given, K)
    if len(true) != len(called):
        raise ValueError(f"there are {len(true)} labels and {len(called)} given ones")
    counts = torch.bincount(K * true + called, minlength=K * K).reshape(K, K).double()
    if (empty := counts.sum(dim=1) == 0).any():
        raise ValueError(f"class {int(empty.nonzero()[0])} has no sample to measure its row by")
    return counts / counts.sum(dim=1, keepdim=True)


def official(dataset: str, labels: Tensor, kind: str, rate: float, seed: int) -> Tensor:
    """Return labels corrupted as the paper's official code does it, flaws included.

    - "symmetric": int(int(rate N) / K) labels of *each* class, drawn without replacement, become
      another class; on MNIST, whose classes differ in size, digit 5 is hit harder than digit 1.
    - "asymmetric", "cifar10": pairs in turn, on labels already changed; dogs turned back leave
      76 % of cats right at rate .4, and 18.4 % of all labels wrong instead of 20 %.
    - "asymmetric", "mnist", "cifar100": each label is drawn; CIFAR-100's rings are five consecutive
      fine labels, and 6 of 100 steps stay in a superclass.

    A seed gives what numpy's RandomState(seed) gave the official code. At rate 0 all labels stay.

    Shapes: labels (N,), any integers; the result is as labels.
    Raises: ValueError for another data set ("mnist", "cifar10", "cifar100" are known) or kind, or a
    class too small for the rate; TypeError and ValueError for labels, rate and seed as `corrupt`.
    Source: dataset.py of HanxunH/Active-Passive-Losses, commit 04bce53.

    >>> labels = torch.arange(10).repeat_interleave(5000)
    >>> noisy = official("cifar10", labels, "asymmetric", 0.4, seed=0)
    >>> f"{(noisy != labels).float().mean():.2f}"
    '0.18'
    """
    if not isinstance(dataset, str) or dataset not in CLASSES:
        known = ", ".join(CLASSES)
        raise ValueError(f"the official code has no noise for {dataset!r}; it has for {known}")
    y = _check_labels(labels, CLASSES[dataset])
    generator(seed)  # the same seeds are allowed
    noisy = relabel(dataset, y.numpy().astype(np.int64), kind, _check_rate(rate), int(seed))
    return torch.from_numpy(noisy).to(labels)


def generator(seed: int, stream: int = 0) -> torch.Generator:
    """Return a CPU random number generator for a seed, apart from torch's global one.

    Other streams of a seed give unrelated numbers, so that one seed can serve the noise (stream 0)
    and, say, a random split, without the one depending on the other.

    Raises: TypeError for a seed that is no int; ValueError for one outside 0..2**32-1.

    >>> a, b = generator(0), generator(0, stream=1)
    >>> bool((torch.rand(5, generator=a) == torch.rand(5, generator=b)).any())
    False
    """
    seed = _check_int("seed", seed)
    # torch's CPU generator uses 32 bits of a seed: 0 and 2**32 would silently be the same.
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed must lie in 0..2**32-1, not {seed}")
    return torch.Generator().manual_seed((seed + stream * 0x9E3779B1) % 2**32)


def _exact(y: Tensor, T: Tensor, rng: torch.Generator) -> Tensor:
    K = len(T)
    size = torch.bincount(y, minlength=K)
    expected = size[:, None] * T
    counts = expected.floor()
    # A stable sort of randomly permuted columns: equal remainders end up in random order.
    shuffle = torch.rand(K, K, generator=rng).argsort(dim=1)
    remainder = (expected - counts).round(decimals=_DECIMALS).gather(1, shuffle)
    best_first = shuffle.gather(1, remainder.argsort(dim=1, descending=True, stable=True))
    left = size - counts.sum(dim=1)
    extra = (torch.arange(K) < left[:, None]).to(counts)
    counts = counts.scatter_add(1, best_first, extra).long()

    order = torch.randperm(len(y), generator=rng)
    by_class = order[y[order].argsort(stable=True)]
    given = torch.arange(K).repeat(K).repeat_interleave(counts.flatten())
    return torch.empty_like(y).scatter_(0, by_class, given)


def _independent(y: Tensor, T: Tensor, rng: torch.Generator) -> Tensor:
    K = len(T)
    # Row i of the distribution functions is shifted to i..i+1, so that one search serves all rows
    # without an (N, K) table. With 32 random bits label + u is exact: it cannot round up into the
    # next row, and a cell of zero width is never hit.
    steps = T.cumsum(dim=1)
    steps = steps / steps[:, -1:] + torch.arange(K, dtype=T.dtype)[:, None]
    u = torch.randint(1 << 32, y.shape, generator=rng).to(T) / (1 << 32)
    return torch.searchsorted(steps.flatten(), y + u, right=True) - K * y


def _check_int(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an int, not {value!r}")
    return int(value)


def _check_rate(rate: object) -> float:
    if isinstance(rate, bool) or not isinstance(rate, Real):
        raise TypeError(f"rate must be a number from 0 to 1, not {rate!r}")
    if not 0 <= (value := float(rate)) <= 1:
        raise ValueError(f"rate must lie between 0 and 1, not {rate}")
    return value


def _check_transition(T: Tensor) -> Tensor:
    """T itself on the CPU, in float64, its rows rescaled to sum to 1 beyond its own precision."""
    if not isinstance(T, Tensor) or not T.is_floating_point():
        kind = T.dtype if isinstance(T, Tensor) else type(T).__name__
        raise TypeError(f"T must be a tensor of floats, not {kind}")
    if T.ndim != 2 or T.shape[0] != T.shape[1] or T.shape[0] < 2:
        raise ValueError(f"T must be square, (K, K) with K >= 2, not {tuple(T.shape)}")
    T = T.detach().to("cpu", torch.float64)
    if not T.isfinite().all() or (T < 0).any():
        i, j = (~(T.isfinite() & (T >= 0))).nonzero()[0].tolist()
        raise ValueError(f"T must hold probabilities, but T[{i}, {j}] is {T[i, j].item():g}")
    total = T.sum(dim=1)
    if ((total - 1).abs() > 1e-6).any():
        i = int((total - 1).abs().argmax())
        raise ValueError(f"each row of T must sum to 1, but row {i} sums to {total[i].item():.7g}")
    return T / total[:, None]


def _check_labels(labels: Tensor, K: int) -> Tensor:
    """Labels themselves on the CPU, in int64."""
    integers = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
    if not isinstance(labels, Tensor) or labels.dtype not in integers:
        kind = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"labels must be a tensor of integers, not {kind}")
    if labels.ndim != 1:
        raise ValueError(f"labels must be 1-D, (N,), not {tuple(labels.shape)}")
    if torch.iinfo(labels.dtype).max < K - 1:
        raise ValueError(f"labels of {labels.dtype} cannot hold the {K} classes of T")
    y = labels.to("cpu", torch.int64)
    if (outside := (y < 0) | (y >= K)).any():
        at = int(outside.nonzero()[0])
        raise ValueError(f"labels must lie in 0..{K - 1}, but labels[{at}] is {y[at].item()}")
    return y
