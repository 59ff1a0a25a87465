"""The losses as they were run, held against one-hot sums written from the list of differences."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import apl
from apl.recipes import Recipe, recipe, recipes

CLASSES = {"mnist": 10, "cifar10": 10, "cifar100": 100, "webvision": 50}
LOG_ZERO = math.log(1e-4)


# --- the witness: float64, one-hot, nothing shared with the package -------------------------------


def one_hot(z: Tensor, y: Tensor) -> Tensor:
    return F.one_hot(y, z.shape[1]).to(z)


def clamped(z: Tensor) -> Tensor:
    return z.softmax(1).clamp(1e-7, 1)


def w_ce(z: Tensor, y: Tensor, s: dict[str, float]) -> Tensor:
    return -(one_hot(z, y) * z.log_softmax(1)).sum(1)


def w_nce(z: Tensor, y: Tensor, s: dict[str, float]) -> Tensor:
    return w_ce(z, y, s) / -z.log_softmax(1).sum(1)


def w_mae(z: Tensor, y: Tensor, s: dict[str, float]) -> Tensor:
    return 1 - (one_hot(z, y) * z.softmax(1)).sum(1)


def w_nmae(z: Tensor, y: Tensor, s: dict[str, float]) -> Tensor:
    return w_mae(z, y, s) / (2 * (z.shape[1] - 1))


def w_rce(z: Tensor, y: Tensor, s: dict[str, float]) -> Tensor:
    return -(clamped(z) * one_hot(z, y).clamp(1e-4, 1).log()).sum(1)


def w_nrce(z: Tensor, y: Tensor, s: dict[str, float]) -> Tensor:
    return w_rce(z, y, s) * (z.shape[1] - 1) / 4


def w_gce(z: Tensor, y: Tensor, s: dict[str, float]) -> Tensor:
    return (1 - (one_hot(z, y) * clamped(z)).sum(1) ** s["q"]) / s["q"]


def w_ngce(z: Tensor, y: Tensor, s: dict[str, float]) -> Tensor:
    p = clamped(z)
    return (1 - (one_hot(z, y) * p).sum(1) ** s["q"]) / (z.shape[1] - (p ** s["q"]).sum(1))


def focal_terms(z: Tensor, s: dict[str, float]) -> Tensor:
    u = z.log_softmax(1)
    return -((1 - u.exp()).clamp(min=0) ** s["gamma"]).detach() * u


def w_fl(z: Tensor, y: Tensor, s: dict[str, float]) -> Tensor:
    return (one_hot(z, y) * focal_terms(z, s)).sum(1)


def w_nfl(z: Tensor, y: Tensor, s: dict[str, float]) -> Tensor:
    return w_fl(z, y, s) / focal_terms(z, s).sum(1)


def witness(name: str, z: Tensor, y: Tensor, s: dict[str, float]) -> Tensor:
    if name == "sce":
        name = "ce+rce"
    first, *second = (globals()[f"w_{part}"](z, y, s).mean() for part in name.split("+"))
    if not second:
        return s.get("scale", 1) * first
    if name in ("gce+mae", "gce+rce"):
        return first + s["beta"] * second[0]
    if name == "gce+nce":
        return first + second[0]
    return s["alpha"] * first + s["beta"] * second[0]


def case(K: int, scale: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    z = scale * torch.randn(12, K, generator=rng, dtype=torch.float64)
    return z.requires_grad_(), torch.randint(K, (12,), generator=rng)


def label(r: Recipe) -> str:
    return f"{r.source}-{r.dataset}-{r.noise}-{r.loss}"


PAPERS = [r for r in recipes() if r.source != "book"]
SAMPLED = [r for r in PAPERS if r.runs == "nlnl"]
SUMMED = [r for r in PAPERS if r.runs != "nlnl"]


@pytest.mark.parametrize("r", SUMMED, ids=label)
def test_values_and_gradients_are_the_witness(r: Recipe) -> None:
    loss = apl.paper_loss(r.dataset, r.loss, r.noise, source=r.source)
    # At scale 30 probabilities are below both floors.
    for scale in (0, 1, 30):
        z, y = case(CLASSES[r.dataset], scale)
        ours, theirs = loss(z, y), witness(r.runs, z, y, dict(r.values))
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
        (ours_grad,), (theirs_grad,) = (torch.autograd.grad(x, z) for x in (ours, theirs))
        torch.testing.assert_close(ours_grad, theirs_grad, rtol=1e-7, atol=1e-10)


# --- the settings, typed again from tables 4.2 to 4.4 of the facts --------------------------------


@pytest.mark.parametrize(
    ("source", "dataset", "noise", "name", "values"),
    [
        ("code", "mnist", "symmetric", "sce", {"alpha": 0.01, "beta": 1}),
        ("code", "mnist", "symmetric", "nce", {"scale": 10}),
        ("code", "mnist", "asymmetric", "nce", {"scale": 10}),
        ("code", "mnist", "symmetric", "ngce", {"q": 0.1, "scale": 10}),
        ("code", "mnist", "asymmetric", "ngce", {"q": 0.1, "scale": 1}),
        ("code", "mnist", "symmetric", "nfl+rce", {"alpha": 1, "beta": 10, "gamma": 0.5}),
        ("code", "mnist", "symmetric", "nlnl", {"negatives": 1}),
        ("code", "cifar10", "symmetric", "sce", {"alpha": 0.1, "beta": 1}),
        ("code", "cifar10", "symmetric", "nfl", {"gamma": 0.5, "scale": 10}),
        ("code", "cifar10", "asymmetric", "nfl", {"gamma": 0.5, "scale": 1}),
        ("code", "cifar10", "symmetric", "nce+rce", {"alpha": 1, "beta": 1}),
        ("code", "cifar10", "symmetric", "ce", {}),
        ("code", "cifar100", "symmetric", "nce+mae", {"alpha": 10, "beta": 1}),
        ("code", "cifar100", "asymmetric", "nce+rce", {"alpha": 10, "beta": 0.1}),
        ("code", "cifar100", "asymmetric", "sce", {"alpha": 6, "beta": 0.1}),
        ("code", "cifar100", "symmetric", "nlnl", {"negatives": 110}),
        ("code", "webvision", "real", "nce+rce", {"alpha": 50, "beta": 0.1}),
        ("2020", "mnist", "symmetric", "nce+rce", {"alpha": 1, "beta": 1}),
        ("2020", "cifar10", "symmetric", "ngce", {"q": 0.7, "scale": 1}),
        ("2020", "cifar10", "asymmetric", "sce", {"alpha": 0.1, "beta": 1}),
        ("2020", "cifar100", "symmetric", "nce+rce", {"alpha": 10, "beta": 0.1}),
        ("2020", "cifar100", "asymmetric", "nce+rce", {"alpha": 5, "beta": 0.1}),
        ("2020", "cifar100", "asymmetric", "nce+mae", {"alpha": 5, "beta": 1}),
        ("2020", "cifar100", "asymmetric", "nfl+rce", {"alpha": 10, "beta": 0.1, "gamma": 0.5}),
        ("2020", "cifar100", "asymmetric", "ngce+mae", {"alpha": 5, "beta": 1, "q": 0.2}),
        ("2020", "cifar100", "asymmetric", "sce", {"alpha": 2, "beta": 0.1}),
        ("2020", "cifar100", "symmetric", "gce+rce", {"alpha": 1, "beta": 0.1, "q": 0.7}),
        ("followers", "mnist", "symmetric", "nce+rce", {"alpha": 1, "beta": 10}),
        ("followers", "cifar100", "asymmetric", "nce+mae", {"alpha": 10, "beta": 0.1}),
    ],
)
def test_settings_are_the_published_ones(
    source: str, dataset: str, noise: str, name: str, values: dict[str, float]
) -> None:
    found = recipe(dataset, name, noise, source)
    assert dict(found.values) == values
    assert set(found.origins) == {"runs", *values}
    assert all(found.origins.values())


def test_every_value_has_an_origin_and_every_loss_is_in_the_catalog() -> None:
    for r in PAPERS:
        assert all(r.origins[parameter].strip() for parameter in ("runs", *r.values))
        assert {r.loss, r.runs} <= set(apl.losses.names())


def test_three_configurations_run_another_loss_than_they_are_named_for() -> None:
    others = [r for r in recipes() if r.runs != r.loss]
    assert [(r.source, r.dataset, r.noise, r.loss, r.runs) for r in others] == [
        ("code", "cifar10", "asymmetric", "ngce+rce", "ngce+mae"),
        ("code", "cifar100", "symmetric", "ngce+rce", "ngce+mae"),
        ("code", "cifar100", "asymmetric", "ngce+rce", "ngce+mae"),
    ]
    loss = apl.paper_loss("cifar100", "ngce+rce")
    assert loss.runs == "ngce+mae"
    assert repr(loss).endswith("; alpha=10, beta=0.1, q=0.7; runs ngce+mae)")


# --- the differences, one by one ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "factor"),
    [("mae", 1 / 2), ("nmae", 1 / 2), ("rce", 1.0), ("nrce", -LOG_ZERO * 9 * 9 / 4)],
)
def test_multiples_of_the_catalogs_losses(name: str, factor: float) -> None:
    z, y = case(10, 1)
    ours = apl.paper_loss("cifar10", name, source="2020")(z, y)
    torch.testing.assert_close(ours, factor * apl.loss(name)(z, y), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["fl", "nfl"])
def test_the_focal_factor_counts_but_is_not_differentiated(name: str) -> None:
    z, y = case(10, 1)
    ours, formula = apl.paper_loss("cifar10", name, source="2020"), apl.loss(name)
    torch.testing.assert_close(ours(z, y), formula(z, y))
    (held,), (full,) = (torch.autograd.grad(x(z, y), z) for x in (ours, formula))
    assert (held - full).norm() > 0.05 * full.norm()


def test_no_gradient_below_the_floor() -> None:
    # Sure and wrong: p_y is below 1e-7. Sure and right: all the other classes are.
    z = torch.tensor([[30.0] + [0.0] * 9], dtype=torch.float64, requires_grad=True)
    wrong, right = torch.tensor([1]), torch.tensor([0])
    gce = apl.paper_loss("cifar10", "gce")(z, wrong)
    assert gce.item() == pytest.approx((1 - 1e-7**0.7) / 0.7, rel=1e-12)
    assert not torch.autograd.grad(gce, z)[0].any()
    rce = apl.paper_loss("cifar10", "rce")(z, right)
    assert rce.item() == pytest.approx(-LOG_ZERO * 9e-7, rel=1e-9)
    assert not torch.autograd.grad(rce, z)[0].any()
    for free in ("nce", "mae", "nfl"):
        value = apl.paper_loss("cifar10", free)(z, right)
        assert torch.autograd.grad(value, z)[0].any(), free


@pytest.mark.parametrize(
    ("name", "ignored", "used"),
    [("gce+mae", ["alpha"], ["beta"]), ("gce+rce", ["alpha"], ["beta"])]
    + [("gce+nce", ["alpha", "beta"], []), ("ngce+nce", [], ["alpha", "beta"])],
)
def test_some_weights_are_ignored(name: str, ignored: list[str], used: list[str]) -> None:
    z, y = case(10, 1)
    plain = apl.paper_loss("cifar10", name, source="2020")(z, y)
    for weight in ("alpha", "beta"):
        changes: dict[str, Any] = {weight: 7.0}
        changed = apl.paper_loss("cifar10", name, source="2020", **changes)(z, y)
        assert torch.equal(plain, changed) == (weight in ignored)
        assert (weight in ignored) != (weight in used)


# --- NLNL ---------------------------------------------------------------------------------------


GIVEN = torch.arange(10).repeat_interleave(torch.arange(1, 11) * 10)


def nlnl(**changes: Any) -> Any:
    return apl.paper_loss("mnist", "nlnl", **{"given": GIVEN, **changes})


def test_nlnl_samples_every_complementary_label_with_the_weight_of_the_given_one() -> None:
    z, _ = case(10, 1)
    row, target = z.detach()[:1], torch.tensor([3])
    # Class 9 is given 100 times, class 3 40 times.
    values = -2.5 * torch.log(1 - row.softmax(1))[0]
    loss = nlnl(seed=5)
    drawn = torch.stack([loss(row, target) for _ in range(300)])
    nearest = (drawn[:, None] - values).abs().min(1)
    assert nearest.values.max() < 1e-6
    counts = nearest.indices.bincount(minlength=10)
    assert counts[3] == 0
    # 300 / 9 = 33 each; 20 is more than three standard deviations.
    assert all(abs(count - 300 / 9) < 20 for k, count in enumerate(counts.tolist()) if k != 3)


def test_nlnl_sums_over_its_negatives_and_means_over_samples() -> None:
    z, y = case(10, 0.5)
    many = nlnl(negatives=4000)(z, y) / 4000
    p = z.softmax(1)
    others = (1 - one_hot(z, y)) / 9
    each = -(others * torch.log(1 - p)).sum(1) * 100 / (10.0 * (y + 1))
    assert many.item() == pytest.approx(each.mean().item(), rel=0.01)


def test_nlnl_is_flat_where_the_sampled_class_is_nearly_sure() -> None:
    z = torch.zeros(1, 10, dtype=torch.float64)
    z[0, 0] = 30.0
    z.requires_grad_()
    loss = nlnl(negatives=200)(z, torch.tensor([9]))  # class 9 has weight 1
    # Every draw of class 0 costs -log(1e-5), the others next to nothing.
    hits = loss.item() / -math.log(1e-5)
    assert 5 < hits < 50
    assert hits == pytest.approx(round(hits), abs=1e-6)
    assert torch.autograd.grad(loss, z)[0].abs().max() < 1e-9


def test_nlnl_repeats_by_seed_and_leaves_the_global_state() -> None:
    z, y = case(10, 1)
    before = torch.get_rng_state()
    first, again, other = (nlnl(seed=s) for s in (0, 0, 1))
    values = [[loss(z, y).item() for _ in range(3)] for loss in (first, again, other)]
    assert values[0] == values[1] != values[2]
    assert len(set(values[0])) == 3
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("r", SAMPLED, ids=label)
def test_every_nlnl_runs(r: Recipe) -> None:
    K = CLASSES[r.dataset]
    loss = apl.paper_loss(r.dataset, r.loss, r.noise, source=r.source, given=torch.arange(K))
    z, y = case(K, 1)
    loss(z, y).backward()
    assert z.grad is not None and z.grad.isfinite().all()


# --- the call -------------------------------------------------------------------------------------


def test_more_dimensions_half_precision_and_copies() -> None:
    z, y = case(10, 1)
    for name in ("nce+rce", "nfl+mae", "ngce"):
        loss = apl.paper_loss("cifar10", name)
        images = z.view(2, 6, 10).movedim(2, 1)
        torch.testing.assert_close(loss(images, y.view(2, 6)), loss(z, y))
        torch.testing.assert_close(loss(z[0], y[0]), loss(z[:1], y[:1]))
        assert loss(z.bfloat16(), y).dtype == torch.float32
        for copied in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
            assert torch.equal(copied(z, y), loss(z, y))
    sampled = nlnl()
    before = copy.deepcopy(sampled)(z, y)
    assert torch.equal(pickle.loads(pickle.dumps(sampled))(z, y), before)


def test_repr_says_the_run() -> None:
    loss = apl.paper_loss("CIFAR100".lower(), "NCE+RCE", noise="asymmetric", source="2020")
    shown = "paper_loss('cifar100', 'nce+rce', 'asymmetric', '2020'; alpha=5, beta=0.1)"
    assert repr(loss) == shown
    assert repr(apl.paper_loss("mnist", "ce")) == "paper_loss('mnist', 'ce', 'symmetric', 'code')"


@pytest.mark.parametrize("name", ["ce", "nce+rce", "ngce", "nfl", "nlnl"])
def test_a_label_that_is_no_class_is_refused(name: str) -> None:
    loss = apl.paper_loss("mnist", name, given=GIVEN)
    for wrong in (10, -1):
        sentence = f"target holds the label {wrong}: with 10 classes labels are 0 to 9"
        with pytest.raises(ValueError, match=sentence):
            loss(torch.zeros(2, 10), torch.tensor([0, wrong]))


@pytest.mark.parametrize(
    ("arguments", "changes", "sentence"),
    [
        (
            ("digits", "ce"),
            {},
            "no recipe of source 'code' is for the data set 'digits'; "
            "there is mnist, cifar10, cifar100, webvision",
        ),
        (
            ("mnist", "ce"),
            {"source": "2021"},
            "no source of recipes '2021'; there is code, 2020, followers, alfs",
        ),
        (
            ("webvision", "ce"),
            {},
            "no recipe of source 'code' for webvision has the noise 'symmetric'; there is real",
        ),
        (
            ("webvision", "mae", "real"),
            {},
            "no recipe of source 'code' for webvision with real noise is for the loss 'mae'; "
            "there is ce, gce, sce, nce+mae, nce+rce, nfl+mae, nfl+rce",
        ),
        (("mnist", "ce"), {"q": 0.5}, "ce as it was run has no parameters, not 'q'"),
        (("mnist", "nce"), {"q": 0.5}, "nce as it was run has scale, not 'q'"),
        (
            ("mnist", "nce"),
            {"scale": 0},
            "scale = 0 is not allowed: it is a finite number above 0",
        ),
        (
            ("mnist", "nlnl"),
            {"negatives": 1.5},
            "negatives = 1.5 is not allowed: it is an int of at least 1",
        ),
        (
            ("mnist", "nlnl"),
            {},
            "NLNL weights the classes by how often each is given: "
            "pass given=, the labels of the training set",
        ),
        (
            ("mnist", "nlnl"),
            {"given": torch.tensor([10])},
            "given must be (N,), with labels in 0..9",
        ),
        (("mnist", "nlnl"), {"given": torch.arange(9)}, "given has no sample of class 9"),
    ],
)
def test_what_is_not_known_is_said(
    arguments: tuple[str, ...], changes: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ValueError) as raised:
        apl.paper_loss(*arguments, **changes)
    assert str(raised.value) == sentence


def test_given_labels_of_another_type_are_refused() -> None:
    with pytest.raises(TypeError, match="given must be a tensor of integer labels, not list"):
        nlnl(given=[0, 1])


def test_logits_of_another_size_are_refused_by_nlnl() -> None:
    with pytest.raises(ValueError, match="logits have 5 classes: NLNL has 10 weights"):
        nlnl()(torch.zeros(1, 5), torch.tensor([0]))
