"""The equilibrium layer: warm starts, empty batches, and inputs that are laid out otherwise."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import torchimplicit as ti

pytestmark = pytest.mark.usefixtures("one_thread")


class Cell(nn.Module):
    def __init__(self, dim=4):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.W = nn.Parameter(0.25 * torch.randn(dim, dim, generator=generator, dtype=torch.float64))

    def forward(self, z, x):
        return torch.tanh(z @ self.W.mT + x)


def exact(cell, x):
    z = torch.zeros_like(x)
    for _ in range(400):
        z = cell(z, x)
    return z


def gradients(z, cell, x):
    return torch.autograd.grad(z.sin().sum(), (cell.W, x))


def inputs(batch=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 4, generator=generator, dtype=torch.float64).requires_grad_()


GRADIENTS = [ti.Implicit(), ti.Implicit(linear_solver=ti.Dense()), ti.SharedInverse(refine=8)]


@pytest.mark.parametrize("rowwise", [False, True])
@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize(
    "solver", [ti.Anderson(rtol=1e-11), ti.Broyden(rtol=1e-11), ti.FixedPointIteration(rtol=1e-11)]
)
def test_warm_starts(solver, gradient, rowwise):
    if isinstance(gradient, ti.SharedInverse) and not isinstance(solver, ti.Broyden):
        pytest.skip("needs Broyden")
    layer = ti.nn.Equilibrium(Cell(), solver=solver, gradient=gradient, warm_start=True, rowwise=rowwise)
    for seed in (0, 0, 1, 0):  # the same input again, another one, and back
        x = inputs(seed=seed)
        z = layer(x)
        want = exact(layer.cell, x)
        torch.testing.assert_close(z, want, rtol=1e-8, atol=1e-10)
        for g, w in zip(gradients(z, layer.cell, x), gradients(want, layer.cell, x)):
            torch.testing.assert_close(g, w, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("change", [lambda z: z.zero_(), lambda z: z.add_(1), lambda z: z.fill_(torch.nan)])
def test_what_is_remembered_is_no_view_of_what_was_returned(change):
    layer = ti.nn.Equilibrium(Cell(), warm_start=True)
    x = inputs()
    with torch.no_grad():
        change(layer(x))
    torch.testing.assert_close(layer(x), exact(layer.cell, x), rtol=1e-7, atol=1e-8)
    assert int(layer.solution.steps.max()) == 0


@pytest.mark.parametrize("kind", ["start", "argument", "buffer", "parameter"])
def test_the_value_is_a_tensor_of_its_own(kind):
    given = exact(Cell(), inputs()).detach()
    if kind == "parameter":
        given = nn.Parameter(given)
    maps = {
        "start": lambda z: z,
        "argument": lambda z, x: x,
        "buffer": lambda z: given,
        "parameter": lambda z: given * 1 if False else given,
    }
    args = (given,) if kind == "argument" else ()
    start = given if kind == "start" else torch.zeros(5, 4, dtype=torch.float64)
    try:
        value = ti.solve(ti.FixedPoint(maps[kind]), start, *args).value
    except (ValueError, TypeError):
        return  # said
    with torch.no_grad():
        before = given.clone()
        value.detach().add_(1)
    assert torch.equal(given, before)


def energy(z: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return (z - x).square().flatten(1).sum(1)


OF_NOTHING: dict[str, tuple[ti.Problem, tuple[ti.Gradient, ...]]] = {
    "FixedPoint": (ti.FixedPoint(lambda z, x: z.sin() / 2 + x), (ti.OneStep(), ti.NeumannPhantom(), ti.Unrolled())),
    "Root": (ti.Root(lambda z, x: z**3 + z - x), (ti.UnrolledPhantom(), ti.AdaptivePhantom())),
    "Minimum": (ti.Minimum(energy), (ti.DampedImplicit(), ti.EquilibriumPropagation(nudge=0.1))),
    "Box": (ti.Minimum(energy, constraint=ti.Box(0.0, 1.0)), (ti.UnrolledPhantom(),)),
    "LeastSquares": (ti.LeastSquares(lambda z, x: z - x), (ti.GaussNewton(),)),
}


@pytest.mark.parametrize("shape", [(0, 4), (0, 2, 2), (3, 0)])
@pytest.mark.parametrize("name", OF_NOTHING)
def test_a_state_without_numbers(name, shape):
    problem, gradients = OF_NOTHING[name]
    for gradient in (ti.Implicit(), *gradients):
        x = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
        solution = ti.solve(problem, x.detach(), x, gradient=gradient)
        assert solution.value.shape == shape
        assert solution.converged.shape == shape[:1]
        assert bool(solution.converged.all())
        (got,) = torch.autograd.grad(solution.value.sum(), x, create_graph=True)
        assert got.shape == shape


LAYOUTS = {
    "transposed": lambda x: x.mT.contiguous().mT,
    "strided": lambda x: torch.stack((x, x), -1)[..., 0],
    "expanded": lambda x: x[:1].expand(5, 4),
    "flipped": lambda x: x.flip(0),
    "narrowed": lambda x: torch.cat((x, x), 1)[:, 2:6],
}


@pytest.mark.parametrize("rowwise", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_inputs_laid_out_otherwise(layout, rowwise):
    cell, x = Cell(), LAYOUTS[layout](inputs()).detach().requires_grad_()
    z0 = LAYOUTS[layout](torch.ones(5, 4, dtype=torch.float64))
    solution = ti.solve(ti.FixedPoint(cell, rowwise=rowwise), z0, x, solver=ti.Anderson(rtol=1e-12))
    want = exact(cell, x)
    for g, w in zip(gradients(solution.value, cell, x), gradients(want, cell, x)):
        torch.testing.assert_close(g, w, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("view", ["complex", "flat", "channels-last"])
def test_maps_that_need_contiguous_states(view):
    x = torch.randn(3, 4, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def f(state, x):
        z, u = state
        if view == "complex":
            turned = torch.view_as_real(0.5j * torch.view_as_complex(z))
        elif view == "flat":
            turned = 0.5 * z.view(-1).view(z.shape)
        else:
            turned = 0.5 * z.permute(0, 2, 1).contiguous().permute(0, 2, 1)
        return turned + x, 0.3 * u + z[..., 0]

    start = (torch.zeros(3, 4, 2, dtype=torch.float64), torch.zeros(3, 4, dtype=torch.float64))
    x.requires_grad_()
    solution = ti.solve(ti.FixedPoint(f), start, x, solver=ti.Anderson(rtol=1e-12))
    got = torch.autograd.grad(solution.value[1].sin().sum(), x)
    state = start
    for _ in range(200):
        state = f(state, x)
    torch.testing.assert_close(got, torch.autograd.grad(state[1].sin().sum(), x), rtol=1e-7, atol=1e-9)
