"""Systems that are too large to be factorized, and badly scaled or in need of many directions."""

from __future__ import annotations

import pytest
import torch

from torchimplicit.linear import GMRES, MINRES, KrylovOrDense
from torchimplicit.linear.equilibrate import equilibrated
from torchimplicit.testing.linear_suite import matrix_operator, residuals

F64 = torch.float64
DIM, ENTRIES = 300, 2**15  # less than the matrices have


def scaled(symmetric: bool) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    a = torch.eye(DIM, dtype=F64) + 0.3 * torch.randn(2, DIM, DIM, generator=generator, dtype=F64) / DIM**0.5
    left, right = (10 ** (6 * torch.rand(2, DIM, generator=generator, dtype=F64) - 3) for _ in range(2))
    if symmetric:
        return left[:, :, None] * (a + a.mT) * left[:, None, :]
    return left[:, :, None] * a * right[:, None, :]


@pytest.mark.parametrize("symmetric", [False, True])
def test_rows_and_columns_come_to_one_size(symmetric):
    a = scaled(symmetric)
    left, right = equilibrated(matrix_operator(a, symmetric=symmetric))
    assert not symmetric or bool((left == right).all())
    matrix = left[:, :, None] * a * right[:, None, :]
    for dim in (1, 2):
        norms = torch.linalg.vector_norm(matrix, dim=dim)
        assert 0.05 < norms.min() < norms.max() < 20


@pytest.mark.parametrize(("symmetric", "krylov"), [(False, GMRES()), (True, MINRES(max_steps=200))])
def test_a_badly_scaled_system_that_is_too_large_to_be_factorized(symmetric, krylov):
    a = scaled(symmetric)
    true = torch.ones(2, DIM, dtype=F64) / torch.linalg.vector_norm(a, dim=1)
    b = (a @ true[:, :, None])[:, :, 0]
    operator = matrix_operator(a, symmetric=symmetric)
    assert not krylov.solve(operator, b).report.converged.all()
    found = KrylovOrDense(krylov=krylov, entries=ENTRIES).solve(operator, b)
    assert found.report.converged.all()
    assert (residuals(a, b, found.value) <= 1e-10 * torch.linalg.vector_norm(b, dim=1)).all()
    torch.testing.assert_close(found.value / true, torch.ones_like(true), rtol=1e-5, atol=1e-5)


def test_one_that_needs_many_directions():
    """The Laplacian of a square, whose size is a hundred times what the directions of the first try can tell of."""
    line = 2 * torch.eye(17, dtype=F64) - torch.ones(16, dtype=F64).diag(1) - torch.ones(16, dtype=F64).diag(-1)
    eye = torch.eye(17, dtype=F64)
    a = (torch.kron(line, eye) + torch.kron(eye, line))[None]
    b = torch.ones(1, 17 * 17, dtype=F64)
    krylov = GMRES(restart=8, max_steps=60)
    assert not krylov.solve(matrix_operator(a), b).report.converged.all()
    found = KrylovOrDense(krylov=krylov, entries=2**16).solve(matrix_operator(a), b)
    assert found.report.converged.all()
    torch.testing.assert_close(found.value, torch.linalg.solve(a, b), rtol=1e-8, atol=1e-8)
