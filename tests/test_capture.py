"""A recorded step, held against the launched one; where there is no GPU, with a stand-in for one.

The stand-in keeps what a CUDA graph keeps: the operations below autograd, in their order, with the
memory they read and write and with the plain numbers they were called with. Replayed, it does the
same operations on the same memory. What a graph would get wrong, it gets wrong.
"""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from typing import ClassVar

import pandas as pd
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import apl
from apl import capture, training
from apl.checkpoints import Checkpoint, OutOfTime
from apl.training import train

WAITING = {"_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "_unique2"}
"""Each of these reads a value that the device has yet to compute."""


class Operations(TorchDispatchMode):
    """Keeps every operation, what it was called with and what it returned."""

    def __init__(self, refuse: bool):
        super().__init__()
        self.calls, self.waited, self.refuse = [], 0, refuse
        self.before, self.made, self.states = {}, set(), {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        args, kwargs = tree_map(lambda leaf: leaf, (args, kwargs or {}))
        if func.overloadpacket.__name__ in WAITING:
            self.waited += 1
            if self.refuse:
                raise RuntimeError(f"{func} while a graph is recorded\nand more")
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, torch.Generator):
                self.states.setdefault(leaf, leaf.get_state())
            elif isinstance(leaf, torch.Tensor) and self.refuse:
                storage = leaf.untyped_storage()
                if storage.data_ptr() not in self.before.keys() | self.made:
                    self.before[storage.data_ptr()] = storage, storage.clone()
        result = func(*args, **kwargs)
        tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.made |= {one.untyped_storage().data_ptr() for one in tensors} - self.before.keys()
        self.calls.append((func, args, kwargs, tensors))
        return result


class StandIn:
    """A graph as :class:`apl.capture.Graph`, on a CPU."""

    made: ClassVar[list[StandIn]] = []

    def __init__(self, device):
        self.replays = 0
        self.made.append(self)

    def aside(self):
        return nullcontext()

    def record(self, work, generators):
        self.generators = set(generators)
        operations = Operations(refuse=True)
        try:
            with operations:
                work()
        finally:  # recording does nothing
            for storage, content in operations.before.values():
                storage.copy_(content)
            for generator, state in operations.states.items():
                generator.set_state(state)
        seeds = {generator.initial_seed() for generator in self.generators}
        assert {generator.initial_seed() for generator in operations.states} <= seeds
        self.calls = operations.calls

    @torch.no_grad()
    def replay(self):
        self.replays += 1
        for func, args, kwargs, before in self.calls:
            result = func(*args, **kwargs)
            tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
            for old, new in zip(before, tensors, strict=True):
                old.copy_(new)


@pytest.fixture
def gpu(monkeypatch):
    """A CPU that is trained on as a GPU is."""
    monkeypatch.setattr(training, "on_gpu", lambda device: True)
    monkeypatch.setattr(capture, "Graph", StandIn)
    monkeypatch.setattr(StandIn, "made", [])
    # The closed form for CPUs writes to memory without torch's knowledge.
    monkeypatch.setattr(apl.losses.Loss, "forward", apl.losses.Loss._plain)


def images(n, shape, K=10):
    """A data set of noise."""
    draws = torch.Generator().manual_seed(0)
    pixels = torch.randn(n + 9, *shape, generator=draws)
    labels = torch.arange(n + 9) * 7 % K
    names = tuple(map(str, range(K)))
    parts = pixels[:n], labels[:n], labels[:n].roll(1), pixels[n:], labels[n:]
    return apl.data.Dataset("noise", names, *parts)


NETWORKS = {
    "mnist": (apl.models.mnist_cnn, images(70, (1, 28, 28))),
    "cifar10": (apl.models.cifar10_cnn, images(70, (3, 32, 32))),
    "digits": (apl.models.digits_net, images(70, (1, 8, 8))),
}


def run(name="digits", loss="nce+rce", data=None, **changes):
    network, images = NETWORKS[name]
    data, model = data or images, network(0)
    if isinstance(loss, str):
        paper = "cifar10" if name == "digits" else name
        loss = apl.paper_loss(paper, loss, given=data.given, seed=1)
    settings = {"epochs": 3, "lr": 0.05, "batch_size": 16, "weight_decay": 1e-3, "progress": False}
    history = train(model, loss, data, **settings | changes)
    return history, [value.cpu() for value in model.state_dict().values()]


def assert_same(one, other):
    pd.testing.assert_frame_equal(one[0], other[0], check_exact=True)
    assert all(torch.equal(a, b) for a, b in zip(one[1], other[1], strict=True))


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_a_recorded_step_is_the_launched_one(name, gpu):
    augment = apl.augment.Augment(crop=2, flip=True, rotate=10.0)
    settings = {"augment": augment, "precision": "float32"}
    recorded = run(name, **settings)
    (graph,) = StandIn.made
    # Of 3 epochs of 4 whole batches and a rest, the first 3 batches are launched, and the rests.
    assert graph.replays == 3 * 4 - capture.WARM
    assert_same(recorded, run(name, graph=False, **settings))
    assert len(StandIn.made) == 1


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_in_every_precision(precision, momentum, gpu):
    settings = {"precision": precision, "momentum": momentum, "nesterov": momentum > 0}
    recorded = run(**settings)
    assert StandIn.made[0].replays == 9
    assert_same(recorded, run(graph=False, **settings))


def test_a_loss_that_draws_goes_on_drawing(gpu):
    recorded = run(loss="nlnl")
    assert StandIn.made[0].replays == 9 and len(StandIn.made[0].generators) == 1
    assert_same(recorded, run(loss="nlnl", graph=False))


def test_a_recorded_run_is_continued(gpu, tmp_path):
    whole = run(epochs=5, precision="float16")
    with pytest.raises(OutOfTime):
        run(epochs=5, precision="float16", checkpoint=Checkpoint(tmp_path / "run", deadline=0.0))
    continued = Checkpoint(tmp_path / "run")
    assert_same(whole, run(epochs=5, precision="float16", checkpoint=continued))
    assert continued.continued == [1]


@pytest.mark.parametrize("name", NETWORKS)
def test_the_settings_of_a_gpu_change_little(name, gpu, monkeypatch):
    """The same arithmetic, in another order: one kernel updates all weights."""
    settings = {"epochs": 1, "lr": 0.01, "precision": "float32", "batch_size": 32}
    on_gpu = run(name, **settings)
    monkeypatch.undo()
    plain = run(name, **settings)
    pd.testing.assert_frame_equal(on_gpu[0], plain[0], rtol=1e-4)
    for a, b in zip(on_gpu[1], plain[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_the_stand_in_repeats_plain_numbers_as_a_graph_does(gpu, monkeypatch):
    """So the tests above would fail were the learning rate no tensor."""
    usual = training.sgd

    def plain(*arguments):
        optimizer = usual(*arguments)
        for group in optimizer.param_groups:
            group["lr"] = group["lr"].item()
        return optimizer

    monkeypatch.setattr(training, "sgd", plain)
    recorded, launched = run(), run(graph=False)
    assert StandIn.made[0].replays == 9
    assert recorded[0]["train_loss"].iloc[0] == launched[0]["train_loss"].iloc[0]
    assert recorded[0]["train_loss"].iloc[2] != launched[0]["train_loss"].iloc[2]


class Waits(torch.nn.Module):
    def forward(self, logits, target):
        return apl.CE()(logits, target) * (1.0 if logits.isnan().any() else 2.0)


def test_a_step_that_cannot_be_recorded_is_launched(gpu):
    sentence = r"cannot be recorded as a CUDA graph, and is slower: aten\._local_scalar_dense"
    with pytest.warns(UserWarning, match=sentence) as caught:
        launched = run(loss=Waits(), graph=True)
    assert len(caught) == 1
    assert StandIn.made[0].replays == 0
    assert_same(launched, run(loss=Waits(), graph=False))


class Counts(torch.nn.Module):
    """A loss whose steps are not alike."""

    calls = 0

    def forward(self, logits, target):
        self.calls += 1
        return apl.CE()(logits, target) * self.calls


def test_what_others_wrote_is_launched_unless_it_is_asked_for(gpu):
    for loss in (Counts(), lambda logits, target: apl.CE()(logits, target)):
        run(loss=loss)
    assert StandIn.made == []
    run(loss=apl.CE())
    assert len(StandIn.made) == 1


def test_what_is_watched_is_launched():
    """Hooks are Python, and a graph calls none."""
    for watch in ("register_forward_hook", "register_full_backward_hook"):
        network = apl.models.cifar10_cnn()
        assert capture.known(network, apl.CE())
        getattr(network[3], watch)(lambda *seen: None)
        assert not capture.known(network, apl.CE())
    for watch in ("register_hook", "register_post_accumulate_grad_hook"):
        network = apl.models.digits_net()
        getattr(network[1].weight, watch)(lambda gradient: None)
        assert not capture.known(network, apl.CE())


def test_a_cpu_records_nothing(monkeypatch):
    monkeypatch.setattr(capture, "Replayed", None)
    run(), run(graph=False)


@pytest.mark.parametrize("name", ["mnist", "cifar10", "resnet34"])
def test_nothing_but_the_end_of_an_epoch_waits(name, gpu, monkeypatch):
    large = apl.models.resnet34, images(8, (3, 32, 32), 100)
    monkeypatch.setitem(NETWORKS, "resnet34", large)
    waited, steps = [], []
    n = len(NETWORKS[name][1].images)
    for parts in (2, 4):
        loss = apl.paper_loss("cifar10" if n > 8 else "cifar100", "nce+rce")
        augment = apl.augment.paper("cifar100") if name != "mnist" else None
        with Operations(refuse=False) as operations:
            run(name, loss, epochs=1, batch_size=-(-n // parts), augment=augment, graph=False)
        waited.append(operations.waited)
        steps.append(sum("_fused_sgd_" in str(func) for func, *_ in operations.calls))
    assert steps == [2, 4]
    assert waited[0] == waited[1] > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(("name", "loss"), [("cifar10", "nce+rce"), ("mnist", "nlnl")])
def test_on_a_gpu_a_recorded_step_is_the_launched_one(name, loss, precision, tmp_path):
    data = NETWORKS[name][1].to("cuda")
    settings = {"precision": precision, "augment": apl.augment.Augment(crop=2, flip=True)}
    launched = run(name, loss, data, graph=False, **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(run(name, loss, data, **settings), launched)
    with pytest.raises(OutOfTime):
        stopped = Checkpoint(tmp_path / "run", deadline=0.0)
        run(name, loss, data, checkpoint=stopped, **settings)
    assert_same(
        run(name, loss, data, checkpoint=Checkpoint(tmp_path / "run"), **settings), launched
    )
