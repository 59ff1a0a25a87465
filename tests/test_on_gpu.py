"""The kernels of apl.on_gpu: their arithmetic, run by Triton's interpreter on a CPU; that they
compile for GPUs, which needs none; on a GPU, the real thing.

Triton reads at import whether it interprets, so each way has a process of its own.
"""

from __future__ import annotations

import multiprocessing
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sympy import Rational, exp, log

import apl
from apl import on_gpu
from apl._cases import close, extreme, rows
from apl.closed_form import derive
from apl.symbolic import p_y
from apl.testing import LossContract

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")

COMPOSED = {
    "composed": lambda: 2 * apl.normalize(apl.GCE(q=0.3)) + 0.5 * apl.normalize(apl.FL(gamma=2)),
    "two gce": lambda: apl.GCE(q=0.3) + 3 * apl.GCE(q=0.7),
    "normalized sum": lambda: apl.normalize(2 * apl.GCE() + apl.MAE()),
    "gce near its limit": lambda: apl.normalize(apl.GCE(q=0.01)),
    "focal, gamma 2": lambda: apl.loss("nfl+rce", gamma=2.0, A=-4.0, alpha=10.0, beta=0.1),
    "own": lambda: apl.Loss((1 - p_y ** Rational(3, 2)) ** 2 + log(2 - p_y)),
    "normalized own": lambda: apl.normalize(apl.Loss(exp(1 - p_y) - Rational(1, 2))),
}
SOME = ("nce+rce", "fl", "nfl", "ngce+nce", "nlnl")
"""With and without sums over the classes, of a + b u and of other functions; with roots, logs."""


def loss(name):
    return COMPOSED[name]() if name in COMPOSED else apl.loss(name)


# --- in a process of its own ----------------------------------------------------------------------


def start():
    np.seterr(all="ignore")  # inf - inf where the other branch is taken
    torch.set_num_threads(1)


def process(interpret):
    """One that runs what is submitted, with a Triton that interprets or compiles."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as cache, ProcessPoolExecutor(1, context) as pool:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_INTERPRET", str(interpret))
            patch.setenv("TRITON_CACHE_DIR", cache)
            pool.submit(start).result()
        yield lambda *call, **keywords: pool.submit(*call, **keywords).result()


@pytest.fixture(scope="module")
def interpreter():
    yield from process(1)


@pytest.fixture(scope="module")
def compiler():
    yield from process(0)


def evaluated(name, logits, target, weight=1.0, *, whole=on_gpu.WHOLE, **keywords):
    found, on_gpu.WHOLE = loss(name), whole
    on_gpu._launches.clear()
    form = derive(found.expression)
    return on_gpu.evaluate(form, found.hyperparameters, logits, target, weight, **keywords)


def truth(name, logits, target, weight=1.0):
    """Values and gradients in float64, by the plain path."""
    found, z = loss(name), logits.detach().double().requires_grad_()
    each = apl.Loss(found.expression, found.hyperparameters, reduction="none")(z, target)
    return each.detach(), torch.autograd.grad((each * weight).sum(), z)[0]


def compare(name, cases, floor=0.0, whole=on_gpu.WHOLE):
    """As the contract does: values, and each row of the gradient by its largest number."""
    for logits, target, *weight in cases:
        values, gradient = evaluated(name, logits, target, *weight, whole=whole)
        true_values, true_gradient = truth(name, logits, target, *weight)
        close(values.double(), true_values, rtol=1e-5, atol=1e-6)
        assert gradient.shape == logits.shape and gradient.dtype == logits.dtype
        size = true_gradient.abs().amax(1, keepdim=True)
        error = (gradient.double() - true_gradient).abs()
        worst = (error - 1e-5 * size).max() if error.numel() else 0.0
        assert worst <= floor, f"{name}, K = {logits.shape[1]}: the gradient is off by {worst:.1e}"


def compare_half(name, dtype):
    for logits, target in [rows(8, 10, 3.0, dtype), rows(3, 1000, 3.0, dtype)]:
        values, gradient = evaluated(name, logits, target)
        true_values, true_gradient = truth(name, logits, target)
        close(values.double(), true_values, rtol=1e-5, atol=1e-6)
        close(gradient, true_gradient.to(dtype))
    for logits, target in extreme(dtype):
        values, gradient = evaluated(name, logits, target)
        assert values.isfinite().all() and gradient.isfinite().all(), "not finite"


def compare_without_gradient(name, logits, target, whole):
    values, _ = evaluated(name, logits, target, whole=whole)
    alone, nothing = evaluated(name, logits, target, whole=whole, with_gradient=False)
    assert nothing is None
    close(alone, values, rtol=0, atol=0)


# --- the interpreter ------------------------------------------------------------------------------


@needs_triton
@pytest.mark.parametrize("name", [*apl.losses.names(), *COMPOSED])
def test_values_and_gradients(interpreter, name):
    moderate = [rows(12, K, s, torch.float32) for K in (2, 3, 10) for s in (1.0, 4.0)]
    interpreter(compare, name, moderate)
    interpreter(compare, name, extreme(), 1e-6)


@needs_triton
@pytest.mark.parametrize("name", SOME)
def test_rows_that_are_read_in_parts(interpreter, name):
    cases = [rows(12, K, 4.0, torch.float32) for K in (2, 3, 10, 100)]
    interpreter(compare, name, cases, 0.0, 0)
    interpreter(compare, name, extreme(), 1e-6, 0)


@needs_triton
@pytest.mark.parametrize("name", SOME)
def test_many_classes(interpreter, name):
    cases = [rows(3, K, 3.0, torch.float32) for K in (100, 1000, 1001, 4097, 9000, 32768, 131072)]
    interpreter(compare, name, cases, 1e-9)


@needs_triton
@pytest.mark.parametrize("whole", [0, on_gpu.WHOLE])
@pytest.mark.parametrize("name", SOME)
def test_the_largest_logits_anywhere(interpreter, name, whole):
    """One or several of them, or the second largest, in other parts of the row than the label."""
    logits, target = torch.zeros(6, 9000), torch.tensor([0, 8999, 5000, 1, 4500, 8000])
    places = [[0], [17], [5000, 8998], [4096, 4095], [4500], [100]]
    for i, place in enumerate(places):
        logits[i, place] = 1e4
    logits[4, 8000], logits[5, 8000] = 9999.5, 9960.0
    interpreter(compare, name, [(logits, target)], 1e-6, whole)


@needs_triton
@pytest.mark.parametrize("K", [2, 10, 1000])
@pytest.mark.parametrize("N", [0, 1, 5, 130])
def test_numbers_of_rows(interpreter, N, K):
    case = rows(N, K, 3.0, torch.float32) if N else (torch.zeros(0, K), torch.zeros(0).long())
    interpreter(compare, "nce+rce", [case])


@needs_triton
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", SOME)
def test_half_precision(interpreter, name, dtype):
    interpreter(compare_half, name, dtype)


def layouts():
    """Transposed, strided, expanded and cut logits, spatial ones, labels with gaps, weights."""
    z, y = rows(12, 10, 3.0, torch.float32)
    wide = torch.stack([z, -z], -1).flatten(1)
    for logits in (z.T.contiguous().T, wide[:, ::2], z[:1].expand(12, 10), z[:, 1:8], z[::2]):
        yield logits, y[: len(logits)] % logits.shape[1]
    for shape in ((3, 4), (2, 3, 2)):
        logits = z.view(*shape, 10).movedim(-1, 1)
        yield logits, y.view(shape)
        yield logits.contiguous(), y.view(shape)
        yield logits.contiguous(), y.view(shape), torch.rand(shape)
    yield z, torch.stack([y, y], 1)[:, 0], torch.rand(12, 2)[:, 1]
    yield z, y, 0.25


@needs_triton
@pytest.mark.parametrize("whole", [0, on_gpu.WHOLE])
@pytest.mark.parametrize("name", ["nce+rce", "nfl"])
def test_layouts_shapes_and_weights(interpreter, name, whole):
    torch.manual_seed(0)
    interpreter(compare, name, list(layouts()), 0.0, whole)


@needs_triton
@pytest.mark.parametrize("name", SOME)
def test_values_without_gradient(interpreter, name):
    for whole in (0, on_gpu.WHOLE):
        interpreter(compare_without_gradient, name, *rows(6, 10, 3.0, torch.float32), whole)


@needs_triton
@pytest.mark.parametrize("whole", [0, on_gpu.WHOLE])
def test_what_is_no_number_or_no_class_gives_nan(interpreter, whole):
    logits, target = rows(8, 10, 3.0, torch.float32)
    logits[1, 3], logits[2, 3], logits[3, target[3]] = float("nan"), float("inf"), float("inf")
    target[4], target[5] = 10, -1
    bad = torch.tensor([False, True, True, True, True, True, False, False])
    for name in SOME:
        values, gradient = interpreter(evaluated, name, logits, target, whole=whole)
        assert (values.isnan() == bad).all(), f"{name}: {values}"
        assert gradient[~bad].isfinite().all(), f"{name}: {gradient}"
        assert gradient[bad].isnan().any(1).all(), f"{name}: {gradient}"


@needs_triton
def test_what_does_not_count_has_no_gradient(interpreter):
    logits, target = rows(4, 10, 3.0, torch.float32)
    logits[1, target[1]] = -float("inf")
    for name in SOME:
        _, gradient = interpreter(
            evaluated, name, logits, target, torch.tensor([1.0, 0.0, 1.0, 1.0])
        )
        assert gradient[0].all() and not gradient[1].any(), f"{name}: {gradient}"


def means(N, ignored, whole):
    logits, target = rows(N, 3, 3.0, torch.float32)
    target[::3] = ignored
    counted = target != ignored
    found = evaluated("nce+rce", logits, target, whole=whole, ignore_index=ignored, mean=True)
    true_values, true_gradient = truth("nce+rce", logits, target.clamp(0, 2), counted)
    count = counted.sum()
    close(found[0].double(), true_values * counted / count, rtol=1e-5, atol=1e-7)
    close(found[1].double(), true_gradient / count, rtol=1e-5, atol=1e-7)


@needs_triton
@pytest.mark.parametrize("whole", [0, on_gpu.WHOLE])
@pytest.mark.parametrize("ignored", [-100, 1])
@pytest.mark.parametrize("N", [1, 130, 1500, on_gpu.FEW + 5])
def test_a_mean_is_over_the_labels_that_count(interpreter, N, ignored, whole):
    if N > 1:
        interpreter(means, N, ignored, whole)
    else:  # none does
        case = torch.zeros(1, 3), torch.tensor([ignored])
        keywords = {"ignore_index": ignored, "mean": True, "whole": whole}
        value, gradient = interpreter(evaluated, "nfl", *case, **keywords)
        assert value.isnan().all() and not gradient.any()


def multiplied(factor):
    numbers = torch.linspace(-2, 2, on_gpu.LARGE + 70)
    return numbers.clone(), on_gpu.times(numbers, torch.tensor(factor))


@needs_triton
@pytest.mark.parametrize("factor", [1.0, -0.5])
def test_a_gradient_times_a_number(interpreter, factor):
    before, after = interpreter(multiplied, factor)
    close(after, before * factor, rtol=0, atol=0)


def failures(name):
    """Of the whole contract, with tensors on a CPU and kernels in the interpreter."""
    on_gpu.available = lambda device: True

    class Contract(LossContract):
        test_labels_out_of_range_are_refused = None  # a GPU does not wait to look: they give NaN

        def loss(self, **keywords):
            return apl.loss(name, **keywords)

    return {test: str(error)[:300] for test, error in Contract.failures().items()}


@needs_triton
@pytest.mark.parametrize("name", ["nce+rce", "nfl"])
def test_the_contract(interpreter, name):
    assert interpreter(failures, name) == {}


# --- the compiler ---------------------------------------------------------------------------------


def recorded_launches(name, K, dtype, capability):
    """What the driver of a GPU would be given by three calls, and the compiled kernel."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    launches = []

    class Driver:
        utils = SimpleNamespace(
            load_binary=lambda *_: (1, 2, 64, 0, 1024),
            get_device_properties=lambda _: {"max_shared_mem": 48 << 10},
            unload_module=lambda _: None,
        )

        def launcher_cls(self, source, metadata):
            return lambda *arguments: launches.append(arguments)

        def get_current_target(self):
            return GPUTarget("cuda", capability, 32)

        def get_current_device(self):
            return capability

        def get_current_stream(self, _):
            return 3

    driver.set_active(Driver())
    on_gpu._launches.clear()
    logits = torch.zeros(16, K, dtype=dtype)
    for _ in range(3):
        evaluated_again = on_gpu.evaluate(
            derive(loss(name).expression),
            loss(name).hyperparameters,
            logits,
            torch.zeros(16).long(),
        )
    assert evaluated_again[1].shape == logits.shape
    kernel = next(reversed(on_gpu._launches.values())).compiled

    def described(x):
        if isinstance(x, torch.Tensor):
            return x.shape, x.dtype
        return getattr(x, "cache_key", x)

    # But for the places of Triton's own hooks.
    seen = [[described(x) for x in (*call[:6], *call[9:])] for call in launches]
    return seen, kernel.asm["ptx"], kernel.asm["cubin"]


@needs_triton
@pytest.mark.parametrize("name", ["ce", "nce+rce", "nfl"])
@pytest.mark.parametrize(
    ("capability", "K", "dtype"),
    [(75, 10, torch.float32), (75, 1001, torch.bfloat16), (90, 50000, torch.float16)],
)
def test_compiles(compiler, name, capability, K, dtype):
    seen, ptx, _ = compiler(recorded_launches, name, K, dtype, capability)
    assert f".target sm_{capability}" in ptx
    # Later calls take a short way past Triton, and must hand over the same.
    assert len(seen) == 3 and seen[0] == seen[1] == seen[2]


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["nce+rce", "fl"])
def test_a_row_of_32768_is_read_in_vectors_and_stays_in_registers(compiler, name, dtype):
    _, ptx, cubin = compiler(recorded_launches, name, 32768, dtype, 90)
    assert len(re.findall(r"ld\.global\.v4", ptx)) == 32768 * dtype.itemsize // (16 * 512)
    assert len(re.findall(r"st\.global\.v4", ptx)) == 32768 * dtype.itemsize // (16 * 512)
    assert local_memory(cubin) < 64


def local_memory(cubin):
    """Bytes of registers that each thread of a kernel spills."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.exists():
        pytest.skip("this Triton comes without cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True)
    return int(re.search(r"STACK:(\d+)", usage.stdout + usage.stderr).group(1))


def test_is_imported_without_triton():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, apl.on_gpu; assert not apl.on_gpu.available(torch.device('cpu'))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# --- a GPU ----------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("name", [*apl.losses.names(), *COMPOSED])
def test_on_a_gpu(name):
    cases = [rows(12, K, 4.0, torch.float32) for K in (2, 10, 100, 1000, 1001, 9000, 32768, 131072)]
    for floor, some in ((1e-9, cases), (1e-6, extreme()), (1e-9, list(layouts()))):
        on_device = [[x.cuda() if isinstance(x, torch.Tensor) else x for x in c] for c in some]
        compare(name, on_device, floor)
    for dtype in (torch.bfloat16, torch.float16):
        logits, target = (x.cuda() for x in rows(12, 1000, 3.0, dtype))
        values, gradient = evaluated(name, logits, target)
        true_values, true_gradient = truth(name, logits, target)
        close(values.double(), true_values, rtol=1e-5, atol=1e-6)
        close(gradient, true_gradient.to(dtype))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_on_a_gpu_memory_and_waiting():
    logits = torch.randn(512, 32768, device="cuda")
    target = torch.randint(32768, (512,), device="cuda")
    evaluated("nce+rce", logits, target)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    try:
        torch.cuda.set_sync_debug_mode("error")
        on_gpu.evaluate(
            derive(loss("nce+rce").expression), loss("nce+rce").hyperparameters, logits, target
        )
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.max_memory_allocated() - before <= logits.numel() * 4 + 512 * 64
