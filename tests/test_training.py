"""The training loop and the runs on digits."""

from __future__ import annotations

import math
import warnings

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


@pytest.fixture
def rates(monkeypatch):
    """The learning rate of each step that is made."""
    made, step = [], torch.optim.SGD.step

    def watched(self, *arguments, **keywords):
        made.append(self.param_groups[0]["lr"])
        return step(self, *arguments, **keywords)

    monkeypatch.setattr(torch.optim.SGD, "step", watched)
    return made


def test_the_learning_rate_follows_a_cosine(rates):
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


# --- what the paper's recipes add ---------------------------------------------------------------


def test_the_learning_rate_ends_at_its_floor(rates):
    history(epochs=5, lr=0.01, eta_min=0.001, batch_size=1297)
    expected = [0.001 + 0.009 * (1 + math.cos(math.pi * e / 5)) / 2 for e in range(5)]
    assert rates == pytest.approx(expected)


@pytest.mark.parametrize(("nesterov", "factor"), [(False, 1.0), (True, 1.9)])
def test_one_step_of_sgd_with_weight_decay(nesterov, factor):
    model = apl.models.digits_net(0)
    before = [w.detach().clone() for w in model.parameters()]
    train(
        model,
        lambda logits, target: 0 * logits.sum(),
        NOISY,
        epochs=1,
        lr=0.1,
        nesterov=nesterov,
        weight_decay=0.01,
        batch_size=1297,
        progress=False,
    )
    for now, then in zip(model.parameters(), before, strict=True):
        torch.testing.assert_close(now.detach(), then * (1 - factor * 0.1 * 0.01))


class Watched(torch.nn.Module):
    """A network that keeps what it is shown."""

    def __init__(self):
        super().__init__()
        self.inner, self.seen = apl.models.digits_net(0), []

    def forward(self, images):
        self.seen.append((self.training, images.clone()))
        return self.inner(images)


def test_augmentation_is_random_seeded_and_for_training_only():
    flip = apl.augment.Augment(flip=True)
    shown = {}
    for seed in (0, 0, 1):
        model = Watched()
        train(model, apl.CE(), NOISY, epochs=2, lr=0.01, augment=flip, seed=seed, progress=False)
        training = torch.cat([images for is_training, images in model.seen if is_training])
        if seed in shown:
            assert torch.equal(shown[seed], training)
        shown[seed] = training
    plain = Watched()
    train(plain, apl.CE(), NOISY, epochs=2, lr=0.01, progress=False)
    unchanged = torch.cat([images for is_training, images in plain.seen if is_training])
    kept = (shown[0] == unchanged).flatten(1).all(1)  # the order is the same with and without
    assert torch.equal(shown[0][~kept], unchanged[~kept].flip(-1))
    assert 0.4 < kept.float().mean() < 0.6
    assert not torch.equal(kept[:1297], kept[1297:])
    assert not torch.equal(shown[0], shown[1])
    tested = torch.cat([images for is_training, images in model.seen if not is_training])
    assert torch.equal(tested, torch.cat([NOISY.test_images, NOISY.images] * 2))


def test_augmentation_that_changes_nothing_changes_nothing():
    pd.testing.assert_frame_equal(history(augment=apl.augment.paper("digits")), history())


def test_the_batches_of_an_evaluation_are_as_large_as_asked():
    model = Watched()
    train(model, apl.CE(), NOISY, epochs=1, lr=0.01, eval_batch_size=500, progress=False)
    sizes = [len(images) for is_training, images in model.seen if not is_training]
    assert sizes == [500] + [500, 500, 297]


def test_a_step_does_not_wait_for_the_device(monkeypatch):
    # As on a GPU: the closed form, which is for CPUs, looks at what it computes.
    monkeypatch.setattr(apl.losses.Loss, "forward", apl.losses.Loss._plain)
    # Each of these reads a value that the device has yet to compute.
    waiting = {"aten::_local_scalar_dense", "aten::nonzero", "aten::equal"}

    def waits(batch_size):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            history(
                epochs=1,
                batch_size=batch_size,
                loss=apl.paper_loss("cifar10", "nce+rce"),
                augment=apl.augment.Augment(crop=1, flip=True, rotate=10.0),
            )
        return sum(event.count for event in profile.key_averages() if event.key in waiting)

    assert waits(100) == waits(1297) > 0


def test_cudnn_is_left_as_it_was(monkeypatch):
    inside = []

    def spy(logits, target):
        inside.append(torch.backends.cudnn.deterministic)
        return apl.CE()(logits, target)

    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
    history(loss=spy, epochs=1)
    assert set(inside) == {True}
    assert not torch.backends.cudnn.deterministic


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_a_step_does_not_wait_and_runs_repeat():
    data = NOISY.to("cuda")
    rotate = apl.augment.Augment(crop=1, flip=True, rotate=10.0, fill=(0.5,))
    loss = apl.paper_loss("cifar10", "nce+rce")

    def waits(batch_size):
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                history(data=data, epochs=1, batch_size=batch_size, augment=rotate, loss=loss)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return sum("synchron" in str(one.message) for one in caught)

    history(data=data, epochs=1)  # the first run also waits for what is set up once
    assert waits(100) == waits(50) > 0  # in each of them a step is recorded, once
    pd.testing.assert_frame_equal(
        history(data=data, augment=rotate, loss=loss),
        history(data=data, augment=rotate, loss=loss),
        check_exact=True,
    )
