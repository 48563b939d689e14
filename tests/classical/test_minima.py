"""The default of a minimum on classical sums of squares, against their published least values."""

from __future__ import annotations

import pytest

import torchimplicit as ti
from tests.classical.roots import ROOTS

LEAST = {
    "rosenbrock 2": 0.0,
    "rosenbrock 10": 0.0,
    "powell singular": 0.0,
    "powell badly scaled": 0.0,
    "wood": 0.0,
    "helical valley": 0.0,
    "watson 6": 0.0,
    "chebyquad 5": 0.0,
    "chebyquad 7": 0.0,
    "chebyquad 9": 0.0,
    "brown 10": 0.0,
    "discrete boundary value 10": 0.0,
    "discrete integral 10": 0.0,
    "trigonometric 10": 2.79506e-5,
    "variably dimensioned 10": 0.0,
    "broyden tridiagonal 10": 0.0,
    "broyden banded 10": 0.0,
    "dennis and schnabel": 0.0,
    "freudenstein and roth": 48.98426,
    "boggs": 0.0,
}


@pytest.mark.parametrize("name", list(LEAST))
def test_the_least_value_is_reached(name):
    f, start = ROOTS[name]
    solution = ti.solve(ti.Minimum(lambda z: f(z).square().sum(), batched=False), start)
    assert solution.converged, solution.summary()
    assert float(f(solution.value).square().sum()) <= LEAST[name] * (1 + 1e-5) + 1e-10
