"""Many runs at once: each is the run of the plain loop."""

from __future__ import annotations

import math
from copy import deepcopy

import pandas as pd
import pytest
import torch
from torch import nn

import apl
from apl import experiments, stacked, training, workers
from apl.campaign import reproduce
from apl.checkpoints import OutOfTime
from apl.ensemble import Run, train
from apl.experiments import Setting, run
from apl.grid import Cell
from apl.protocols import Protocol
from apl.records import Store
from apl.stacked import Stack, stackable
from apl.together import alike

PROTOCOL = Protocol.of("digits")
DIGITS = apl.data.load("digits")
NAMES = ("ce", "mae", "rce", "nce", "gce", "nlnl", "nce+rce", "ngce+mae")


def member(loss="ce", lr=0.01, seed=0, *, rate=0.6, hold_out=0.0, exact=False):
    made = PROTOCOL.member(loss, rate=rate, seed=seed, lr=lr, hold_out=hold_out)
    if exact:  # float64, which a data set refuses
        made.model.double()
        for name in ("images", "test_images"):
            object.__setattr__(made.data, name, getattr(made.data, name).double())
    return made


def alone(made, **settings):
    """The same run in the plain loop: its table, and its network."""
    model = deepcopy(made.model)
    settings |= {"lr": made.lr, "seed": made.seed, "progress": False}
    return training.train(model, made.loss, made.data, **settings), model


def assert_same(made, fresh, table, **settings):
    """Tight in float64: in float32 a rounding may turn a unit on that the loop has off."""
    untouched = Run(fresh, made.loss, made.data, made.lr, made.seed)
    expected, model = alone(untouched, **settings)
    pd.testing.assert_frame_equal(table, expected, rtol=1e-6, atol=0)
    for name, value in model.state_dict().items():
        found = made.model.state_dict()[name]
        torch.testing.assert_close(found, value, rtol=1e-6, atol=1e-8, msg=name)


def together(runs, **settings):
    """Train runs at once, and hold each against the plain loop."""
    before = [deepcopy(made.model) for made in runs]
    for made, fresh, table in zip(runs, before, train(runs, **settings), strict=True):
        assert_same(made, fresh, table, **settings)


# --- the numbers --------------------------------------------------------------------------------


def test_every_run_is_that_of_the_loop():
    # Another learning rate, seed and noise for each, and no loss beside its like.
    runs = [
        member(name, lr, seed, rate=rate, exact=True)
        for seed, lr, rate in ((3, 0.01, 0.6), (4, 0.1, 0.0))
        for name in NAMES
    ]
    together(runs, epochs=2)


@pytest.mark.parametrize(
    "settings",
    [
        {"momentum": 0.5, "nesterov": True, "weight_decay": 0.01, "eta_min": 0.002},
        {"momentum": 0.0, "weight_decay": 0.1, "clip": 0.01, "batch_size": 300},
    ],
)
def test_with_other_settings_too(settings):
    together([member("ce", exact=True), member("nce", 0.3, 1, exact=True)], epochs=3, **settings)


def test_with_a_part_held_out_too():
    # Then each run has images of its own.
    runs = [member("ce", seed=seed, hold_out=0.2, exact=True) for seed in range(3)]
    together(runs, epochs=2)


def test_the_parameters_of_a_loss_are_its_own():
    runs = [member(exact=True) for _ in range(3)]
    for made, loss in zip(runs, (apl.GCE(q=0.1), apl.GCE(q=0.9), 5 * apl.GCE()), strict=True):
        object.__setattr__(made, "loss", loss)
    together(runs, epochs=1)


def test_in_float32_the_tables_agree():
    names = apl.losses.names()
    tables = train([member(name) for name in names], epochs=2)
    for name, table in zip(names, tables, strict=True):
        expected, _ = alone(member(name), epochs=2)
        pd.testing.assert_series_equal(table["train_loss"], expected["train_loss"], rtol=1e-4)
        pd.testing.assert_frame_equal(table, expected, rtol=0, atol=0.01)


def test_a_run_that_diverges_does_not_touch_the_others():
    tame = [member("ce"), member("nce", seed=1)]
    wild = [member("ce"), member("ce", lr=1e30), member("nce", seed=1)]
    first, error, second = train(wild, epochs=3)
    with pytest.raises(FloatingPointError) as expected:
        alone(member("ce", lr=1e30), epochs=3)
    assert isinstance(error, FloatingPointError) and "in epoch 1" in str(error)
    assert "in epoch 1" in str(expected.value)
    for table, other in zip((first, second), train(tame, epochs=3), strict=True):
        pd.testing.assert_frame_equal(table, other, rtol=1e-5)
        assert table["train_loss"].map(math.isfinite).all()


def test_the_gradients_are_those_of_autograd():
    nets = [apl.models.digits_net(seed, width=5).double() for seed in range(3)]
    images = torch.randn(3, 7, 64, dtype=torch.float64, generator=torch.manual_seed(0))
    weights = torch.randn(3, 10, 7, dtype=torch.float64)
    stack = Stack(nets)
    logits = stack.forward(images.mT, training=True)
    stack.backward(weights)
    slopes = [slope for layer in stack.layers for slope in layer.slopes]
    for m, net in enumerate(nets):
        own = net(images[m])
        torch.testing.assert_close(logits[m].T, own)
        expected = torch.autograd.grad((own * weights[m].T).sum(), list(net.parameters()))
        for slope, value in zip(slopes, expected, strict=True):
            torch.testing.assert_close(slope[m].view_as(value), value)


def test_a_step_does_not_wait_for_the_device(monkeypatch):
    # As on a GPU: the closed form, which is for CPUs, looks at what it computes.
    monkeypatch.setattr(apl.losses.Loss, "forward", apl.losses.Loss._plain)
    waiting = {"aten::_local_scalar_dense", "aten::nonzero", "aten::equal"}

    def waits(batch_size):
        runs = [member(name) for name in ("ce", "nce", "nce+mae")]
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            train(runs, epochs=1, batch_size=batch_size)
        return sum(event.count for event in profile.key_averages() if event.key in waiting)

    assert waits(100) == waits(1297)


# --- what goes together -------------------------------------------------------------------------


def test_networks_that_can_be_stacked():
    flatten, linear, relu = nn.Flatten(), nn.Linear(4, 4), nn.ReLU()
    assert stackable(nn.Sequential(flatten, linear, relu, linear))
    assert not stackable(nn.Sequential(linear))
    assert not stackable(nn.Sequential(flatten))
    assert not stackable(nn.Sequential(flatten, relu, linear))
    assert not stackable(nn.Sequential(flatten, linear, relu, nn.BatchNorm1d(4)))
    assert not stackable(nn.Sequential(flatten, linear, nn.Dropout()))
    assert not stackable(linear)


@pytest.mark.parametrize(
    ("runs", "sentence"),
    [
        (lambda: [], "needs at least one run"),
        (lambda: [member(), member(hold_out=0.5)], "data sets of one shape"),
        (lambda: [Run(apl.models.mnist_cnn(), apl.CE(), DIGITS, 0.1)], "Flatten, then Linear"),
        (lambda: [Run(apl.models.digits_net(), nn.CrossEntropyLoss(), DIGITS, 0.1)], "losses of"),
        (lambda: [Run(apl.models.digits_net(), apl.CE(reduction="sum"), DIGITS, 0.1)], "means"),
    ],
)
def test_what_does_not_is_said(runs, sentence):
    with pytest.raises(ValueError, match=sentence):
        train(runs(), epochs=1)


def test_without_numba_runs_go_one_by_one(monkeypatch):
    monkeypatch.setattr(stacked, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs numba"):
        train([member()], epochs=1)
    assert alike(Cell("digits", "ce")) == ("", 1)
    monkeypatch.setattr(experiments, "run_together", None)
    table = run([Setting("ce", epochs=1)], jobs=1)
    assert len(table) == 1


def test_a_batch_of_one_is_said_before_it_comes():
    with pytest.raises(ValueError, match="1297 samples, batches of 81 leave one over"):
        train([member()], epochs=1, batch_size=81)


# --- where it is used ---------------------------------------------------------------------------


def test_experiments_use_it_and_the_loop_can_be_chosen():
    settings = [
        Setting("nce+mae", rate=0.4, epochs=2, parameters={"beta": 0.1}, lr=0.03),
        Setting("ce", epochs=1),
        Setting("ce", rate=0.6, epochs=2, hold_out=0.2, seed=1),
        Setting("ce", "asymmetric", 0.4, epochs=2, seed=2),
    ]
    at_once, loop = (run(settings, jobs=1, together=how) for how in (True, False))
    same = ["loss", "label", "noise", "rate", "lr", "seed", "epoch"]
    pd.testing.assert_frame_equal(at_once[same], loop[same])
    pd.testing.assert_frame_equal(at_once, loop, rtol=1e-4, atol=0.01)


def test_a_run_that_diverges_ends_the_experiment():
    with pytest.raises(FloatingPointError, match="in epoch 1"):
        run([Setting("ce", epochs=1), Setting("ce", lr=1e30, epochs=1)], jobs=1)


def cells(*names, epochs=2, **options):
    return [Cell("digits", name, "symmetric", 0.6, epochs=epochs, **options) for name in names]


def test_a_campaign_uses_it_and_its_records_say_so(tmp_path):
    store, todo = Store(tmp_path), cells("ce", "mae", "nce")
    outcome = reproduce(todo, store, say=lambda line: None)
    assert outcome.done == todo
    for cell in todo:
        record = store.read(cell.settings())
        assert (record.made["together"], record.made["continued"]) == (3, [])
        expected = cell.protocol().train(cell.loss, cell.kind, cell.rate, progress=False)
        pd.testing.assert_frame_equal(record.history, expected, rtol=1e-4, atol=0.01)
    alone = cells("gce")
    reproduce(alone, store, say=lambda line: None)
    assert "together" not in store.read(alone[0].settings()).made


def test_all_of_them_are_claimed_while_they_run(tmp_path, monkeypatch):
    store, todo, held = Store(tmp_path), cells("ce", "mae", "nce"), []

    def spy(runs, **settings):
        for cell in todo:
            with Store(tmp_path).claim(cell.settings()) as ours:
                held.append(not ours)
        return train(runs, **settings)

    monkeypatch.setattr("apl.ensemble.train", spy)
    with store.claim(todo[0].settings()):
        outcome = reproduce(todo, store, say=lambda line: None)
    assert (outcome.elsewhere, outcome.done) == (todo[:1], todo[1:])
    assert held == [True] * 3
    for cell in todo:
        with store.claim(cell.settings()) as ours:
            assert ours


def test_one_that_diverges_is_failed_and_the_others_are_recorded(tmp_path):
    wild = cells("ce", changes=(("lr", 1e30),))
    tame = cells("mae", "nce", changes=(("lr", 0.01),))
    outcome = reproduce(wild + tame, Store(tmp_path), say=lambda line: None)
    assert (outcome.failed, outcome.done) == (wild, tame)


def test_at_the_limit_nothing_is_half_done(tmp_path, monkeypatch):
    monkeypatch.setattr("apl.together.SECONDS", math.inf)
    monkeypatch.setattr("apl.together.int", lambda most: 24, raising=False)
    lines, todo = [], cells("ce", "mae", epochs=2000)
    outcome = reproduce(todo, Store(tmp_path), minutes=0.05, say=lines.append)
    assert outcome.too_long == todo and not list(tmp_path.rglob("*.json"))
    assert all("of 2000 epochs, to be done anew" in line for line in lines)


def test_what_a_kill_can_cost_is_bounded(tmp_path):
    assert alike(cells("ce", epochs=60)[0])[1] == 24
    assert alike(cells("ce", epochs=400)[0])[1] == 4
    assert alike(cells("ce", epochs=2000)[0])[1] == 1
    long, short = cells("ce", epochs=2)[0], cells("ce", epochs=1)[0]
    assert alike(long)[0] != alike(short)[0]


def test_a_run_with_a_checkpoint_is_continued_alone(tmp_path):
    store, todo = Store(tmp_path), cells("ce", "mae", "nce", epochs=3)
    with pytest.raises(OutOfTime):
        workers.run(todo[0], store, deadline=0.0)
    assert store.checkpoint(todo[0].settings()).exists()
    reproduce(todo, store, say=lambda line: None)
    made = [store.read(cell.settings()).made for cell in todo]
    assert made[0]["continued"] == [1] and "together" not in made[0]
    assert [one.get("together") for one in made[1:]] == [2, 2]
