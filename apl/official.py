"""The official code's label noise, procedure by procedure, flaws included.

Nothing is corrected: published numbers were measured under this noise. The transition matrices that
the paper describes are in :mod:`apl.noise`. Written from what the code does, it draws numpy's
legacy random numbers in the code's order, so that the same labels become wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["CLASSES", "RING", "relabel"]

Labels = NDArray[np.int64]

CLASSES: Mapping[str, int] = MappingProxyType({"mnist": 10, "cifar10": 10, "cifar100": 100})
"""The data sets with official noise, and their numbers of classes."""

_MNIST = {7: 1, 2: 7, 5: 6, 6: 5, 3: 8}
# In this order: cats turned dogs are candidates when dogs are turned into cats.
_CIFAR10 = ((9, 1), (2, 0), (3, 5), (5, 3), (4, 7))

RING: Mapping[int, int] = MappingProxyType(
    {i: i // 5 * 5 + (i + 1) % 5 for i in range(CLASSES["cifar100"])}
)
"""CIFAR-100's wrong label for each class, in rings of five *consecutive* fine labels.

Fine labels are alphabetical, so this is not the superclass the rings are named for: 6 of the 100
steps stay in one.
"""


def relabel(dataset: str, labels: Labels, kind: str, rate: float, seed: int) -> Labels:
    """Labels with the official noise; the arguments are as in :func:`apl.noise.official`, checked.

    Raises
    ------
    ValueError
        for a kind of noise that is neither "symmetric" nor "asymmetric", or symmetric noise of a
        rate that one of the classes is too small for

    Examples
    --------
    >>> labels = np.repeat(np.arange(10), 100)
    >>> noisy = relabel("cifar10", labels, "asymmetric", 0.4, seed=0)
    >>> int((noisy[labels == 3] != 3).sum()), int((noisy[labels == 5] != 5).sum())
    (23, 39)
    """
    if kind not in ("symmetric", "asymmetric"):
        raise ValueError(f"the kind of noise is {kind!r}: it must be 'symmetric' or 'asymmetric'")
    rng = np.random.RandomState(seed)
    if kind == "symmetric":
        return _symmetric(labels, CLASSES[dataset], rate, rng)
    return _ASYMMETRIC[dataset](labels, rate, rng)


def _symmetric(y: Labels, K: int, rate: float, rng: Any) -> Labels:
    """Equally many wrong labels in every class, however large it is; the true class is excluded."""
    each = int(int(rate * len(y)) / K)
    classes = [np.flatnonzero(y == k) for k in range(K)]
    small = min(range(K), key=lambda k: len(classes[k]))
    if len(classes[small]) < each:
        raise ValueError(
            f"at rate {rate:g} the official procedure changes {each} labels of every class, "
            f"but only {len(classes[small])} are of class {small}"
        )
    chosen = np.concatenate([rng.choice(members, each, replace=False) for members in classes])
    other = rng.randint(0, K - 1, size=len(chosen))
    noisy = y.copy()
    noisy[chosen] = other + (other >= y[chosen])
    return noisy


def _in_turn(y: Labels, rate: float, rng: Any) -> Labels:
    """CIFAR-10: one pair after the other, an exact share of the labels as they are by then."""
    noisy = y.copy()
    for source, wrong in _CIFAR10:
        members = np.flatnonzero(noisy == source)
        noisy[rng.choice(members, int(rate * len(members)), replace=False)] = wrong
    return noisy


def _sampled(flips: Mapping[int, int], K: int) -> Callable[[Labels, float, Any], Labels]:
    """MNIST and CIFAR-100: each label on its own, from its row of a transition matrix."""

    def draw(y: Labels, rate: float, rng: Any) -> Labels:
        T = np.eye(K)
        for true, wrong in flips.items():
            T[true, true], T[true, wrong] = 1.0 - rate, rate
        # One multinomial for each sample, kept labels included: that is what the numbers are for.
        return np.array([rng.multinomial(1, T[k]).argmax() for k in y], dtype=np.int64)

    return draw


_ASYMMETRIC: dict[str, Callable[[Labels, float, Any], Labels]] = {
    "mnist": _sampled(_MNIST, CLASSES["mnist"]),
    "cifar10": _in_turn,
    "cifar100": _sampled(RING, CLASSES["cifar100"]),
}
