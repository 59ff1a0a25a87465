"""Noisy risk and its minimizers: the identities and closed forms, on the losses that train."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import apl
from apl.noise import is_diagonally_dominant, symmetric
from apl.risk import every_label, minimize, noisy_risk
from apl.symbolic import is_symmetric, p_y

NAMES = apl.losses.names()


def predictions(rows, classes, seed, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(rows, classes, generator=generator, dtype=torch.float64)).softmax(
        -1
    )


def dominant_matrix(classes, seed):
    """A random transition matrix whose diagonal is the largest entry of its row."""
    generator = torch.Generator().manual_seed(seed)
    T = torch.rand(classes, classes, generator=generator, dtype=torch.float64) ** 3
    T += torch.diag(T.max(-1).values - T.diagonal() + 0.05)
    return T / T.sum(-1, keepdim=True)


def test_every_label_is_the_loss_of_each_label():
    p = predictions(4, 5, 0)
    loss = apl.loss("nce+mae", reduction="none")
    table = every_label(apl.loss("nce+mae"), p)  # its reduction is not used
    for label in range(5):
        torch.testing.assert_close(table[:, label], loss(p.log(), torch.full((4,), label)))
    assert every_label(torch.nn.CrossEntropyLoss(reduction="none"), p).shape == p.shape
    assert every_label(apl.CE(), p.view(2, 2, 5)).shape == (2, 2, 5)


def test_what_is_no_prediction_is_refused():
    with pytest.raises(ValueError, match="not positive"):
        every_label(apl.CE(), torch.tensor([1.0, 0.0]))
    with pytest.raises(ValueError, match="sum to 1"):
        every_label(apl.CE(), torch.tensor([0.5, 0.6]))
    with pytest.raises(ValueError, match="floor is"):
        minimize(apl.CE(), torch.tensor([0.5, 0.5]), floor=0.5)


# --- symmetric noise: the identity of Lemma 1 ----------------------------------------------------


@settings(max_examples=60)
@given(st.sampled_from(NAMES), st.integers(2, 12), st.floats(0, 1), st.integers(0, 10**6))
def test_noisy_risk_is_clean_risk_and_the_sum_over_labels(name, classes, eta, seed):
    p = predictions(8, classes, seed)
    table = every_label(apl.loss(name), p)
    s = 1 - eta * classes / (classes - 1)
    expected = s * table + eta / (classes - 1) * table.sum(-1, keepdim=True)
    row = symmetric(classes, eta)
    for label in range(classes):
        found = noisy_risk(apl.loss(name), p, row[label])
        torch.testing.assert_close(found, expected[:, label], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_what_sympy_calls_symmetric_is_symmetric(name):
    sums = every_label(apl.loss(name), predictions(50, 7, 1)).sum(-1)
    constant = bool(((sums - sums[0]).abs() < 1e-9 * sums[0]).all())
    entry = apl.catalog.entry(name)
    numbers = {apl.catalog.PARAMETERS[key].symbol: value for key, value in entry.parameters.items()}
    assert is_symmetric(entry.expression.subs(numbers)) is constant


# --- asymmetric noise: the sandwich of Lemma 2 ---------------------------------------------------


def sandwich(loss, p, T):
    """Whether c_min R <= R_eta - C E[eta_y]/(K - 1) <= c_max R, one label for each prediction."""
    K = T.shape[0]
    labels = torch.arange(len(p)) % K
    table = every_label(loss, p)
    C = table[0].sum()
    clean = table.gather(-1, labels[:, None])[:, 0]
    noisy = (T[labels] * table).sum(-1)
    stay = T.diagonal()
    c = stay[:, None] - T
    wrong = c[~torch.eye(K, dtype=torch.bool)]
    c_min, c_max = wrong.min(), wrong.max()
    middle = noisy - C * (1 - stay)[labels] / (K - 1)
    low = bool((c_min * clean <= middle + 1e-9).all())
    return low and bool((middle <= c_max * clean + 1e-9).all())


@settings(max_examples=60)
@given(st.integers(3, 10), st.integers(0, 10**6), st.sampled_from(["mae", "nmae", "rce", "q2"]))
def test_the_sandwich_holds_for_losses_within_the_bound(classes, seed, name):
    loss = apl.normalize((1 - p_y**2) / 2) if name == "q2" else apl.loss(name)
    T = dominant_matrix(classes, seed)
    assume(is_diagonally_dominant(T))
    assert sandwich(loss, predictions(60, classes, seed + 1), T)


@pytest.mark.parametrize("name", ["nce", "nfl", "ngce"])
def test_the_sandwich_breaks_for_losses_beyond_the_bound(name):
    broken = [
        not sandwich(apl.loss(name), predictions(300, 3, seed, scale=6), dominant_matrix(3, seed))
        for seed in range(20)
    ]
    assert any(broken)


# --- minimizers ----------------------------------------------------------------------------------

ROWS = {
    "uniform": [0.6, 0.2, 0.2],
    "tilted": [0.6, 0.3, 0.1],
    "pair": [0.6, 0.4, 0.0],
    "ten": [0.4, *[0.6 / 9] * 9],
}
FLOOR = 1e-6


def closed_form(name, row):
    """The minimizers derived in the book; of NCE and NGCE by bisection on the least risk r."""
    pi = torch.tensor(row, dtype=torch.float64)
    if name in ("ce", "nlnl"):
        found = pi
    elif name in ("mae", "nmae", "rce"):
        found = torch.nn.functional.one_hot(pi.argmax(), len(pi)).double()
    elif name == "gce":
        found = pi ** (1 / 0.3)
    else:
        raise AssertionError(name)
    return found / found.sum()


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("name", ["ce", "mae", "rce", "nmae", "gce", "nlnl"])
def test_minimizers_of_plain_losses(name, row):
    found = minimize(apl.loss(name), torch.tensor(ROWS[row], dtype=torch.float64), FLOOR)
    torch.testing.assert_close(found, closed_form(name, ROWS[row]), rtol=0, atol=2e-4)


@pytest.mark.parametrize("row", ["tilted", "pair"])
@pytest.mark.parametrize(("name", "power"), [("nce", 1.0), ("ngce", 1 / 0.3)])
def test_normalizing_subtracts_the_risk_from_the_posterior(name, power, row):
    # p_k is proportional to (pi_k - r)^power, cut at the floor, with r the least risk.
    pi = torch.tensor(ROWS[row], dtype=torch.float64)
    found = minimize(apl.loss(name), pi, FLOOR)
    r = noisy_risk(apl.loss(name), found, pi).item()
    shape = (pi - r).clamp(min=0) ** power
    expected = (shape / shape.sum()).clamp(min=FLOOR)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-3)


@pytest.mark.parametrize("name", ["nce", "nfl", "ngce", "nmae", "nce+mae", "nce+rce", "nfl+rce"])
def test_symmetric_noise_leaves_the_truth(name):
    for row in ("uniform", "ten"):
        found = minimize(apl.loss(name), torch.tensor(ROWS[row], dtype=torch.float64), FLOOR)
        assert found[0] > 0.999, row


def test_pair_noise_moves_nce_and_the_passive_term_holds_it():
    row = torch.tensor(ROWS["pair"], dtype=torch.float64)
    assert minimize(apl.loss("nce"), row, FLOOR)[0] < 0.7
    assert minimize(apl.loss("ngce"), row, FLOOR)[0] < 0.95
    assert minimize(apl.loss("nce+mae"), row, FLOOR)[0] > 0.9
    assert minimize(apl.loss("nce+mae", beta=10), row, FLOOR)[0] > 0.99
    assert minimize(apl.loss("mae"), row, FLOOR)[0] > 0.999


def test_symmetric_noise_beyond_the_limit_turns_the_order_around():
    row = symmetric(4, 0.9)[0]  # (K - 1)/K = .75
    assert minimize(apl.loss("mae"), row, FLOOR)[0] < 1e-4
