"""The gradient of samples that were not solved, against dense matrices."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import torchimplicit as ti
from torchimplicit.testing import GradientSuite

F64 = torch.float64
BATCH, DIM = 5, 4
HARD = (1, 3)


class TestSolved(GradientSuite):
    """Where all are solved, it is what it wraps."""

    def make(self) -> ti.WhenUnconverged:
        return ti.WhenUnconverged(instead=0.0, above=1e-6)


class TestSolvedByTwo(GradientSuite):
    second_order = False

    def make(self) -> ti.WhenUnconverged:
        return ti.WhenUnconverged(instead=ti.OneStep(), above=1e-6)

    test_second_derivatives_by_create_graph = None  # they are those of Implicit where every sample is solved


@pytest.fixture(autouse=True)
def quiet() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ti.ConvergenceWarning)
        yield


def f(z: Tensor, x: Tensor, w: Tensor, rate: Tensor) -> Tensor:
    return torch.sin(rate * (z @ w) + x)


@pytest.fixture
def data() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    w = torch.linalg.qr(torch.randn(DIM, DIM, dtype=F64, generator=generator)).Q
    x = torch.randn(BATCH, DIM, dtype=F64, generator=generator)
    rate = torch.full((BATCH, 1), 0.2, dtype=F64)
    rate[list(HARD)] = 0.97
    return x.requires_grad_(), w.requires_grad_(), rate


def solved(gradient: Any, data: Any, rowwise: bool = False, **options: Any) -> ti.Solution:
    solver = ti.FixedPointIteration(**{"rtol": 1e-10, "max_steps": 18, **options})
    z0 = torch.full((BATCH, DIM), 0.1, dtype=F64)
    return ti.solve(ti.FixedPoint(f, rowwise=rowwise), z0, *data, solver=solver, gradient=gradient)


def by_hand(instead: Any, solution: ti.Solution, data: Any, u: Tensor) -> tuple[Tensor, ...]:
    x, w, rate = data
    z = solution.value.detach()
    if isinstance(instead, ti.UnrolledPhantom):  # its steps are in the value
        z = solved(ti.Implicit(), data).value.detach()
    J = torch.func.vmap(torch.func.jacrev(lambda z, x, rate: f(z, x, w.detach(), rate)))(z, x.detach(), rate)
    eye = torch.eye(DIM, dtype=F64)
    g = torch.linalg.solve((eye - J).mT, u)
    own = u if isinstance(instead, ti.OneStep) else None
    if isinstance(instead, ti.NeumannPhantom):
        B = instead.damping * J.mT + (1 - instead.damping) * eye
        own = instead.damping * sum(torch.linalg.matrix_power(B, k) for k in range(instead.steps)) @ u[:, :, None]
        own = own[:, :, 0]
    if isinstance(instead, float):
        own = instead * g
    hard = torch.zeros(BATCH, 1, dtype=torch.bool)
    hard[list(HARD)] = True
    if isinstance(instead, ti.UnrolledPhantom):
        h = z
        for _ in range(instead.steps):
            h = (1 - instead.damping) * h + instead.damping * f(h, x, w, rate)
        ends = (f(z, x, w, rate) * torch.where(hard, 0, g)).sum() + (h * torch.where(hard, u, 0)).sum()
        return torch.autograd.grad(ends, (x, w))
    return torch.autograd.grad(f(z, x, w, rate), (x, w), torch.where(hard, own, g))


@pytest.mark.parametrize("rowwise", [False, True])
@pytest.mark.parametrize(
    "instead", [0.0, 0.25, 1.0, ti.OneStep(), ti.NeumannPhantom(steps=3), ti.UnrolledPhantom(steps=2)], ids=str
)
def test_each_sample_gets_the_gradient_that_is_its_due(instead: Any, rowwise: bool, data: Any) -> None:
    u = torch.randn(BATCH, DIM, dtype=F64)
    solution = solved(ti.WhenUnconverged(instead=instead), data, rowwise)
    assert solution.fell_short.nonzero().flatten().tolist() == list(HARD)
    given = torch.autograd.grad(solution.value, data[:2], u)
    for one, other in zip(given, by_hand(instead, solution, data, u), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-9)
    assert solution.adjoint is not None


def test_a_line_of_its_own(data: Any) -> None:
    """The residual draws it, be the samples converged or not, and after a given number of steps too."""
    u = torch.randn(BATCH, DIM, dtype=F64)
    for options in ({"max_steps": 60}, {"steps": 60, "rtol": None, "max_steps": 200}):
        loose = solved(ti.Implicit(), data, **options)
        line = float(loose.residual.median())
        solution = solved(ti.WhenUnconverged(instead=0.0, above=line), data, **options)
        (gx,) = torch.autograd.grad(solution.value, data[0], u)
        assert torch.equal(gx.abs().sum(dim=1) == 0, loose.residual > line)
    with pytest.raises(ValueError, match="above"):
        solved(ti.WhenUnconverged(), data, steps=5, rtol=None, max_steps=200)


@pytest.mark.parametrize("instead", [ti.Implicit(), ti.NeumannPhantom(steps=2), ti.UnrolledPhantom(steps=2)], ids=str)
def test_another_estimator_begins_where_given_steps_have_ended(instead: Any, data: Any) -> None:
    """Of one step the estimate is that of the last step; the other estimator takes the value that this leads to."""
    u, z0 = torch.randn(BATCH, DIM, dtype=F64), torch.full((BATCH, DIM), 0.1, dtype=F64)
    gradient = ti.WhenUnconverged(gradient=ti.OneStep(), instead=instead, above=1e-3)
    solver = ti.FixedPointIteration(steps=12)
    solution = ti.solve(ti.FixedPoint(f), z0, *data, solver=solver, gradient=gradient)
    one, other = (
        ti.solve(ti.FixedPoint(f), z0, *data, solver=solver, gradient=each).value for each in (ti.OneStep(), instead)
    )
    hard = (solution.residual > 1e-3)[:, None]
    assert hard.any()
    assert not hard.all()
    expected = torch.where(hard, other, one)
    torch.testing.assert_close(solution.value, expected, rtol=0, atol=1e-15)
    found, known = (torch.autograd.grad((z * u).sum(), data[:2], retain_graph=True) for z in (solution.value, expected))
    torch.testing.assert_close(found, known, rtol=1e-10, atol=1e-13)
    with pytest.raises(ti.UnsupportedDerivativeError, match="OneStep"):
        torch.func.grad(
            lambda x: ti.solve(ti.FixedPoint(f), z0, x, *data[1:], solver=solver, gradient=gradient).value.sum()
        )(data[0].detach())


def test_what_is_dropped_does_not_come_back_as_nan(data: Any) -> None:
    solution = solved(ti.WhenUnconverged(), data)
    u = torch.ones(BATCH, DIM, dtype=F64)
    u[list(HARD)] = torch.nan
    given = torch.autograd.grad(solution.value, data[:2], u)
    assert all(g.isfinite().all() for g in given)


def test_higher_orders_and_transforms(data: Any) -> None:
    x, w, rate = data
    for instead in (0.0, 0.5, ti.UnrolledPhantom(steps=2)):
        gradient = ti.WhenUnconverged(instead=instead)

        def loss(x: Tensor, rate: Tensor = rate, gradient: Any = gradient) -> Tensor:
            solver = ti.FixedPointIteration(rtol=1e-10, max_steps=18)
            value = ti.solve(
                ti.FixedPoint(f), torch.full_like(x, 0.1), x, w, rate, solver=solver, gradient=gradient
            ).value
            return value.square().sum()

        (first,) = torch.autograd.grad(loss(x), x, create_graph=True)
        torch.testing.assert_close(torch.func.grad(loss)(x.detach()), first)
        way = torch.randn_like(x)
        slope = torch.func.jvp(loss, (x.detach(),), (way,))[1]
        torch.testing.assert_close(slope, (first * way).sum())
        both = torch.func.vmap(torch.func.grad(loss))(torch.stack((x.detach(), x.detach())))
        torch.testing.assert_close(both[1], first)
        (second,) = torch.autograd.grad((first * way).sum(), x)
        easy = [i for i in range(BATCH) if i not in HARD]

        def exact(x: Tensor) -> Tensor:
            return solve_exactly(x, w, rate).square().sum()

        right = torch.autograd.functional.hvp(exact, x.detach(), way)[1]
        torch.testing.assert_close(second[easy], right[easy], rtol=1e-6, atol=1e-8)
        if instead == 0.0:
            assert (second[list(HARD)] == 0).all()


def solve_exactly(x: Tensor, w: Tensor, rate: Tensor) -> Tensor:
    z = torch.full_like(x, 0.1)
    for _ in range(60):
        z = f(z, x, w, rate)
    return z


def test_a_whole_system_and_a_compiled_solve(data: Any) -> None:
    x, w, rate = data
    for options in ({}, {"compile": True}):
        solution = ti.solve(
            ti.FixedPoint(f, batched=bool(options)),
            torch.zeros(BATCH, DIM, dtype=F64),
            x,
            w,
            rate,
            solver=ti.FixedPointIteration(rtol=1e-10, max_steps=18),
            gradient=ti.WhenUnconverged(),
            **options,
        )
        (gx,) = torch.autograd.grad(solution.value.sum(), x)
        chosen = solution.fell_short.expand(BATCH)
        assert torch.equal(gx.abs().sum(dim=1) == 0, chosen)


def test_where_all_are_solved_nothing_is_evaluated(data: Any) -> None:
    calls = []

    def counted(z: Tensor, *args: Tensor) -> Tensor:
        calls.append(1)
        return f(z, *args)

    counts = []
    for gradient in (ti.Implicit(), ti.WhenUnconverged(instead=ti.OneStep())):
        calls.clear()
        ti.solve(
            ti.FixedPoint(counted), torch.zeros(BATCH, DIM, dtype=F64), *data, gradient=gradient
        ).value.sum().backward()
        counts.append(len(calls))
    assert counts[0] == counts[1]


def test_refuses() -> None:
    for wrong in (-0.1, 1.5):
        with pytest.raises(ValueError, match="must lie in"):
            ti.WhenUnconverged(instead=wrong)
    with pytest.raises(TypeError, match="estimator"):
        ti.WhenUnconverged(instead="drop")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="UnrolledPhantom"):
        ti.WhenUnconverged(instead=ti.Unrolled())
    with pytest.raises(ValueError, match="Minimum"):
        ti.solve(
            ti.FixedPoint(lambda z: 0.5 * z), torch.ones(2, 2), gradient=ti.WhenUnconverged(instead=ti.DampedImplicit())
        )
