"""What tests/test_contract.py does not ask of every loss: parameters, many classes, composition."""

from __future__ import annotations

import definitions
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from sympy import Rational, Symbol, exp, log

import apl
from apl.symbolic import is_symmetric, p, p_y

NAMES = apl.losses.names()
every_loss = pytest.mark.parametrize("name", NAMES)


def value_and_gradient(loss, logits, target):
    logits = logits.clone().requires_grad_()
    values = loss(logits, target)
    (gradient,) = torch.autograd.grad(values.sum(), logits)
    return values.detach(), gradient


def expected(name, logits, target, **parameters):
    """Values and gradients of the definitions, rounded to float64."""
    rows = [
        definitions.value_and_gradient(name, row.tolist(), int(y), **parameters)
        for row, y in zip(logits, target, strict=True)
    ]
    values = torch.tensor([float(value) for value, _ in rows], dtype=torch.float64)
    return values, torch.tensor([[float(g) for g in gradient] for _, gradient in rows]).double()


def random_rows(N, K, scale, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(N, K, generator=generator, dtype=dtype)
    return logits, torch.randint(K, (N,), generator=generator)


def test_the_witness_and_the_catalog_name_the_same_losses():
    assert set(NAMES) == set(definitions.NAMES)


@every_loss
@pytest.mark.parametrize(("K", "N", "scale"), [(100, 3, 1), (1000, 2, 2)])
def test_many_classes_to_the_last_digits_of_float32(name, K, N, scale):
    logits, target = random_rows(N, K, scale)
    target[0] = logits[0].argmax()  # a confident right row, and a confident wrong one
    target[1] = logits[1].argmin()
    values, gradient = value_and_gradient(apl.loss(name, reduction="none"), logits, target)
    true_values, true_gradient = expected(name, logits, target)
    torch.testing.assert_close(values.double(), true_values, rtol=1e-5, atol=1e-6)
    error = (gradient.double() - true_gradient).abs().amax(1)
    assert (error <= 1e-5 * true_gradient.abs().amax(1)).all()


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("fl", {"gamma": 0.0}),
        ("fl", {"gamma": 2.0}),
        ("nfl", {"gamma": 5.0}),
        ("gce", {"q": 0.01}),
        ("gce", {"q": 1.0}),
        ("ngce", {"q": 0.1}),
        ("ngce", {"q": 1.0}),
        ("rce", {"A": -4.0}),
        ("nfl+rce", {"gamma": 2.0, "A": -4.0, "alpha": 10.0, "beta": 0.1}),
        ("sce", {"alpha": 6.0, "beta": 0.1}),
        ("ngce+nce", {"q": 0.3, "alpha": 2.0}),
    ],
)
def test_parameters(name, parameters):
    logits, target = random_rows(8, 10, 3.0)
    loss = apl.loss(name, reduction="none", **parameters)
    values, gradient = value_and_gradient(loss, logits, target)
    true_values, true_gradient = expected(name, logits, target, **parameters)
    torch.testing.assert_close(values.double(), true_values, rtol=1e-5, atol=1e-6)
    error = (gradient.double() - true_gradient).abs().amax(1)
    assert (error <= 1e-5 * true_gradient.abs().amax(1)).all()


@given(
    name=st.sampled_from(NAMES),
    rows=st.integers(2, 6).flatmap(
        lambda K: st.lists(
            st.lists(st.floats(-1e4, 1e4, width=32), min_size=K, max_size=K), min_size=1, max_size=4
        )
    ),
    label=st.integers(0, 1),
)
def test_finite_logits_give_finite_losses_and_gradients(name, rows, label):
    logits = torch.tensor(rows)
    target = torch.full((len(rows),), label)
    values, gradient = value_and_gradient(apl.loss(name, reduction="none"), logits, target)
    assert values.isfinite().all()
    assert gradient.isfinite().all()
    assert (values >= 0).all()


def test_cross_entropy_is_torchs():
    logits, target = random_rows(32, 10, 5.0)
    torch.testing.assert_close(apl.CE()(logits, target), F.cross_entropy(logits, target))


def test_composed_losses_are_the_named_ones():
    logits, target = random_rows(32, 10, 3.0)
    pairs = [
        (apl.normalize(apl.CE()) + apl.RCE(), apl.loss("nce+rce")),
        (
            2 * apl.normalize(apl.FL(gamma=2)) + 0.5 * apl.MAE(),
            apl.loss("nfl+mae", alpha=2, beta=0.5, gamma=2),
        ),
        (0.1 * apl.CE() + apl.RCE(A=-4), apl.loss("sce", A=-4)),
        (apl.normalize(apl.GCE(q=0.1)), apl.loss("ngce", q=0.1)),
        (apl.normalize(3 * apl.CE()), apl.loss("nce")),
        (apl.normalize(apl.normalize(apl.CE())), apl.loss("nce")),
    ]
    for composed, named in pairs:
        torch.testing.assert_close(composed(logits, target), named(logits, target))


def test_a_sum_keeps_both_values_of_a_parameter():
    logits, target = random_rows(32, 10, 3.0)
    a = Symbol("a", positive=True)  # a parameter of one's own, that the catalog does not know
    own = [apl.Loss((1 - p_y) ** a, {"a": value}, name="own") for value in (2.0, 3.0)]
    for first, second in [(apl.GCE(q=0.3), apl.GCE(q=0.7)), own]:
        apart = first(logits, target) + second(logits, target)
        torch.testing.assert_close((first + second)(logits, target), apart)


@pytest.mark.parametrize(
    "expression",
    [
        (1 - p_y) ** 2,
        log(1 + exp(-p_y)) - log(1 + exp(-1)),
        (1 - p_y) + (1 - p_y) ** 2 / 2 + (1 - p_y) ** 3 / 3,
        p_y * log(p_y) + (1 - p_y) * log(1 - p_y) + 2,
        (1 - p_y ** Rational(3, 2)) * Rational(2, 3),
    ],
    ids=str,
)
def test_a_loss_of_ones_own_normalizes_to_a_symmetric_loss(expression):
    logits, _ = random_rows(16, 7, 3.0, dtype=torch.float64)
    loss = apl.Loss(expression, reduction="none")
    normalized = apl.normalize(loss)
    assert is_symmetric(normalized.expression)
    labels = torch.arange(7).repeat(16, 1)
    each = torch.stack([loss(logits, labels[:, k]) for k in range(7)])
    normalized_each = torch.stack([normalized(logits, labels[:, k]) for k in range(7)])
    torch.testing.assert_close(normalized_each, each / each.sum(0))
    torch.testing.assert_close(normalized_each.sum(0), torch.ones(16, dtype=torch.float64))


def test_what_a_notebook_shows():
    assert repr(apl.loss("nce+rce", alpha=1, beta=0.5)) == "NCE+RCE(alpha=1, beta=0.5, A=-9.21034)"
    assert repr(apl.CE(reduction="sum")) == "CE(reduction='sum')"
    shown = apl.loss("nce+mae")._repr_latex_()
    assert shown == (
        r"$\displaystyle \frac{\alpha \log{\left(p_{y} \right)}}{\sum_{k=1}^{K} "
        r"\log{\left(p_{k} \right)}} + 2 \beta \left(1 - p_{y}\right), \quad \alpha = 1, "
        r"\quad \beta = 1$"
    )
    assert r"\sum_{k \ne y}" in apl.NLNL()._repr_latex_()


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (lambda: apl.loss("nec"), "no loss is named 'nec': the names are ce, fl, mae"),
        (lambda: apl.loss(3), "no loss is named 3"),
        (lambda: apl.loss("ce", q=0.5), "ce has no parameter 'q': it has no parameters"),
        (lambda: apl.loss("gce", Q=0.5), "gce has no parameter 'Q': it has q"),
        (lambda: apl.loss("gce", q=0), "q = 0 is not allowed.*above 0 and at most 1"),
        (lambda: apl.loss("gce", q=1.5), "q = 1.5 is not allowed.*above 0 and at most 1"),
        (lambda: apl.loss("gce", q="a"), "q = 'a' is not allowed"),
        (lambda: apl.loss("fl", gamma=-1), "gamma = -1 is not allowed.*at least 0"),
        (lambda: apl.loss("fl", gamma=float("nan")), "gamma = nan is not allowed"),
        (lambda: apl.loss("nce+mae", alpha=-1), "alpha = -1 is not allowed.*above 0"),
        (lambda: apl.loss("nce+mae", beta=float("inf")), "beta = inf is not allowed"),
        (lambda: apl.loss("rce", A=4), "A = 4 is not allowed.*below 0"),
        (lambda: -1 * apl.CE(), "a loss takes the weight -1: weights are positive and finite"),
        (lambda: apl.CE() + apl.MAE(reduction="sum"), "cannot add a loss with reduction 'mean'"),
        (lambda: apl.Loss(p[3]), "cannot compile"),
        (lambda: apl.Loss(apl.catalog.gce, name="mine"), "mine needs a value for 'q'"),
        (lambda: apl.CE()(torch.tensor(1.0), torch.tensor(0)), "single number"),
    ],
)
def test_bad_input_gets_one_sentence(wrong, sentence):
    with pytest.raises(ValueError, match=sentence) as error:
        wrong()
    assert "\n" not in str(error.value)


def test_a_loss_adds_to_losses_only():
    with pytest.raises(TypeError, match="unsupported operand"):
        apl.CE() + 1
