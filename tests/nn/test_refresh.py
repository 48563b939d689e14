"""States that are carried along by single evaluations: WarmStart(refresh=...)."""

import pytest
import torch
from cells import TanhCell, loss_of
from torch import nn

import torchimplicit as ti
from torchimplicit.nn import Equilibrium, WarmStart

TIGHT = {"solver": ti.Anderson(rtol=1e-12)}


class Counted(nn.Module):
    def __init__(self, cell):
        super().__init__()
        self.inner, self.calls = cell, 0

    def forward(self, z, x):
        self.calls += 1
        return self.inner(z, x)


@pytest.fixture
def x():
    return torch.randn(4, 5, dtype=torch.float64)


def layer_of(refresh=1, gradient=None, **options):
    cell = Counted(TanhCell().double())
    return Equilibrium(cell, gradient=gradient, warm_start=WarmStart(refresh=refresh, **options), rowwise=True, **TIGHT)


def test_a_step_after_the_first_evaluates_the_cell_once_forward_and_backward(x):
    layer = layer_of(gradient=ti.NeumannPhantom(steps=2, damping=1.0))
    layer(x).sum().backward()
    layer.cell.calls = 0
    layer(x).sum().backward()
    assert layer.cell.calls == 1
    assert layer.solution.evaluations == 1
    assert layer.solution.adjoint.evaluations == 1  # T = 1: u + J'u


@pytest.mark.parametrize("terms", [1, 2, 3, 8])
def test_the_derivative_is_the_truncated_series_at_the_remembered_state(x, terms):
    layer = layer_of(gradient=ti.NeumannPhantom(steps=terms, damping=1.0))
    layer(x)
    layer.cell.inner.recurrent.weight.data.mul_(1.1)
    z = layer.solution.value
    weights = list(layer.parameters())
    out = layer(x)
    got = torch.autograd.grad(loss_of(out), weights)
    torch.testing.assert_close(out, layer.cell.inner(z, x))
    # the series' terms are what reaches the weights of the last, the one before last, ... application at the same z
    image = layer.cell.inner(z, x)
    (u,) = torch.autograd.grad(loss_of(image), image, retain_graph=True)
    at = z.clone().requires_grad_()
    image = layer.cell.inner(at, x)
    g = u
    for _ in range(terms - 1):
        g = u + torch.autograd.grad(image, at, g, retain_graph=True)[0]
    for a, b in zip(got, torch.autograd.grad(image, weights, g), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("steps", "damping"), [(1, 1.0), (3, 1.0), (1, 0.5), (4, 0.5)])
def test_at_a_solution_it_is_the_phantom_gradient_of_a_solve(x, steps, damping):
    layer = layer_of(gradient=ti.NeumannPhantom(steps=steps, damping=damping))
    weights = list(layer.parameters())
    solved = torch.autograd.grad(loss_of(layer(x)), weights)
    refreshed = torch.autograd.grad(loss_of(layer(x)), weights)
    assert layer.solution.adjoint.evaluations == steps - 1
    for a, b in zip(refreshed, solved, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("solver", [ti.Neumann(rtol=1e-13, max_steps=500), ti.GMRES(rtol=1e-13)])
def test_at_a_solution_the_converged_series_is_exact(x, solver):
    layer = layer_of(gradient=ti.Implicit(linear_solver=solver))
    weights = list(layer.parameters())
    exact = torch.autograd.grad(loss_of(layer(x)), weights)
    refreshed = torch.autograd.grad(loss_of(layer(x)), weights)
    assert layer.solution.evaluations == 1
    for a, b in zip(refreshed, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_the_state_follows_the_weights(x):
    layer = layer_of()
    layer(x)
    layer.cell.inner.recurrent.weight.data.mul_(1.05)
    for _ in range(60):
        carried = layer(x)
    layer.warm_start.reset()
    torch.testing.assert_close(carried, layer(x), rtol=1e-9, atol=1e-10)


def test_the_input_gets_its_gradient(x):
    layer = layer_of(gradient=ti.Implicit(linear_solver=ti.GMRES(rtol=1e-13)))
    x.requires_grad_()
    (exact,) = torch.autograd.grad(loss_of(layer(x)), x)
    (again,) = torch.autograd.grad(loss_of(layer(x)), x)
    torch.testing.assert_close(again, exact, rtol=1e-8, atol=1e-10)


def test_each_sample_keeps_its_own_state_through_minibatches():
    every = torch.randn(10, 5, dtype=torch.float64)
    layer = layer_of(samples=10)
    whole = layer_of()
    whole.load_state_dict(layer.state_dict())
    expected = whole(every)
    for turn in range(2):
        for part in (torch.tensor([7, 2, 9, 0, 4]), torch.tensor([1, 3, 5, 6, 8])):
            layer.cell.calls = 0
            got = layer(every[part], index=part)
            torch.testing.assert_close(got, expected[part], rtol=1e-9, atol=1e-10)
            assert (layer.cell.calls == 1) == (turn == 1)


def test_a_batch_with_an_unknown_sample_is_solved():
    every = torch.randn(6, 5, dtype=torch.float64)
    layer = layer_of(samples=6)
    layer(every[:3], index=torch.arange(3))
    layer(every[2:5], index=torch.arange(2, 5))
    assert layer.solution.evaluations > 1
    assert layer.solution.converged.all()


def test_evaluation_mode_solves(x):
    layer = layer_of()
    layer(x)
    layer.eval()
    for _ in range(2):
        layer(x)
        assert layer.solution.converged.all()
    layer.cell.inner.recurrent.weight.data.mul_(1.2)
    layer(x)
    assert layer.solution.converged.all()
    assert layer.solution.evaluations > 1


def test_more_evaluations_are_counted_and_come_nearer(x):
    residuals = []
    for refresh in (1, 4):
        torch.manual_seed(0)
        layer = layer_of(refresh)
        layer(x)
        layer.cell.inner.recurrent.weight.data.mul_(1.3)
        layer(x)
        assert layer.solution.evaluations == refresh
        residuals.append(float(layer.solution.residual.max()))
    assert residuals[1] < 0.2 * residuals[0]


def test_a_second_derivative_raises(x):
    layer = layer_of()
    x.requires_grad_()
    layer(x)
    with pytest.raises(ti.UnsupportedDerivativeError, match=r"WarmStart\(\)"):
        torch.autograd.grad(layer(x).sum(), x, create_graph=True)


@pytest.mark.parametrize("gradient", [ti.UnrolledPhantom(), ti.SharedInverse(), ti.Unrolled(), ti.Reversible()])
def test_estimators_that_need_a_solve_are_refused(gradient):
    with pytest.raises(ValueError, match=r"Unrolled|SharedInverse|Reversible"):
        Equilibrium(TanhCell(), gradient=gradient, warm_start=WarmStart(refresh=1))


def test_a_transform_is_given_a_solve(x):
    layer = layer_of()
    layer(x)
    jacobian = torch.func.jacrev(lambda x: layer(x).sum(0))(x)
    assert jacobian.shape == (5, 4, 5)


def test_infinity_is_said_and_not_remembered(x):
    layer = layer_of()
    layer(x)
    with pytest.raises(ti.SolveError, match="NaN"):
        layer(x * torch.inf)
    layer(x)
    assert layer.solution.residual.max() < 1e-6


def test_without_gradients(x):
    layer = layer_of(refresh=2)
    layer(x)
    with torch.no_grad():
        assert not layer(x).requires_grad
    assert layer.solution.evaluations == 2


def test_refresh_is_checked():
    with pytest.raises(ValueError, match="refresh"):
        WarmStart(refresh=0)
