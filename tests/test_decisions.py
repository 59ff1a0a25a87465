"""What `apl.symbolic` decides about losses, held against the losses that train."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sympy import (
    Function,
    N,
    Rational,
    Sum,
    Symbol,
    cos,
    exp,
    log,
    nsimplify,
    oo,
    pi,
    simplify,
    sqrt,
)

import apl
from apl import catalog
from apl.symbolic import (
    K,
    at,
    infimum,
    initial_gradient,
    is_symmetric,
    is_within_bound,
    j,
    logit_gradient,
    noisy_risk,
    normalize,
    p,
    p_y,
    rest_uniform,
    sum_over_labels,
    supremum,
    weight,
)

NAMES = tuple(catalog.CATALOG)
SINGLE = tuple(name for name in NAMES if "+" not in name)
h = Function("h", positive=True)


def parameters(name):
    """The defaults, except that A is a round number."""
    return {key: -4 if key == "A" else v for key, v in catalog.entry(name).parameters.items()}


def with_numbers(name):
    """The expression of a loss with its parameters as exact numbers."""
    values = {k: nsimplify(v, rational=True) for k, v in parameters(name).items()}
    return catalog.entry(name).expression.subs(
        {catalog.PARAMETERS[key].symbol: value for key, value in values.items()}
    )


def trained(name, **keywords):
    """The loss that trains, with the same parameters."""
    return apl.loss(name, **parameters(name), **keywords)


def random_logits(classes, seed=0, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(classes, generator=generator, dtype=torch.float64)


def slope(name, logits, label):
    """The gradient that training would see."""
    logits = logits.clone().requires_grad_()
    value = trained(name)(logits[None], torch.tensor([label]))
    return torch.autograd.grad(value, logits)[0]


# --- gradients ----------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [2, 3, 7])
@pytest.mark.parametrize("name", NAMES)
def test_logit_gradients_are_those_of_the_losses_that_train(name, classes):
    loss, logits = with_numbers(name), random_logits(classes, seed=classes)
    probabilities = [nsimplify(v, rational=True) for v in logits.softmax(-1).tolist()]
    expected = slope(name, logits, label=1)
    found = float(N(at(logit_gradient(loss), probabilities, label=1)))
    assert found == pytest.approx(expected[1].item(), rel=1e-8, abs=1e-12)
    other = at(logit_gradient(loss, j).subs(p[j], p[1]), probabilities, label=1)
    assert float(N(other)) == pytest.approx(expected[0].item(), rel=1e-8, abs=1e-12)


def test_logit_gradients_of_a_function_without_a_name():
    derivative = h(p_y).diff(p_y)
    assert simplify(logit_gradient(h(p_y)) - derivative * p_y * (1 - p_y)) == 0
    assert simplify(logit_gradient(h(p_y), j) + derivative * p_y * p[j]) == 0


def test_logit_gradients_sum_to_zero():
    # Adding the same number to all logits changes nothing.
    for name in SINGLE:
        loss = with_numbers(name)
        probabilities = [Rational(1, 2), Rational(1, 3), Rational(1, 6)]
        total = at(logit_gradient(loss), probabilities, label=0)
        for other in (2, 3):
            total += at(logit_gradient(loss, j).subs(p[j], p[other]), probabilities, label=0)
        assert abs(N(total)) < 1e-12, name


def test_another_class_is_called_j():
    with pytest.raises(ValueError, match="wrt is p"):
        logit_gradient(-log(p_y), p_y)


WEIGHTS = {"ce": 1, "mae": 2 * p_y, "gce": p_y**catalog.q, "rce": -catalog.A * p_y} | dict.fromkeys(
    ("nmae", "nrce"), p_y / (K - 1)
)


@pytest.mark.parametrize("name", SINGLE)
def test_weights(name):
    found = weight(catalog.entry(name).expression)
    if name in WEIGHTS:
        assert simplify(found - WEIGHTS[name]) == 0
    elif name in ("nce", "nfl", "ngce", "nlnl"):
        assert found is None
    else:
        logits = random_logits(5)
        probabilities = logits.softmax(-1)
        value = weight(with_numbers(name)).subs(p_y, probabilities[0].item())
        direction = probabilities - torch.eye(5, dtype=torch.float64)[0]
        torch.testing.assert_close(slope(name, logits, 0), float(value) * direction)


@pytest.mark.parametrize("name", NAMES)
def test_initial_gradients_are_those_of_the_losses_that_train(name):
    found = initial_gradient(with_numbers(name))
    for classes in (2, 3, 10, 100):
        expected = -slope(name, torch.zeros(classes, dtype=torch.float64), 1)[1].item()
        assert float(found.subs(K, classes)) == pytest.approx(expected, rel=1e-9)


def test_normalizing_divides_the_initial_gradient():
    # grad N[h] = grad h / (K h(1/K)) at the uniform prediction, for any h.
    ratio = initial_gradient(normalize(h(p_y))) / initial_gradient(h(p_y))
    assert simplify(ratio * K * h(1 / K)) == 1


def test_the_rest_uniform():
    loss = catalog.entry("nce").expression
    exact = at(loss, [Rational(1, 2), Rational(1, 6), Rational(1, 6), Rational(1, 6)], label=0)
    general = rest_uniform(loss, Rational(1, 2)).subs(K, 4)
    assert simplify(exact - general) == 0
    others = catalog.entry("nlnl").expression
    exact = at(others, [Rational(1, 2), Rational(1, 4), Rational(1, 4)], label=0)
    assert simplify(exact - rest_uniform(others, Rational(1, 2)).subs(K, 3)) == 0


# --- the largest and the smallest value ---------------------------------------------------------

r = Symbol("r", positive=True)  # q = 1/(1 + r) lies in (0, 1)
SUPREMA = {
    "ce": oo,
    "fl": oo,
    "mae": 2,
    "rce": -catalog.A,
    "gce": 1 / catalog.q,
    "nlnl": oo,
    "nce": 1,
    "nfl": 1,
    "nmae": 1 / (K - 1),
    "nce+mae": catalog.alpha + 2 * catalog.beta,
}


@pytest.mark.parametrize("name", SUPREMA)
def test_suprema_for_symbolic_parameters(name):
    found = supremum(catalog.entry(name).expression)
    assert found == SUPREMA[name] or simplify(found - SUPREMA[name]) == 0


def test_supremum_of_ngce_for_every_exponent_below_one():
    found = supremum(catalog.entry("ngce").expression.subs(catalog.q, 1 / (1 + r)))
    expected = 1 / (K - (K - 1) ** (1 - 1 / (1 + r)))
    for exponent, classes in ((Rational(1, 10), 3), (Rational(7, 10), 10), (Rational(1, 2), 100)):
        values = {r: 1 / exponent - 1, K: classes}
        assert N((found - expected).subs(values), 30) == pytest.approx(0, abs=1e-25)


@pytest.mark.parametrize("classes", [3, 10])
@pytest.mark.parametrize("name", NAMES)
def test_no_prediction_leaves_the_range_and_some_come_close(name, classes):
    loss = with_numbers(name)
    low, high = (bound(loss).subs(K, classes) for bound in (infimum, supremum))
    vertex = 1e4 * torch.eye(classes, dtype=torch.float64)
    rows = torch.cat(
        [
            torch.stack([random_logits(classes, seed, scale=4) for seed in range(200)]),
            vertex,
            -vertex,  # the label's probability near 0, the rest uniform
            torch.zeros(1, classes, dtype=torch.float64),
        ]
    )
    values = trained(name, reduction="none")(rows, torch.zeros(len(rows), dtype=torch.long))
    slack = 1e-9
    assert values.min() >= float(low) - slack
    assert values.min() == pytest.approx(float(low), abs=1e-3)
    if high is oo:
        assert values.max() > 10
    else:
        assert values.max() <= float(high) * (1 + slack)
        # Losses with a logarithm climb slowly: N = z/(z + 9 log 9) at a vertex of height z.
        assert values.max() >= float(high) * 0.995


@pytest.mark.parametrize("name", NAMES)
def test_which_losses_obey_the_bound_of_lemma_2(name):
    parts = set(name.split("+"))
    expected = parts <= {"mae", "rce", "nmae", "nrce"}
    assert is_within_bound(with_numbers(name)) is expected


def test_ngce_obeys_the_bound_from_exponent_one_on():
    for exponent, expected in ((Rational(99, 100), False), (1, True), (2, True), (5, True)):
        assert is_within_bound(normalize(1 - p_y**exponent)) is expected


def test_what_cannot_be_decided_is_none():
    assert supremum(normalize(h(p_y))) is None
    assert supremum(h(p_y)) is None
    assert infimum(cos(20 * pi * p_y)) is None  # neither rising nor falling
    assert is_within_bound(h(p_y)) is None
    assert is_symmetric(h(p_y)) is None
    assert weight(normalize(h(p_y))) is None
    # Convex and concave: their largest values lie in different places.
    assert supremum(normalize(1 - sqrt(p_y)) + normalize(1 - p_y**2)) is None
    # h(1) is not 0, so the label's loss does not vanish where the label is certain.
    assert supremum(normalize(exp(-p_y))) is None


# --- risk ---------------------------------------------------------------------------------------


def test_noisy_risk_of_any_loss_under_symmetric_noise():
    eta = Symbol("eta")
    s = 1 - eta * K / (K - 1)
    total = sum_over_labels(h(p_y))
    difference = noisy_risk(h(p_y), eta) - (s * h(p_y) + eta / (K - 1) * total)
    assert isinstance(total, Sum)
    assert simplify(difference) == 0


@settings(max_examples=20)
@given(st.sampled_from(NAMES), st.integers(0, 10**6), st.integers(2, 5))
def test_noisy_risk_of_a_row_is_that_of_the_losses_that_train(name, seed, classes):
    row = torch.softmax(random_logits(classes, seed), -1)
    logits = random_logits(classes, seed + 1)
    exact = [nsimplify(v, rational=True) for v in row.tolist()]
    exact[-1] = 1 - sum(exact[:-1])
    risk = noisy_risk(with_numbers(name), exact)
    found = float(N(at(risk, [nsimplify(v, rational=True) for v in logits.softmax(-1).tolist()])))
    expected = apl.risk.noisy_risk(trained(name), logits.softmax(-1), row)
    assert found == pytest.approx(expected.item(), rel=1e-7)


@pytest.mark.parametrize("row", [[1], [0.5, 0.6], ["3/2", "-1/2"]])
def test_rows_that_are_no_distributions_are_refused(row):
    with pytest.raises(ValueError, match="the row"):
        noisy_risk(1 - p_y, row)
