from __future__ import annotations

import pytest
import torch

from torchimplicit.linear.basis import inner, less, room


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
