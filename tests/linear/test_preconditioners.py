from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from torchimplicit.linear import (
    CG,
    GMRES,
    MINRES,
    Diagonal,
    Factorized,
    Inverse,
    Jacobi,
    LinearOperator,
    Preconditioner,
)
from torchimplicit.testing.linear_suite import matrix_operator


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def definite(batch: int, dim: int) -> Tensor:
    a = gaussian(batch, dim, dim)
    return a @ a.mT / dim + torch.eye(dim, dtype=torch.float64)


def unit(batch: int, dim: int) -> Tensor:
    return torch.nn.functional.normalize(gaussian(batch, dim, seed=5), dim=-1)


@pytest.mark.parametrize("block", [False, True])
@pytest.mark.parametrize("limit", [None, 1, 40])
def test_jacobi_is_the_exact_diagonal(block: bool, limit: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if limit is not None:
        monkeypatch.setattr("torchimplicit.linear.preconditioners._BLOCK_ENTRIES", limit)
    a = gaussian(3, 7, 7)
    operator = matrix_operator(a)
    if block:
        operator = replace(operator, block_product=lambda v: torch.einsum("bij,kbj->kbi", a, v))
    torch.testing.assert_close(Jacobi().diagonal(operator), a.diagonal(dim1=1, dim2=2))


def test_jacobi_is_paid_for() -> None:
    a, tally = definite(4, 6), [0]
    report = (
        CG(preconditioner=Jacobi()).solve(matrix_operator(a, tally, symmetric=True), torch.ones(4, 6).double()).report
    )
    assert report.evaluations == tally[0] / 4
    assert report.evaluations > 6


def test_jacobi_with_zeros_on_the_diagonal() -> None:
    a = torch.diag_embed(torch.tensor([[0.0, 2.0, -4.0], [0.0, 0.0, 0.0]]))
    v = torch.ones(2, 3)
    inverse = Jacobi().prepare(matrix_operator(a)).inverse
    torch.testing.assert_close(inverse(v), torch.tensor([[1 / 3, 0.5, -0.25], [1.0, 1.0, 1.0]]))
    inverse = Jacobi().prepare(matrix_operator(a), definite=True).inverse
    torch.testing.assert_close(inverse(v), torch.tensor([[1 / 3, 0.5, 0.25], [1.0, 1.0, 1.0]]))


def cases(batch: int, dim: int) -> dict[str, tuple[Preconditioner, Tensor]]:
    """Preconditioners, and the matrices ``[batch, dim, dim]`` that they stand for."""
    values, a, m = 1 + gaussian(batch, dim).abs(), definite(batch, dim), gaussian(batch, dim, dim)
    inverse = torch.linalg.inv(m)
    return {
        "shared diagonal": (Diagonal(values[0]), torch.diag(values[0]).expand(batch, -1, -1)),
        "diagonal": (Diagonal(values), torch.diag_embed(values)),
        "shared factor": (Factorized(a[0]), a[:1].expand(batch, -1, -1)),
        "factor": (Factorized(a), a),
        "function": (Inverse(lambda v: (inverse @ v.unsqueeze(-1)).squeeze(-1)), m),
    }


@pytest.mark.parametrize("name", ["shared diagonal", "diagonal", "shared factor", "factor", "function"])
@pytest.mark.parametrize("transposed", [False, True])
def test_inverses(name: str, transposed: bool) -> None:
    preconditioner, m = cases(5, 6)[name]
    v, rows = gaussian(5, 6, seed=1), torch.tensor([3, 1])
    m = m.mT if transposed else m
    prepared = preconditioner.prepare(matrix_operator(m, transposed=transposed))
    expected = torch.linalg.solve(m, v)
    torch.testing.assert_close(prepared.inverse(v), expected)
    torch.testing.assert_close(prepared.transposed_inverse(v), torch.linalg.solve(m.mT, v))
    part = prepared.restrict(torch.tensor([0, 1, 3])).restrict(torch.tensor([2, 1]))
    torch.testing.assert_close(part.inverse(v[rows]), expected[rows])
    torch.testing.assert_close(part.transposed_inverse(v[rows]), torch.linalg.solve(m.mT, v)[rows])


@pytest.mark.parametrize("name", ["shared diagonal", "diagonal", "shared factor", "factor", "function"])
@pytest.mark.parametrize("shared", [False, True])
def test_consistent_with_a_null_vector(name: str, shared: bool) -> None:
    """``M^-1 - M^-1 w w^T M^-1 / (w^T M^-1 w)`` for symmetric M, and into the complement of w for any."""
    preconditioner, m = cases(5, 6)[name]
    w, v, rows = unit(5, 6), gaussian(5, 6, seed=1), torch.tensor([4, 0])
    w = w[:1].expand(5, -1) if shared else w
    prepared = preconditioner.prepare(matrix_operator(m)).orthogonal_to(w)
    y = prepared.inverse(v)
    assert (y * w).sum(-1).abs().max() < 1e-12
    assert (prepared.transposed_inverse(v) * w).sum(-1).abs().max() < 1e-11
    if name != "function":
        inverse = torch.linalg.inv(m)
        u = (inverse @ w.unsqueeze(-1)).squeeze(-1)
        expected = (inverse @ v.unsqueeze(-1)).squeeze(-1) - u * ((u * v).sum(-1) / (u * w).sum(-1))[:, None]
        torch.testing.assert_close(y, expected)
    torch.testing.assert_close(prepared.restrict(rows).inverse(v[rows]), y[rows])


@pytest.mark.parametrize("solver", [CG, MINRES])
def test_shared_null_vector(solver: type[CG] | type[MINRES]) -> None:
    h, w, b = definite(4, 8), unit(1, 8), gaussian(4, 8, seed=2)
    p = torch.eye(8, dtype=torch.float64) - w.T @ w
    for preconditioner in (None, Factorized(h), Diagonal(h.diagonal(dim1=1, dim2=2)), lambda v: v):
        operator = matrix_operator(p @ h @ p, symmetric=True, null=w)
        solution = solver(rtol=1e-9, preconditioner=preconditioner).solve(operator, b)
        assert solution.report.converged.all()
        assert (solution.value @ w.T).abs().max() < 1e-10


def test_a_function_always_sees_the_whole_batch() -> None:
    seen = []

    def inverse(v: Tensor) -> Tensor:
        seen.append(v.shape)
        return v / scale

    scale = torch.linspace(1, 3, 8, dtype=torch.float64)[:, None]
    a = scale[:, :, None] * torch.eye(5, dtype=torch.float64)
    a = a + 0.3 * torch.linspace(0, 1, 8, dtype=torch.float64)[:, None, None] ** 4 * gaussian(8, 5, 5)
    report = GMRES(preconditioner=inverse).solve(matrix_operator(a), torch.ones(8, 5, dtype=torch.float64)).report
    assert report.converged.all()
    assert report.steps.unique().numel() > 1
    assert set(seen) == {torch.Size((8, 5))}


def test_half_precision_operators() -> None:
    a = (torch.eye(6) * 2).expand(3, 6, 6).bfloat16()
    b = torch.ones(3, 6, dtype=torch.bfloat16)
    for preconditioner in (Jacobi(), Diagonal(torch.full((6,), 2.0)), Factorized(a[0]), lambda v: v / 2):
        solution = CG(preconditioner=preconditioner).solve(matrix_operator(a, symmetric=True), b)
        assert solution.report.converged.all()
        assert solution.value.dtype == torch.bfloat16


def test_what_has_no_inverse_is_refused() -> None:
    with pytest.raises(ValueError, match="zero or not finite"):
        Diagonal(torch.tensor([1.0, 0.0]))
    with pytest.raises(ValueError, match="zero or not finite"):
        Diagonal(torch.tensor([1.0, torch.nan]))
    with pytest.raises(ValueError, match="values must be"):
        Diagonal(torch.ones(2, 2, 2))
    with pytest.raises(ValueError, match="not positive definite"):
        Factorized(torch.diag(torch.tensor([1.0, -1.0])))
    with pytest.raises(ValueError, match="matrix must be"):
        Factorized(torch.ones(2, 3))


def test_what_does_not_fit_is_refused() -> None:
    operator: LinearOperator = matrix_operator(definite(3, 4))
    for preconditioner in (
        Diagonal(torch.ones(5)),
        Diagonal(torch.ones(2, 4)),
        Factorized(torch.eye(5)),
        Factorized(torch.eye(4).expand(2, 4, 4)),
    ):
        with pytest.raises(ValueError, match="does not fit"):
            preconditioner.prepare(operator)
