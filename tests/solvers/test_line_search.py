from __future__ import annotations

import pytest
import torch

from torchimplicit import Minimum
from torchimplicit._solve import flat_system
from torchimplicit.solvers import Evaluator
from torchimplicit.solvers.line_search import CURVATURE, SUFFICIENT, search
from torchimplicit.testing.solver_suite import Spy


def at(energy, z0):
    """The evaluator of an energy, and the point ``z0``."""
    system, z, params = flat_system(Minimum(energy), z0, ())
    evaluate = Evaluator(system, params)
    return evaluate, evaluate(z)


# energies of one number; minima at 1, at various depths and with various shapes
ENERGIES = {
    "quadratic": lambda z: (z - 1) ** 2,
    "quartic": lambda z: (z - 1) ** 4,
    "wavy": lambda z: (z - 1) ** 2 + 0.3 * torch.sin(9 * z),
    "bounded": lambda z: -1 / (1 + (z - 1) ** 2),
    "barrier": lambda z: -torch.log(1.5 - z) - 2 * z,
}


@pytest.mark.parametrize("energy", ENERGIES.values(), ids=ENERGIES)
def test_the_weak_wolfe_conditions_hold(energy):
    evaluate, start = at(lambda z: energy(z).sum(1), torch.full((9, 1), -1.0, dtype=torch.float64))
    # directions that make the first trial far too short, about right, and far too long
    direction = torch.logspace(-4, 4, 9, dtype=torch.float64)[:, None]
    found = search(evaluate, start, direction, None, 20)
    assert not found.any_failed
    assert not found.failed.any()
    slope, reached = (-(p.residual * direction).sum(1) for p in (start, found.point))
    size = ((found.point.z - start.z) / direction)[:, 0]
    assert (found.point.energy <= start.energy + SUFFICIENT * size * slope).all()
    assert (reached >= CURVATURE * slope).all()


def test_a_sample_that_is_not_searched_for_stays():
    evaluate, start = at(lambda z: (z - 1).square().sum(1), torch.zeros(3, 2))
    active = torch.tensor([True, False, True])
    found = search(evaluate, start, start.residual, active, 20)
    assert torch.equal(found.point.z[1], start.z[1])
    assert not found.failed.any()
    assert (found.point.energy[[0, 2]] < start.energy[[0, 2]]).all()


@pytest.mark.parametrize("value", [-1.0, 0.0, float("nan")])
def test_a_direction_that_does_not_descend_fails(value):
    evaluate, start = at(lambda z: (z - 1).square().sum(1), torch.zeros(3, 2))
    direction = start.residual * torch.tensor([[1.0], [value], [1.0]])
    found = search(evaluate, start, direction, None, 20)
    assert found.any_failed
    assert found.failed.tolist() == [False, True, False]
    assert torch.equal(found.point.z[1], start.z[1])


def test_the_trials_are_counted():
    spy = Spy(lambda z: z.detach().sum(1) + 0 * z.sum(1) - z.sum(1) + z.detach().sum(1))  # rises where it should fall
    evaluate, start = at(spy, torch.zeros(2, 2))
    before = len(spy.seen)
    found = search(evaluate, start, start.residual, None, 7)
    assert found.failed.all()
    assert len(spy.seen) - before == 7
