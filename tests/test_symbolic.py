"""The symbolic operations, for general K and for functions that are not named."""

from __future__ import annotations

import subprocess
import sys

import pytest
from sympy import Function, Rational, Sum, Symbol, log, simplify

from apl import catalog
from apl.symbolic import (
    K,
    at,
    is_symmetric,
    k,
    latex,
    mean_over_others,
    negate,
    normalize,
    p,
    p_y,
    pointwise,
    sum_over_labels,
    weight,
)

h = Function("h", positive=True)


def test_normalizing_any_function_gives_labels_that_sum_to_one():
    assert sum_over_labels(normalize(h(p_y))) == 1
    assert sum_over_labels(normalize(3 * h(p_y))) == 1
    assert normalize(normalize(h(p_y))) == normalize(h(p_y))


def test_sums_over_labels_of_what_is_known():
    a, b = Symbol("a"), Symbol("b")
    assert simplify(sum_over_labels(a + b * p_y) - (a * K + b)) == 0
    assert sum_over_labels(catalog.nlnl) == -Sum(log(1 - p[k]), (k, 1, K))
    mixed = a * normalize(h(p_y)) + b * (1 - p_y)
    assert simplify(sum_over_labels(mixed) - (a + b * (K - 1))) == 0


def test_what_cannot_be_summed_is_said():
    with pytest.raises(ValueError, match="cannot sum"):
        sum_over_labels(log(normalize(h(p_y))))


SYMMETRIC = dict.fromkeys(
    ("mae", "rce", "nce", "nfl", "nmae", "nrce", "ngce", "mae+rce", "nfl+nce", "ngce+nce"), True
) | dict.fromkeys(catalog.APL, True)


@pytest.mark.parametrize("name", catalog.CATALOG)
def test_which_losses_are_symmetric(name):
    entry = catalog.CATALOG[name]
    numbers = {
        catalog.PARAMETERS[key].symbol: Rational(str(value))
        for key, value in entry.parameters.items()
    }
    assert is_symmetric(entry.expression.subs(numbers)) is SYMMETRIC.get(name, False)


def test_an_open_parameter_leaves_the_question_undecided():
    assert is_symmetric(catalog.gce) is None
    assert is_symmetric(catalog.gce.subs(catalog.q, 1)) is True
    assert is_symmetric(h(p_y)) is None


def test_operations():
    third = [Rational(1, 2), Rational(1, 3), Rational(1, 6)]
    assert at(mean_over_others(p_y**2), third, 0) == (Rational(1, 9) + Rational(1, 36)) / 2
    assert at(negate(p_y, 3), third, 1) == 3 - Rational(1, 3)
    assert at(normalize(p_y**2), third, 2) == Rational(1, 36) / Rational(14, 36)
    assert pointwise(normalize(p_y**2)) is None


def test_the_identities_between_losses():
    assert simplify(catalog.rce + catalog.A / 2 * catalog.mae) == 0
    assert catalog.entry("nmae").expression == catalog.entry("nrce").expression
    assert simplify(catalog.gce.subs(catalog.q, 1) - catalog.mae / 2) == 0


def test_formulas_are_set_as_in_the_book():
    assert latex(catalog.entry("nce").expression) == (
        r"\frac{\log{\left(p_{y} \right)}}{\sum_{k=1}^{K} \log{\left(p_{k} \right)}}"
    )
    assert r"\sum_{k \ne y} \log" in latex(catalog.nlnl)
    assert latex(catalog.entry("ngce").expression) == (
        r"\frac{1 - p_{y}^{q}}{\sum_{k=1}^{K} \left(1 - p_{k}^{q}\right)}"
    )


def test_the_symbolic_room_does_not_import_torch():
    code = "import sys, apl.catalog; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("name", [name for name in catalog.CATALOG if "+" in name])
def test_weights_of_sums_add_up(name):
    first, second = (weight(catalog.entry(part).expression) for part in name.split("+"))
    found = weight(catalog.entry(name).expression)
    if first is None or second is None:
        assert found is None
    else:
        assert simplify(found - catalog.alpha * first - catalog.beta * second) == 0
