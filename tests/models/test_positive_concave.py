"""A positive concave map: one equilibrium, and Thompson's metric."""

from __future__ import annotations

import pytest
import torch

import torchimplicit as ti
from torchimplicit.diagnostics import certify
from torchimplicit.models import PositiveConcaveCell

D = torch.float64


def cell_of(scale=1.0, seed=0, features=10):
    torch.manual_seed(seed)
    cell = PositiveConcaveCell(features, 4).to(D)
    with torch.no_grad():
        cell.recurrent.weight = scale * cell.recurrent.weight
    return cell, torch.randn(6, 4, dtype=D)


@pytest.mark.parametrize("scale", [0.3, 1.0, 20.0])
def test_every_start_leads_to_one_equilibrium(scale):
    cell, x = cell_of(scale)
    solver = ti.FixedPointIteration(rtol=1e-14, max_steps=1000)
    starts = [torch.zeros(6, 10, dtype=D), 1e-8 * torch.ones(6, 10, dtype=D), 1e6 * torch.rand(6, 10, dtype=D)]
    found = [ti.solve(ti.FixedPoint(cell), z0, x, solver=solver) for z0 in starts]
    for solution in found:
        assert solution.converged.all()
        torch.testing.assert_close(solution.value, found[0].value, rtol=1e-10, atol=1e-12)
    assert (found[0].value > 0).all()


@pytest.mark.parametrize("scale", [0.3, 1.0, 5.0])
def test_the_factor_is_that_of_thompsons_metric(scale):
    """Above that of every pair of states, and just above the largest elasticity."""
    cell, x = cell_of(scale)
    z = torch.rand(2000, 6, 10, dtype=D) ** 4
    images = cell(z, x)
    distances = [(a[:1000].log() - a[1000:].log()).abs().amax(-1) for a in (z, images)]
    factor = certify(cell, images[0], x).factor
    ratios = (distances[1] / distances[0]).amax(0)
    assert (ratios <= factor).all()
    found = []
    for size in torch.logspace(-4, 0, 400, dtype=D):
        z = size * torch.ones(6, 10, dtype=D)
        found.append(torch.func.jvp(lambda z: cell(z, x).log(), (z,), (z,))[1].amax(1))
    largest = torch.stack(found).amax(0)
    assert (largest <= factor).all()
    assert (factor <= 1.01 * largest).all()


@pytest.mark.parametrize(("floor", "bound"), [(0.1, 0.69), (0.01, 0.93)])
def test_the_factor_is_bounded_whatever_the_weights(floor, bound):
    torch.manual_seed(0)
    cell = PositiveConcaveCell(5, 3, floor=floor).to(D)
    x = torch.randn(4, 3, dtype=D)
    with torch.no_grad():
        cell.recurrent.weight = 1e3 * cell.recurrent.weight
        cell.injection.bias.sub_(1e3)
    assert bound - 0.02 < certify(cell, torch.ones(4, 5, dtype=D), x).factor.max() <= bound


@pytest.mark.parametrize("scale", [0.3, 1.0, 5.0])
def test_the_bound_holds_and_is_not_vacuous(scale):
    cell, x = cell_of(scale)
    layer = ti.nn.Equilibrium(cell, solver=ti.FixedPointIteration(rtol=1e-15, max_steps=1000))
    exact = layer(x).detach()
    for size in (3.0, 0.3, 1e-3, 1e-6):
        z = exact * torch.exp(size * torch.randn(exact.shape, dtype=D, generator=torch.Generator().manual_seed(0)))
        found = certify(layer, z, x)
        error = torch.linalg.vector_norm(z - exact, dim=1)
        assert (error <= found.error).all()
        if size <= 1e-3:
            assert (found.error <= 20 / (1 - found.factor) * error).all()
    assert certify(layer, exact, x).error.max() < 1e-9
    assert certify(layer.solve(x)).metric == "Thompson"


def test_training_keeps_it():
    cell, x = cell_of()
    layer = ti.nn.Equilibrium(cell)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.1)
    target = torch.rand(6, 10, dtype=D)
    losses = []
    for _ in range(20):
        loss = (layer(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
        assert (cell.recurrent.weight > 0).all()
        assert (certify(layer, layer(x), x).factor < 1).all()
    assert losses[-1] < 0.5 * losses[0]


def test_refusals():
    cell, x = cell_of()
    with pytest.raises(ValueError, match="not positive"):
        certify(cell, torch.zeros(6, 10, dtype=D), x)
    with pytest.raises(ValueError, match="floor is 0"):
        PositiveConcaveCell(3, 3, floor=0)
