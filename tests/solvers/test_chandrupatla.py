"""Bracketed roots of one unknown, beside SciPy's Brent where it is installed."""

from __future__ import annotations

import math

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, vmap

import torchimplicit as ti
from torchimplicit import Chandrupatla, FixedPoint, Minimum, Root, Status

F64 = torch.float64


def column(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=F64)[:, None]


CASES = {
    "cube": (lambda z: z**3 - 2, 0.0, 3.0, 2 ** (1 / 3)),
    "cosine": (lambda z: torch.cos(z) - z, 0.0, 2.0, 0.7390851332151607),
    "steep": (lambda z: torch.exp(z) - 1e3, -5.0, 20.0, math.log(1e3)),
    "falling": (lambda z: 1 - z.exp(), -3.0, 5.0, 0.0),
    "flat ends": (lambda z: torch.atan(z - 3) + 1e-3 * (z - 3), -1e4, 1e3, 3.0),
    "triple": (lambda z: (z - 1) ** 3, 0.0, 3.3, 1.0),
    "tiny": (lambda z: z - 1e-12, -1.0, 1.0, 1e-12),
    "infinite at a bound": (lambda z: torch.log(z) + 5, 0.0, 10.0, math.exp(-5)),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("place", [0.0, 0.4, 3.0])
def test_finds_the_root_wherever_it_starts(case, place):
    f, low, high, root = case
    solver = Chandrupatla(low=low, high=high)
    found = ti.solve(Root(f), column(low + place * (high - low)), solver=solver)
    assert found.converged.all()
    assert abs(float(found.value) - root) <= 1e-9 * max(abs(root), 1e-3)
    assert found.steps.max() <= (110 if root == 1.0 else 20)


@pytest.mark.parametrize("rowwise", [False, True])
def test_a_batch_with_bounds_of_its_own(rowwise):
    c = column(1.0, 2.0, 30.0, -400.0, 5e3).requires_grad_()
    solver = Chandrupatla(low=-100.0, high=torch.tensor([3.0, 100.0, 5.0, 0.0, 50.0]))
    found = ti.solve(Root(lambda z, c: z**3 + z - c, rowwise=rowwise), torch.zeros(5, 1, dtype=F64), c, solver=solver)
    assert found.converged.all()
    (slope,) = torch.autograd.grad(found.value.sum(), c)
    torch.testing.assert_close(slope, 1 / (3 * found.value.detach() ** 2 + 1), rtol=1e-8, atol=1e-12)
    for i in range(5):
        alone = Chandrupatla(low=-100.0, high=float(solver.high[i]))
        one = ti.solve(Root(lambda z, c: z**3 + z - c), torch.zeros(1, 1, dtype=F64), c[i : i + 1], solver=alone)
        assert one.steps[0] == found.steps[i]


def solved(c):
    solver = Chandrupatla(low=-10.0, high=10.0)
    return ti.solve(Root(lambda z, c: z**3 + z - c), torch.zeros_like(c), c, solver=solver).value


def test_derivatives():
    c = column(1.0, 5.0, -3.0).requires_grad_()
    assert gradcheck(solved, c, check_forward_ad=True)
    assert gradgradcheck(solved, c)


def test_under_vmap():
    c = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=F64)[..., None]
    torch.testing.assert_close(vmap(solved)(c), torch.stack([solved(one) for one in c]))
    slope = vmap(grad(lambda c: solved(c).sum()))(c)
    torch.testing.assert_close(slope, 1 / (3 * vmap(solved)(c) ** 2 + 1), rtol=1e-8, atol=1e-10)


def test_a_fixed_point():
    found = ti.solve(FixedPoint(torch.cos), column(0.0), solver=Chandrupatla(low=0.0, high=1.0))
    assert abs(float(found.value) - 0.7390851332151607) < 1e-9


def test_no_more_evaluations_than_brent():
    optimize = pytest.importorskip("scipy.optimize")
    ours = theirs = 0.0
    for name, (f, low, high, _) in CASES.items():
        if name in ("triple", "infinite at a bound"):
            continue
        ours += ti.solve(Root(f), column(low), solver=Chandrupatla(low=low, high=high)).evaluations
        _, figures = optimize.brentq(lambda x, f=f: f(column(x)).item(), low, high, rtol=1e-12, full_output=True)
        theirs += figures.function_calls
    assert ours <= theirs


def test_a_pole_is_no_root():
    with pytest.warns(ti.ConvergenceWarning, match="grew without bound"):
        found = ti.solve(
            Root(lambda z: 1 / (z - 0.3)), column(0.5), solver=Chandrupatla(low=0.0, high=1.0), throw=False
        )
    assert found.status.tolist() == [Status.NONFINITE]


@pytest.mark.parametrize("rowwise", [False, True])
def test_a_sample_without_a_change_of_sign_stops_alone(rowwise):
    c = column(1.0, -1.0, 2.0).requires_grad_()
    with pytest.warns(ti.ConvergenceWarning, match="the same sign at both bounds"):
        found = ti.solve(
            Root(lambda z, c: z**2 - c, rowwise=rowwise),
            column(0.0, 1.0, 0.0),
            c,
            solver=Chandrupatla(low=0.0, high=2.0),
        )
    assert found.status.tolist() == [Status.CONVERGED, Status.BREAKDOWN, Status.CONVERGED]
    torch.testing.assert_close(found.value, column(1.0, 0.0, 2**0.5))  # of the bad one, the better end
    with pytest.warns(ti.ConvergenceWarning):
        (slope,) = torch.autograd.grad(found.value.sum(), c)
    torch.testing.assert_close(slope[[0, 2]], column(0.5, 0.5 / 2**0.5))


def test_nan_at_a_bound():
    solver = Chandrupatla(low=torch.tensor([-1.0, 0.5]), high=2.0)
    with pytest.warns(ti.ConvergenceWarning):
        found = ti.solve(Root(torch.log), column(0.5, 0.7), solver=solver, throw=False)
    assert found.status.tolist() == [Status.NONFINITE, Status.CONVERGED]
    torch.testing.assert_close(found.value, column(0.5, 1.0))
    with pytest.raises(ti.SolveError):
        ti.solve(Root(torch.log), column(0.5, 0.7), solver=solver)


def test_a_start_between_the_bounds_may_show_the_change_of_sign():
    found = ti.solve(Root(lambda z: (z - 1) ** 2 - 0.25), column(1.2), solver=Chandrupatla(low=0.0, high=3.0))
    assert found.converged.all()
    assert abs(abs(float(found.value) - 1) - 0.5) < 1e-9


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"low": 1.0, "high": 1.0}, ValueError),
        ({"low": 0.0, "high": math.inf}, ValueError),
        ({"low": torch.zeros(2), "high": torch.ones(3)}, ValueError),
        ({"low": torch.zeros(2, 1), "high": 1.0}, ValueError),
        ({"low": "0", "high": 1.0}, TypeError),
    ],
)
def test_bad_bounds(options, error):
    with pytest.raises(error):
        Chandrupatla(**options)


def test_what_it_is_not_for():
    solver = Chandrupatla(low=0.0, high=1.0)
    with pytest.raises(ValueError, match="one unknown per sample"):
        ti.solve(Root(torch.sin), torch.ones(2, 3), solver=solver)
    with pytest.raises(ValueError, match="LBFGS"):
        ti.solve(Minimum(lambda z: z.square().sum(1)), torch.ones(2, 1), solver=solver)
    with pytest.raises(ti.UnsupportedDerivativeError, match="Implicit"):
        ti.solve(
            Root(lambda z, c: z - c), column(0.0), column(0.5).requires_grad_(), solver=solver, gradient=ti.Unrolled()
        )
