"""The verb: what it takes, what it says, and who takes part in a batch."""

from __future__ import annotations

import gc
import warnings
import weakref

import pytest
import torch
from torch import nn

import torchimplicit as ti
from torchimplicit import (
    LBFGS,
    Anderson,
    Broyden,
    EquilibriumPropagation,
    FixedPoint,
    FixedPointIteration,
    Implicit,
    Minimum,
    NewtonKrylov,
    Root,
    SharedInverse,
    Status,
)
from torchimplicit.testing.solver_suite import Spy

F64 = torch.float64


def cell(z, x, slope):
    return slope * torch.tanh(z.roll(1, 1)) + x


def batch(size=64, hard=(17,), dim=8):
    x = torch.randn(size, dim, dtype=F64, generator=torch.Generator().manual_seed(0))
    slope = torch.full((size, 1), 0.2, dtype=F64)
    slope[list(hard)] = 0.95
    return torch.zeros_like(x), x, slope


# -- what it takes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("problem", "words", "error"),
    [
        (torch.cos, r"problem must be a Problem, for example problem=FixedPoint\(f\), not", TypeError),
        (FixedPoint, "not the class FixedPoint", TypeError),
        (None, "problem must be a Problem", TypeError),
    ],
)
def test_refuses_what_is_no_problem(problem, words, error):
    with pytest.raises(error, match=words):
        ti.solve(problem, torch.ones(2, 3))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"solver": "anderson"}, r"solver must be a Solver, for example solver=Anderson\(\), not 'anderson'"),
        ({"solver": Anderson}, "solver must be a Solver.* not the class Anderson"),
        ({"gradient": "ift"}, r"gradient must be a Gradient, for example gradient=Implicit\(\), not 'ift'"),
        ({"gradient": Implicit}, "not the class Implicit"),
        ({"gradient": Anderson()}, r"gradient must be a Gradient.*Anderson\("),
    ],
)
def test_refuses_what_is_no_strategy(options, words):
    with pytest.raises(TypeError, match=words):
        ti.solve(FixedPoint(torch.cos), torch.ones(2, 3), **options)


@pytest.mark.parametrize(
    ("problem", "options", "words"),
    [
        (FixedPoint(torch.cos), {"gradient": SharedInverse()}, r"solver is Anderson: solve with solver=Broyden\(\)"),
        (FixedPoint(torch.cos), {"gradient": EquilibriumPropagation()}, r"differentiates a Minimum.*Implicit\(\)"),
        (FixedPoint(torch.cos), {"solver": LBFGS()}, "needs an energy"),
        (Root(torch.cos), {"gradient": EquilibriumPropagation()}, "differentiates a Minimum"),
    ],
)
def test_refuses_what_does_not_go_together(problem, options, words):
    with pytest.raises(ValueError, match=words):
        ti.solve(problem, torch.ones(2, 3), **options)


def test_refuses_a_state_that_is_no_batch():
    with pytest.raises(ValueError, match="dim 0 is the batch"):
        ti.solve(FixedPoint(torch.cos), torch.ones(3))
    assert ti.solve(FixedPoint(torch.cos, batched=False), torch.ones(3)).converged
    assert ti.solve(FixedPoint(torch.cos, batched=False), torch.tensor(1.0)).value.shape == ()


@pytest.mark.parametrize(
    ("problem", "answer"),
    [
        (FixedPoint(torch.cos), 0.7390851332151607),
        (Root(lambda z: torch.cos(z) - z), 0.7390851332151607),
        (Minimum(lambda z: (0.5 * z**2 - torch.sin(z)).sum(1)), 0.7390851332151607),
    ],
)
def test_every_problem_has_a_default_solver(problem, answer):
    solution = ti.solve(problem, torch.zeros(2, 3, dtype=F64))
    torch.testing.assert_close(solution.value, torch.full((2, 3), answer, dtype=F64))
    assert solution.status.shape == solution.steps.shape == solution.residual.shape == (2,)
    assert solution.converged.all()
    assert solution.adjoint is None
    assert solution.trajectory == ()
    assert solution.summary().startswith("2 CONVERGED; largest relative residual")


def test_arguments_are_passed_as_they_are():
    def f(z, tree, flag, name):
        assert flag is True
        assert name == "x"
        return 0.5 * z + tree["x"][0]

    x = torch.ones(2, 3, requires_grad=True)
    solution = ti.solve(FixedPoint(f), torch.zeros(2, 3), {"x": [x], "none": None}, True, "x")
    solution.value.sum().backward()
    torch.testing.assert_close(x.grad, torch.full((2, 3), 2.0))


# -- what it says ------------------------------------------------------------------------------------------------------


def test_an_error_carries_the_solution_and_says_what_to_try():
    z0, x, slope = batch(4, ())
    x[2, 3] = torch.inf
    with pytest.raises(ti.SolveError, match=r"Anderson met NaN.*\(2\).*Try more damping.*throw=False") as e:
        ti.solve(FixedPoint(cell), z0, x, slope)
    solution = e.value.solution
    assert solution.status.tolist() == [Status.CONVERGED, Status.CONVERGED, Status.NONFINITE, Status.CONVERGED]
    assert torch.isfinite(solution.value).all()
    with pytest.warns(ti.ConvergenceWarning, match=r"samples \(2\)"):
        again = ti.solve(FixedPoint(cell), z0, x, slope, throw=False)
    assert torch.equal(again.value, solution.value)


def energy(z):
    return (z * torch.nan).sum(1)


@pytest.mark.parametrize("solver", [None, LBFGS(), ti.NewtonKrylov(), ti.ProjectedNewton(), ti.LevenbergMarquardt()])
@pytest.mark.parametrize(
    "problem",
    [
        ti.Minimum(energy),
        ti.Minimum(energy, constraint=ti.Box(0.0, 2.0)),
        ti.LeastSquares(lambda z: z * torch.nan),
        ti.Root(lambda z: z * torch.nan),
    ],
)
def test_what_it_says_to_try_suits_the_problem_and_has_not_failed(problem, solver):
    try:
        ti.solve(problem, torch.ones(2, 1), solver=solver)
    except ti.SolveError as error:
        met, told = str(error).split(" met ")
        names = told.split("another solver")[1].split("(")[1].split(")")[0].split(", ")
        assert met not in names
        for name in names:
            kind = getattr(ti, name)
            other = kind(step_size=0.1) if kind is ti.GradientDescent else kind()
            with pytest.raises(ti.SolveError):  # and no ValueError
                ti.solve(problem, torch.ones(2, 1), solver=other)
    except ValueError:
        assert solver is not None  # it is not for such problems
    else:
        pytest.fail("no error")


def test_many_bad_samples_are_abridged():
    z0, x, slope = batch(20, ())
    with pytest.raises(ti.SolveError, match=r"20 of 20 samples \(0, 1, 2, 3, 4, 5, 6, 7, \.\.\.\)"):
        ti.solve(FixedPoint(cell), z0, x * torch.nan, slope)


@pytest.mark.filterwarnings("ignore::torchimplicit.ConvergenceWarning")
@pytest.mark.parametrize("rowwise", [False, True])
def test_the_gradient_of_the_good_samples_survives_a_bad_one(rowwise):
    z0, x, slope = batch(6, ())
    good = x.clone().requires_grad_()
    ti.solve(FixedPoint(cell), z0, good, slope).value.square().sum().backward()
    x[2] = torch.nan
    bad = x.clone().requires_grad_()
    solution = ti.solve(FixedPoint(cell, rowwise=rowwise), z0, bad, slope, throw=False)
    solution.value[solution.converged].square().sum().backward()
    others = [0, 1, 3, 4, 5]
    torch.testing.assert_close(bad.grad[others], good.grad[others], rtol=1e-7, atol=1e-7)


def test_the_warning_points_to_the_caller():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ti.solve(FixedPoint(cell), *batch(4, (0,)), solver=Anderson(max_steps=1))
    assert [w.category for w in caught] == [ti.ConvergenceWarning]
    assert caught[0].filename == __file__
    assert "Allow more max_steps" in str(caught[0].message)


@pytest.mark.parametrize("gradient", [Implicit(), ti.UnrolledPhantom(), ti.OneStep()])
def test_a_solution_that_is_its_own_start_has_a_gradient(gradient):
    z0, x, slope = batch(4, ())
    start = ti.solve(FixedPoint(cell), z0, x, slope, solver=Anderson(rtol=1e-12)).value
    x.requires_grad_()
    solution = ti.solve(FixedPoint(cell), start, x, slope, solver=Anderson(rtol=1e-8), gradient=gradient)
    assert not solution.steps.any()
    solution.value.sum().backward()
    assert x.grad.abs().min() > 0
    given = ti.solve(FixedPoint(lambda z, x: x), z0, x)  # the solution is the argument itself
    (grad,) = torch.autograd.grad(given.value.sum(), x)
    torch.testing.assert_close(grad, torch.ones_like(x))


# -- who takes part ----------------------------------------------------------------------------------------------------

SOLVERS = [FixedPointIteration(rtol=1e-8), Anderson(rtol=1e-8), Broyden(rtol=1e-8), NewtonKrylov(rtol=1e-8)]


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: type(s).__name__)
def test_one_hard_sample_costs_little_forward_and_backward(solver):
    z0, x, slope = batch()
    values, grads = [], []
    for rowwise in (False, True):
        leaf = x.clone().requires_grad_()
        solution = ti.solve(FixedPoint(cell, rowwise=rowwise), z0, leaf, slope, solver=solver)
        solution.value.square().sum().backward()
        values.append(solution.value.detach())
        grads.append(leaf.grad)
    torch.testing.assert_close(values[0], values[1], rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-6, atol=1e-6)
    forward, adjoint = solution.evaluations * 64, solution.adjoint.evaluations * 64
    assert forward <= 1.3 * int((solution.steps + 1).sum())
    assert adjoint <= 1.3 * int((solution.adjoint.steps + 1).sum())
    assert solution.steps[17] == solution.steps.max()


def test_arguments_are_indexed_along_and_captured_tensors_are_not():
    z0, x, slope = batch()
    weight = nn.Parameter(torch.eye(64, dtype=F64)[:8, :8].clone())
    square = nn.Parameter(torch.eye(64, dtype=F64))  # a parameter has no batch, whatever its size

    def f(z, tree, number, square):
        assert len(tree["x"]) == len(tree["slope"]) == len(z)
        assert square.shape == (64, 64)
        return cell(z @ weight, tree["x"], tree["slope"]) + number * square[0, 0]

    args = ({"x": x, "slope": slope}, torch.tensor(0.0, dtype=F64), square)
    for_all = ti.solve(FixedPoint(f), z0, *args)
    apart = ti.solve(FixedPoint(f, rowwise=True), z0, *args)
    torch.testing.assert_close(apart.value, for_all.value, rtol=1e-9, atol=1e-9)
    assert apart.evaluations < 0.7 * for_all.evaluations


@pytest.mark.filterwarnings("ignore::torchimplicit.ConvergenceWarning")
@pytest.mark.parametrize(
    "make", [lambda x, s: (lambda z: cell(z, x, s), ()), lambda x, s: (lambda z, a: cell(z, a, s), (x,))]
)
def test_a_captured_batch_is_a_broken_promise(make):
    z0, x, slope = batch()
    f, args = make(x, slope)
    with pytest.raises(ValueError, match=r"rowwise=True.*captures no tensor that carries the batch.*as arguments"):
        ti.solve(FixedPoint(f, rowwise=True), z0, *args)


@pytest.mark.parametrize("hard", [(17,), (3, 17, 40)])
def test_a_shared_argument_of_the_size_of_the_batch_is_a_broken_promise(hard):
    z0, x, slope = batch(64, hard, dim=64)
    w = torch.eye(64, dtype=F64).roll(1, 0)

    def f(z, x, slope, w):
        return slope * torch.tanh(z @ w.T) + x

    assert ti.solve(FixedPoint(f), z0, x, slope, w).converged.all()
    with pytest.raises(ValueError, match=r"rowwise=True.*shared ones as parameters or\s+captured tensors"):
        ti.solve(FixedPoint(f, rowwise=True), z0, x, slope, w)


def test_samples_that_look_at_each_other_are_a_broken_promise():
    z0, x, slope = batch()
    with pytest.raises(ValueError, match="rowwise=True"):
        ti.solve(FixedPoint(lambda z, x, slope: cell(z - z.mean(0), x, slope), rowwise=True), z0, x, slope)


def test_a_trajectory_keeps_everybody_in_the_batch():
    z0, x, slope = batch()
    spy = Spy(cell)
    solution = ti.solve(FixedPoint(spy, rowwise=True), z0, x, slope, solver=Anderson(keep_trajectory=True))
    assert all(len(z) == 64 for z in spy.seen)
    assert all(z.shape == z0.shape for z in solution.trajectory)


@pytest.mark.parametrize("gradient", [ti.Implicit(), ti.OneStep(), ti.NeumannPhantom(), ti.Unrolled()])
@pytest.mark.parametrize("backward", [True, False])
def test_a_solve_leaves_memory_when_it_is_dropped(gradient, backward):
    """And does not wait for Python's search for cycles, which does not know how large tensors are."""

    class Map:
        def __init__(self):
            self.weight = (0.1 * torch.ones(4, 4)).requires_grad_()

        def __call__(self, z, x):
            return torch.tanh(z @ self.weight + x)

    f, x = Map(), torch.randn(3, 4, requires_grad=True)
    known = weakref.ref(f)
    gc.disable()
    try:
        solution = ti.solve(FixedPoint(f), torch.zeros(3, 4), x, gradient=gradient)
        if backward:
            torch.autograd.grad(solution.value.sum(), [f.weight, x])
        del solution, f
        assert known() is None
    finally:
        gc.enable()


class TestLeavesSeenByAutograd:
    """Where autograd sees the steps, a state of several leaves goes from one call to the next as it was returned."""

    SEEN = ({"gradient": ti.OneStep()}, {"gradient": ti.Unrolled()}, {"gradient": ti.UnrolledPhantom(damping=1.0)})

    @pytest.mark.parametrize("options", SEEN)
    def test_values_and_gradients_are_those_of_one_flat_state(self, options):
        w = torch.randn(6, 6, dtype=torch.float64).mul_(0.2).requires_grad_()
        x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)

        def parts(z, x):
            return tuple(torch.tanh(torch.cat(z, dim=1) @ w + x).split(3, dim=1))

        def flat(z, x):
            return torch.tanh(z @ w + x)

        found = []
        for f, z0 in ((parts, (torch.zeros_like(x[:, :3]),) * 2), (flat, torch.zeros_like(x))):
            solution = ti.solve(ti.FixedPoint(f), z0, x, solver=ti.FixedPointIteration(steps=4), **options)
            value = torch.cat(solution.value, dim=1) if f is parts else solution.value
            grads = torch.autograd.grad(value.sin().sum(), (w, x))
            assert solution.adjoint is not None
            found.append((value, *grads, solution.residual, solution.adjoint.evaluations))
        for a, b in list(zip(*found, strict=True))[:3]:
            torch.testing.assert_close(a, b)
        assert found[0][-1] == found[1][-1]

    @pytest.mark.parametrize("options", SEEN)
    def test_what_the_map_returned_of_its_own_is_copied(self, options):
        own = torch.ones(3, 2, requires_grad=True)
        buffer = torch.ones(3, 2)
        for leaf in (own, buffer):
            solver = ti.FixedPointIteration(steps=2)
            f = lambda z, leaf=leaf: (0.5 * z[0] * own, leaf)  # noqa: E731
            solution = ti.solve(ti.FixedPoint(f), (torch.ones(3, 2), torch.ones(3, 2)), solver=solver, **options)
            with torch.no_grad():
                solution.value[1].zero_()
            assert leaf.eq(1).all()
