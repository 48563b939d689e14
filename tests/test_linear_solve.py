"""``linear_solve``: systems, least squares and least norm, against dense algebra and finite differences."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

import torchimplicit as ti
from torchimplicit import CG, GMRES, LSMR, MINRES, BiCGStab, Dense
from torchimplicit.linear import Diagonal

F64 = torch.float64
SHAPES = {"square": (5, 5), "tall": (6, 4), "wide": (4, 6)}


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def regular(batch: int, n: int, seed: int = 0) -> torch.Tensor:
    return normal(batch, n, n, seed=seed) + 4 * torch.eye(n, dtype=F64)


def product(y, a):
    return (a @ y[..., None])[..., 0]


def pinv(a, b):
    return product(b, torch.linalg.pinv(a))


def deficient(left, right):
    """Rank 3 whatever the factors are."""
    return left @ right


# -- values ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", [None, Dense(), GMRES(rtol=1e-13), BiCGStab(rtol=1e-13), LSMR(rtol=1e-13)], ids=repr)
@pytest.mark.parametrize("shared", [False, True])
def test_square_systems(solver, shared):
    a, b = regular(3, 6), normal(3, 6, seed=1)
    a = a[0] if shared else a
    found = ti.linear_solve(a, b, solver=solver)
    torch.testing.assert_close(found.value, product(b, torch.linalg.inv(a)), rtol=1e-10, atol=1e-10)
    assert found.converged.all()
    assert found.residual.max() < 1e-10


@pytest.mark.parametrize(
    "solver",
    [
        None,
        CG(rtol=1e-13),
        MINRES(rtol=1e-13),
        CG(rtol=1e-13, preconditioner=Diagonal(torch.full((6,), 3.0, dtype=F64))),
    ],
    ids=repr,
)
def test_symmetric_systems(solver):
    a = normal(3, 6, 6)
    a, b = a @ a.mT + torch.eye(6, dtype=F64), normal(3, 6, seed=1)
    found = ti.linear_solve(a, b, solver=solver, symmetric=True)
    torch.testing.assert_close(found.value, torch.linalg.solve(a, b), rtol=1e-9, atol=1e-9)
    x, y = a.clone().requires_grad_(), b.clone().requires_grad_()
    got = torch.autograd.grad(ti.linear_solve(x, y, solver=solver, symmetric=True).value.sin().sum(), (x, y))
    expected = torch.autograd.grad(torch.linalg.solve(x, y).sin().sum(), (x, y))
    torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("shape", [*SHAPES.values(), "singular"], ids=str)
@pytest.mark.parametrize(
    "solver",
    [None, LSMR(rtol=1e-13), CG(rtol=1e-14), MINRES(rtol=1e-14), GMRES(rtol=1e-14)],
    ids=lambda s: type(s).__name__,
)
def test_pseudo_inverses(shape, solver):
    a = deficient(normal(3, 5, 3), normal(3, 3, 5, seed=1)) if shape == "singular" else normal(3, *shape)
    b = normal(3, a.shape[1], seed=2)
    found = ti.linear_solve(a, b, solver=solver, least_squares=True)
    torch.testing.assert_close(found.value, pinv(a, b), rtol=1e-9, atol=1e-9)
    assert found.converged.all()


@pytest.mark.parametrize("solver", [None, LSMR()])
@pytest.mark.parametrize("unit", [1e-150, 1e150])
def test_units_change_nothing(solver, unit):
    a, b = normal(3, 6, 4), normal(3, 6, seed=1)
    found = ti.linear_solve(a, unit * b, solver=solver)
    torch.testing.assert_close(found.value / unit, pinv(a, b), rtol=1e-9, atol=1e-9)
    other = ti.linear_solve(1e-9 * a, b, solver=solver)
    torch.testing.assert_close(1e-9 * other.value, pinv(a, b), rtol=1e-9, atol=1e-9)
    assert found.converged.all()
    assert other.converged.all()


def test_a_right_hand_side_that_nothing_reaches():
    a = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]], dtype=F64)
    for solver in (None, LSMR(), CG()):
        found = ti.linear_solve(a, torch.tensor([[0.0, 0.0, 2.0], [1.0, 2.0, 3.0]], dtype=F64), solver=solver)
        assert found.converged.all()
        torch.testing.assert_close(found.value, torch.tensor([[0.0, 0.0], [1.0, 2.0]], dtype=F64))


def test_zero_has_the_solution_zero():
    for a in (regular(2, 3), normal(2, 4, 3), normal(2, 3, 4)):
        found = ti.linear_solve(a, torch.zeros(2, a.shape[1], dtype=F64))
        assert found.converged.all()
        assert not found.value.any()


# -- derivatives -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES.values(), ids=str)
@pytest.mark.parametrize("solver", [None, LSMR(rtol=1e-14)], ids=repr)
def test_first_and_second_derivatives(shape, solver):
    a = (regular(2, 5) if shape == (5, 5) else normal(2, *shape)).requires_grad_()
    b = normal(2, shape[0], seed=1).requires_grad_()

    def solved(a, b):
        return ti.linear_solve(a, b, solver=solver).value

    assert gradcheck(solved, (a, b), check_forward_ad=True, fast_mode=solver is not None)
    assert gradgradcheck(solved, (a, b), check_fwd_over_rev=True, fast_mode=True)


@pytest.mark.parametrize("solver", [None, LSMR(rtol=1e-14)], ids=repr)
def test_derivatives_of_a_constant_rank(solver):
    factors = (normal(2, 5, 3).requires_grad_(), normal(2, 3, 4, seed=1).requires_grad_())
    b = normal(2, 5, seed=2).requires_grad_()

    def solved(left, right, b):
        return ti.linear_solve(deficient(left, right), b, least_squares=True, solver=solver).value

    assert gradcheck(solved, (*factors, b), check_forward_ad=True)
    assert gradgradcheck(solved, (*factors, b), fast_mode=True)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=str)
def test_transforms(shape):
    a = normal(*shape) + (4 * torch.eye(5, dtype=F64) if shape == (5, 5) else 0)
    b = normal(2, shape[0], seed=1)

    def loss(a):
        return ti.linear_solve(a, b).value.sin().sum()

    def reference(a):
        return pinv(a, b).sin().sum()

    close = {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(jacrev(loss)(a), jacrev(reference)(a), **close)
    torch.testing.assert_close(jacfwd(loss)(a), jacrev(reference)(a), **close)
    torch.testing.assert_close(hessian(loss)(a), hessian(reference)(a), **close)
    many = a + 0.1 * normal(3, *shape, seed=2)
    torch.testing.assert_close(vmap(loss)(many), torch.stack([reference(one) for one in many]), **close)
    torch.testing.assert_close(vmap(grad(loss))(many), torch.stack([grad(reference)(one) for one in many]), **close)
    moved = jvp(grad(loss), (a,), (a.cos(),))[1]
    torch.testing.assert_close(moved, jvp(grad(reference), (a,), (a.cos(),))[1], **close)


@pytest.mark.parametrize("least_squares", [False, True])
def test_captured_parameters_and_trees(least_squares):
    class Operator(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(regular(1, 5)[0])

        def forward(self, y, x):
            whole = torch.cat((y["a"], y["b"]), dim=1) @ self.weight.T * (1 + 0.1 * x)
            return {"a": whole[:, :2], "b": whole[:, 2:]}

    operator, x, b = Operator(), normal(3, 1).requires_grad_(), normal(3, 5, seed=1)
    tree = {"a": b[:, :2], "b": b[:, 2:]}
    found = ti.linear_solve(operator, tree, x, least_squares=least_squares).value
    reference = torch.linalg.solve(operator.weight * (1 + 0.1 * x[:, :, None]), b)
    joined = torch.cat((found["a"], found["b"]), dim=1)
    torch.testing.assert_close(joined, reference, rtol=1e-9, atol=1e-9)
    leaves = (operator.weight, x)
    for _create in (True, False):
        got = torch.autograd.grad(joined.sin().sum(), leaves, create_graph=True)
        expected = torch.autograd.grad(reference.sin().sum(), leaves, create_graph=True)
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    second = torch.autograd.grad(got[0].square().sum(), leaves)
    torch.testing.assert_close(second, torch.autograd.grad(expected[0].square().sum(), leaves), rtol=1e-8, atol=1e-8)


def test_one_system_without_a_batch():
    a, b = normal(6, 4), normal(6, seed=1)
    found = ti.linear_solve(a, b, batched=False)
    assert found.value.shape == (4,)
    assert found.converged.ndim == 0
    torch.testing.assert_close(found.value, torch.linalg.lstsq(a, b[:, None]).solution[:, 0])
    field = normal(4, 4, seed=2)
    found = ti.linear_solve(lambda u: 3 * u - u.roll(1, 0), field, batched=False, solver=GMRES())
    torch.testing.assert_close(3 * found.value - found.value.roll(1, 0), field, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("least_squares", [False, True])
def test_rows_that_depend_on_each_other(least_squares):
    def operator(y):
        return 2 * y + y.mean(0, keepdim=True)

    b = normal(4, 3)
    for solver in (None, LSMR(rtol=1e-13), GMRES(rtol=1e-13)):
        found = ti.linear_solve(operator, b, solver=solver, least_squares=least_squares)
        torch.testing.assert_close(operator(found.value), b, rtol=1e-8, atol=1e-8)
        assert found.converged.all()


@pytest.mark.parametrize("shape", SHAPES.values(), ids=str)
def test_an_empty_batch(shape):
    for solver in (None, LSMR()):
        found = ti.linear_solve(normal(*shape), torch.zeros(0, shape[0], dtype=F64), solver=solver)
        assert found.value.shape == (0, shape[1])


# -- faults ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES.values(), ids=str)
def test_a_sample_that_is_not_finite_is_alone(shape):
    a, b = normal(3, *shape), normal(3, shape[0], seed=1)
    b[1, 0] = torch.nan
    with pytest.raises(ti.SolveError):
        ti.linear_solve(a, b)
    with pytest.warns(ti.ConvergenceWarning, match="NaN"):
        found = ti.linear_solve(a, b, throw=False)
    assert found.status.tolist() == [0, 2, 0]
    torch.testing.assert_close(found.value[::2], pinv(a, b.nan_to_num())[::2], rtol=1e-9, atol=1e-9)
    assert found.value[1].isnan().any()


def test_what_does_not_converge_says_so():
    a = torch.diag(torch.logspace(0, 8, 30, dtype=F64))
    for kwargs in ({"solver": GMRES(max_steps=3)}, {"solver": LSMR(max_steps=3), "least_squares": True}):
        with pytest.warns(ti.ConvergenceWarning, match="did not converge"):
            found = ti.linear_solve(a, torch.ones(2, 30, dtype=F64), **kwargs)
        assert (found.status == ti.Status.MAX_STEPS).all()


def test_a_singular_system_says_so():
    a = torch.ones(2, 2, dtype=F64)
    with pytest.warns(ti.ConvergenceWarning, match="least_squares=True"):
        found = ti.linear_solve(a, torch.tensor([[1.0, 2.0]], dtype=F64))
    assert found.status.tolist() == [int(ti.Status.BREAKDOWN)]


def test_a_consistent_singular_system_has_its_solution_of_least_norm_and_says_so():
    a = torch.ones(2, 2, dtype=F64)
    with pytest.warns(ti.ConvergenceWarning, match="nearly singular in 1 of 1 samples"):
        found = ti.linear_solve(a, torch.tensor([[2.0, 2.0]], dtype=F64))
    assert found.converged.all()
    torch.testing.assert_close(found.value, torch.ones(1, 2, dtype=F64))


@pytest.mark.parametrize(
    "solver", [CG(), MINRES(), GMRES(), BiCGStab(), LSMR(), Dense()], ids=lambda s: type(s).__name__
)
@pytest.mark.parametrize("shape", [(7, 4), (4, 7), (6, 6)], ids=str)
def test_every_method_where_the_rank_is_not_full(solver, shape):
    a = (normal(3, shape[0], 3) @ normal(3, 3, shape[1], seed=1)).requires_grad_()
    b = normal(3, shape[0], seed=2).requires_grad_()
    found = ti.linear_solve(a, b, solver=solver, least_squares=True)
    assert found.converged.all(), found.summary()
    torch.testing.assert_close(found.value, pinv(a.detach(), b.detach()), rtol=1e-7, atol=1e-7)
    (slope,) = torch.autograd.grad(found.value.sin().sum(), b)
    turned = torch.linalg.pinv(a.detach()).mT @ found.value.detach().cos()[:, :, None]
    torch.testing.assert_close(slope, turned[:, :, 0], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda b: ti.linear_solve(lambda y: y**3 + y, b), "not linear"),
        (lambda b: ti.linear_solve(lambda y: y**3, b, least_squares=True), "not linear"),
        (lambda b: ti.linear_solve(lambda y: y[:, :2] + 1, b[:, :2], like=b), "does not map zero to zero"),
        (lambda b: ti.linear_solve(normal(3, 3), b, symmetric=True), "not symmetric"),
        (lambda b: ti.linear_solve(normal(2, 3), b), "operator has shape"),
        (lambda b: ti.linear_solve(normal(3, 4), b, least_squares=False), "3 equations for 4 unknowns"),
        (lambda b: ti.linear_solve(normal(3, 3).float(), b), "convert one of them"),
        (lambda b: ti.linear_solve(lambda y: y[:, :2], b), "shape of the state"),
        (lambda b: ti.linear_solve(lambda y: y[:1], b), "keep the batch"),
    ],
)
def test_bad_input_is_said_in_words(call, message):
    with pytest.raises(ValueError, match=message):
        call(normal(2, 3, seed=1))


def test_the_wrong_kind_of_solver():
    with pytest.raises(TypeError, match="linear solver"):
        ti.linear_solve(normal(3, 3), normal(2, 3), solver=ti.Anderson())
    with pytest.raises(TypeError, match="takes no further arguments"):
        ti.linear_solve(normal(3, 3), normal(2, 3), normal(3))
