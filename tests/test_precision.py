"""Half precision: where it is chosen, what it touches, and what a run keeps of it."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import apl
from apl import precision, streaming, training
from apl.checkpoints import Checkpoint, OutOfTime
from apl.grid import Cell
from apl.protocols import Protocol
from apl.training import train

DIGITS = apl.data.load("digits").with_noise(apl.noise.symmetric(10, 0.4), seed=0)
HALF = ("bfloat16", "float16")


@pytest.mark.parametrize(
    ("capability", "expected"),
    [
        ((9, 0), "bfloat16"),
        ((8, 0), "bfloat16"),
        ((7, 5), "float16"),
        ((7, 0), "float16"),
        ((6, 1), "float32"),
    ],
)
def test_the_fastest_by_device(capability, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    assert precision.of("cuda") == precision.of(torch.device("cuda", 1)) == expected
    assert precision.of("cuda", "float32") == "float32"
    assert precision.of("cpu") == "float32"


def test_an_unknown_one_lists_those_there_are():
    with pytest.raises(ValueError, match="no precision 'half'; there is float32, bfloat16, float"):
        train(apl.models.digits_net(), apl.CE(), DIGITS, epochs=1, lr=0.1, precision="half")


class Spy(nn.Module):
    """A network that keeps the types of what its last layer returns."""

    def __init__(self):
        super().__init__()
        self.inner, self.seen = apl.models.digits_net(), set()

    def forward(self, images):
        logits = self.inner(images)
        self.seen.add(logits.dtype)
        return logits


@pytest.mark.parametrize("name", precision.NAMES)
def test_the_network_computes_in_it_and_the_rest_in_float32(name):
    spy, losses = Spy(), set()

    def loss(logits, target):
        losses.add(logits.dtype)
        return apl.CE()(logits, target)

    train(spy, loss, DIGITS, epochs=1, lr=0.1, precision=name, progress=False)
    assert spy.seen == {getattr(torch, name)}
    assert losses == {torch.float32}
    kinds = {value.dtype for value in spy.state_dict().values() if value.is_floating_point()}
    assert kinds == {weight.grad.dtype for weight in spy.parameters()} == {torch.float32}


@pytest.mark.parametrize("name", HALF)
def test_a_run_in_half_precision_learns_as_well(name):
    """Seeds of this run differ by about a hundredth; so may the precisions."""
    network, loss = apl.models.digits_net, apl.loss("nce+rce")
    settings = {"epochs": 15, "lr": 0.03, "progress": False}
    plain, half = (
        train(network(), loss, DIGITS, precision=one, **settings) for one in ("float32", name)
    )
    assert (plain["train_loss"] != half["train_loss"]).any()
    assert plain["test_accuracy"].iloc[-1] > 0.9
    assert abs(plain["test_accuracy"].iloc[-1] - half["test_accuracy"].iloc[-1]) < 0.03


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_step_whose_gradients_overflow_is_left_out(gpu, momentum, monkeypatch):
    monkeypatch.setattr(training, "on_gpu", lambda device: gpu)
    network, seen = apl.models.digits_net(), []

    def loss(logits, target):
        seen.append(network[1].weight.detach().clone())
        return 400 * apl.CE()(logits, target)  # times 2^16, the first scale, too much

    settings = {"precision": "float16", "momentum": momentum, "progress": False}
    train(network, loss, DIGITS, epochs=1, lr=0.01, graph=False, **settings)
    moved = [not torch.equal(before, after) for before, after in pairwise(seen)]
    assert not moved[0] and moved[-1]
    assert all(value.isfinite().all() for value in network.state_dict().values())
    assert network[1].weight.abs().max() < 10


def test_the_scale_is_continued(tmp_path):
    def run(checkpoint=None):
        network, settings = apl.models.digits_net(), {"lr": 0.1, "progress": False}
        loss = 400 * apl.CE()
        return train(
            network, loss, DIGITS, epochs=3, precision="float16", checkpoint=checkpoint, **settings
        )

    with pytest.raises(OutOfTime):
        run(Checkpoint(tmp_path / "run", deadline=0.0))
    assert run(Checkpoint(tmp_path / "run")).equals(run())


@pytest.mark.parametrize("name", HALF)
@pytest.mark.parametrize("gpu", [False, True])
def test_data_in_files_too(name, gpu, monkeypatch, tmp_path):
    monkeypatch.setattr(streaming, "on_gpu", lambda device: gpu)
    data = TensorDataset(DIGITS.images[:200], DIGITS.given[:200])
    tests = {"digits": TensorDataset(DIGITS.test_images, DIGITS.test_labels)}

    def run(name, checkpoint=None):
        spy, settings = Spy(), {"epochs": 3, "lr": 0.1, "decay": 0.9, "parts": 2, "workers": 0}
        settings |= {"batch_size": 64, "progress": False, "checkpoint": checkpoint}
        history = streaming.train(spy, apl.CE(), data, tests, precision=name, **settings)
        assert spy.seen == {getattr(torch, name)}
        return history

    half = run(name)
    assert abs(half["test_accuracy"] - run("float32")["test_accuracy"]).iloc[-1] < 0.05
    with pytest.raises(OutOfTime):
        run(name, Checkpoint(tmp_path / "run", deadline=0.0))
    assert run(name, Checkpoint(tmp_path / "run")).equals(half)


def test_a_protocol_names_it_only_where_it_is_chosen():
    """So a record that was made before is still the record of its run."""
    plain = Protocol.of("cifar10")
    assert "precision" not in plain.settings() and "precision" not in Cell("mnist", "ce").settings()
    digits = Protocol.of("digits")
    for name, ensemble in {"float32": True, "bfloat16": False}.items():
        chosen = type(digits)(**{**vars(digits), "precision": name})
        assert chosen.settings()["precision"] == name
        together = chosen.together("ce")
        assert (together is not None) == ensemble and "precision" not in (together or {})
        history = chosen.train("ce", epochs=1)
        same = history.equals(digits.train("ce", epochs=1))
        assert same == (name == "float32")


def test_float32_is_no_tf32_and_the_choice_is_put_back():
    place, name = torch.backends.cudnn, "allow_tf32"
    if hasattr(place, "conv"):
        place, name = place.conv, "fp32_precision"
    before = getattr(place, name)
    with training.repeatable():
        assert getattr(place, name) in ("ieee", False)
    assert getattr(place, name) == before
