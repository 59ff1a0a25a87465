"""Every loss passes the contract of apl.testing, and the contract finds the losses that do not."""

from __future__ import annotations

import shutil
import subprocess
import sys

import definitions
import pytest
import torch
from sympy import Rational, exp, log

import apl
from apl.symbolic import is_symmetric, p_y
from apl.testing import LossContract

pytest.mark.gpu(LossContract.test_cuda)


def contract(name, **parameters):
    """The contract of a loss of the catalog, held against tests/definitions.py."""

    class Contract(LossContract):
        # Undecided (None) for a general parameter: at its default none of these is symmetric.
        symmetric = bool(is_symmetric(apl.catalog.entry(name).expression))

        def loss(self, **keywords):
            return apl.loss(name, **parameters, **keywords)

        def reference(self, logits, target):
            rows = [
                definitions.value_and_gradient(name, row.tolist(), int(y), **parameters)
                for row, y in zip(logits, target, strict=True)
            ]
            values = [float(value) for value, _ in rows]
            gradients = [[float(g) for g in gradient] for _, gradient in rows]
            return torch.tensor(values).double(), torch.tensor(gradients).double()

    return Contract


def collected(name):
    title = "Test" + name.upper().replace("+", "_")
    return title, type(title, (contract(name),), {"__module__": __name__})


# TestCE, TestNCE_RCE and so on, where pytest looks for classes.
globals().update(collected(name) for name in apl.losses.names())


class TestFocalWithGammaTwo(contract("nfl+rce", gamma=2.0, A=-4.0, alpha=10.0, beta=0.1)):
    pass


class TestComposed(LossContract):
    symmetric = True

    def loss(self, **keywords):
        focal = apl.normalize(apl.FL(gamma=2, **keywords))
        return 2 * apl.normalize(apl.GCE(q=0.3, **keywords)) + 0.5 * focal + apl.MAE(**keywords)


class TestSumOfTwoOfAKind(LossContract):
    symmetric = False

    def loss(self, **keywords):
        return apl.GCE(q=0.3, **keywords) + 3 * apl.GCE(q=0.7, **keywords)


class TestNormalizedSum(LossContract):
    symmetric = True

    def loss(self, **keywords):
        return apl.normalize(2 * apl.GCE(**keywords) + apl.MAE(**keywords))


class TestOneOfOnesOwn(LossContract):
    symmetric = False

    def loss(self, **keywords):
        return apl.Loss((1 - p_y ** Rational(3, 2)) ** 2 + log(2 - p_y), name="own", **keywords)


class TestNormalizedOneOfOnesOwn(LossContract):
    symmetric = True

    def loss(self, **keywords):
        return apl.normalize(apl.Loss(exp(1 - p_y) - Rational(1, 2), **keywords))


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("name", ["nce+rce", "ngce", "nlnl"])
def test_compiled_to_machine_code(name):
    """The default backend; the contract traces every loss with a backend that compiles nothing."""
    inductor = contract(name)
    inductor.backend = "inductor"
    inductor().test_compile()


# --- the contract finds what is wrong -------------------------------------------------------------


class Changed(apl.Loss):
    """Cross entropy, but ``change(plain, logits, target)`` says what is called in its place."""

    def __init__(self, change, **keywords):
        super().__init__(-log(p_y), **keywords)
        self.change = change

    def forward(self, logits, target):
        return self.change(super().forward, logits, target)


class SwallowsKeywords(Changed):
    def __init__(self, change, weight=None, **keywords):
        super().__init__(change, **keywords)


class WrongGradient(torch.autograd.Function):
    """The identity, with a first derivative of 2 and no second one."""

    @staticmethod
    def forward(context, value):
        return value.clone()

    @staticmethod
    def backward(context, gradient):
        return 2 * gradient


class NoSecondDerivative(torch.autograd.Function):
    """The square, with a first derivative that is a constant."""

    @staticmethod
    def forward(context, logits):
        context.saved = logits.detach()
        return logits.square()

    @staticmethod
    def backward(context, gradient):
        return 2 * context.saved * gradient


def unchanged(plain, logits, target):
    return plain(logits, target)


def probabilities_first(plain, logits, target):
    return plain(logits.softmax(1 if logits.ndim > 1 else 0).log(), target)


def labels_looked_at(plain, logits, target):
    if target.numel() and target.max() >= logits.shape[min(1, logits.ndim - 1)]:
        raise ValueError("no such label")
    return plain(logits, target)


def writes_to_its_input(plain, logits, target):
    logits.data.sub_(1.0)
    return plain(logits, target)


def always_a_graph(plain, logits, target):
    with torch.enable_grad():
        return plain(logits, target)


def longs_only(plain, logits, target):
    assert target.dtype == torch.long
    return plain(logits, target)


def graph_break(plain, logits, target):
    torch._dynamo.graph_break()
    return plain(logits, target)


def mean_over_all(plain, logits, target):
    value = plain(logits, target)
    return value if value.ndim else value * (target != -100).sum() / target.numel()


def first_class_favored(plain, logits, target):
    return plain(logits + torch.eye(logits.shape[1])[0], target)


# What is done wrong, and the tests that must see it.
WRONG = {
    "values": (lambda plain, z, y: 1.001 * plain(z, y), "values_are_those_of_the_expression"),
    "digits": (lambda plain, z, y: plain(z, y) + 1e3 - 1e3, "float32_keeps_its_digits"),
    "softmax, then log": (
        probabilities_first,
        "extreme_logits_give_finite_values_and_gradients",
    ),
    "negative": (
        lambda plain, z, y: plain(z, y) - 1e-3,
        "extreme_logits_give_finite_values_and_gradients",
    ),
    "not of differences": (
        lambda plain, z, y: plain(1.1 * z, y) + z.sum(),
        "a_shift_of_the_logits_changes_nothing",
    ),
    "classes differ": (first_class_favored, "no_class_is_special"),
    "gradient": (
        lambda plain, z, y: WrongGradient.apply(plain(z, y)),
        "gradcheck torch_func vmap",
    ),
    "second derivative": (
        lambda plain, z, y: plain(NoSecondDerivative.apply(z), y),
        "gradgradcheck",
    ),
    "looks at labels": (labels_looked_at, "vmap compile compile_of_vmap_of_grad"),
    "graph break": (graph_break, "compile compile_of_vmap_of_grad"),
    "mean": (mean_over_all, "ignored_labels"),
    "scalars twice": (lambda plain, z, y: (v := plain(z, y)) * (2 - min(1, v.ndim)), "reductions"),
    "flattened": (lambda plain, z, y: plain(z.flatten(1), y.flatten()), "shapes"),
    "never nan": (lambda plain, z, y: plain(z, y).nan_to_num(), "nothing_to_average"),
    "half": (
        lambda plain, z, y: plain(z, y).to(z.dtype),
        "half_precision_is_computed_in_float32 autocast",
    ),
    "writes": (writes_to_its_input, "layouts"),
    "int64 only": (longs_only, "integer_labels_of_every_width"),
    "keeps a graph": (always_a_graph, "no_grad"),
    "not to be pickled": (lambda plain, z, y: plain(z, y), "copies"),
    "any label": (lambda plain, z, y: plain(z, y % z.shape[1]), "labels_out_of_range_are_refused"),
    "soft": (lambda plain, z, y: plain(z, y.long()), "soft_targets_are_refused"),
    "broadcasts": (
        lambda plain, z, y: plain(z.float(), y.flatten()[:1].expand(z.shape[:1])),
        "misfits_are_refused",
    ),
}


def changed(change, kind=Changed, symmetric=None):
    attributes = {"loss": lambda self, **keywords: kind(change, **keywords)}
    return type("Contract", (LossContract,), {**attributes, "symmetric": symmetric})


@pytest.mark.parametrize("wrong", WRONG)
def test_the_contract_finds(wrong):
    change, tests = WRONG[wrong]
    for test in tests.split():
        with pytest.raises(Exception, match=r"."):
            getattr(changed(change)(), f"test_{test}")()


def test_the_contract_finds_a_wrong_declaration():
    for kind, said in ((apl.CE, True), (apl.MAE, False), (apl.loss, True)):
        arguments = ["fl"] if kind is apl.loss else []
        attributes = {
            "loss": lambda self, kind=kind, arguments=arguments, **kw: kind(*arguments, **kw),
            "symmetric": said,
        }
        with pytest.raises(AssertionError, match="sums over the labels vary"):
            type("Contract", (LossContract,), attributes)().test_symmetry_is_as_declared()


def test_the_contract_finds_class_weights():
    with pytest.raises(AssertionError, match="nothing was raised"):
        changed(unchanged, SwallowsKeywords)().test_class_weights_are_refused()


def test_every_test_of_the_contract_is_seen_to_fail():
    seen = {f"test_{name}" for _, names in WRONG.values() for name in names.split()}
    elsewhere = {"test_symmetry_is_as_declared", "test_class_weights_are_refused", "test_cuda"}
    assert {name for name in dir(LossContract) if name.startswith("test_")} == seen | elsewhere


def test_what_is_changed_above_is_without_fault():
    assert changed(unchanged).failures() == {}


def test_failures_are_named():
    failures = changed(mean_over_all).failures()
    assert "test_ignored_labels" in failures
    assert "test_gradcheck" not in failures


def test_a_test_set_to_none_does_not_count():
    attributes = {"test_class_weights_are_refused": None, "test_compile": None}
    lenient = type("Lenient", (changed(unchanged, SwallowsKeywords),), attributes)
    assert lenient.failures() == {}


def test_a_contract_without_a_loss_says_so():
    with pytest.raises(NotImplementedError, match="needs a method loss"):
        LossContract().test_gradcheck()


def test_the_contract_does_not_need_pytest():
    code = "import sys; sys.modules['pytest'] = None; import apl.testing"
    subprocess.run([sys.executable, "-c", code], check=True)
