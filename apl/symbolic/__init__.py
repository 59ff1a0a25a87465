"""Losses as SymPy expressions, and what can be decided about them. Nothing here imports torch.

Four rooms: :mod:`~apl.symbolic.expressions` (what a loss is, and the operations on it),
:mod:`~apl.symbolic.risks` (risk under label noise), :mod:`~apl.symbolic.gradients` (with respect
to the logits), :mod:`~apl.symbolic.extrema` (the largest and smallest value of a loss). All of it
holds for a symbolic number of classes ``K`` and works on a reader's own loss; what cannot be
decided is answered with None, never with a guess.

>>> from apl.symbolic import initial_gradient, normalize, p_y
>>> from sympy import log
>>> initial_gradient(normalize(-log(p_y)))
(K - 1)/(K**2*log(K))
"""

from apl.symbolic.expressions import (
    K,
    at,
    is_symmetric,
    j,
    k,
    latex,
    mean_over_others,
    negate,
    normalize,
    p,
    p_y,
    pointwise,
    rest_uniform,
    sum_over_labels,
    twice,
    y,
)
from apl.symbolic.extrema import infimum, is_within_bound, supremum
from apl.symbolic.gradients import initial_gradient, logit_gradient, weight
from apl.symbolic.risks import noisy_risk

__all__ = [
    "K",
    "at",
    "infimum",
    "initial_gradient",
    "is_symmetric",
    "is_within_bound",
    "j",
    "k",
    "latex",
    "logit_gradient",
    "mean_over_others",
    "negate",
    "noisy_risk",
    "normalize",
    "p",
    "p_y",
    "pointwise",
    "rest_uniform",
    "sum_over_labels",
    "supremum",
    "twice",
    "weight",
    "y",
]
