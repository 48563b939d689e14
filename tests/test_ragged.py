"""Problems of different size as one batch: each as it would be alone."""

from __future__ import annotations

import pytest
import torch

import torchimplicit as ti
from torchimplicit import CG, LBFGS, MINRES, Dense, Implicit, LinearEquality, Minimum, Ragged

F64 = torch.float64
SIZES = (3, 7, 5)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


TARGETS = [normal(n, seed=n) for n in SIZES]
WEIGHTS = [normal(n, seed=n + 10).abs() + 0.2 for n in SIZES]
METRICS = [torch.eye(n, dtype=F64) + 0.1 * torch.ones(n, n, dtype=F64) for n in SIZES]
ENERGIES = [
    lambda p, theta, t=target: ((p - theta * t) ** 2).sum() + 0.1 * (theta * p).tanh().square().sum()
    for target in TARGETS
]


def starts():
    return [torch.zeros(n, dtype=F64) for n in SIZES]


@pytest.mark.parametrize("estimator", [Implicit(), ti.EquilibriumPropagation(nudge=1e-3)], ids=["implicit", "eqprop"])
@pytest.mark.parametrize("linear_solver", [None, Dense(), MINRES(), CG()], ids=["default", "dense", "minres", "cg"])
@pytest.mark.parametrize("eliminate", [False, True], ids=["projected", "eliminated"])
@pytest.mark.parametrize("metric", [None, METRICS], ids=["own", "metric"])
def test_minima_and_gradients_are_those_of_each_alone(metric, eliminate, linear_solver, estimator):
    if isinstance(estimator, Implicit):
        estimator = Implicit(linear_solver=linear_solver)
    elif linear_solver is not None:
        pytest.skip("has no linear solver")
    theta = torch.tensor(1.3, dtype=F64, requires_grad=True)
    total = torch.tensor([1.0, 2.0, -1.0], dtype=F64, requires_grad=True)
    ragged = Ragged.of(starts())
    solver = LBFGS(rtol=0.0, atol=1e-12)
    problem = ragged.minimum(ENERGIES, WEIGHTS, total, metric, eliminate=eliminate)
    solution = ti.solve(problem, ragged.pack(starts()), theta, solver=solver, gradient=estimator)
    assert solution.converged.all()
    loss = sum((p * t).sum() + p.square().sum() for p, t in zip(ragged.unpack(solution.value), TARGETS, strict=True))
    found = torch.autograd.grad(loss, (theta, total))

    alone = 0.0
    for i, p in enumerate(ragged.unpack(solution.value)):
        constraint = LinearEquality(WEIGHTS[i], total[i])
        one = Minimum(ENERGIES[i], constraint, batched=False)
        expected = ti.solve(one, starts()[i], theta, solver=solver).value
        assert (p - expected).abs().max() < 1e-9
        alone = alone + (expected * TARGETS[i]).sum() + expected.square().sum()
    exact = torch.autograd.grad(alone, (theta, total))
    for got, want in zip(found, exact, strict=True):
        assert torch.allclose(got, want, rtol=1e-5 if isinstance(estimator, ti.EquilibriumPropagation) else 1e-8)
    assert not solution.value[0, 3:].any()


def test_each_stops_at_its_own_tolerance():
    hard = [lambda p, s=s: (torch.logspace(0, s, len(p), dtype=F64) * (p - 1) ** 2).sum() for s in (0, 3, 1)]
    ragged = Ragged(SIZES)
    solution = ti.solve(ragged.minimum(hard), ragged.pack(starts()))
    assert solution.converged.all()
    assert solution.steps[0] < solution.steps[2] < solution.steps[1]


def test_fixed_points_and_roots():
    matrices = [0.4 * torch.linalg.qr(normal(n, n, seed=n)).Q for n in SIZES]
    x = torch.tensor(0.7, dtype=F64, requires_grad=True)
    maps = [lambda p, x, m=m, t=t: torch.tanh(m @ p + x * t) for m, t in zip(matrices, TARGETS, strict=True)]
    roots = [lambda p, x, f=f: p - f(p, x) for f in maps]
    ragged = Ragged(SIZES)
    tight = {"rtol": 0.0, "atol": 1e-12}
    start = ragged.pack(starts())
    fixed = ti.solve(ragged.fixed_point(maps), start, x, solver=ti.Anderson(**tight)).value
    root = ti.solve(ragged.root(roots), start, x, solver=ti.NewtonKrylov(**tight)).value
    assert (fixed - root).abs().max() < 1e-10
    slopes = []
    for value in (fixed, root):
        slopes.append(torch.autograd.grad(value.square().sum(), x, create_graph=True)[0])
        slopes.append(torch.autograd.grad(slopes[-1], x)[0])
    assert torch.allclose(slopes[0], slopes[2])
    assert torch.allclose(slopes[1], slopes[3])
    alone = [
        ti.solve(ti.FixedPoint(f, batched=False), s, x, solver=ti.Anderson(**tight)).value
        for f, s in zip(maps, starts())
    ]
    assert torch.allclose(ragged.pack(alone), fixed, atol=1e-10)


def test_a_captured_module_is_differentiated():
    net = torch.nn.Linear(1, 1, dtype=F64)
    energies = [lambda p, t=t: ((p - t) ** 2).sum() + net(p[:, None]).square().sum() for t in TARGETS]
    ragged = Ragged(SIZES)
    value = ti.solve(ragged.minimum(energies), ragged.pack(starts())).value
    value.square().sum().backward()
    assert net.weight.grad is not None
    assert float(net.weight.grad.abs()) > 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda r: Ragged(()), "at least one"),
        (lambda r: Ragged.of([torch.zeros(2, 2)]), "flatten"),
        (lambda r: r.pack([torch.zeros(3)]), "3 problems, but 1 states"),
        (lambda r: r.pack([torch.zeros(3)] * 3), r"state 1 has shape \(3,\)"),
        (lambda r: r.unpack(torch.zeros(3, 6)), r"shape \(3, 7\)"),
        (lambda r: r.minimum(ENERGIES[:2]), "2 energies"),
        (lambda r: r.minimum(ENERGIES, WEIGHTS), "both"),
        (lambda r: r.minimum(ENERGIES, WEIGHTS, [1.0]), "1 totals"),
        (lambda r: r.metric([torch.eye(3)] * 3), "matrix 1"),
    ],
)
def test_what_does_not_fit_is_said(call, message):
    with pytest.raises(ValueError, match=message):
        call(Ragged(SIZES))
