"""The training loop and the runs on digits."""

from __future__ import annotations

import math

import pandas as pd
import pytest
import torch

import apl
from apl.experiments import Setting, run
from apl.training import memorization, train

DIGITS = apl.data.load("digits")
NOISY = DIGITS.with_noise(apl.noise.symmetric(10, 0.6), seed=0)


def history(**changes):
    arguments = {"epochs": 2, "lr": 0.01, "progress": False} | changes
    model, loss = (
        apl.models.digits_net(arguments.pop("weights", 0)),
        arguments.pop("loss", apl.CE()),
    )
    return train(model, loss, arguments.pop("data", NOISY), **arguments)


def test_the_same_seed_gives_the_same_numbers():
    pd.testing.assert_frame_equal(history(seed=3), history(seed=3))
    assert history(seed=3).train_loss.iloc[-1] != history(seed=4).train_loss.iloc[-1]
    assert history(weights=1).train_loss.iloc[-1] != history(weights=2).train_loss.iloc[-1]


def test_the_global_random_state_is_left_alone():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    history()
    assert torch.rand(1) == expected


def test_every_sample_is_seen_once_an_epoch_with_the_given_label():
    seen = []

    def spy(logits, target):
        seen.append(target)
        return apl.CE()(logits, target)

    history(loss=spy, epochs=1, batch_size=100)
    assert [len(batch) for batch in seen] == [100] * 12 + [97]
    assert torch.equal(torch.cat(seen).sort().values, NOISY.given.sort().values)


def test_the_gradient_is_clipped():
    weights = apl.models.digits_net(0)
    before = [w.detach().clone() for w in weights.parameters()]
    train(
        weights,
        1000 * apl.CE(),
        NOISY,
        epochs=1,
        lr=1.0,
        momentum=0,
        clip=1e-4,
        batch_size=1297,
        progress=False,
    )
    pairs = zip(weights.parameters(), before, strict=True)
    step = torch.cat([(a - b).flatten() for a, b in pairs]).norm()
    assert step.item() == pytest.approx(1e-4, rel=1e-2)


def test_the_learning_rate_follows_a_cosine(monkeypatch):
    rates = []
    step = torch.optim.SGD.step
    monkeypatch.setattr(
        torch.optim.SGD,
        "step",
        lambda self, *a, **k: (rates.append(self.param_groups[0]["lr"]), step(self, *a, **k))[1],
    )
    history(epochs=4, lr=0.1, batch_size=1297)
    assert rates == pytest.approx([0.05 * (1 + math.cos(math.pi * e / 4)) for e in range(4)])


def test_a_loss_that_diverges_is_an_error():
    with pytest.raises(FloatingPointError, match=r"the training loss is nan in epoch 1"):
        history(loss=lambda logits, target: apl.CE()(logits * float("nan"), target))


def test_what_memorization_counts():
    wrong = NOISY.corrupted
    memorized = memorization(NOISY.given, NOISY)
    assert memorized["wrong_given"] == memorized["clean"] == memorized["train_given"] == 1
    assert memorized["wrong_true"] == 0
    assert memorized["train_true"] == pytest.approx(1 - wrong.float().mean().item())
    corrected = memorization(NOISY.labels, NOISY)
    assert corrected["wrong_true"] == corrected["clean"] == corrected["train_true"] == 1
    assert corrected["wrong_given"] == 0
    assert math.isnan(memorization(DIGITS.labels, DIGITS)["wrong_given"])


def test_cross_entropy_memorizes_and_a_robust_loss_does_not():
    ce = history(epochs=40, lr=0.03).iloc[-1]
    robust = history(epochs=40, lr=0.03, loss=apl.normalize(apl.CE())).iloc[-1]
    assert ce.wrong_given > 0.8 > 0.2 > robust.wrong_given
    assert robust.test_accuracy > ce.test_accuracy + 0.1


def test_progress_is_silent_in_ci(monkeypatch, capfd):
    monkeypatch.setenv("CI", "true")
    history(progress=None)
    assert capfd.readouterr() == ("", "")
    history(progress=True)
    assert "epoch" in capfd.readouterr().err


def test_runs_do_not_depend_on_how_many_go_at_once():
    settings = [
        Setting("nce+mae", rate=0.4, epochs=2, parameters={"beta": 0.1}),
        Setting("ce", epochs=2),
    ]
    one, two = run(settings, jobs=1), run(settings, jobs=2)
    pd.testing.assert_frame_equal(one, two)
    assert list(one.label.unique()) == ["nce+mae, beta=0.1", "ce"]
    assert list(one.noise.unique()) == ["symmetric", "clean"]


def test_a_run_that_holds_out_does_not_touch_the_test_set():
    held_out = run([Setting("ce", rate=0.6, epochs=1, hold_out=0.2)], jobs=1)
    # Held-out labels are 60 % wrong: no model can look better than 40 % right for long.
    assert held_out.test_accuracy.iloc[-1] < 0.5


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        (Setting("nec"), "no loss is named"),
        (Setting("ce", noise="pairs"), "noise is 'pairs': it must be 'symmetric' or 'asymmetric'"),
        (Setting("ce", rate=1.5), "1.5"),
        (Setting("ce", parameters={"q": 0.5}), "ce has no parameter 'q'"),
    ],
)
def test_a_bad_setting_is_said_before_anything_runs(setting, sentence):
    with pytest.raises(ValueError, match=sentence):
        run([Setting("ce", epochs=10_000), setting], jobs=1)
