import pytest
import torch
from cells import TanhCell, loss_of

import torchimplicit as ti
from torchimplicit.nn import Equilibrium, spectral_norm, weight_norm

ESTIMATORS = [
    ti.Implicit(),
    ti.UnrolledPhantom(steps=30),
    ti.NeumannPhantom(steps=30),
    ti.OneStep(),
    ti.SharedInverse(),
    ti.Unrolled(),
    ti.Reversible(),
]
by_name = pytest.mark.parametrize("gradient", ESTIMATORS, ids=lambda g: type(g).__name__)


class Watched(TanhCell):
    """Notes the dtype in which its linear maps are computed."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, z, x):
        inner = self.recurrent(z)
        self.seen.append(inner.dtype)
        return torch.tanh(inner + self.input(x))


def solver_for(gradient):
    if isinstance(gradient, ti.Reversible):
        return ti.ReversibleIteration()
    return ti.Broyden() if isinstance(gradient, ti.SharedInverse) else None


@by_name
@pytest.mark.parametrize("backward_inside", [True, False])
def test_the_map_runs_in_the_lower_precision_forward_and_backward(gradient, backward_inside):
    layer = Equilibrium(Watched(), gradient=gradient, solver=solver_for(gradient))
    x = torch.randn(4, 5, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = layer(x)
        if backward_inside:
            loss_of(z).backward()
    if not backward_inside:
        loss_of(z).backward()
    assert z.dtype == torch.float32
    assert set(layer.cell.seen) == {torch.bfloat16}
    assert layer.solution.converged.all()
    got = [x.grad, *(p.grad for p in layer.parameters())]

    full = Equilibrium(layer.cell, gradient=gradient, solver=solver_for(gradient))
    layer.cell.seen.clear()
    expected = torch.autograd.grad(loss_of(full(x)), (x, *layer.parameters()))
    assert set(layer.cell.seen) == {torch.float32}
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == torch.float32
        assert torch.linalg.vector_norm(a - b) < 0.3 * torch.linalg.vector_norm(b)


@pytest.mark.parametrize("solver", [ti.Anderson(), ti.Broyden(), ti.FixedPointIteration(), ti.NewtonKrylov()])
def test_every_solver_converges_to_what_the_precision_allows(solver):
    layer = Equilibrium(TanhCell(), solver=solver)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layer(torch.randn(4, 5)).sum().backward()
    assert layer.solution.converged.all()
    assert layer.solution.adjoint.converged.all()


def test_a_tolerance_of_the_users_is_kept():
    layer = Equilibrium(TanhCell(), solver=ti.FixedPointIteration(rtol=0.0, max_steps=7))
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.warns(ti.ConvergenceWarning):
        layer(torch.randn(4, 5))
    assert layer.solution.steps.max() == 7


def test_where_autocast_comes_on_after_the_forward_pass_the_backward_pass_stays_full():
    layer = Equilibrium(Watched())
    x = torch.randn(4, 5, requires_grad=True)
    z = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z.sum().backward()
    assert set(layer.cell.seen) == {torch.float32}


def test_a_bfloat16_input_gives_a_bfloat16_state():
    layer = Equilibrium(TanhCell())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = layer(torch.randn(4, 5).bfloat16())
    assert z.dtype == torch.bfloat16


def test_second_derivatives():
    layer = Equilibrium(TanhCell())
    x = torch.randn(4, 5, requires_grad=True)
    results = []
    for enabled in (True, False):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            z = layer(x)
        (first,) = torch.autograd.grad(loss_of(z), x, create_graph=True)
        results.append(torch.autograd.grad((first**2).sum(), (x, *layer.parameters())))
    for a, b in zip(*results, strict=True):
        assert torch.linalg.vector_norm(a - b) < 0.2 * torch.linalg.vector_norm(b)


@pytest.mark.parametrize("norm", [weight_norm, spectral_norm])
def test_normalized_weights_get_their_gradients(norm):
    cell = TanhCell()
    norm(cell.input)
    norm(cell.recurrent, **({"bound": 0.5} if norm is spectral_norm else {}))
    layer = Equilibrium(cell)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layer(torch.randn(4, 5)).sum().backward()
    assert all(p.grad is not None and p.grad.norm() > 0 for p in layer.parameters())


HALVES = [torch.bfloat16, torch.float16]
SOLVERS = [
    ti.Anderson(),
    ti.Broyden(),
    ti.FixedPointIteration(damping=0.9),
    ti.NewtonKrylov(),
]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: type(s).__name__)
def test_half_precision_states(solver, dtype):
    layer = Equilibrium(TanhCell().to(dtype), solver=solver)
    x = torch.randn(4, 5, dtype=dtype, requires_grad=True)
    z = layer(x)
    loss_of(z).backward()
    assert z.dtype == dtype
    assert layer.solution.converged.all()
    reference = Equilibrium(TanhCell())
    reference.load_state_dict({k: v.float() for k, v in layer.state_dict().items()})
    wide = x.detach().float().requires_grad_()
    expected = reference(wide)
    loss_of(expected).backward()
    assert torch.linalg.vector_norm(z.float() - expected) < 0.05 * torch.linalg.vector_norm(expected)
    assert torch.linalg.vector_norm(x.grad.float() - wide.grad) < 0.1 * torch.linalg.vector_norm(wide.grad)


@by_name
def test_half_precision_estimators(gradient):
    layer = Equilibrium(TanhCell().bfloat16(), gradient=gradient, solver=solver_for(gradient))
    x = torch.randn(4, 5, dtype=torch.bfloat16, requires_grad=True)
    loss_of(layer(x)).backward()
    assert all(t.grad.dtype == torch.bfloat16 and t.grad.isfinite().all() for t in (x, *layer.parameters()))


def test_a_row_that_overflows_float16_is_the_only_one_to_fail():
    class Squares(torch.nn.Module):
        def forward(self, z, x):
            return x + 0.1 * z * z

    layer = Equilibrium(Squares(), throw=False, solver=ti.FixedPointIteration())
    x = torch.full((3, 2), 0.5, dtype=torch.float16)
    x[1] = 300
    with pytest.warns(ti.ConvergenceWarning, match=r"1 of 3 samples \(1\)"):
        z = layer(x)
    assert layer.solution.status.tolist() == [ti.Status.CONVERGED, ti.Status.NONFINITE, ti.Status.CONVERGED]
    assert z.isfinite().all()
    assert torch.equal(z[0], z[2])
