"""The paper's losses as its authors ran them, differences from the formulas included.

Each is a positive combination of terms. What agrees with the catalog is the catalog's loss; what
the official code does differently is a small module here, which takes its formula from the catalog
too. D1 to D7 number the differences.

- D1 NRCE is RCE times (K - 1) / 4, where the formula divides by -A (K - 1)
- D2 MAE is 1 - p_y, half of the formula; NMAE is half of the formula too
- D3 the modulating factor of FL and NFL is held constant when differentiating
- D4 RCE's A is log(1e-4), the natural logarithm, not -4
- D5 RCE, SCE, GCE and NGCE clamp probabilities at 1e-7, below which their gradient is 0
- D6 GCE+MAE and GCE+RCE ignore alpha, GCE+NCE ignores alpha and beta
- D7 NLNL samples complementary labels and weights the classes; left out is a cross entropy over no
  labels at all, which the official code adds times 0: it is NaN in torch today, and so is the sum
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from sympy import Expr, Symbol, lambdify
from torch import Tensor, nn

from apl import catalog, symbolic
from apl.checks import check_call, label_error
from apl.losses import loss
from apl.recipes import recipe

__all__ = ["PaperLoss", "paper_loss"]

_FLOOR = 1e-7  # of probabilities, D5
_NEGATIVE_FLOOR = 1e-5  # of 1 - p in NLNL
_CLASSES = {"mnist": 10, "cifar10": 10, "cifar100": 100, "webvision": 50}


def _in_p(expression: Expr) -> Callable[..., Tensor]:
    """A pointwise expression of the catalog as a function of p and its parameters."""
    pointwise: Any = symbolic.pointwise(expression)
    p = Symbol("p", positive=True)
    parameters = sorted(pointwise.free_symbols - {p}, key=str)
    return lambdify([p, *parameters], pointwise, modules=[{}])


# The modulating factor (1 - p)^gamma, and (1 - p^q) / q.
_FACTOR = _in_p(catalog.fl / catalog.ce)
_GCE_TERM = _in_p(catalog.gce)


def paper_loss(
    dataset: str,
    name: str,
    noise: str = "symmetric",
    *,
    source: str = "code",
    given: Tensor | None = None,
    seed: int = 0,
    **changes: float,
) -> PaperLoss:
    """The loss as it was run: its settings, and what the official code computes.

    Parameters
    ----------
    dataset, name, noise, source
        which run, see :func:`apl.recipes.recipe`; :mod:`apl.recipes` says where sources differ
    given
        the given labels of the training set, (N,); NLNL's class weights are taken from them
    seed
        of NLNL's complementary labels
    changes
        values to replace, of the parameters the recipe has (``loss.settings``)

    Raises
    ------
    ValueError
        for a run that is not known, a parameter the recipe does not have, a value outside its
        range, or NLNL without labels in which every class is given
    TypeError
        for given labels that are not a tensor of integers

    Examples
    --------
    >>> paper_loss("cifar100", "nce+rce", noise="asymmetric")
    paper_loss('cifar100', 'nce+rce', 'asymmetric', 'code'; alpha=10, beta=0.1)
    >>> paper_loss("mnist", "mae")(torch.zeros(1, 10), torch.tensor([3]))
    tensor(0.9000)
    """
    found = recipe(dataset, name, noise, source)
    settings = dict(found.values)
    for parameter, value in changes.items():
        if parameter not in settings:
            known = f"has {', '.join(settings)}" if settings else "has no parameters"
            raise ValueError(f"{found.loss} as it was run {known}, not {parameter!r}")
        settings[parameter] = _check(parameter, value)
    if found.runs == "nlnl":
        weights = _class_weights(given, _CLASSES[dataset])
        parts: list[tuple[float, nn.Module]] = [
            (1.0, _Negative(weights, int(settings["negatives"]), seed))
        ]
    else:
        parts = _parts(found.runs, settings)
    title = f"{found.dataset!r}, {found.loss!r}, {found.noise!r}, {found.source!r}"
    return PaperLoss(parts, settings, title=title, runs=found.runs)


class PaperLoss(nn.Module):
    """A loss as the official code computes it: the mean over samples of a sum of weighted terms.

    Called as the losses of :mod:`apl.losses`, and reduced by the mean. ``settings`` are its
    parameters and ``runs`` the loss it is, where the official configuration names another.

    Raises, when called: TypeError or ValueError as :class:`apl.losses.Loss`; there is no
    ``ignore_index``.
    """

    def __init__(
        self,
        parts: list[tuple[float, nn.Module]],
        settings: Mapping[str, float],
        *,
        title: str,
        runs: str,
    ) -> None:
        super().__init__()
        self.weights = tuple(weight for weight, _ in parts)
        self.terms = nn.ModuleList(term for _, term in parts)
        self.settings = dict(settings)
        self.title = title
        self.runs = runs

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """The mean loss of logits (N, K) or (N, K, d1, ...) and labels (N,) or (N, d1, ...)."""
        check_call(logits, target)
        if logits.dtype in (torch.float16, torch.bfloat16):
            logits = logits.float()
        rows = logits.movedim(1, -1) if logits.ndim > 1 else logits
        rows, target = rows.reshape(-1, rows.shape[-1]), target.long().reshape(-1)
        try:
            pairs = zip(self.weights, self.terms, strict=True)
            return torch.stack([weight * term(rows, target) for weight, term in pairs]).sum()
        except RuntimeError as error:
            wrong = label_error(error, rows.shape[-1])
            if wrong is None:
                raise
            raise wrong from None

    def __repr__(self) -> str:
        values = ", ".join(f"{name}={value:g}" for name, value in self.settings.items())
        also = "" if self.title.split(", ")[1] == repr(self.runs) else f"; runs {self.runs}"
        return f"paper_loss({self.title}{'; ' if values else ''}{values}{also})"


class _Focal(nn.Module):
    """FL or NFL with the modulating factor held constant (D3)."""

    def __init__(self, gamma: float, normalized: bool) -> None:
        super().__init__()
        self.gamma = gamma
        self.normalized = normalized

    def forward(self, rows: Tensor, target: Tensor) -> Tensor:
        u = rows.log_softmax(-1)
        each = -u * _FACTOR(u.detach().exp(), gamma=self.gamma)
        label = _of_label(each, target)
        return (label / each.sum(-1) if self.normalized else label).mean()


class _GCE(nn.Module):
    """GCE or NGCE of clamped probabilities (D5)."""

    def __init__(self, q: float, normalized: bool) -> None:
        super().__init__()
        self.q = q
        self.normalized = normalized

    def forward(self, rows: Tensor, target: Tensor) -> Tensor:
        p = rows.softmax(-1).clamp(_FLOOR, 1.0)
        if not self.normalized:
            return _GCE_TERM(_of_label(p, target), q=self.q).mean()
        each = _GCE_TERM(p, q=self.q)
        return (_of_label(each, target) / each.sum(-1)).mean()


class _RCE(nn.Module):
    """RCE, -A times the sum of the other classes' clamped probabilities (D4, D5).

    The sum stands for the formula's 1 - p_y: where all of them are below the floor, the gradient
    is 0. Scaled by (K - 1) / 4 it is what the official code calls NRCE (D1).
    """

    def __init__(self, normalized: bool) -> None:
        super().__init__()
        self.normalized = normalized
        self.A = catalog.PARAMETERS["A"].default

    def forward(self, rows: Tensor, target: Tensor) -> Tensor:
        p = rows.softmax(-1).clamp(_FLOOR, 1.0)
        others = p.scatter(-1, target[:, None], 0.0).sum(-1)
        factor = (rows.shape[-1] - 1) / 4 if self.normalized else 1.0
        return -self.A * factor * others.mean()


class _Negative(nn.Module):
    """NLNL: -log(1 - p) of sampled complementary labels, with class weights (D7)."""

    class_weights: Tensor

    def __init__(self, class_weights: Tensor, negatives: int, seed: int) -> None:
        super().__init__()
        self.register_buffer("class_weights", class_weights)
        self.negatives = negatives
        self.seed = seed
        self._generators: dict[torch.device, torch.Generator] = {}

    def forward(self, rows: Tensor, target: Tensor) -> Tensor:
        N, K = rows.shape
        if len(self.class_weights) != K:
            raise ValueError(f"logits have {K} classes: NLNL has {len(self.class_weights)} weights")
        # Drawn on the device itself, so that a step does not wait for a copy.
        if rows.device not in self._generators:
            fresh = torch.Generator(rows.device).manual_seed(self.seed)
            self._generators[rows.device] = fresh
        step = torch.randint(
            1, K, (N, self.negatives), generator=self._generators[rows.device], device=rows.device
        )
        complementary = (target[:, None] + step) % K
        kept = (1 - rows.softmax(-1)).clamp(_NEGATIVE_FLOOR, 1.0)
        each = -kept.log().gather(-1, complementary).sum(-1)
        return (self.class_weights.to(rows).gather(0, target) * each).mean()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_generators": {}}  # generators cannot be copied

    def get_extra_state(self) -> dict[str, Tensor]:
        return {str(device): rng.get_state() for device, rng in self._generators.items()}

    def set_extra_state(self, state: dict[str, Tensor]) -> None:
        self._generators = {torch.device(d): torch.Generator(d) for d in state}
        for device, rng in self._generators.items():
            rng.set_state(state[str(device)])


def _parts(name: str, settings: Mapping[str, float]) -> list[tuple[float, nn.Module]]:
    """A loss by name as weighted terms."""
    first, *second = ("ce", "rce") if name == "sce" else name.split("+")
    if not second:
        weight, term = _term(first, settings)
        return [(settings.get("scale", 1.0) * weight, term)]
    alpha, beta = settings["alpha"], settings["beta"]
    if first == "gce":  # D6
        alpha, beta = 1.0, 1.0 if second == ["nce"] else beta
    pairs = zip((alpha, beta), (first, second[0]), strict=True)
    found = [(weight, *_term(part, settings)) for weight, part in pairs]
    return [(weight * own, term) for weight, own, term in found]


def _term(name: str, settings: Mapping[str, float]) -> tuple[float, nn.Module]:
    """A loss that is no sum, as the official code has it: a weight and a module."""
    if name in ("fl", "nfl"):
        return 1.0, _Focal(settings["gamma"], normalized=name == "nfl")
    if name in ("gce", "ngce"):
        return 1.0, _GCE(settings["q"], normalized=name == "ngce")
    if name in ("rce", "nrce"):
        return 1.0, _RCE(normalized=name == "nrce")
    return (0.5 if name in ("mae", "nmae") else 1.0), loss(name)  # D2


def _of_label(each: Tensor, target: Tensor) -> Tensor:
    return each.gather(-1, target[:, None]).squeeze(-1)


def _class_weights(given: Tensor | None, K: int) -> Tensor:
    """The largest class's count over each class's, as float32: (K,)."""
    if given is None:
        raise ValueError(
            "NLNL weights the classes by how often each is given: "
            "pass given=, the labels of the training set"
        )
    if not isinstance(given, Tensor) or given.is_floating_point() or given.is_complex():
        kind = given.dtype if isinstance(given, Tensor) else type(given).__name__
        raise TypeError(f"given must be a tensor of integer labels, not {kind}")
    if given.ndim != 1 or ((given < 0) | (given >= K)).any():
        raise ValueError(f"given must be (N,), with labels in 0..{K - 1}")
    counts = torch.bincount(given.long(), minlength=K)
    if not counts.all():
        raise ValueError(f"given has no sample of class {int((counts == 0).nonzero()[0])}")
    return counts.max() / counts.float()


def _check(parameter: str, value: float) -> float:
    if parameter == "negatives":
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"negatives = {value!r} is not allowed: it is an int of at least 1")
        return float(value)
    if parameter == "scale":
        try:
            return catalog.PARAMETERS["alpha"].check(value)
        except ValueError:
            raise ValueError(
                f"scale = {value!r} is not allowed: it is a finite number above 0"
            ) from None
    return catalog.PARAMETERS[parameter].check(value)
