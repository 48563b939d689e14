"""``linear_solve``: derivatives of two orders over every structure, against dense algebra and finite differences."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.func import hessian, jvp, vmap

import torchimplicit as ti
from torchimplicit import CG, GMRES, LSMR, MINRES, BiCGStab, Dense

F64, BATCH = torch.float64, 2


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def times(a: Tensor, y: Tensor) -> Tensor:
    return (a @ y[..., None])[..., 0]


def square(x: Tensor) -> Tensor:
    return x + 4 * torch.eye(x.shape[-1], dtype=x.dtype)


def positive(x: Tensor) -> Tensor:
    return x @ x.mH + torch.eye(x.shape[-1], dtype=x.dtype)


def indefinite(x: Tensor) -> Tensor:
    signs = torch.tensor([1.0, -1.0, 2.0, -3.0], dtype=x.dtype)
    return 0.3 * (x + x.mH) + 3 * torch.diag(signs)


def deficient(x: Tensor) -> Tensor:
    """Of rank 2 whatever x is."""
    return x[..., :, :2] @ x[..., :2, :]


EXACT = 1e-14
STRUCTURES = {
    "square": ((4, 4), square, {}, (None, Dense(), GMRES(rtol=EXACT), BiCGStab(rtol=EXACT), LSMR(rtol=EXACT))),
    "positive": ((4, 4), positive, {"symmetric": True}, (None, CG(rtol=EXACT), MINRES(rtol=EXACT))),
    "indefinite": ((4, 4), indefinite, {"symmetric": True}, (None, MINRES(rtol=EXACT))),
    "least squares": ((5, 3), lambda x: x, {}, (None, LSMR(rtol=EXACT), CG(rtol=EXACT))),
    "least norm": ((3, 5), lambda x: x, {}, (None, LSMR(rtol=EXACT), CG(rtol=EXACT))),
    "of no full rank": ((4, 4), deficient, {"least_squares": True}, (None, LSMR(rtol=EXACT))),
}
CASES = [
    pytest.param(*STRUCTURES[name][:3], solver, id=f"{name}, {type(solver).__name__}")
    for name in STRUCTURES
    for solver in STRUCTURES[name][3]
]


@pytest.mark.parametrize("shared", [False, True], ids=["one each", "shared"])
@pytest.mark.parametrize("free", [False, True], ids=["matrix", "products"])
@pytest.mark.parametrize(("shape", "make", "options", "solver"), CASES)
def test_two_orders(shape, make, options, solver, free, shared):
    x = normal(*(() if shared else (BATCH,)), *shape).requires_grad_()
    b = normal(BATCH, shape[0], seed=1).requires_grad_()
    like = torch.zeros(BATCH, shape[1], dtype=F64)

    def solved(x: Tensor, b: Tensor) -> Tensor:
        if not free:
            return ti.linear_solve(make(x), b, solver=solver, **options).value
        return ti.linear_solve(lambda y, a: times(a, y), b, make(x), like=like, solver=solver, **options).value

    def reference(x: Tensor, b: Tensor) -> Tensor:
        return times(torch.linalg.pinv(make(x), rtol=1e-9), b)

    close = {"rtol": 1e-7, "atol": 1e-8}
    v = normal(BATCH, shape[1], seed=2)
    found, expected = solved(x, b), reference(x, b)
    torch.testing.assert_close(found, expected, **close)
    got = torch.autograd.grad((found.sin() * v).sum(), (x, b), create_graph=True)
    wanted = torch.autograd.grad((expected.sin() * v).sum(), (x, b), create_graph=True)
    torch.testing.assert_close(got, wanted, **close)
    ways = [normal(*t.shape, seed=3) for t in (x, b)]
    got = torch.autograd.grad(sum((g * w).sum() for g, w in zip(got, ways, strict=True)), (x, b))
    wanted = torch.autograd.grad(sum((g * w).sum() for g, w in zip(wanted, ways, strict=True)), (x, b))
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", STRUCTURES)
def test_finite_differences_and_forward_mode(name):
    shape, make, options, _ = STRUCTURES[name]
    x, b = normal(BATCH, *shape).requires_grad_(), normal(BATCH, shape[0], seed=1).requires_grad_()

    def solved(x: Tensor, b: Tensor) -> Tensor:
        return ti.linear_solve(make(x), b, **options).value

    assert gradcheck(solved, (x, b), check_forward_ad=True, fast_mode=True)
    assert gradgradcheck(solved, (x, b), check_fwd_over_rev=True, fast_mode=True)


@pytest.mark.parametrize("name", STRUCTURES)
def test_second_derivatives_under_transforms(name):
    shape, make, options, _ = STRUCTURES[name]
    x, b = normal(*shape), normal(BATCH, shape[0], seed=1)

    def loss(x: Tensor) -> Tensor:
        return ti.linear_solve(make(x), b, **options).value.sin().sum()

    def reference(x: Tensor) -> Tensor:
        return times(torch.linalg.pinv(make(x), rtol=1e-9), b).sin().sum()

    close = {"rtol": 1e-7, "atol": 1e-8}
    many = x + 0.1 * normal(2, *shape, seed=2)
    expected = torch.stack([hessian(reference)(one) for one in many])
    torch.testing.assert_close(vmap(hessian(loss))(many), expected, **close)
    way = normal(*shape, seed=3)
    moved = jvp(lambda x: jvp(loss, (x,), (way,))[1], (x,), (way,))[1]
    torch.testing.assert_close(moved, torch.einsum("ijkl,ij,kl->", hessian(reference)(x), way, way), **close)


@pytest.mark.parametrize("name", ["square", "positive", "indefinite", "least squares", "least norm"])
def test_complex_systems(name):
    shape, make, options, _ = STRUCTURES[name]
    x = normal(BATCH, *shape, dtype=torch.complex128).requires_grad_()
    b = normal(BATCH, shape[0], seed=1, dtype=torch.complex128).requires_grad_()

    def solved(x: Tensor, b: Tensor) -> Tensor:
        return ti.linear_solve(make(x), b, **options).value

    torch.testing.assert_close(solved(x, b), times(torch.linalg.pinv(make(x)), b), rtol=1e-9, atol=1e-9)
    assert gradcheck(solved, (x, b), fast_mode=True)
    assert gradgradcheck(solved, (x, b), fast_mode=True)


def test_one_system_of_a_tree_without_a_batch():
    weight, field = normal(6, 6).requires_grad_(), normal(6, seed=1).requires_grad_()

    def operator(y: dict[str, Tensor], weight: Tensor) -> dict[str, Tensor]:
        whole = square(weight) @ torch.cat((y["a"], y["b"].flatten()))
        return {"a": whole[:2], "b": whole[2:].reshape(2, 2)}

    def solved(weight: Tensor, field: Tensor) -> Tensor:
        tree = {"a": field[:2], "b": field[2:].reshape(2, 2)}
        value = ti.linear_solve(operator, tree, weight, batched=False).value
        return torch.cat((value["a"], value["b"].flatten()))

    torch.testing.assert_close(solved(weight, field), torch.linalg.solve(square(weight), field))
    assert gradcheck(solved, (weight, field), check_forward_ad=True, fast_mode=True)
    assert gradgradcheck(solved, (weight, field), fast_mode=True)
