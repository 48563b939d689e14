"""The extreme eigenvalues of operators that have a preconditioner."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from torchimplicit.linear import Diagonal, HessianMemory, LinearOperator, ReferenceHessian
from torchimplicit.linear.extremes import extreme_eigenvalues
from torchimplicit.linear.preconditioners import Preconditioner

LOW = {"definite": None, "nearly singular": 1e-4, "saddle": -0.02, "deep saddle": -30.0}
"""The least eigenvalue of the first sample."""


def spectra(dim: int, batch: int, low: float | None) -> tuple[Tensor, Tensor]:
    """Eigenvalues from .05 to 125, ``[batch, dim]``, and the eigenvectors."""
    generator = torch.Generator().manual_seed(0)
    turns = torch.linalg.qr(torch.randn(batch, dim, dim, generator=generator, dtype=torch.float64)).Q
    values = torch.logspace(-1.3, 2.1, dim, dtype=torch.float64).repeat(batch, 1)
    if low is not None:
        values[0, dim // 2] = low
    return values, turns


class Counted:
    """An operator that counts its products, ``P H P`` where it has a null vector."""

    def __init__(self, matrix: Tensor, null: Tensor | None, dtype: torch.dtype = torch.float64):
        self.products = 0
        if null is not None:
            plane = torch.eye(matrix.shape[1], dtype=matrix.dtype) - null[:, :, None] * null[:, None, :]
            matrix = plane @ matrix @ plane
        self.matrix = matrix.to(dtype)
        self.operator = LinearOperator(
            product=self.product,
            batch=len(matrix),
            dim=matrix.shape[1],
            dtype=dtype,
            device=torch.device("cpu"),
            symmetric=True,
            null=None if null is None else null.to(dtype),
        )

    def product(self, v: Tensor) -> Tensor:
        self.products += 1
        return torch.einsum("bij,bj->bi", self.matrix, v)


def reference(values: Tensor, turns: Tensor, noise: float) -> HessianMemory:
    """The Hessian of a point nearby, off by ``noise`` relative to the Hessian itself."""
    generator = torch.Generator().manual_seed(1)
    dim = values.shape[1]
    drawn = torch.randn(len(values), dim, dim, generator=generator, dtype=torch.float64) / dim**0.5
    root = values.abs().sqrt()
    change = noise * root[:, :, None] * (drawn + drawn.mT) * root[:, None, :]
    kept = ReferenceHessian().init()
    kept.keep(turns @ (torch.diag_embed(values) + change) @ turns.mT)
    return kept


@pytest.mark.parametrize("low", LOW)
@pytest.mark.parametrize("noise", [0.0, 0.02, 0.3])
@pytest.mark.parametrize("constrained", [False, True])
@pytest.mark.parametrize(("dim", "batch"), [(60, 1), (200, 3)])
def test_a_kept_hessian_finds_them_in_few_products(
    dim: int, batch: int, constrained: bool, noise: float, low: str
) -> None:
    values, turns = spectra(dim, batch, LOW[low])
    null = torch.nn.functional.normalize(torch.linspace(0.5, 1.5, dim, dtype=torch.float64), dim=0)
    counted = Counted(turns @ torch.diag_embed(values) @ turns.mT, null.expand(batch, -1) if constrained else None)
    least, largest = extreme_eigenvalues(counted.operator, preconditioner=reference(values, turns, noise))
    products = counted.products
    exact = torch.linalg.eigvalsh(counted.operator.spectrum_matrix(torch.float64))
    torch.testing.assert_close(least, exact[:, 0], rtol=1e-2, atol=1e-5 * float(exact.max()))
    torch.testing.assert_close(largest, exact[:, -1], rtol=0.1, atol=0.0)
    assert products <= 60


def test_single_precision() -> None:
    values, turns = spectra(80, 2, None)
    counted = Counted(turns @ torch.diag_embed(values) @ turns.mT, None, torch.float32)
    least, _ = extreme_eigenvalues(counted.operator, preconditioner=reference(values, turns, 0.02))
    torch.testing.assert_close(least.double(), values[:, 0], rtol=1e-2, atol=0.0)


@pytest.mark.parametrize("preconditioner", [Diagonal(torch.ones(50)), Diagonal(torch.linspace(1.0, 5.0, 50))])
def test_an_exhausted_space(preconditioner: Preconditioner) -> None:
    """Two distinct eigenvalues: the residuals vanish, or rounding is all that is left of them."""
    scale = torch.where(torch.arange(50) < 20, 2.0, 5.0).double()
    counted = Counted(torch.diag(scale).repeat(3, 1, 1), None)
    least, largest = extreme_eigenvalues(counted.operator, preconditioner=preconditioner)
    torch.testing.assert_close(least, torch.full((3,), 2.0, dtype=torch.float64), rtol=1e-3, atol=0.0)
    torch.testing.assert_close(largest, torch.full((3,), 5.0, dtype=torch.float64), rtol=1e-2, atol=0.0)


@pytest.mark.parametrize("constrained", [False, True])
def test_the_whole_space_when_nothing_helps(constrained: bool) -> None:
    """A preconditioner that is far off: as many products as there are dimensions, then it is exact."""
    values, turns = spectra(40, 2, -0.02)
    null = torch.nn.functional.normalize(torch.linspace(0.5, 1.5, 40, dtype=torch.float64), dim=0).expand(2, -1)
    counted = Counted(turns @ torch.diag_embed(values) @ turns.mT, null if constrained else None)
    useless = Diagonal(torch.logspace(-3, 3, 40, dtype=torch.float64))
    least, _ = extreme_eigenvalues(counted.operator, preconditioner=useless)
    assert counted.products == 40 - constrained
    exact = torch.linalg.eigvalsh(counted.operator.spectrum_matrix(torch.float64))
    torch.testing.assert_close(least, exact[:, 0], rtol=1e-6, atol=1e-6)


def test_no_more_products_than_allowed() -> None:
    values, turns = spectra(100, 2, None)
    counted = Counted(turns @ torch.diag_embed(values) @ turns.mT, None)
    extreme_eigenvalues(counted.operator, subspace=7, preconditioner=Diagonal(torch.ones(100, dtype=torch.float64)))
    assert counted.products == 7


@pytest.mark.parametrize("way", ["dense", "lanczos", "preconditioned"])
def test_a_sample_that_is_not_finite_changes_no_other(way: str) -> None:
    values, turns = spectra(60, 3, None)
    matrix = turns @ torch.diag_embed(values) @ turns.mT
    matrix[1] = torch.nan
    operator = Counted(matrix, None).operator
    given = Diagonal(torch.ones(60, dtype=torch.float64)) if way == "preconditioned" else None
    least, largest = extreme_eigenvalues(operator, 59 if way == "lanczos" else 60, preconditioner=given)
    assert bool(least[1].isnan())
    assert bool(largest[1].isnan())
    torch.testing.assert_close(least[[0, 2]], values[[0, 2], 0], rtol=1e-2, atol=0.0)
    torch.testing.assert_close(largest[[0, 2]], values[[0, 2], -1], rtol=0.1, atol=0.0)
