"""Minima on sets: against KKT systems, closed forms and finite differences; what is inconsistent; every estimator."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, hessian, jacrev, vmap

import torchimplicit as ti
from torchimplicit import (
    Box,
    L2Ball,
    LinearEqualities,
    LinearEquality,
    LinearInequalities,
    Minimum,
    NonNegative,
    Projection,
    Proximal,
    Simplex,
)
from torchimplicit.constraints import clamped

F64 = torch.float64
BATCH, DIM = 3, 8


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


HESSIAN = normal(BATCH, DIM, DIM) @ normal(BATCH, DIM, DIM).mT / DIM + 0.2 * torch.eye(DIM, dtype=F64)
SLOPE = 2 * normal(BATCH, DIM, seed=1)
G, H = normal(5, DIM, seed=2), normal(5, seed=3).abs() + 0.1
A, B = normal(2, DIM, seed=4), 0.3 * normal(2, seed=5)
W = normal(DIM, seed=6).abs() + 0.5


def energy(z: Tensor, slope: Tensor) -> Tensor:
    hessian = HESSIAN if len(z) == BATCH else HESSIAN[:1]
    return 0.5 * (z[:, None, :] @ hessian @ z[:, :, None])[:, 0, 0] + (slope * z).sum(1)


def solved(constraint, slope: Tensor = SLOPE, **options) -> ti.Solution:
    return ti.solve(Minimum(energy, constraint), torch.zeros(len(slope), DIM, dtype=F64), slope, **options)


def as_inequalities(constraint) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The set as ``G z <= h``, ``A z = b``."""
    eye, none = torch.eye(DIM, dtype=F64), torch.zeros(0, DIM, dtype=F64)
    g, h, a, b = none, none[:, 0], none, none[:, 0]
    for part in constraint if isinstance(constraint, tuple) else (constraint,):
        if isinstance(part, (NonNegative, Simplex)):
            g, h = torch.cat((g, -eye)), torch.cat((h, torch.zeros(DIM, dtype=F64)))
        if isinstance(part, Simplex):
            a, b = torch.cat((a, torch.ones(1, DIM, dtype=F64))), torch.cat((b, torch.tensor([part.total], dtype=F64)))
        if isinstance(part, Box):
            bounds = torch.full((DIM,), part.high, dtype=F64), torch.full((DIM,), -part.low, dtype=F64)
            g, h = torch.cat((g, eye, -eye)), torch.cat((h, *bounds))
        if isinstance(part, LinearEquality):
            a, b = torch.cat((a, part.weight[None])), torch.cat((b, torch.tensor([part.total], dtype=F64)))
        if isinstance(part, LinearEqualities):
            a, b = torch.cat((a, part.matrix)), torch.cat((b, part.total))
        if isinstance(part, LinearInequalities):
            g, h = torch.cat((g, part.matrix)), torch.cat((h, part.bound))
    return g, h, a, b


LINEAR = {
    "box": Box(-0.5, 0.7),
    "nonnegative": NonNegative(),
    "simplex": Simplex(2.0),
    "electrons that are nowhere negative": (NonNegative(), LinearEquality(W, 3.0)),
    "box and a plane with weights of both signs": (Box(-1.0, 1.0), LinearEquality(W - 1, 0.3)),
    "equalities": LinearEqualities(A, B),
    "inequalities": LinearInequalities(G, H),
    "both": (LinearInequalities(G, H), LinearEqualities(A, B)),
    "all": (LinearInequalities(G, H), LinearEqualities(A, B), Box(-2.0, 2.0)),
    "two planes": (LinearEquality(W, 1.0), LinearEquality(W.flip(0), 2.0), NonNegative()),
}


@pytest.mark.parametrize("constraint", LINEAR.values(), ids=LINEAR)
def test_the_kkt_conditions_hold(constraint):
    found = solved(constraint)
    assert found.converged.all()
    assert found.steps.max() <= 6
    g, h, a, b = as_inequalities(constraint)
    for i in range(BATCH):
        z = found.value[i]
        gap = g @ z - h
        assert gap.numel() == 0 or gap.max() < 1e-9
        torch.testing.assert_close(a @ z, b, rtol=1e-9, atol=1e-9)
        active = torch.cat((a, g[gap > -1e-9]))
        slope = HESSIAN[i] @ z + SLOPE[i]
        if not len(active):
            assert slope.abs().max() < 1e-9
            continue
        multipliers = torch.linalg.lstsq(active.T, -slope[:, None]).solution[:, 0]
        assert (active.T @ multipliers + slope).abs().max() < 1e-8
        assert (multipliers[len(a) :] > -1e-9).all()


@pytest.mark.parametrize("constraint", LINEAR.values(), ids=LINEAR)
def test_derivatives_are_those_of_the_active_constraints(constraint):
    slope = SLOPE.clone().requires_grad_()
    value = solved(constraint, slope).value
    (got,) = torch.autograd.grad(value.sin().sum(), slope)
    g, h, a, _ = as_inequalities(constraint)
    for i in range(BATCH):
        z = value[i].detach()
        active = torch.cat((a, g[g @ z - h > -1e-9]))
        basis = torch.linalg.svd(active, full_matrices=True).Vh[torch.linalg.matrix_rank(active) :]
        inverse = basis.T @ torch.linalg.solve(basis @ HESSIAN[i] @ basis.T, basis)
        torch.testing.assert_close(got[i], -inverse @ z.cos(), rtol=1e-8, atol=1e-9)


def check(function, *inputs: Tensor) -> None:
    inputs = tuple(t.detach().clone().requires_grad_() for t in inputs)
    assert gradcheck(function, inputs, check_forward_ad=True, fast_mode=True)
    assert gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize(
    ("make", "inputs"),
    [
        (lambda low, high: Box(low, high), (-0.5 * W, normal(BATCH, DIM, seed=7).abs() + 0.1)),
        (Simplex, (torch.tensor([1.0, 2.0, 3.0], dtype=F64),)),
        (lambda w, n: (NonNegative(), LinearEquality(w, n)), (W * (1 + 0.1 * normal(BATCH, DIM)), W[:BATCH])),
        (LinearEqualities, (A, B)),
        (LinearEqualities, (normal(BATCH, 2, DIM, seed=8), normal(BATCH, 2, seed=9))),
        (LinearInequalities, (G, H)),
        (lambda g, h, a, b: (LinearInequalities(g, h), LinearEqualities(a, b)), (G, H + 0.1 * W[:BATCH, None], A, B)),
        (L2Ball, (W[:BATCH] * 0.5, 0.1 * normal(BATCH, DIM))),
    ],
    ids=["box", "simplex", "electrons", "equalities", "equalities each", "inequalities", "both", "ball"],
)
def test_derivatives_in_the_set_itself(make, inputs):
    def function(*inputs: Tensor) -> Tensor:
        return solved(make(*inputs)).value

    check(function, *inputs)


@pytest.mark.parametrize("constraint", [*LINEAR.values(), L2Ball(0.8)], ids=[*LINEAR, "ball"])
def test_derivatives_of_two_orders(constraint):
    check(lambda slope: solved(constraint, slope).value, SLOPE)


@pytest.mark.parametrize(
    "constraint", [LINEAR["both"], LINEAR["electrons that are nowhere negative"], L2Ball(0.8)], ids=["qp", "n", "ball"]
)
def test_transforms(constraint):
    def loss(slope: Tensor) -> Tensor:
        return solved(constraint, slope[None]).value.sin().sum()

    apart = torch.stack([grad(loss)(s) for s in SLOPE])
    torch.testing.assert_close(vmap(grad(loss))(SLOPE), apart, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(vmap(loss)(SLOPE), torch.stack([loss(s) for s in SLOPE]))
    torch.testing.assert_close(jacrev(loss)(SLOPE[0]), grad(loss)(SLOPE[0]), rtol=1e-8, atol=1e-9)
    numbers = torch.autograd.functional.hessian(loss, SLOPE[0])
    torch.testing.assert_close(hessian(loss)(SLOPE[0]), numbers, rtol=1e-7, atol=1e-8)


def test_transforms_of_the_set():
    def loss(bound: Tensor) -> Tensor:
        return solved((LinearInequalities(G, bound), LinearEqualities(A, B))).value.sin().sum()

    bounds = H + 0.1 * normal(4, 5, seed=7).abs()
    apart = torch.stack([grad(loss)(bound) for bound in bounds])
    torch.testing.assert_close(vmap(grad(loss))(bounds), apart, rtol=1e-8, atol=1e-9)


# -- closed forms ------------------------------------------------------------------------------------------------------


def nearest(constraint, y: Tensor) -> ti.Solution:
    return ti.solve(Minimum(lambda z, y: (z - y).square().sum(1), constraint), torch.zeros_like(y), y)


def test_the_nearest_point_of_the_simplex():
    y = normal(20, 30)
    order = y.sort(dim=1, descending=True).values
    excess = (order.cumsum(1) - 1) / torch.arange(1, 31)
    last = (order > excess).sum(1, keepdim=True) - 1
    torch.testing.assert_close(nearest(Simplex(), y).value, (y - excess.gather(1, last)).clamp_min(0))


def test_the_nearest_point_of_the_ball():
    y = 3 * normal(5, 4)
    found = nearest(L2Ball(2.0, torch.ones(4, dtype=F64)), y).value
    away = y - 1
    torch.testing.assert_close(found, 1 + away * (2 / away.norm(dim=1, keepdim=True)).clamp_max(1))


def test_soft_thresholds_are_those_of_the_lasso():
    y = 2 * normal(4, 6)
    size = torch.tensor(0.7, dtype=F64, requires_grad=True)
    penalty = Proximal(soft, lambda z, size: size * z.abs().sum(1), (size,))
    found = ti.solve(Minimum(lambda z, y: 0.5 * (z - y).square().sum(1), penalty), torch.zeros_like(y), y)
    expected = y.sign() * (y.abs() - 0.7).clamp_min(0)
    torch.testing.assert_close(found.value, expected)
    (slope,) = torch.autograd.grad(found.value.sum(), size)
    torch.testing.assert_close(slope, -(expected.sign()).sum())


def soft(v: Tensor, step: Tensor, size: Tensor) -> Tensor:
    return v.sign() * (v.abs() - step * size).clamp_min(0)


def test_the_lasso_and_the_elastic_net():
    """Hyperparameter gradients against those of the reduced system on the support."""
    design, observed = normal(20, DIM, seed=1), normal(BATCH, 20, seed=2)

    def fit(size: Tensor, ridge: Tensor) -> Tensor:
        penalty = Proximal(soft, lambda z, size: size * z.abs().sum(1), (size,))
        problem = Minimum(
            lambda z, ridge: 0.5 * (z @ design.T - observed).square().sum(1) + ridge * z.square().sum(1), penalty
        )
        return ti.solve(problem, torch.zeros(BATCH, DIM, dtype=F64), ridge).value

    size, ridge = (torch.tensor(v, dtype=F64, requires_grad=True) for v in (3.0, 0.1))
    value = fit(size, ridge)
    got = torch.autograd.grad(value.sin().sum(), (size, ridge))
    expected = torch.zeros(2, dtype=F64)
    for z in value.detach():
        on = z != 0
        assert 0 < on.sum() < DIM
        matrix = design[:, on].T @ design[:, on] + 0.2 * torch.eye(int(on.sum()), dtype=F64)
        g = torch.linalg.solve(matrix, z[on].cos())
        expected -= torch.stack(((g * z[on].sign()).sum(), (g * 2 * z[on]).sum()))
    torch.testing.assert_close(torch.stack(got), expected, rtol=1e-8, atol=1e-9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ti.SmoothnessWarning)  # of the clamp in the user's own operator
        check(fit, size, ridge)


def slope_in(size: Tensor, solution: ti.Solution) -> Tensor:
    return torch.autograd.grad(solution.value.square().sum(), size)[0]


@pytest.mark.parametrize("size", [3.0, 9.0])
def test_the_group_lasso(size):
    design, observed = normal(30, 8), 2 * normal(1, 30, seed=1)

    def lengths(z: Tensor) -> Tensor:
        square = z.reshape(-1, 4, 2).square().sum(2)
        return torch.where(square > 0, torch.where(square > 0, square, 1).sqrt(), 0)

    def shrink(v: Tensor, step: Tensor, size: Tensor) -> Tensor:
        length = lengths(v)
        share = torch.relu(1 - step * size / torch.where(length > 0, length, 1))
        return (v.reshape(-1, 4, 2) * share[:, :, None]).reshape(v.shape)

    def found(size: Tensor) -> ti.Solution:
        penalty = Proximal(shrink, lambda z, size: size * lengths(z).sum(1), args=(size,))
        problem = Minimum(lambda z: 0.5 * (z @ design.T - observed).square().sum(1), penalty)
        return ti.solve(problem, torch.zeros(1, 8, dtype=F64))

    given = torch.tensor(size, dtype=F64, requires_grad=True)
    solution = found(given)
    assert solution.converged.all()
    # the groups that are left satisfy the condition of a stationary point, the others are small enough to stay out
    z, length = solution.value.detach(), lengths(solution.value.detach())
    pull = ((observed - z @ design.T) @ design).reshape(4, 2)
    for group in range(4):
        if length[0, group] > 0:
            unit = z.reshape(4, 2)[group] / length[0, group]
            torch.testing.assert_close(pull[group], size * unit, rtol=1e-8, atol=1e-8)
        else:
            assert pull[group].norm() <= size
    ahead, back = (found(torch.tensor(size + e, dtype=F64)).value.square().sum() for e in (1e-5, -1e-5))
    torch.testing.assert_close(slope_in(given, solution), (ahead - back) / 2e-5, rtol=1e-6, atol=1e-7)


def test_the_nuclear_norm():
    mix, observed = normal(4, 4) + 3 * torch.eye(4, dtype=F64), normal(1, 4, 3, seed=1)

    def shrink(v: Tensor, step: Tensor, size: Tensor) -> Tensor:
        left, values, right = torch.linalg.svd(v, full_matrices=False)
        return (left * torch.relu(values - (step * size).reshape(-1, 1))[:, None, :]) @ right

    def found(size: Tensor) -> ti.Solution:
        penalty = Proximal(shrink, lambda z, size: size * torch.linalg.svdvals(z).sum(-1), args=(size,))
        problem = Minimum(lambda z: 0.5 * (mix @ z - observed).square().sum((1, 2)), penalty)
        return ti.solve(problem, 0.1 * normal(1, 4, 3, seed=2))

    size = torch.tensor(0.7, dtype=F64, requires_grad=True)
    solution = found(size)
    assert solution.converged.all()
    ahead, back = (found(size.detach() + e).value.square().sum() for e in (1e-5, -1e-5))
    torch.testing.assert_close(slope_in(size, solution), (ahead - back) / 2e-5, rtol=1e-6, atol=1e-7)


def test_a_projection_onto_a_set_that_is_not_convex():
    """The sphere: what is found is the eigenvector of the least eigenvalue, with its derivative."""
    matrix = (normal(4, 4) + normal(4, 4).T).requires_grad_()
    problem = Minimum(
        lambda z, a: 0.5 * ((z @ (0.5 * (a + a.T))) * z).sum(1),
        Projection(lambda z: torch.nn.functional.normalize(z, dim=1)),
    )
    solution = ti.solve(problem, torch.ones(1, 4, dtype=F64), matrix)
    assert solution.converged.all()
    _, vectors = torch.linalg.eigh(0.5 * (matrix + matrix.T))
    vector = vectors[:, 0] * (vectors[:, 0] @ solution.value.detach()[0]).sign()
    torch.testing.assert_close(solution.value[0], vector, rtol=1e-8, atol=1e-8)
    weight = normal(4, seed=3)
    (one,) = torch.autograd.grad((solution.value @ weight).sum(), matrix)
    (other,) = torch.autograd.grad(vector @ weight, matrix)
    torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-8)


def test_where_the_last_coefficient_of_a_lasso_vanishes_there_is_a_kink():
    design, observed = normal(10, 3), normal(1, 10, seed=1)
    size = (design.T @ observed[0]).abs().max().requires_grad_()
    penalty = Proximal(soft, lambda z, size: size * z.abs().sum(1), args=(size,))
    with pytest.warns(ti.SmoothnessWarning):
        ti.solve(
            Minimum(lambda z: 0.5 * (z @ design.T - observed).square().sum(1), penalty), torch.zeros(1, 3, dtype=F64)
        )


def test_a_projection_of_ones_own():
    """The second-order cone."""

    def project(z: Tensor, slant: Tensor) -> Tensor:
        x, t = z[:, :-1], z[:, -1:]
        length = x.square().sum(1, keepdim=True).clamp_min(1e-300).sqrt()
        share = (slant * length + t) / (slant**2 + 1)
        side = torch.cat((slant * share * x / length, share), dim=1)
        inside, below = length <= slant * t, t <= -slant * length
        return torch.where(inside, z, torch.where(below, torch.zeros_like(z), side))

    def value(slant: Tensor) -> Tensor:
        return solved(Projection(project, (slant,))).value

    slant = torch.tensor(0.8, dtype=F64)
    found = value(slant)
    assert (found[:, :-1].norm(dim=1) <= 0.8 * found[:, -1] + 1e-9).all()
    check(value, slant)


# -- hard cases --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("condition", [1e2, 1e5, 1e8])
def test_ill_conditioned_boxes(condition):
    turn = torch.linalg.qr(normal(16, 30, 30)).Q
    matrix = turn @ torch.diag(torch.logspace(0, -torch.tensor(condition).log10().item(), 30, dtype=F64)) @ turn.mT
    slope = normal(16, 30, seed=1)

    def steep(z: Tensor) -> Tensor:
        return 0.5 * (z[:, None] @ matrix @ z[:, :, None])[:, 0, 0] + (slope * z).sum(1)

    found = ti.solve(Minimum(steep, Box(-1.0, 1.0)), torch.zeros(16, 30, dtype=F64))
    assert found.converged.all()
    z = found.value
    defect = (z - grad(lambda z: steep(z).sum())(z)).clamp(-1, 1) - z
    assert defect.norm(dim=1).max() < 1e-9
    assert found.steps.max() <= 12


def test_many_polyhedra():
    for seed in range(3):
        inside = normal(8, 6, seed=seed)
        g, a = normal(8, 20, 6, seed=seed + 10), normal(8, 2, 6, seed=seed + 20)
        h = (g @ inside[:, :, None])[:, :, 0] + 0.5 * normal(8, 20, seed=seed + 30).abs()
        b = (a @ inside[:, :, None])[:, :, 0]
        sets = (LinearInequalities(g, h), LinearEqualities(a, b))
        found = nearest(sets, 5 * normal(8, 6, seed=seed + 40))
        assert found.converged.all()
        assert ((g @ found.value[:, :, None])[:, :, 0] - h).max() < 1e-9
        torch.testing.assert_close((a @ found.value[:, :, None])[:, :, 0], b, rtol=1e-9, atol=1e-9)


def test_a_linear_program():
    cost = normal(BATCH, DIM)
    found = ti.solve(Minimum(lambda z: (cost * z).sum(1), Simplex(2.0)), torch.full((BATCH, DIM), 2 / DIM, dtype=F64))
    expected = torch.zeros_like(cost).scatter(1, cost.argmin(1, keepdim=True), 2.0)
    torch.testing.assert_close(found.value, expected)


def test_energies_that_are_not_convex():
    def bumpy(z: Tensor) -> Tensor:
        return (z**4 - 3 * z**2 + 0.5 * z).sum(1) + (z[:, :-1] * z[:, 1:]).sum(1)

    found = ti.solve(Minimum(bumpy, Box(-1.0, 1.2)), normal(6, 10).clamp(-0.9, 1.1))
    assert found.converged.all()


def test_samples_in_units_of_their_own():
    one = solved(Simplex(2.0))
    unit = torch.tensor([1e-6, 1.0, 1e6], dtype=F64)
    problem = Minimum(lambda z, slope: unit * energy(z, slope), Simplex(2.0))
    other = ti.solve(problem, torch.zeros(BATCH, DIM, dtype=F64), SLOPE)
    torch.testing.assert_close(other.value, one.value, rtol=1e-10, atol=1e-10)
    for size in (1e-8, 1e8):
        problem = Minimum(lambda z, slope, size=size: energy(z / size, slope), Simplex(2.0 * size))
        other = ti.solve(problem, torch.zeros(BATCH, DIM, dtype=F64), SLOPE)
        torch.testing.assert_close(other.value / size, one.value, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("constraint", [Simplex(2.0), LINEAR["both"]], ids=["simplex", "qp"])
def test_a_sample_that_is_not_finite_is_alone(constraint):
    slope = SLOPE.clone()
    slope[1, 0] = torch.nan
    with pytest.warns(ti.ConvergenceWarning):
        found = solved(constraint, slope, throw=False)
    assert found.status.tolist() == [0, 2, 0]
    torch.testing.assert_close(found.value[::2], solved(constraint).value[::2], rtol=1e-9, atol=1e-9)


def test_trees_and_states_without_a_batch():
    start = {"a": torch.zeros(2, dtype=F64), "b": torch.zeros(3, dtype=F64)}
    problem = Minimum(
        lambda z: (z["a"] - 1).square().sum() + (z["b"] + 1).square().sum(),
        Box({"a": torch.zeros(2, dtype=F64), "b": torch.full((3,), -0.5, dtype=F64)}, 0.6),
        batched=False,
    )
    found = ti.solve(problem, start)
    assert found.converged
    torch.testing.assert_close(found.value["a"], torch.full((2,), 0.6, dtype=F64))
    torch.testing.assert_close(found.value["b"], torch.full((3,), -0.5, dtype=F64))


@pytest.mark.parametrize("constraint", [Simplex(2.0), LinearInequalities(G, H)], ids=["simplex", "inequalities"])
def test_rowwise_and_empty_batches(constraint):
    slope = normal(40, DIM, seed=1) * torch.logspace(-2, 2, 40, dtype=F64)[:, None]

    def plain(z: Tensor, slope: Tensor) -> Tensor:
        return (z.square() + slope * z).sum(1)

    start = torch.zeros(40, DIM, dtype=F64)
    whole = ti.solve(Minimum(plain, constraint), start, slope).value
    apart = ti.solve(Minimum(plain, constraint, rowwise=True), start, slope).value
    torch.testing.assert_close(apart, whole, rtol=1e-9, atol=1e-9)
    assert ti.solve(Minimum(plain, constraint), start[:0], slope[:0]).value.shape == (0, DIM)


# -- estimators and solvers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gradient", "solver", "bound"),
    [
        (ti.UnrolledPhantom(steps=60, damping=1.0), None, 1e-3),
        (ti.NeumannPhantom(steps=60, damping=1.0), None, 1e-3),
        (ti.AdaptivePhantom(tolerance=1e-6), None, 1e-4),
        (ti.Unrolled(), ti.FixedPointIteration(max_steps=3000), 1e-6),
        (ti.Implicit(linear_solver=ti.GMRES(rtol=1e-12)), ti.Anderson(), 1e-7),
        (ti.Implicit(), ti.NewtonKrylov(), 1e-7),
    ],
    ids=repr,
)
def test_other_estimators_and_solvers(gradient, solver, bound):
    slope = SLOPE.clone().requires_grad_()
    exact = torch.autograd.grad(solved(Simplex(2.0), slope).value.sin().sum(), slope)[0]
    value = solved(Simplex(2.0), slope, gradient=gradient, solver=solver).value
    (got,) = torch.autograd.grad(value.sin().sum(), slope)
    assert (got - exact).norm() <= bound * exact.norm()


@pytest.mark.parametrize(
    "options",
    [
        {"solver": ti.LBFGS()},
        {"solver": ti.GradientDescent()},
        {"gradient": ti.EquilibriumPropagation()},
        {"gradient": ti.DampedImplicit()},
    ],
    ids=repr,
)
def test_who_knows_no_set_says_so(options):
    with pytest.raises(ValueError, match="single LinearEquality"):
        solved(Simplex(), SLOPE.clone().requires_grad_(), **options)


def test_attach_and_derivatives_know_sets():
    slope = SLOPE.clone().requires_grad_()
    solution = solved(LINEAR["both"], slope)
    (first,) = torch.autograd.grad(solution.value.sin().sum(), slope)
    given = ti.attach(solution.problem, solution.value.detach(), slope)
    assert given.converged.all()
    (second,) = torch.autograd.grad(given.value.sin().sum(), slope)
    torch.testing.assert_close(first, second, rtol=1e-8, atol=1e-9)
    direction = normal(BATCH, DIM, seed=9)
    (moved,) = ti.derivatives.Derivatives(solution).along((direction,))
    tangent = torch.func.jvp(lambda s: solved(LINEAR["both"], s).value, (SLOPE,), (direction,))[1]
    torch.testing.assert_close(moved, tangent, rtol=1e-8, atol=1e-9)


# -- what is degenerate or inconsistent --------------------------------------------------------------------------------


def test_a_multiplier_of_zero_is_told():
    c = torch.tensor([[1.0, 0.0, -1.0]], dtype=F64, requires_grad=True)
    with pytest.warns(ti.SmoothnessWarning, match="strict complementarity"):
        nearest(NonNegative(), c)


def test_more_constraints_than_are_independent_are_told():
    """Three lines through one point of the plane: what moving one of them does depends on where it moves to."""
    matrix = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]], dtype=F64)
    bound = torch.tensor([1.0, 1.0, 2.0], dtype=F64, requires_grad=True)
    y = torch.tensor([[3.0, 3.0]], dtype=F64, requires_grad=True)
    with pytest.warns(ti.SmoothnessWarning, match="more constraints meet"):
        nearest(LinearInequalities(matrix, bound), y)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ti.SmoothnessWarning)
        nearest(LinearInequalities(matrix, bound.detach()), y)  # which moves nothing of them
        nearest(LinearInequalities(matrix[:2], bound[:2]), y)


@pytest.mark.parametrize(
    ("constraint", "message"),
    [
        ((Box(0.0, 1.0), Box(2.0, 3.0)), "empty"),
        ((Box(0.0, 1.0), LinearEquality(torch.ones(DIM, dtype=F64), 9.0)), "empty in 1 of 1"),
        ((NonNegative(), LinearEquality(torch.ones(DIM, dtype=F64), -1.0)), "empty"),
        (LinearInequalities(torch.cat((G[:1], -G[:1])), torch.tensor([-1.0, -1.0], dtype=F64)), "empty"),
        ((LinearEqualities(A, B), LinearInequalities(A[:1], B[:1] - 1)), "empty"),
        (LinearEqualities(torch.ones(2, DIM, dtype=F64), torch.tensor([1.0, 2.0])), "linearly dependent"),
        (LinearEqualities(normal(9, DIM), 0.0), "linearly dependent"),
        (LinearInequalities(normal(2, 3), 1.0), "give \\(m, 8\\)"),
        (LinearInequalities(G, normal(4)), "5 rows"),
        ((L2Ball(1.0), Box(3.0, 4.0)), "no state in the ball"),
        ((L2Ball(1.0), L2Ball(2.0)), "more than one L2Ball"),
        ((Projection(torch.relu), Box(0.0, 1.0)), "cannot be combined"),
        (Projection(lambda z: z * W.clone().requires_grad_()), "give it in args"),
        (Projection(lambda z: z[:, :2]), "shape"),
    ],
)
def test_what_is_inconsistent_is_an_error_in_words(constraint, message):
    with pytest.raises(ValueError, match=message):
        solved(constraint)


# -- quadratic programs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5, 4, 3, 1), (3, 30, 40, 8), (1, 6, 9, 0)])
def test_a_quadratic_program_takes_one_step(shape):
    batch, dim, count, equal = shape
    root, inside = normal(dim, dim), normal(batch, dim, seed=1)
    matrix = root @ root.T / dim + 0.1 * torch.eye(dim, dtype=F64)
    g, a, c = normal(batch, count, dim, seed=2), normal(batch, equal, dim, seed=3), 3 * normal(batch, dim, seed=4)
    h = (g @ inside[:, :, None])[:, :, 0] + normal(batch, count, seed=5).abs()
    b = (a @ inside[:, :, None])[:, :, 0]
    parts = (LinearInequalities(g, h), LinearEqualities(a, b))[: 2 if equal else 1]
    found = ti.solve(
        Minimum(lambda z, c: 0.5 * ((z @ matrix) * z).sum(1) + (c * z).sum(1), parts), torch.zeros_like(c), c
    )
    assert found.converged.all()
    assert found.steps.max() <= 1
    z = found.value
    gap = (g @ z[:, :, None])[:, :, 0] - h
    assert gap.max() < 1e-9
    for i in range(batch):  # the multipliers, from what holds with equality
        rows = torch.cat((a[i], g[i][gap[i] > -1e-9]))
        slope = z[i] @ matrix + c[i]
        multipliers = torch.linalg.lstsq(rows.T, -slope).solution
        torch.testing.assert_close(rows.T @ multipliers, -slope, rtol=1e-8, atol=1e-8)
        assert (multipliers[equal:] > -1e-9).all()


COUPLED = {
    "box": Box(-1.0, 1.0),
    "polyhedron": LinearInequalities(G, H),
    "one each": (LinearInequalities(normal(BATCH, 5, DIM, seed=2), H), LinearEqualities(A, B)),
    "ball": L2Ball(0.6),
}


@pytest.mark.parametrize("constraint", COUPLED.values(), ids=COUPLED)
def test_energies_that_couple_the_batch(constraint):
    mix = 0.2 * normal(DIM, DIM, seed=7)

    def coupled(z: Tensor, slope: Tensor) -> Tensor:
        return energy(z, slope) + 0.1 * (z - z.mean(dim=0)).square().sum(1) + (z * (z.roll(1, 0) @ mix)).sum(1) ** 2

    def solved(slope: Tensor, start: Tensor) -> ti.Solution:
        return ti.solve(Minimum(coupled, constraint), start, slope)

    found = solved(SLOPE, torch.zeros(BATCH, DIM, dtype=F64))
    assert found.converged.all()
    z = found.value
    step = z - 0.1 * grad(lambda z: coupled(z, SLOPE).sum())(z)
    torch.testing.assert_close(nearest(constraint, step).value, z, rtol=1e-7, atol=1e-7)
    assert gradcheck(lambda slope: solved(slope, z).value, SLOPE.clone().requires_grad_(), fast_mode=True)


# -- balls that cut other sets -----------------------------------------------------------------------------------------


CUT = {
    "box": Box(-0.1, 1.0),
    "simplex": Simplex(2.0),
    "plane": LinearEquality(W, 1.0),
    "polyhedron": (LinearInequalities(G, H), LinearEquality(W, 1.0), NonNegative()),
}


@pytest.mark.parametrize("others", CUT.values(), ids=CUT)
def test_the_nearest_point_of_a_ball_that_cuts_another_set(others):
    parts = others if isinstance(others, tuple) else (others,)
    center = ti.solve(Minimum(lambda z: z.square().sum(1), parts), torch.zeros(1, DIM, dtype=F64)).value[
        0
    ] + 0.05 * normal(DIM)
    constraint = (*parts, L2Ball(0.6, center))
    y = 2 * normal(20, DIM, seed=3)
    found = nearest(constraint, y)
    assert found.converged.all()
    away = torch.linalg.vector_norm(found.value - center, dim=1)
    assert away.max() <= 0.6 + 1e-9
    assert (away > 0.6 - 1e-9).any()  # the ball is in the way
    torch.testing.assert_close(nearest(parts, found.value).value, found.value)  # which lies in the others
    # x is the nearest point of a convex set where <y - x, p - x> <= 0 for all p in it: those of the other samples
    rest, others = y - found.value, found.value[None] - found.value[:, None]
    assert (rest[:, None] * others).sum(dim=2).max() <= 1e-8


def test_derivatives_on_a_ball_that_cuts_another_set():
    h = H.clone().requires_grad_()
    radius = torch.tensor(0.5, dtype=F64, requires_grad=True)
    slope = SLOPE[:2].clone().requires_grad_()

    def of(slope: Tensor, radius: Tensor, h: Tensor) -> Tensor:
        return solved((LinearInequalities(G, h), L2Ball(radius)), slope[:1]).value.sin()

    assert gradcheck(of, (slope, radius, h), atol=1e-6)
    assert gradgradcheck(lambda s, r: of(s, r, H), (slope, radius), atol=1e-5)
    both = torch.stack((SLOPE[:2], 2 * SLOPE[:2]))
    r = radius.detach()
    torch.testing.assert_close(vmap(lambda s: of(s, r, H))(both), torch.stack([of(s, r, H) for s in both]))


def test_wrong_types():
    with pytest.raises(TypeError, match="constraint must be one of"):
        Minimum(energy, 3)
    with pytest.raises(TypeError, match="callable"):
        Projection(3)
    with pytest.raises(ValueError, match="negative"):
        Simplex(-1.0)
    with pytest.raises(ValueError, match="single LinearEquality"):
        Minimum(energy, Simplex(), eliminate=True)


def test_a_tuple_of_one_or_none():
    torch.testing.assert_close(solved((LinearEquality(W, 1.0),)).value, solved(LinearEquality(W, 1.0)).value)
    torch.testing.assert_close(solved((Box(0.0, 1.0),)).value, solved(Box(0.0, 1.0)).value)
    torch.testing.assert_close(solved(()).value, solved(None).value)


def test_a_start_outside_is_moved():
    found = ti.solve(Minimum(energy, Simplex(2.0)), torch.full((BATCH, DIM), 7.0, dtype=F64), SLOPE)
    torch.testing.assert_close(found.value, solved(Simplex(2.0)).value)


def test_an_entry_on_its_bound_has_a_derivative_of_one_with_every_torch():
    low, high = torch.tensor([[-1.0, 0.0, -torch.inf, 2.0]]), torch.tensor([[1.0, 0.0, 0.0, 3.0]])
    z = torch.tensor([[-1.0, 0.0, 0.0, 5.0], [torch.nan, -1.0, -7.0, 1.0]], requires_grad=True)
    there = clamped(z, low, high)
    torch.testing.assert_close(there, torch.clamp(z, low, high), equal_nan=True)
    (slope,) = torch.autograd.grad(there.nan_to_num().sum(), z)
    assert slope.tolist() == [[1, 1, 1, 0], [0, 0, 1, 0]]
