"""The contract of a loss: what training code may expect wherever ``F.cross_entropy`` stands.

Subclass :class:`LossContract` and pytest collects its tests; ``failures()`` needs no pytest.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any
from unittest import SkipTest

import torch
from sympy import Float, exp
from torch import Tensor, nn
from torch.func import grad, hessian, jacfwd, jacrev, vmap

from apl import symbolic
from apl._cases import Pair, close, extreme, refuses, rows, torch_may_warn, value_and_gradient
from apl.losses import Loss


class LossContract:
    """The tests of one loss; a subclass says which, and pytest runs them.

    ``symmetric`` declares whether the sum over the labels is the same for every prediction (None:
    not declared). ``backend`` is what ``torch.compile`` compiles with. A subclass sets a test to
    None that should not hold for its loss.

    Examples
    --------
    >>> import apl
    >>> class TestMine(LossContract):
    ...     symmetric = False
    ...
    ...     def loss(self, **keywords):
    ...         return apl.Loss((1 - apl.symbolic.p_y) ** 2, **keywords)
    >>> TestMine.failures()
    {}
    """

    symmetric: bool | None = None
    backend: str = "aot_eager"

    def loss(self, **keywords: Any) -> nn.Module:
        """Your loss, made with the keywords given: ``reduction``, ``ignore_index``."""
        raise NotImplementedError("a LossContract needs a method loss(self, **keywords)")

    def reference(self, logits: Tensor, target: Tensor) -> Pair:
        """True values (N,) and gradients (N, K) in float64; unless told, the loss in float64."""
        return self._each(logits.double(), target)

    @classmethod
    def failures(cls) -> dict[str, Exception]:
        """Run every test without pytest: those that fail, by name, with what went wrong."""
        failed: dict[str, Exception] = {}
        for name in (n for n in dir(cls) if n.startswith("test_") and getattr(cls, n)):
            try:
                getattr(cls(), name)()
            except SkipTest:
                continue
            except Exception as error:
                failed[name] = error
        return failed

    def _each(self, logits: Tensor, target: Tensor, **keywords: Any) -> Pair:
        return value_and_gradient(self.loss(reduction="none", **keywords), logits, target)

    def _compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        torch.compiler.reset()
        return torch.compile(function, fullgraph=True, dynamic=True, backend=self.backend)

    def test_values_are_those_of_the_expression(self) -> None:
        """The torch code gives what the formula gives when evaluated to 50 digits."""
        loss, (logits, target) = self.loss(reduction="none"), rows(4, 4)
        if not isinstance(loss, Loss):
            raise SkipTest("the loss has no expression")
        named = {symbol.name: symbol for symbol in loss.expression.free_symbols}
        numbers = {named[key]: Float(v, 50) for key, v in loss.hyperparameters.items()}
        for z, y, value in zip(logits.tolist(), target, loss(logits, target), strict=True):
            total = sum(exp(Float(x, 50)) for x in z)
            p = [exp(Float(x, 50)) / total for x in z]
            exact = symbolic.at(loss.expression.subs(numbers), p, int(y))
            close(value.item(), float(exact), rtol=1e-12, atol=1e-14)

    def test_float32_keeps_its_digits(self) -> None:
        """Values and gradients in float32 are the reference's, also for logits up to 10^4."""
        moderate = [rows(12, K, s, torch.float32) for K in (2, 3, 10) for s in (1.0, 4.0)]
        for (logits, target), floor in [(x, 0) for x in moderate] + [(x, 1e-6) for x in extreme()]:
            value, gradient = (x.double() for x in self._each(logits, target))
            true_value, true_gradient = self.reference(logits, target)
            close(value, true_value, rtol=1e-5, atol=1e-6)
            error, size = (x.abs().amax(1) for x in (gradient - true_gradient, true_gradient))
            assert (error <= 1e-5 * size + floor).all(), f"the gradient is off by {error.max()}"

    def test_extreme_logits_give_finite_values_and_gradients(self) -> None:
        """No inf, no NaN and nothing negative for logits up to 10^4, in every type."""
        for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
            for logits, target in extreme(dtype):
                value, gradient = self._each(logits, target)
                assert value.isfinite().all() and (value >= 0).all(), f"{dtype} values: {value}"
                assert gradient.isfinite().all(), f"{dtype} gradients: {gradient}"

    def test_a_shift_of_the_logits_changes_nothing(self) -> None:
        """Only differences of logits count."""
        logits, target = rows(8, 10)
        close(self._each(logits + 7.0, target), self._each(logits, target))

    def test_no_class_is_special(self) -> None:
        """Classes in another order: the same values, and the gradients in that order."""
        (logits, target), order = rows(8, 5), torch.tensor([3, 0, 4, 2, 1])
        value, gradient = self._each(logits, target)
        close(self._each(logits[:, order], order.argsort()[target]), (value, gradient[:, order]))

    def test_symmetry_is_as_declared(self) -> None:
        """The sum over the labels is the same for every prediction, or it is not."""
        if self.symmetric is None:
            raise SkipTest("the loss does not declare whether it is symmetric")
        logits, labels = rows(16, 5, 4.0)[0].repeat(5, 1), torch.arange(5).repeat_interleave(16)
        sums = self._each(logits, labels)[0].view(5, 16).sum(0)
        spread = float((sums.max() - sums.min()) / sums.mean())
        assert (spread < 1e-9) == self.symmetric, f"sums over the labels vary by {spread:.1e}"

    def test_gradcheck(self) -> None:
        """First derivatives, in backward and forward mode, are those of finite differences."""
        logits, target = rows(4, 4)
        with torch_may_warn():
            inputs = (logits.requires_grad_(), target)
            torch.autograd.gradcheck(self.loss(), inputs, check_forward_ad=True)

    def test_gradgradcheck(self) -> None:
        """Second derivatives are those of finite differences."""
        logits, target = rows(4, 4)
        torch.autograd.gradgradcheck(self.loss(), (logits.requires_grad_(), target))

    def test_torch_func(self) -> None:
        """grad is autograd's; jacrev and jacfwd agree, and so do hessian and double backward."""
        (logits, target), loss = rows(4, 3), self.loss()
        close(grad(loss)(logits, target), value_and_gradient(loss, logits, target)[1])
        twice, each = torch.autograd.functional.hessian, self.loss(reduction="none")
        with torch_may_warn():
            close(hessian(loss)(logits, target), twice(lambda z: loss(z, target), logits))
            close(jacfwd(each)(logits, target), jacrev(each)(logits, target))

    def test_vmap(self) -> None:
        """Rows mapped over one by one, and models stacked in front that share their labels."""
        (logits, target), loss = rows(6, 5), self.loss()
        found = vmap(loss)(logits, target), vmap(grad(loss))(logits, target)
        close(found, self._each(logits, target))
        stack = torch.stack([logits, 2 * logits, logits.flip(0)])
        stacked = vmap(grad(loss), in_dims=(0, None))(stack, target)
        close(stacked, torch.stack([grad(loss)(z, target) for z in stack]))

    def test_reductions(self) -> None:
        """The mean (default) and the sum of the rows' losses; no other reduction."""
        case = rows(6, 5)
        value, gradient = self._each(*case)
        close(value_and_gradient(self.loss(), *case), (value.mean(), gradient / 6))
        close(value_and_gradient(self.loss(reduction="sum"), *case), (value.sum(), gradient))
        refuses(ValueError, "average", lambda: self.loss(reduction="average"))

    def test_shapes(self) -> None:
        """Logits (K,), (N, K, d1) and (N, K, d1, d2): a loss for each label, in its place."""
        # Few numbers and many, in both types and layouts: each may take a way of its own.
        for K, dtype in ((5, torch.float64), (5, torch.float32), (2000, torch.float32)):
            logits, target = rows(12, K, dtype=dtype)
            value, gradient = self._each(logits, target)
            close(self._each(logits[0], target[0]), (value[0], gradient[0]))
            for shape in ((3, 4), (2, 3, 2)):
                z, g = (x.view(*shape, K).movedim(-1, 1) for x in (logits, gradient))
                for layout in (z, z.contiguous()):
                    close(self._each(layout, target.view(shape)), (value.view(shape), g))

    def test_ignored_labels(self) -> None:
        """They count in no reduction and get no gradient: -100, or any label one says."""
        logits, target = rows(6, 5)
        for index, keywords in ((-100, {}), (255, {"ignore_index": 255}), (0, {"ignore_index": 0})):
            labels = target.clamp(min=1).index_fill(0, torch.tensor([2, 4]), index)
            kept = labels != index
            value, gradient = self._each(logits, labels, **keywords)
            close((value[kept], gradient[kept]), self._each(logits[kept], labels[kept]))
            assert not value[~kept].any() and not gradient[~kept].any(), "ignored labels count"
            close(self.loss(**keywords)(logits, labels), value[kept].mean())

    def test_nothing_to_average(self) -> None:
        """Empty batches and batches of ignored labels give what ``F.cross_entropy`` gives."""
        for shape in ((0, 3), (0, 3, 2), (2, 3, 0), (2, 3), (3,)):
            logits = torch.zeros(shape)
            target = torch.full(shape[:1] * (len(shape) > 1) + shape[2:], -100)
            for reduction in ("mean", "sum", "none"):
                ours = value_and_gradient(self.loss(reduction=reduction), logits, target)
                torchs = nn.CrossEntropyLoss(reduction=reduction)
                close(ours, value_and_gradient(torchs, logits, target), equal_nan=True)

    def test_half_precision_is_computed_in_float32(self) -> None:
        """float16 and bfloat16 logits: the value of the same numbers in float32."""
        for dtype in (torch.float16, torch.bfloat16):
            logits, target = rows(8, 10, 3.0, dtype)
            value, gradient = self._each(logits.float(), target)
            close(self._each(logits, target), (value, gradient.to(dtype)))

    def test_layouts(self) -> None:
        """Transposed, strided and expanded logits and labels; none of them is written to."""
        logits, target = rows(6, 5)
        wide = torch.stack([logits, -logits], -1).flatten(1)
        for z in (logits.T.contiguous().T, wide[:, ::2], logits[:1].expand(6, 5)):
            for y in (target, torch.stack([target, target], 1)[:, 0], target[:1].expand(6)):
                before = z.clone(), y.clone()
                close(self._each(z, y), self._each(*before))
                close((z, y), before, rtol=0, atol=0)

    def test_integer_labels_of_every_width(self) -> None:
        """uint8, int8, int16 and int32 labels, as data sets store them."""
        logits, target = rows(6, 5)
        for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32):
            close(self._each(logits, target.to(dtype)), self._each(logits, target))

    def test_autocast(self) -> None:
        """Under autocast a layer's bfloat16 logits give a float32 loss and train the layer."""
        (features, target), layer = rows(8, 5, dtype=torch.float32), nn.Linear(5, 5)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = self.loss()(logits := layer(features), target)
        close(value, self.loss()(logits.float(), target))
        value.backward()
        assert layer.weight.grad is not None and layer.weight.grad.any(), "nothing is trained"

    def test_no_grad(self) -> None:
        """Without gradients: the same values, and no graph."""
        logits, target = rows(6, 5)
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                value = self.loss()(logits.requires_grad_(), target)
            assert not value.requires_grad, f"{mode.__name__} keeps a graph"
            close(value.clone(), self.loss()(logits.detach(), target))

    def test_copies(self) -> None:
        """Pickled, copied and moved losses are the same; the state is empty."""
        (logits, target), loss = rows(6, 5), self.loss(ignore_index=1)
        assert not loss.state_dict(), "a loss has no state"
        loss.load_state_dict({}, strict=True)
        pickled, copied = pickle.loads(pickle.dumps(loss)), copy.deepcopy(loss)
        for other in (pickled, copied, copy.deepcopy(loss).half().eval()):
            assert repr(other) == repr(loss), "a copy has another name"
            close(other(logits, target), loss(logits, target), rtol=0, atol=0)

    def test_compile(self) -> None:
        """Compiled as one graph: the values and gradients of eager mode, at every batch size."""
        compiled = self._compile(self.loss())
        for N in (6, 5, 3):
            logits, target = rows(N, 5, 2.0, torch.float32)
            target[0] = -100
            eager = value_and_gradient(self.loss(), logits, target)
            close(value_and_gradient(compiled, logits, target), eager)
        refuses(Exception, "out of bounds", compiled, logits, target + 5)

    def test_compile_of_vmap_of_grad(self) -> None:
        """The gradients of a stack of models, compiled as one graph."""
        (logits, target), each = rows(6, 5), vmap(grad(self.loss()), in_dims=(0, None))
        stack = torch.stack([logits, 2 * logits])
        close(self._compile(each)(stack, target), each(stack, target))

    def test_labels_out_of_range_are_refused(self) -> None:
        """A ValueError names the label, under vmap too."""
        (logits, target), loss = rows(6, 5), self.loss()
        for label in (5, -1):
            for function in (loss, vmap(loss)):
                refuses(ValueError, f" {label}", function, logits, target.where(target < 2, label))

    def test_soft_targets_are_refused(self) -> None:
        """A TypeError says that labels are needed."""
        logits, target = rows(6, 5)
        for soft in (logits.softmax(1), target.double(), nn.functional.one_hot(target, 5).bool()):
            refuses(TypeError, "label", self.loss(), logits, soft)

    def test_class_weights_are_refused(self) -> None:
        """A TypeError gives the reason: they break the symmetric condition."""
        refuses(TypeError, "symmetric", lambda: self.loss(weight=torch.ones(5)))

    def test_misfits_are_refused(self) -> None:
        """Shapes that do not fit, a single class, logits that are not floating point."""
        logits, target = rows(6, 5)
        for z, y in ((logits, target[:5]), (logits, target[:, None]), (logits[:, 0], target)):
            refuses(ValueError, "shape", self.loss(), z, y)
        refuses(ValueError, "class", self.loss(), logits[:, :1], target)
        refuses(TypeError, "floating point", self.loss(), logits.long(), target)

    def test_cuda(self) -> None:
        """The CPU's values and gradients, from labels on the device, without waiting for it."""
        if not torch.cuda.is_available():
            raise SkipTest("there is no CUDA device")
        for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
            rtol = 1e-5 if dtype.itemsize > 2 else 0.02
            for logits, target in [rows(8, 10, 3.0, dtype), *extreme(dtype)]:
                expected, on_device = self._each(logits, target), (logits.cuda(), target.cuda())
                try:
                    with torch_may_warn():
                        torch.cuda.set_sync_debug_mode("error")
                    found = self._each(*on_device)
                finally:
                    torch.cuda.set_sync_debug_mode("default")
                close([x.cpu() for x in found], [*expected], rtol=rtol, atol=1e-5)
