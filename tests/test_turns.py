"""Runs that take turns, held against the same runs alone."""

from __future__ import annotations

import threading

import pandas as pd
import pytest
import torch

import apl
from apl import capture, training
from apl.checkpoints import Checkpoint, OutOfTime
from apl.training import train
from apl.turns import in_turns

NOISY = apl.data.load("digits").with_noise(apl.noise.symmetric(10, 0.4), seed=0)


def job(loss, seed=0, data=NOISY, **changes):
    settings = {"epochs": 2, "lr": 0.01, "progress": False, "seed": seed} | changes

    def run(on_step):
        return train(apl.models.digits_net(seed), loss, data, on_step=on_step, **settings)

    return run


def alone(one):
    return one(lambda: None)


def test_each_run_is_what_it_is_alone():
    augment = apl.augment.Augment(crop=1, flip=True)
    jobs = [
        job(apl.CE(), 0),
        job(apl.loss("nce+rce"), 1, epochs=3, augment=augment),
        job(apl.paper_loss("cifar10", "nlnl", given=NOISY.given), 2, epochs=1, batch_size=50),
    ]
    for found, one in zip(in_turns(jobs), jobs, strict=True):
        if one is not jobs[2]:  # a loss that draws is another one the second time
            pd.testing.assert_frame_equal(found, alone(one), check_exact=True)
    assert in_turns([]) == []


def test_turns_are_of_one_step():
    seen = []

    def spy(name):
        def loss(logits, target):
            seen.append(name)
            return apl.CE()(logits, target)

        return loss

    in_turns([job(spy("a"), epochs=1), job(spy("b"), epochs=1, batch_size=256)])
    assert seen == ["a", "b"] * 6 + ["a"] * 5


def test_a_run_that_ends_early_leaves_the_others_alone(tmp_path):
    late = Checkpoint(tmp_path / "run", deadline=0.0)
    ce = job(apl.CE())
    wild = job(lambda logits, target: apl.CE()(logits * float("nan"), target))
    diverged, stopped, found = in_turns([wild, job(apl.CE(), checkpoint=late), ce])
    assert isinstance(diverged, FloatingPointError) and isinstance(stopped, OutOfTime)
    pd.testing.assert_frame_equal(found, alone(ce), check_exact=True)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_another_error_ends_all_and_leaves_nothing(error, monkeypatch):
    before, ended = threading.active_count(), []

    def wrong(on_step):
        on_step()
        raise ValueError("no such thing")

    def going_on(on_step):
        try:
            while True:
                on_step()
        finally:
            ended.append(True)

    if error is KeyboardInterrupt:
        monkeypatch.setattr("apl.turns._raise_unless_its_own", interrupt)
    with pytest.raises(error):
        in_turns([going_on, wrong, going_on])
    assert len(ended) >= 1 and threading.active_count() == before


def interrupt(result):
    raise KeyboardInterrupt


def test_cudnn_is_left_as_it_was(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
    inside = []

    def spy(logits, target):
        inside.append(torch.backends.cudnn.deterministic)
        return apl.CE()(logits, target)

    in_turns([job(apl.CE(), epochs=1), job(spy, epochs=3)])
    assert set(inside) == {True} and not torch.backends.cudnn.deterministic


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_each_run_is_what_it_is_alone():
    data = NOISY.to("cuda")
    jobs = [job(apl.loss("nce+rce"), seed, data, epochs=3) for seed in range(4)]
    assert training.on_gpu(data.device) and capture.known(apl.models.digits_net(), apl.CE())
    for found, one in zip(in_turns(jobs, "cuda"), jobs, strict=True):
        pd.testing.assert_frame_equal(found, alone(one), check_exact=True)
