"""The rows of a loss on a CPU: in pieces, in threads, in every layout, and what they hand back."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit
from sympy import exp, log
from torch._dynamo import compiled_autograd
from torch._subclasses.fake_tensor import FakeTensorMode

import apl
from apl import on_cpu, single, team
from apl.closed_form import derive
from apl.symbolic import p_y

LOSSES = ("mae", "fl", "nlnl", "nce", "nfl", "ngce+nce")
LARGE = (2100, 1100)
assert LARGE[0] * LARGE[1] > team._MANY


def data(*shape, seed=0, scale=3.0, dtype=torch.float32):
    own = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(*shape, generator=own)
    labels = shape[:1] + shape[2:]
    target = torch.randint(shape[1], labels, generator=own)
    on_top = torch.rand(labels, generator=own) < 0.5
    return logits.to(dtype), torch.where(on_top, logits.argmax(1), target)


def closed(loss, logits, target, weight=1.0, **keywords):
    def plain(z, y):
        return loss._kernel(z, y, loss.hyperparameters)

    form = derive(loss.expression)
    return on_cpu.evaluate(form, loss.hyperparameters, plain, logits, target, weight, **keywords)


def exact(loss, logits, target, weight=1.0):
    """Losses, and the gradient of their weighted sum, by the plain path in double precision."""
    z = logits.double().requires_grad_()
    each = loss._kernel(z.movedim(1, -1), target, loss.hyperparameters)
    (each * weight).sum().backward()
    return each.detach(), z.grad


def assert_close(found, expected, rtol=2e-5):
    (value, gradient), (true_value, true_gradient) = found, expected
    torch.testing.assert_close(value.double(), true_value, rtol=rtol, atol=1e-7)
    scale = true_gradient.abs().amax(1, keepdim=True)
    error = (gradient.double() - true_gradient).abs() / (scale + 1e-30)
    assert error.max() < 2 * rtol


@pytest.mark.parametrize("name", LOSSES)
def test_many_pieces_give_what_double_precision_gives(name):
    loss, (logits, target) = apl.loss(name), data(*LARGE)
    assert_close(closed(loss, logits, target), exact(loss, logits, target))


@pytest.mark.parametrize("whose", ["torch's", "own"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_numbers_do_not_depend_on_the_threads(whose, dtype, monkeypatch):
    if whose == "own":
        monkeypatch.setattr(team, "_team", lambda: None)
    loss, (logits, target) = apl.loss("nfl+rce"), data(*LARGE, dtype=dtype)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(closed(loss, logits, target))
    finally:
        torch.set_num_threads(before)
    for value, gradient in found[1:]:
        assert torch.equal(value, found[0][0]) and torch.equal(gradient, found[0][1])


@pytest.mark.parametrize("shape", [(40, 7), LARGE, (6, 5, 3), (90, 300, 4, 30)], ids=str)
@pytest.mark.parametrize("layout", ["plain", "strided", "transposed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_layout_and_type(shape, layout, dtype):
    loss = apl.loss("nce+mae")
    logits, target = data(*shape, dtype=dtype)
    if layout == "strided":
        logits = torch.stack([logits, logits], -1)[..., 0]
    if layout == "transposed":
        logits = logits.transpose(0, -1).contiguous().transpose(0, -1)
    weight = torch.rand(target.shape, generator=torch.Generator().manual_seed(1))
    value, gradient = closed(loss, logits, target, weight)
    assert gradient.dtype == dtype and gradient.shape == logits.shape
    true_value, true_gradient = exact(loss, logits, target, weight)
    rtol = 1e-2 if dtype == torch.bfloat16 else 2e-5
    assert_close((value, gradient), (true_value, true_gradient), rtol)


@pytest.mark.skipif(sys.platform != "linux", reason="torch's OpenMP is GNU's on Linux alone")
def test_torch_lends_its_threads():
    """Else 1024 x 1000 logits take twice as long, and no other test would tell."""
    assert team._team() is not None


def test_rounding_to_half_precision_is_torchs():
    """Ties go to the even neighbor; also beyond the largest number, and NaN."""
    numbers = np.arange(-(1 << 31), 1 << 31, 65521).astype(np.int32).view(np.float32)
    halves = np.concatenate([numbers, np.float32([0, -0.0, np.inf, -np.inf, 3.4e38])])
    ties = (np.arange(1 << 16, dtype=np.uint32) << 16 | 0x8000).view(np.float32)
    row = np.concatenate([halves, ties])
    found = np.empty(len(row), np.uint16)
    _narrow(row, found)
    expected = torch.from_numpy(row).bfloat16()
    torch.testing.assert_close(
        torch.from_numpy(found.view(np.int16)).view(torch.bfloat16),
        expected,
        rtol=0,
        atol=0,
        equal_nan=True,
    )
    back = np.empty(len(row), np.float32)
    _widen(found, back)
    assert np.array_equal(back, expected.float().numpy(), equal_nan=True)


def test_a_default_device_is_not_taken_for_the_inputs():
    logits, target = data(5, 4)
    expected = apl.loss("nce")(logits, target)
    with torch.device("meta"):
        assert torch.equal(apl.loss("nce")(logits, target), expected)


def test_what_has_no_memory_is_refused_or_computed_otherwise():
    logits, target = data(5, 4)
    zeros = torch._efficientzerotensor((5, 4))
    with pytest.raises(RuntimeError, match="logits, labels and weights in memory"):
        closed(apl.loss("nce"), zeros, target)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert apl.loss("nce")(logits, target).shape == ()


def test_sizes_that_do_not_go_together_are_refused():
    logits, target = data(5, 4)
    for labels, weight in ((target[:3], 1.0), (target, torch.ones(3))):
        with pytest.raises(RuntimeError, match="5 rows of logits do not go with"):
            closed(apl.loss("nce"), logits, labels, weight)


@pytest.mark.filterwarnings("ignore")  # of dynamo, about what it cannot trace
def test_a_backward_inside_compiled_code():
    """Dynamo drops what no name is left for; the rows know only its address."""
    logits, target = data(200, 1000, dtype=torch.float16)
    z, x = logits.clone().requires_grad_(), logits.double().requires_grad_()
    loss = apl.loss("nfl+rce", ignore_index=0)
    for _ in range(5):
        z.grad = None
        value = loss(z * 1, target)
        with compiled_autograd._enable(torch.compile(backend="eager")):
            value.backward()
    loss(x, target).backward()
    torch.testing.assert_close(z.grad.double(), x.grad, rtol=2e-2, atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(
    N=st.integers(1, 40),
    K=st.integers(2, 70),
    scale=st.sampled_from([0.1, 1.0, 5.0]),
    offset=st.sampled_from([0.0, 1e3, -1e4]),
    seed=st.integers(0, 1 << 16),
    name=st.sampled_from(LOSSES),
)
def test_any_size_and_offset(N, K, scale, offset, seed, name):
    """An offset of all logits changes nothing but what float32 has rounded."""
    logits, target = data(N, K, seed=seed, scale=scale)
    logits = logits + offset
    loss = apl.loss(name)
    value, gradient = closed(loss, logits, target)
    true_value, true_gradient = exact(loss, logits, target)
    torch.testing.assert_close(value.double(), true_value, rtol=2e-5, atol=1e-6)
    torch.testing.assert_close(gradient.double(), true_gradient, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_a_row_that_is_not_finite_stays_alone(name):
    loss, (logits, target) = apl.loss(name), data(6, 5)
    logits[1, 2] = torch.nan
    logits[3, 0] = torch.inf
    value, gradient = closed(loss, logits, target)
    wrong = torch.tensor([False, True, False, True, False, False])
    assert value.isnan().tolist() == wrong.tolist()
    assert gradient.isnan().any(1).tolist() == wrong.tolist()
    kept = ~wrong
    assert_close((value[kept], gradient[kept]), exact(loss, logits[kept], target[kept]))


def test_a_row_that_divides_by_zero_stays_alone():
    """Else it would end its thread, and the rows after it would stay unwritten."""
    loss = apl.Loss(log(p_y) ** -2, reduction="none")
    logits = torch.zeros(6, 4)
    logits[1, 1] = 200.0
    target = torch.tensor([0, 1, 2, 3, 0, 1])
    value = closed(loss, logits, target)[0]
    expected = exact(loss, logits, target)[0]
    assert value[1].isinf()
    kept = torch.arange(6) != 1
    torch.testing.assert_close(value[kept].double(), expected[kept], rtol=1e-5, atol=0)


def test_a_backward_in_inference_mode_computes_such_rows_too():
    """float16 has its gradient in the backward."""
    logits = torch.tensor([[100.0, 0.0, 0.0], [1.0, 2.0, 3.0]], dtype=torch.float16)
    target = torch.tensor([1, 0])
    gradients = []
    for inference in (False, True):
        x = logits.clone().requires_grad_()
        value = apl.loss("nlnl")(x, target)
        with torch.inference_mode(inference):
            value.backward()
        gradients.append(x.grad.clone())
    assert gradients[0].isfinite().all() and torch.equal(*gradients)


@pytest.mark.parametrize("name", LOSSES)
def test_nothing_ends_a_thread(name):
    """Compiled code has no way to raise: what it would raise, nobody is told."""
    for half in (False, True):
        code = on_cpu.compiled(derive(apl.loss(name).expression), half).inspect_llvm()
        assert "picklebuf" not in code


def test_one_row_of_one_place_that_single_precision_cannot_compute():
    logits = torch.tensor([100.0, 0.0, 0.0]).view(1, 3, 1).requires_grad_()
    value = apl.loss("nlnl", ignore_index=0)(logits, torch.tensor([[1]]))
    value.backward()
    x = logits.detach().double().requires_grad_()
    apl.loss("nlnl", ignore_index=0)(x, torch.tensor([[1]])).backward()
    torch.testing.assert_close(logits.grad.double(), x.grad, rtol=1e-5, atol=1e-7)


def test_a_class_that_is_ruled_out():
    """-inf is a probability of 0: no share in the value, no gradient."""
    logits, target = torch.tensor([[0.0, -torch.inf, 1.0]]), torch.tensor([0])
    for name in ("ce", "mae", "gce"):
        value, gradient = closed(apl.loss(name), logits, target)
        assert_close((value, gradient[:, ::2]), exact(apl.loss(name), logits[:, ::2], target))
        assert gradient[0, 1] == 0


@pytest.mark.parametrize("name", LOSSES)
def test_a_label_that_is_ruled_out_is_as_in_the_plain_path(name):
    loss, (logits, target) = apl.loss(name), data(6, 5)
    logits[2, target[2]] = -torch.inf
    value, gradient = closed(loss, logits, target)
    true_value, true_gradient = exact(loss, logits, target)
    torch.testing.assert_close(value.double(), true_value, rtol=1e-5, atol=1e-6, equal_nan=True)
    torch.testing.assert_close(gradient.double(), true_gradient, rtol=0, atol=1e-5, equal_nan=True)
    assert (value[2] == 1) == (name in ("nce", "nfl"))


def test_without_gradient_there_is_none_and_the_value_is_the_same():
    for name in LOSSES:
        loss, (logits, target) = apl.loss(name), data(*LARGE)
        value, gradient = closed(loss, logits, target, with_gradient=False)
        assert gradient is None
        assert torch.equal(value, closed(loss, logits, target)[0])


def test_half_precision_keeps_gradients_that_a_scale_makes_large():
    """1e-7 rounds to a multiple of 6e-8 in float16; times 65536 it does not."""
    (logits, target), scale = data(4096, 10, dtype=torch.float16), 65536.0
    z = logits.clone().requires_grad_()
    (scale * apl.loss("nce")(z, target)).backward()
    x = logits.double().requires_grad_()
    (scale * apl.loss("nce")(x, target)).backward()
    torch.testing.assert_close(z.grad.double(), x.grad, rtol=2e-3, atol=1e-6)


def test_a_label_that_is_no_class_is_named_from_a_thread_too():
    logits, target = data(*LARGE)
    target[-1] = 1100
    with pytest.raises(ValueError, match="the label 1100: with 1100 classes labels are 0 to 1099"):
        apl.loss("nce")(logits.requires_grad_(), target)


def test_a_loss_of_more_sums_than_are_compiled_takes_the_plain_path():
    powers = [apl.normalize(1 - p_y**n) for n in (2, 3, 4)]
    loss = powers[0] + powers[1] + powers[2]
    assert not on_cpu.takes(derive(loss.expression))
    assert on_cpu.takes(derive((powers[0] + powers[1]).expression))
    logits, target = data(5, 4)
    z, x = logits.clone().requires_grad_(), logits.double().requires_grad_()
    for each in (z, x):
        loss(each, target).backward()
    torch.testing.assert_close(z.grad.double(), x.grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "expression",
    [
        (1 - p_y) ** 3,
        apl.symbolic.normalize((1 - p_y) ** 1.5),
        apl.symbolic.normalize(1 - exp(3 * (p_y - 1))),
        apl.symbolic.mean_over_others(p_y**0.5),
        apl.symbolic.mean_over_others(log(1 + p_y)),
        apl.symbolic.normalize((1 - p_y) / (1 + p_y)),
    ],
    ids=str,
)
def test_a_function_of_ones_own(expression):
    loss, (logits, target) = apl.Loss(expression), data(50, 12, scale=1.0)
    assert on_cpu.takes(derive(expression))
    assert_close(closed(loss, logits, target), exact(loss, logits, target))


def test_without_numba_the_plain_path_runs(monkeypatch):
    def missing(name):
        assert name == "numba"

    monkeypatch.setattr(on_cpu, "find_spec", missing)
    monkeypatch.setattr(on_cpu, "evaluate", None)
    on_cpu.takes.cache_clear()
    try:
        logits, target = data(5, 4)
        loss = apl.loss("nce")
        assert not on_cpu.takes(derive(loss.expression))
        loss(logits.requires_grad_(), target).backward()
        assert logits.grad.isfinite().all()
    finally:
        on_cpu.takes.cache_clear()


def _in_child(connection, logits, target):
    connection.send(closed(apl.loss("mae"), logits, target)[0].sum().item())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_process_that_forked_has_threads_of_its_own():
    """In a forked process torch's threads are gone, and its OpenMP waits for them for ever."""
    logits, target = data(*LARGE)
    expected = closed(apl.loss("mae"), logits, target)[0].sum().item()
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    child = context.Process(target=_in_child, args=(there, logits, target))
    child.start()
    try:
        assert here.poll(300), "the forked process hangs"
        assert here.recv() == pytest.approx(expected, rel=1e-6)
    finally:
        child.kill()
        child.join()


def test_an_interrupted_call_waits_for_its_helpers(monkeypatch):
    """They work on memory that is given back when the call ends."""
    done, interruptions = [], iter([KeyboardInterrupt, KeyboardInterrupt])

    def work(data):
        if threading.current_thread() is not threading.main_thread():
            begun.set()
            time.sleep(0.2)
            done.append(data)
        else:
            begun.wait()

    def interrupted(futures):
        for kind in interruptions:
            raise kind
        return wait(futures)

    begun, wait = threading.Event(), team.wait
    monkeypatch.setattr(team, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        team._in_pool(work, 5, 1)
    assert done == [5]


FORKED = """
import os, sys, torch, apl
torch.set_num_threads(2)
(torch.randn(1 << 22) + 1).sum()
if (child := os.fork()) == 0:
    logits = torch.frombuffer(bytearray(1 << 19), dtype=torch.float32).view(1024, 128)
    apl.loss("mae")(logits, torch.frombuffer(bytearray(1 << 13), dtype=torch.int64))
    os._exit(7)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_process_that_forked_before_its_first_loss():
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", FORKED], timeout=300)
    assert done.returncode == 7


@njit
def _narrow(row, halves):
    single.narrow(row, halves)


@njit
def _widen(halves, row):
    single.widen(halves, row)


@njit
def _apply(function, x, out):
    for i in range(len(x)):
        out[i] = function(x[i])


@pytest.mark.parametrize(
    ("ours", "true", "x"),
    [
        (single._exp, np.exp, np.linspace(-87, 80, 100_001)),
        (single._expm1, np.expm1, -np.logspace(-30, 1.9, 100_001)),
        (single._expm1, np.expm1, np.linspace(0.01, 80, 10_001)),
        (single._log1p, np.log1p, -np.logspace(-30, np.log10(0.5), 100_001)),
        (single._log1p, np.log1p, np.linspace(0.001, 1, 10_001)),
    ],
)
def test_functions_are_exact_to_three_roundings(ours, true, x):
    x = x.astype(np.float32)
    out = np.empty_like(x)
    _apply(ours, x, out)
    expected = true(x.astype(float))
    assert np.abs(out / expected - 1).max() < 3 * 2**-24
