from __future__ import annotations

import pytest
import torch

from torchimplicit.linear.basis import Basis, inner, less, room


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("dim", [3, 130, 500])
def test_products_of_every_size(count: int, dim: int) -> None:
    v = torch.randn(4, dim, dtype=torch.float64)
    basis = room(v, count)
    basis.copy_(torch.randn(4, count, dim, dtype=torch.float64))
    assert all(basis[:, i].is_contiguous() for i in range(count))
    torch.testing.assert_close(inner(basis, v), torch.einsum("bkd,bd->bk", basis, v))
    weights = torch.randn(count, 4, dtype=torch.float64).mT  # column by column
    torch.testing.assert_close(less(v, weights, basis), v - torch.einsum("bkd,bk->bd", basis, weights))


@pytest.mark.parametrize("rows", [4, 600])
@pytest.mark.parametrize("leave_at", [3, 7, 12, 13])
def test_it_grows_after_rows_have_left(rows: int, leave_at: int) -> None:
    like = torch.randn(rows, 64, dtype=torch.float64)
    basis, plain = Basis.empty(like, 100), list[torch.Tensor]()
    for k in range(20):
        if k == leave_at:
            stay = torch.tensor([0, rows - 2])
            basis, plain, like = basis.select(stay), [vector[stay] for vector in plain], like[stay]
        vector = torch.randn_like(like)
        if k:
            torch.testing.assert_close(basis.inner(vector), torch.stack([(q * vector).sum(1) for q in plain], 1))
            weights = torch.randn(len(like), k, dtype=torch.float64)
            expected = vector - sum(weights[:, i : i + 1] * q for i, q in enumerate(plain))
            torch.testing.assert_close(basis.less(vector, weights), expected)
        basis = basis.longer()
        basis.slot(k).copy_(vector)
        plain.append(vector)
