"""The witness itself: closed values, numerical derivatives, and formulas written naively in p."""

from __future__ import annotations

import random
from collections.abc import Callable

import definitions
import pytest
from mpmath import mp, mpf

ROWS = [
    [random.Random(seed).gauss(0, size) for _ in range(classes)]
    for seed, (classes, size) in enumerate([(2, 1), (3, 5), (10, 3), (10, 30), (25, 1)])
]
EXTREMES = [
    [1e4, -1e4, 0.0, 5e3],
    [-1e4, 1e4],
    [0.0, -2e4, -2e4, -2e4],
    [1e4, 1e4, -1e4],
    [1e4, -1e4, *ROWS[2]],
    [7.0, 7.0, 7.0],
]


def close(a: mpf, b: mpf, digits: int) -> bool:
    with mp.workdps(60):
        return bool(abs(a - b) <= mpf(10) ** -digits * max(abs(a), abs(b)))


def softmax(z: list[float]) -> list[mpf]:
    """Plainly, for a caller who has set enough digits for 1 - p."""
    e = [mp.exp(mpf(x)) for x in z]
    return [x / sum(e) for x in e]


def naive(name: str, z: list[float], y: int, par: dict[str, float]) -> mpf:
    """The losses of one row in the usual formulas, in p_y, with 1 - p as a subtraction."""
    p = softmax(z)
    n, g, e = len(p), mpf(par.get("gamma", 0.5)), mpf(par.get("q", 0.7))
    floor = mpf(par["A"]) if "A" in par else mp.log(mpf("1e-4"))
    alpha = mpf(par.get("alpha", 0.1 if name == "sce" else 1))
    losses: dict[str, Callable[[int], mpf]] = {
        "ce": lambda j: -mp.log(p[j]),
        "fl": lambda j: -((1 - p[j]) ** g) * mp.log(p[j]),
        "mae": lambda j: 2 * (1 - p[j]),
        "rce": lambda j: -floor * (1 - p[j]),
        "gce": lambda j: (1 - p[j] ** e) / e,
        "nlnl": lambda j: -sum(mp.log(1 - p[k]) for k in range(n) if k != j) / (n - 1),
    }
    if name in losses:
        return losses[name](y)
    if name in definitions.NORMALIZED:
        return losses[name[1:]](y) / sum(losses[name[1:]](k) for k in range(n))
    a, b = ("ce", "rce") if name == "sce" else name.split("+")
    return alpha * naive(a, z, y, par) + mpf(par.get("beta", 1)) * naive(b, z, y, par)


def odd_parameters(name: str) -> dict[str, float]:
    """Settings away from the defaults, for the parameters that the loss has."""
    odd = {"alpha": 3.5, "beta": 0.3, "gamma": 2.25, "q": 0.3, "A": -4.0}
    return {key: odd[key] for key in definitions.complete(name, {})}


def test_the_names() -> None:
    assert len(definitions.NAMES) == len(set(definitions.NAMES)) == 24


@pytest.mark.parametrize("classes", [2, 10, 100])
def test_uniform_rows_have_closed_values(classes: int) -> None:
    with mp.workdps(60):
        n, log = mpf(classes), mp.log
        rce, gce = 4 * log(10) * (n - 1) / n, (1 - n ** -mpf(0.7)) / mpf(0.7)
        expected = {
            "ce": log(n),
            "fl": mp.sqrt(1 - 1 / n) * log(n),
            "mae": 2 * (n - 1) / n,
            "rce": rce,
            "gce": gce,
            "nlnl": log(n / (n - 1)),
            "sce": mpf(0.1) * log(n) + rce,
            **dict.fromkeys(definitions.NORMALIZED, 1 / n),
        }
        for pair in (*definitions.ACTIVE_PASSIVE, *definitions.OTHER_PAIRS):
            a, b = pair.split("+")
            expected[pair] = expected[a] + expected[b]
    assert set(expected) == set(definitions.NAMES)
    for name, value in expected.items():
        assert close(definitions.value(name, [0.25] * classes, classes - 1), value, 49), name


def test_textbook_values() -> None:
    with mp.workdps(60):
        third = [mp.log(2), 0, 0]  # p = (1/2, 1/4, 1/4); settled only to the digits of log 2
        values = {name: definitions.value(name, third, 0) for name in ("nce", "nmae", "mae")}
        assert close(values["nce"], mpf(1) / 5, 49)  # log 2 / (log 2 + 2 log 4)
        assert close(values["nmae"], mpf(1) / 4, 49)  # (1 - p_y) / (K - 1)
        assert close(values["mae"], mpf(1), 49)
        assert close(definitions.value("rce", third, 0, A=-4), mpf(2), 49)


@pytest.mark.parametrize("name", definitions.NAMES)
@pytest.mark.parametrize("z", ROWS, ids=lambda z: f"K{len(z)}")
def test_gradient_is_the_numerical_derivative(name: str, z: list[float]) -> None:
    for y, par in ((0, {}), (len(z) - 1, odd_parameters(name))):
        value, gradient = definitions.value_and_gradient(name, z, y, **par)
        with mp.workdps(300):
            assert close(value, naive(name, z, y, par), 49)
            for i in {0, 1, len(z) // 2, len(z) - 1}:
                # Centred difference: its error is of order h^2 = 1e-160, relative to the largest.
                up, down = ([*z[:i], z[i] + s * mpf(10) ** -80, *z[i + 1 :]] for s in (1, -1))
                slope = naive(name, up, y, par) - naive(name, down, y, par)
                assert close(slope * mpf(10) ** 80 / 2, gradient[i], 49)


@pytest.mark.parametrize("name", definitions.NAMES)
def test_gradient_agrees_with_mpmath_diff_of_the_one_hot_sum(name: str) -> None:
    z = ROWS[1]
    gradient = definitions.gradient(name, z, 2)
    for i in range(len(z)):
        with mp.workdps(60):
            slope = mp.diff(
                lambda x, i=i: definitions.value(name, [*z[:i], x, *z[i + 1 :]], 2),
                mpf(z[i]),
                h=mpf(10) ** -15,
            )
        assert close(slope, gradient[i], 13)


@pytest.mark.parametrize("name", definitions.NORMALIZED)
@pytest.mark.parametrize("z", [*ROWS, *EXTREMES], ids=lambda z: f"K{len(z)}")
def test_normalized_losses_sum_to_one_over_labels(name: str, z: list[float]) -> None:
    rows = [definitions.value_and_gradient(name, z, y) for y in range(len(z))]
    with mp.workdps(60):
        assert close(mp.fsum(value for value, _ in rows), mpf(1), 48)
        for column in zip(*(gradient for _, gradient in rows), strict=True):
            assert abs(mp.fsum(column)) < mpf(10) ** -48


@pytest.mark.parametrize("name", definitions.NAMES)
@pytest.mark.parametrize("z", [*ROWS, *EXTREMES], ids=lambda z: f"K{len(z)}")
def test_rows_are_finite_and_gradients_sum_to_zero(name: str, z: list[float]) -> None:
    for y in {0, 1, len(z) - 1}:
        value, gradient = definitions.value_and_gradient(name, z, y)
        assert mp.isfinite(value) and value > 0
        assert all(mp.isfinite(g) for g in gradient)
        with mp.workdps(60):
            assert abs(mp.fsum(gradient)) < mpf(10) ** -48


@pytest.mark.parametrize("name", definitions.NAMES)
def test_lost_digits_are_found_again(name: str) -> None:
    """1 - p is about 1e-130 here; the usual formulas need some 500 digits to see it."""
    for z in ([300.0, 0.0, 0.0], [0.0, 300.0, 12.0], [300.0, 300.0, 0.0]):
        value, gradient = definitions.value_and_gradient(name, z, 0)
        with mp.workdps(1500):
            assert close(value, naive(name, z, 0, {}), 49)
            for i in range(3):
                up, down = ([*z[:i], z[i] + s * mpf(10) ** -500, *z[i + 1 :]] for s in (1, -1))
                slope = (naive(name, up, 0, {}) - naive(name, down, 0, {})) * mpf(10) ** 500 / 2
                assert close(slope, gradient[i], 49)


def test_saturated_rows_keep_their_size() -> None:
    with mp.workdps(60):
        tiny = mp.exp(-20000)
        assert close(definitions.value("ce", [1e4, -1e4], 0), tiny, 49)
        assert close(definitions.value("mae", [1e4, -1e4], 0), 2 * tiny, 49)
        assert close(definitions.value("gce", [1e4, -1e4], 0), tiny, 49)
        assert close(definitions.value("nlnl", [1e4, -1e4], 1), mpf(20000), 49)
        assert close(definitions.gradient("ce", [1e4, -1e4], 0)[0], -tiny, 49)


def test_wrong_questions_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown loss"):
        definitions.value("cee", [0.0, 1.0], 0)
    with pytest.raises(ValueError, match="not one of 2"):
        definitions.value("ce", [0.0, 1.0], -1)
    with pytest.raises(TypeError, match="gamma"):
        definitions.value("ce", [0.0, 1.0], 0, gamma=2.0)
