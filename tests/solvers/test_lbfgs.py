from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import torchimplicit as ti
from torchimplicit import LBFGS, FixedPoint, LinearEquality, Minimum, Status
from torchimplicit.solvers import Solver
from torchimplicit.testing.solver_suite import HostReads, SolverSuite, Spy


class TestLBFGS(SolverSuite):
    kind = "energy"
    unrolled = False
    reads = 2.5  # one per trial of the line search, one per step
    row_cost = 1.8  # steps with more than one trial, and a product with the Hessian before the first and after the last

    def make(self, **options: Any) -> Solver:
        return LBFGS(**options)


def rotated(dim: int, eigenvalues: torch.Tensor) -> torch.Tensor:
    """The symmetric matrix of such eigenvalues, in a random basis."""
    turn = torch.linalg.qr(torch.randn(dim, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(dim))).Q
    return turn @ torch.diag(eigenvalues) @ turn.T


def minimize(energy: Any, z0: torch.Tensor, *args: Any, constraint: Any = None, **options: Any) -> ti.Solution:
    return ti.solve(Minimum(energy, constraint=constraint), z0, *args, solver=LBFGS(**options), throw=False)


@pytest.mark.parametrize(("cond", "most"), [(1e2, 80), (1e3, 100), (1e4, 120)])
def test_cost_on_a_nearly_quadratic_energy(cond, most):
    hessian = rotated(50, torch.linspace(1 / cond, 1, 50, dtype=torch.float64))
    b = torch.randn(1, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def energy(z, b):
        return (0.5 * (z @ hessian) * z - b * z + 0.01 * torch.sqrt(1 + z**2)).sum(1)

    solution = minimize(energy, torch.zeros_like(b), b, rtol=1e-8)
    assert solution.converged.all(), solution.summary()
    assert solution.evaluations <= most


@pytest.mark.parametrize("cond", [1e2, 1e3])
def test_converges_where_energies_differ_by_less_than_rounding(cond):
    # eigenvalues in geometric progression; at the end the slopes alone tell where to go
    hessian = rotated(50, torch.logspace(0, -math.log10(cond), 50, dtype=torch.float64))
    b = torch.randn(2, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    solution = minimize(
        lambda z, b: (0.5 * (z @ hessian) * z - b * z).sum(1), torch.zeros_like(b), b, rtol=1e-8, max_steps=2000
    )
    assert solution.converged.all(), solution.summary()
    # the largest eigenvalue is 1: the terms of the gradient are at most as large as the state
    assert ((solution.value @ hessian - b).norm(dim=1) <= 1.1e-8 * solution.value.norm(dim=1)).all()
    assert solution.evaluations <= 1.2 * solution.steps.max() + 20


def test_the_rosenbrock_valley():
    z0 = torch.tensor([[-1.2, 1.0], [2.0, 2.0], [0.0, 0.0]], dtype=torch.float64)
    solution = minimize(lambda z: (1 - z[:, 0]) ** 2 + 100 * (z[:, 1] - z[:, 0] ** 2) ** 2, z0)
    torch.testing.assert_close(solution.value, torch.ones_like(z0))
    assert solution.evaluations <= 100


# Energies that are bad in some way: what becomes of a solve from ones, and the most evaluations that it may take.
BAD = {
    "nan": (lambda z: z.sum(1) * torch.nan, Status.NONFINITE, 2),
    "infinite": (lambda z: z.sum(1) + torch.inf, Status.NONFINITE, 2),
    "nan where it would go": (
        lambda z: (torch.where(z.sum(1) < 2.9, torch.nan, 1.0)) * z.square().sum(1),
        Status.NONFINITE,
        500,
    ),
    "linear": (lambda z: z.sum(1), Status.MAX_STEPS, 1000),
    "concave": (lambda z: -z.square().sum(1), Status.NONFINITE, 50),
    "quartic downward": (lambda z: -z.pow(4).sum(1), Status.NONFINITE, 50),
    "a wall": (lambda z: torch.log(z).sum(1), None, 500),
    "a jump": (lambda z: z.square().sum(1) + torch.where(z[:, 0] > 0.3, 0.0, 10.0), Status.BREAKDOWN, 1000),
    "kinks": (lambda z: (z - 0.1).abs().sum(1), None, 1000),
    "a gradient of another function": (lambda z: z.sum(1) - 2 * z.detach().sum(1), Status.BREAKDOWN, 50),
    "noise": (lambda z: z.square().sum(1) + 1e-3 * torch.sin(1e9 * z.detach()).sum(1), None, 1000),
    "constant": (lambda z: 0 * z.sum(1), Status.CONVERGED, 1),
    "flat at the start": (lambda z: (z - 1).pow(4).sum(1), Status.CONVERGED, 1),
}


@pytest.mark.parametrize(("energy", "status", "most"), BAD.values(), ids=BAD)
@pytest.mark.filterwarnings("ignore::torchimplicit.ConvergenceWarning")
def test_a_bad_energy_ends_the_search(energy, status, most):
    spy = Spy(energy)
    solution = minimize(spy, torch.ones(2, 3, dtype=torch.float64), max_steps=40)
    assert len(spy.seen) <= most + 2
    assert torch.isfinite(solution.value).all()
    if status is not None:
        assert (solution.status == status).all(), solution.summary()


@pytest.mark.filterwarnings("ignore::torchimplicit.ConvergenceWarning")
def test_a_bad_energy_does_not_disturb_the_others():
    def energy(z, bend, tilt):
        stretch = torch.tensor([1.0, 10.0, 100.0], dtype=z.dtype)
        return bend * (stretch * (z - 1) ** 2 + torch.cos(z)).sum(1) + tilt * z.sum(1)

    z0 = torch.zeros(4, 3, dtype=torch.float64)
    bend = torch.tensor([1.0, torch.nan, -1.0, 0.0], dtype=torch.float64)
    tilt = torch.tensor([0.0, 0.0, 0.0, 1.0], dtype=torch.float64)
    alone = minimize(energy, z0[:1], bend[:1], tilt[:1])
    solution = minimize(energy, z0, bend, tilt, max_steps=60)
    expected = [Status.CONVERGED, Status.NONFINITE, Status.NONFINITE, Status.MAX_STEPS]
    assert solution.status.tolist() == expected
    assert solution.steps[0] == alone.steps[0]
    torch.testing.assert_close(solution.value[:1], alone.value)


@pytest.mark.parametrize("where", ["energy", "state"])
def test_every_sample_has_its_own_scale(where):
    scale = torch.logspace(-6, 6, 7, dtype=torch.float64)
    stretch = torch.tensor([1.0, 10.0, 100.0], dtype=torch.float64)

    def energy(z, scale):
        y = z * scale[:, None] if where == "state" else z
        out = (stretch * (y - 1) ** 2 + torch.cos(y)).sum(1)
        return scale * out if where == "energy" else out

    solution = minimize(energy, torch.zeros(7, 3, dtype=torch.float64), scale)
    assert solution.converged.all(), solution.summary()
    y = solution.value * scale[:, None] if where == "state" else solution.value
    torch.testing.assert_close(y, y[3].expand(7, 3), rtol=1e-8, atol=0.0)
    assert solution.steps.max() <= 25


@pytest.mark.parametrize("plane", [False, True], ids=["free", "on a plane"])
@pytest.mark.parametrize("start", [0.0, 0.3])
@pytest.mark.parametrize(
    ("dtype", "units"), [(torch.float64, (2.0**-40, 2.0**40)), (torch.float32, (2.0**-20, 2.0**20))]
)
def test_a_leaf_in_another_unit_takes_the_same_steps(dtype, units, start, plane):
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(7, 7, generator=generator, dtype=torch.float64)
    hessian = (root @ root.T / 7 + 0.3 * torch.eye(7)).to(dtype)
    b = torch.randn(3, 7, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.linspace(1, 2, 7, dtype=dtype)

    def steps_and_value(unit):
        def energy(z, b):
            y = torch.cat((z["a"] / unit, z["b"]), dim=1)
            return 0.5 * ((y @ hessian) * y).sum(1) + 0.1 * y.pow(4).sum(1) - (b * y).sum(1)

        z0 = {"a": torch.full((3, 3), start * unit, dtype=dtype), "b": torch.full((3, 4), start, dtype=dtype)}
        equality = LinearEquality({"a": weight[:3] / unit, "b": weight[3:]}, 2.0)
        if plane:  # on it from the start, since the nearest point of a plane is another one in another unit
            z0 = {
                "a": torch.full((3, 3), 2 / weight.sum(), dtype=dtype) * unit,
                "b": torch.full((3, 4), 2 / weight.sum(), dtype=dtype),
            }
        solution = minimize(energy, z0, b, constraint=equality if plane else None)
        assert solution.converged.all(), solution.summary()
        return solution.steps, torch.cat((solution.value["a"] / unit, solution.value["b"]), dim=1)

    steps, value = steps_and_value(1.0)
    for unit in units:
        others, other = steps_and_value(unit)
        assert (others - steps).abs().max() <= (5 if plane else 0)  # the projected gradient is another one
        torch.testing.assert_close(other, value, rtol=1e-3 if dtype == torch.float32 else 1e-8, atol=1e-6)


@pytest.mark.parametrize(("dtype", "offset"), [(torch.float64, 1e8), (torch.float64, -1e12), (torch.float32, 1e8)])
def test_a_large_constant_in_the_energy(dtype, offset):
    stretch = torch.tensor([1.0, 10.0, 100.0], dtype=dtype)
    solution = minimize(
        lambda z: offset + (stretch * (z - 1) ** 2 + z**4).sum(1), torch.zeros(2, 3, dtype=dtype), rtol=1e-5
    )
    assert solution.converged.all(), solution.summary()
    assert solution.evaluations <= 40


def test_reads_the_device_once_a_trial():
    x = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with HostReads() as reads:
        solution = minimize(lambda z, x: ((z - x) ** 2 + 3 * torch.cosh(z)).sum(1), torch.zeros_like(x), x)
    trials = int(solution.evaluations) - 1
    assert reads.count <= trials + int(solution.steps.max()) + 6


def test_stays_on_the_constraint():
    weight = torch.rand(3, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    stretch = torch.logspace(0, 2, 20, dtype=torch.float64)
    solution = minimize(
        lambda z: (stretch * (z - 1) ** 2 + z**4).sum(1),
        torch.zeros(3, 20, dtype=torch.float64),
        constraint=LinearEquality(weight, 10.0),
        keep_trajectory=True,
        max_steps=2000,
    )
    assert solution.converged.all(), solution.summary()
    assert all(((weight * z).sum(1) - 10).abs().max() <= 1e-8 for z in solution.trajectory)


@pytest.mark.parametrize("name", ["memory", "trials"])
def test_refuses_a_wrong_count(name):
    with pytest.raises(ValueError, match=rf"LBFGS\.{name} is 0, and must be at least 1"):
        LBFGS(**{name: 0})


def test_refuses_a_problem_without_an_energy():
    with pytest.raises(ValueError, match="LBFGS needs an energy, and only Minimum has one: for FixedPoint take"):
        ti.solve(FixedPoint(lambda z: z / 2), torch.ones(2, 3), solver=LBFGS())
