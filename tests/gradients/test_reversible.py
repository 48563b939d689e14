"""Backpropagation along inverse steps."""

from __future__ import annotations

import warnings

import pytest
import torch
from maps import assert_agree, data, tanh_map

import torchimplicit as ti
from torchimplicit.solvers import Solver
from torchimplicit.testing import GradientSuite
from torchimplicit.testing.gradient_suite import Kind

D = torch.float64


class TestReversible(GradientSuite):
    kinds = ("fixed_point",)
    bound = 1e-6
    second_order = False
    forward_mode = False
    of_z0 = True

    def solver(self, kind: Kind) -> Solver:
        return ti.ReversibleIteration(rtol=0.0, atol=1e-13)

    def make(self) -> ti.Reversible:
        return ti.Reversible()


class TestReversibleOverRelaxed(TestReversible):
    def solver(self, kind: Kind) -> Solver:
        return ti.ReversibleIteration(damping=1.1, rtol=0.0, atol=1e-13)


def gradients(gradient, solver, f=tanh_map, scale=1.0, dtype=D, seed=0, **options):
    """In z0, x and w, and the solution."""
    x, w = data(batch=4, dim=6, seed=seed)
    leaves = [t.to(dtype).requires_grad_() for t in (torch.full_like(x, 0.3), x, scale * w)]
    solution = ti.solve(ti.FixedPoint(f, **options), *leaves, solver=solver, gradient=gradient)
    value = solution.value.to(D)
    return list(torch.autograd.grad(value.sin().sum(), leaves)), solution


@pytest.mark.parametrize("damping", [0.2, 0.5, 0.8, 1.3])
@pytest.mark.parametrize("steps", [1, 2, 7, 60])
def test_given_steps_are_those_of_unrolling(damping, steps):
    """Far from the solution and beyond it, whatever the map does to distances, and in z0 as well."""
    for scale in (1.0, 4.0):
        solver = ti.ReversibleIteration(damping=damping, steps=steps)
        (got, one), (expected, other) = (gradients(g, solver, scale=scale) for g in (ti.Reversible(), ti.Unrolled()))
        assert torch.equal(one.value, other.value)
        assert_agree(got, expected, 1e-10)
        assert one.adjoint.residual.max() < 1e-8
        assert one.adjoint.evaluations == 2 * steps


def test_no_step_at_all():
    z0 = torch.ones(2, 3, dtype=D, requires_grad=True)
    solver = ti.ReversibleIteration(steps=0)
    problem = ti.FixedPoint(lambda z, a: a * z)
    value = ti.solve(problem, z0, z0.new_ones(1), solver=solver, gradient=ti.Reversible()).value
    assert torch.autograd.grad(value.sum(), z0)[0].eq(1).all()


def coupled(z, x, w):
    return tanh_map(z + 0.5 * (z.mean(0, keepdim=True) - z), x, w)


@pytest.mark.parametrize(("f", "options"), [(tanh_map, {}), (tanh_map, {"rowwise": True}), (coupled, {})])
@pytest.mark.parametrize("every", [1, 3])
def test_samples_that_stop_are_inverted_from_where_they_did(f, options, every):
    solver = ti.ReversibleIteration(rtol=1e-6, check_every=every)
    (got, one), (expected, _) = (gradients(g, solver, f, 2.0, **options) for g in (ti.Reversible(), ti.Unrolled()))
    assert len(set(one.steps.tolist())) > 1
    assert_agree(got, expected, 1e-10)


@pytest.mark.filterwarnings("ignore::torchimplicit.ConvergenceWarning")
def test_a_budget_that_runs_out():
    solver = ti.ReversibleIteration(max_steps=3)
    (got, one), (expected, _) = (gradients(g, solver) for g in (ti.Reversible(), ti.Unrolled()))
    assert one.status.eq(ti.Status.MAX_STEPS).all()
    assert_agree(got, expected, 1e-11)


@pytest.mark.parametrize("eigenvalue", [0.05, 0.5, 0.95])
@pytest.mark.parametrize("damping", [0.2, 0.5, 0.8, 1.3])
def test_rounding_grows_as_the_inverse_of_a_step_does(damping, eigenvalue):
    """From 1 / |1 - β| a step for a weak map to 1 / (1 - β)^2 for one that hardly contracts: within a factor of ten."""
    keep, take = 1 - damping, damping * eigenvalue
    step = torch.tensor([[keep, take], [take * keep, keep + take**2]], dtype=D)
    growth = float(torch.linalg.eigvals(torch.linalg.inv(step)).abs().max())
    assert 1 / abs(keep) * 0.99 <= growth <= 1.01 / keep**2
    generator = torch.Generator().manual_seed(0)
    turn = torch.linalg.qr(torch.randn(16, 16, dtype=D, generator=generator)).Q
    w = turn @ torch.diag(eigenvalue * torch.linspace(0.9, 1, 16, dtype=D)) @ turn.T
    x = torch.randn(8, 16, dtype=D, generator=generator).requires_grad_()

    def drift(**options):
        solver = ti.ReversibleIteration(damping=damping, **options)
        problem = ti.FixedPoint(lambda z, x: z @ w + x)
        solution = ti.solve(problem, torch.zeros_like(x), x, solver=solver, gradient=ti.Reversible())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ti.ConvergenceWarning)
            solution.value.sum().backward()
        return float(solution.adjoint.residual.max())

    eps = torch.finfo(D).eps
    for steps in (4, 8, 12):
        assert 0.05 <= drift(steps=steps, keep_every=99) / (eps * growth**steps) <= 3
    assert drift(steps=150) <= 3 * eps * 7.4e5, "the pairs that are remembered keep it in bounds"


def test_a_way_back_that_is_lost_is_said():
    solver = ti.ReversibleIteration(damping=0.8, steps=40, keep_every=1000)
    with pytest.warns(ti.ConvergenceWarning, match=r"inverse steps of 4 of 4 samples.*keep_every"):
        _, solution = gradients(ti.Reversible(), solver)
    assert solution.adjoint.status.eq(ti.Status.BREAKDOWN).all()


def test_a_map_that_has_changed_is_an_error():
    x, w = data()
    shift = [0.0]
    leaf = w.requires_grad_()
    solution = ti.solve(
        ti.FixedPoint(lambda z, w: tanh_map(z, x, w) + shift[0]),
        torch.zeros_like(x),
        leaf,
        solver=ti.ReversibleIteration(steps=5),
        gradient=ti.Reversible(),
    )
    shift[0] = 0.1
    with pytest.raises(RuntimeError, match="has been changed since"):
        solution.value.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_pair_is_kept_in_double_precision(dtype):
    """So that inverse steps of a state in single precision are as good as that of one in double precision: steps of
    single precision would be lost after 24."""
    solver = ti.ReversibleIteration(steps=30, keep_every=1000)
    (got, one), (expected, _) = (gradients(g, solver, dtype=dtype) for g in (ti.Reversible(), ti.Unrolled()))
    assert one.adjoint.residual.max() < (1e-5 if dtype == torch.float32 else 1e-2)
    for g, e in zip(got[1:], expected[1:], strict=True):
        torch.testing.assert_close(g, e, rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)


def test_under_autocast_the_map_alone_is_in_half_precision():
    x, w = (t.float() for t in data(batch=4, dim=16))
    found = []
    for gradient in (ti.Reversible(), ti.Unrolled()):
        leaf = w.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            solution = ti.solve(
                ti.FixedPoint(lambda z, leaf: torch.tanh(z @ leaf.mT) + x),
                torch.zeros_like(x),
                leaf,
                solver=ti.ReversibleIteration(steps=12),
                gradient=gradient,
            )
        assert solution.value.dtype == torch.float32
        found.append(torch.autograd.grad(solution.value.sin().sum(), leaf)[0])
        if gradient == ti.Reversible():
            assert solution.adjoint.residual.max() < 1e-6
    assert_agree(*found, 2e-2)


def test_in_very_small_numbers():
    """The squares of 1e-170 underflow: the problem is solved in other units."""
    for unit in (1.0, 1e-170):
        x, w = data()
        x = (unit * x).requires_grad_()

        def f(z, x, w, unit=unit):
            return unit * torch.tanh(z @ w.mT / unit) + x

        solution = ti.solve(
            ti.FixedPoint(f),
            torch.zeros_like(x),
            x,
            w,
            solver=ti.ReversibleIteration(),
            gradient=ti.Reversible(),
        )
        assert solution.converged.all()
        (grad,) = torch.autograd.grad(solution.value.sum(), x)
        if unit == 1.0:
            expected = grad
    assert_agree(grad, expected, 1e-9)


def test_a_sample_that_ran_away_has_no_derivative_and_spoils_no_other():
    x, w = data(batch=3)
    spoilt = x.clone()
    spoilt[1] = torch.inf
    found = []
    for inputs in (x, spoilt):
        leaf = inputs.clone().requires_grad_()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ti.ConvergenceWarning)
            value = ti.solve(
                ti.FixedPoint(tanh_map),
                torch.zeros_like(x),
                leaf,
                w,
                solver=ti.ReversibleIteration(),
                gradient=ti.Reversible(),
                throw=False,
            ).value
        found.append(torch.autograd.grad(value.sum(), leaf)[0])
    assert found[1][1].isnan().all()
    torch.testing.assert_close(found[1][[0, 2]], found[0][[0, 2]], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(
    ("solver", "match"),
    [
        (ti.Anderson(), "the solver is Anderson"),
        (ti.FixedPointIteration(damping=0.5), "the solver is FixedPointIteration"),
        (ti.Polyalgorithm(members=(ti.ReversibleIteration(), ti.Anderson())), "the solver is Polyalgorithm"),
        (ti.ReversibleIteration(return_last=False), "return_last"),
    ],
)
def test_solvers_whose_steps_it_cannot_invert(solver, match):
    with pytest.raises(ValueError, match=match):
        gradients(ti.Reversible(), solver)


def test_second_derivatives_are_refused():
    x, w = data()
    leaf = w.requires_grad_()
    value = ti.solve(
        ti.FixedPoint(tanh_map),
        torch.zeros_like(x),
        x,
        leaf,
        solver=ti.ReversibleIteration(),
        gradient=ti.Reversible(),
    ).value
    (grad,) = torch.autograd.grad(value.sin().sum(), leaf, create_graph=True)
    with pytest.raises(ti.UnsupportedDerivativeError, match="Unrolled"):
        grad.sum().backward()


@pytest.mark.parametrize("steps", [None, 5])
def test_iterates_on_the_way_are_refused(steps):
    x, w = data()
    solution = ti.solve(
        ti.FixedPoint(tanh_map),
        torch.zeros_like(x),
        x,
        w.requires_grad_(),
        solver=ti.ReversibleIteration(steps=steps, keep_trajectory=True),
        gradient=ti.Reversible(),
    )
    loss = ti.regularizers.fixed_point_correction(solution, lambda z: z.square().sum())
    with pytest.raises(ti.UnsupportedDerivativeError, match=r"fixed_point_correction.*Unrolled"):
        loss.backward()


def test_a_warm_start_is_refused():
    with pytest.raises(ValueError, match="Reversible differentiates the solver's steps"):
        ti.nn.Equilibrium(torch.nn.Identity(), gradient=ti.Reversible(), warm_start=True)


def test_what_a_map_returns_beside_the_state():
    x, w = data()
    found = []
    for gradient in (ti.Reversible(), ti.Unrolled()):
        leaf = w.clone().requires_grad_()
        problem = ti.FixedPoint(lambda z, w: (tanh_map(z, x, w), z.sum(1) * w.sum()), has_aux=True)
        solver = ti.ReversibleIteration(rtol=1e-12)
        solution = ti.solve(problem, torch.zeros_like(x), leaf, solver=solver, gradient=gradient)
        found.append(torch.autograd.grad(solution.aux.sin().sum() + solution.value.sum(), leaf)[0])
    assert_agree(*found, 1e-10)


def test_the_start_under_transforms():
    x, w = data()
    z0 = torch.full_like(x, 0.2)

    def of(z0, gradient):
        solver = ti.ReversibleIteration(steps=3)
        return ti.solve(ti.FixedPoint(tanh_map), z0, x, w, solver=solver, gradient=gradient).value.sin().sum()

    found = [torch.func.grad(lambda z0, g=g: of(z0, g))(z0) for g in (ti.Reversible(), ti.Unrolled())]
    assert_agree(*found, 1e-11)
    with pytest.raises(ti.UnsupportedDerivativeError, match=r"z0 under torch\.func\.vmap"):
        torch.func.vmap(torch.func.grad(lambda z0: of(z0, ti.Reversible())))(torch.stack([z0, z0]))


def test_compiled_solves_say_that_they_are_not():
    x, w = data()
    with pytest.warns(ti.CaptureWarning, match=r"Reversible"):
        ti.solve(
            ti.FixedPoint(tanh_map),
            torch.zeros_like(x),
            x.requires_grad_(),
            w,
            solver=ti.ReversibleIteration(),
            gradient=ti.Reversible(),
            compile=True,
        ).value.sum().backward()


def test_a_layer_with_dropout_trains():
    torch.manual_seed(0)
    cell = ti.nn.VariationalDropout(0.3)
    linear = torch.nn.Linear(6, 6)
    with torch.no_grad():
        linear.weight.mul_(0.5)

    class Cell(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.drop = linear, cell

        def forward(self, z, x):
            return torch.tanh(self.drop(self.linear(z)) + x)

    layer = ti.nn.Equilibrium(Cell(), solver=ti.ReversibleIteration(steps=6), gradient=ti.Reversible())
    with warnings.catch_warnings():
        warnings.simplefilter("error", ti.ConvergenceWarning)
        layer(torch.randn(4, 6)).sum().backward()
    assert linear.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(("gradient", "grows"), [(ti.Reversible(), False), (ti.Unrolled(), True)])
def test_what_autograd_saves_does_not_grow_with_the_steps(gradient, grows):
    seen = []

    def pack(t):
        seen.append(t.numel())
        return t

    counts = []
    for steps in (4, 16):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            gradients(gradient, ti.ReversibleIteration(steps=steps))
        counts.append(sum(seen))
        seen.clear()
    assert (counts[0] < counts[1]) == grows
