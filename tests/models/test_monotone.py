"""Equilibria of monotone operators, beside dense algebra."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import torchimplicit as ti
from torchimplicit.diagnostics import certify
from torchimplicit.models import (
    ConvMonotone,
    DenseMonotone,
    ForwardBackward,
    LipschitzEquilibrium,
    MonotoneCell,
    MonotoneEquilibrium,
    PeacemanRachford,
)
from torchimplicit.models.monotone import constants

D = torch.float64
SPLITTINGS = [ForwardBackward(), PeacemanRachford(), PeacemanRachford(step=0.3)]


def dense(features=12, scale=1.0, margin=0.2, seed=0):
    torch.manual_seed(seed)
    operator = DenseMonotone(features, margin=margin).to(D)
    with torch.no_grad():
        for p in operator.parameters():
            p.mul_(scale)
    return operator


def conv(seed=0):
    torch.manual_seed(seed)
    return ConvMonotone(3, margin=0.3).to(D)


def matrix_of(operator, like):
    """W as a matrix on flat states, column by column."""
    eye = torch.eye(like[0].numel(), dtype=D).reshape(-1, *like.shape[1:])
    return operator.product(operator.blocks(like), eye).flatten(1).mT


def states(operator, count=4, seed=1):
    generator = torch.Generator().manual_seed(seed)
    shape = (3, 5, 4) if isinstance(operator, ConvMonotone) else (12,)
    return torch.randn(count, *shape, dtype=D, generator=generator)


@pytest.mark.parametrize("operator", [dense(), dense(scale=4.0), conv()], ids=["dense", "large", "conv"])
def test_the_operator_is_what_it_says(operator):
    x = states(operator)
    w = matrix_of(operator, x)
    eye = torch.eye(len(w), dtype=D)
    m, size = constants(operator.blocks(x))
    torch.testing.assert_close(m, torch.linalg.eigvalsh(eye - (w + w.mT) / 2).amin())
    torch.testing.assert_close(size, torch.linalg.matrix_norm(eye - w, 2))
    assert m >= operator.margin * (1 - 1e-12)


def test_a_convolution_is_the_one_of_torch():
    operator = conv()
    x = states(operator)

    def circular(kernel, z):
        return nn.functional.conv2d(nn.functional.pad(z, (1, 1, 1, 1), mode="circular"), kernel)

    def transposed(kernel, z):
        return circular(kernel.transpose(0, 1).flip(2, 3), z)

    a, b = operator.a, operator.b
    a, b = a.flip(2, 3), b.flip(2, 3)  # torch's convolution correlates
    expected = 0.7 * x - transposed(a, circular(a, x)) + circular(b, x) - transposed(b, x)
    got = operator.product(operator.blocks(x), x)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("splitting", SPLITTINGS, ids=["FB", "PR", "PR .3"])
@pytest.mark.parametrize("operator", [dense(), dense(scale=3.0), conv()], ids=["dense", "large", "conv"])
def test_there_is_one_equilibrium_and_every_start_leads_to_it(operator, splitting):
    x = states(operator)
    layer = MonotoneEquilibrium(
        operator, splitting=splitting, solver=ti.FixedPointIteration(rtol=1e-12, max_steps=200_000)
    )
    found = [layer(x, z0=start) for start in (None, 10 * states(operator, seed=2), -1e3 * torch.ones_like(x))]
    for z in found:
        torch.testing.assert_close(z, layer.cell(z, x), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(z, found[0], rtol=1e-8, atol=1e-8)
    assert layer.equilibrium.solution.converged.all()


def test_plain_iteration_runs_away_where_splitting_does_not():
    operator = dense(scale=4.0)
    x = states(operator)
    cell = MonotoneCell(operator)
    with pytest.raises(ti.SolveError):
        ti.solve(ti.FixedPoint(cell), torch.zeros_like(x), x, solver=ti.FixedPointIteration(max_steps=2000))
    layer = MonotoneEquilibrium(operator)
    z = layer(x)
    torch.testing.assert_close(z, cell(z, x), rtol=1e-8, atol=1e-8)


def test_what_the_splittings_take():
    """The figures of docs/guaranteed.md: Peaceman and Rachford's is the one to take."""
    operator = dense(scale=3.0)
    x = states(operator)
    steps = []
    for splitting in (ForwardBackward(), PeacemanRachford()):
        solver = ti.FixedPointIteration(rtol=1e-8, max_steps=20_000)
        layer = MonotoneEquilibrium(operator, splitting=splitting, solver=solver)
        layer(x)
        steps.append(int(layer.equilibrium.solution.steps.max()))
    assert steps[0] > 1000
    assert steps[1] < 100


@pytest.mark.parametrize("operator", [dense(), conv()], ids=["dense", "conv"])
def test_the_derivatives_are_those_of_the_cell(operator):
    """Whatever the splitting: the equilibrium does not depend on it, nor on its step."""
    x = states(operator).requires_grad_()
    wanted = (x, *operator.parameters())
    solver = ti.FixedPointIteration(rtol=1e-13, max_steps=20_000)
    plain = ti.solve(ti.FixedPoint(MonotoneCell(operator)), torch.zeros_like(x), x, solver=ti.Anderson(rtol=1e-13))
    expected = torch.autograd.grad(plain.value.sin().sum(), wanted)
    for splitting in SPLITTINGS:
        z = MonotoneEquilibrium(operator, splitting=splitting, solver=solver)(x)
        got = torch.autograd.grad(z.sin().sum(), wanted)
        for g, e in zip(got, expected, strict=True):
            torch.testing.assert_close(g, e, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("operator", [dense(), dense(scale=3.0), conv()], ids=["dense", "large", "conv"])
def test_the_bound_holds_and_is_not_vacuous(operator):
    x = states(operator)
    layer = MonotoneEquilibrium(operator, solver=ti.FixedPointIteration(rtol=1e-14, max_steps=100_000))
    exact = layer(x).detach()
    for size in (1.0, 1e-3, 1e-7):
        z = exact + size * torch.randn(x.shape, dtype=D, generator=torch.Generator().manual_seed(3))
        found = certify(layer, z, x)
        error = torch.linalg.vector_norm((z - exact).flatten(1), dim=1)
        assert (error <= found.error).all()
        blocks = operator.blocks(x)
        far = 1 + PeacemanRachford().chosen(blocks) * constants(blocks).lipschitz  # from z to the splitting's state
        assert (found.error <= far * (2 + 2 / (1 - found.factor)) * error).all()
    assert certify(layer, exact, x).error.max() < 1e-7
    assert found.factor < 1
    assert found.monotonicity >= operator.margin * (1 - 1e-12)


@pytest.mark.parametrize("seed", range(12))
def test_the_bound_holds_of_random_operators(seed):
    """Of every size, margin and scale, for states near and far."""
    generator = torch.Generator().manual_seed(seed)
    features = int(torch.randint(2, 40, (), generator=generator))
    scale, margin = (float(10 ** (2 * torch.rand((), generator=generator) - 1)) for _ in range(2))
    operator = dense(features, scale, margin, seed)
    x = torch.randn(4, features, dtype=D, generator=generator)
    exact = MonotoneEquilibrium(operator, solver=ti.FixedPointIteration(rtol=1e-14, max_steps=200_000))(x).detach()
    for size in (10.0, 1e-2, 1e-6, 0.0):
        z = exact + size * torch.randn(x.shape, dtype=D, generator=generator)
        found = certify(MonotoneCell(operator), z, x)
        assert (torch.linalg.vector_norm(z - exact, dim=1) <= found.error).all()
        assert found.monotonicity >= margin * (1 - 1e-9)


def test_the_bound_holds_of_a_solution_that_another_solver_stopped_early():
    operator = dense()
    x = states(operator)
    cell = MonotoneCell(operator)
    rough = ti.solve(ti.FixedPoint(cell), torch.zeros_like(x), x, solver=ti.Anderson(rtol=1e-3))
    exact = MonotoneEquilibrium(operator, solver=ti.FixedPointIteration(rtol=1e-14, max_steps=100_000))(x)
    found = certify(rough)
    assert (torch.linalg.vector_norm(rough.value - exact, dim=1) <= found.error).all()
    assert (found.error <= 1).all()


def test_the_sensitivity_holds():
    operator = dense()
    x = states(operator)
    layer = MonotoneEquilibrium(operator)
    bound = certify(layer, layer(x), x).sensitivity
    jacobian = torch.autograd.functional.jacobian(lambda x: layer(x).sum(0), x).permute(1, 0, 2)
    norms = torch.linalg.matrix_norm(jacobian, 2)
    assert (norms <= bound).all()
    assert norms.max() >= 0.05 * bound


def test_training_keeps_it():
    torch.manual_seed(0)
    layer = MonotoneEquilibrium(DenseMonotone(8, margin=0.2), nn.Linear(3, 8)).to(D)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.1)
    x, target = torch.randn(16, 3, dtype=D), torch.randn(16, 8, dtype=D).abs()
    losses = []
    for _ in range(15):
        loss = (layer(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
        assert certify(layer, layer(x), x).monotonicity >= 0.2 * (1 - 1e-9)
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("bound", [0.3, 3.0])
def test_the_lipschitz_bound_holds_whatever_the_weights(bound):
    torch.manual_seed(0)
    layer = LipschitzEquilibrium(4, 10, 3, bound=bound).to(D)
    with torch.no_grad():
        for p in layer.parameters():
            p.mul_(3)
    x = 2 * torch.randn(32, 4, dtype=D)
    jacobian = torch.autograd.functional.jacobian(lambda x: layer(x).sum(0), x).permute(1, 0, 2)
    gain = torch.linalg.matrix_norm(jacobian, 2)
    assert (gain <= bound).all()
    assert gain.max() >= 0.1 * bound, "the bound is not vacuous"
    z = layer.state(x)
    found = certify(layer, z, x)
    assert found.sensitivity <= bound
    assert found.error.max() < 1e-6
    torch.testing.assert_close(layer(x), layer.readout(z))


def test_in_single_precision():
    torch.manual_seed(0)
    layer = MonotoneEquilibrium(DenseMonotone(32), nn.Linear(5, 32))
    x = torch.randn(8, 5)
    z = layer(x)
    found = certify(layer, z, x)
    assert found.error.dtype == D
    assert found.error.max() < 0.1 * z.norm(dim=1).max()


@pytest.mark.parametrize("kind", ["dense", "conv"])
def test_under_autocast(kind):
    torch.manual_seed(0)
    operator = DenseMonotone(16, margin=1.0) if kind == "dense" else ConvMonotone(3, margin=1.0)
    layer = MonotoneEquilibrium(operator)
    x = torch.randn(4, 3, 5, 4) if isinstance(operator, ConvMonotone) else torch.randn(4, 16)
    expected = layer(x).detach()
    with torch.autocast("cpu", torch.bfloat16):
        z = layer(x)
    assert z.dtype == torch.float32
    assert torch.linalg.vector_norm(z - expected) < 0.1 * torch.linalg.vector_norm(expected)
    z.sum().backward()
    assert operator.a.grad.isfinite().all()


def test_refusals():
    x = states(dense())
    with pytest.raises(ValueError, match="margin is 0"):
        DenseMonotone(3, margin=0)
    with pytest.raises(ValueError, match="odd"):
        ConvMonotone(3, 2)
    with pytest.raises(ValueError, match="smaller than the kernel"):
        ConvMonotone(3, 5).blocks(torch.zeros(1, 3, 4, 9))
    with pytest.raises(ValueError, match="bound is -1"):
        LipschitzEquilibrium(2, 2, 2, bound=-1)
    with pytest.raises(ValueError, match="step is -1"):
        ForwardBackward(step=-1)
    broken = dense()
    with torch.no_grad():
        broken.a[0, 0] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        certify(MonotoneCell(broken), x, x)
    huge = dense()
    with torch.no_grad():
        huge.b.mul_(1e18)
    with pytest.raises(ValueError, match="not proved to contract"):
        certify(MonotoneCell(huge), x, x)
