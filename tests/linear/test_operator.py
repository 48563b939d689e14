from __future__ import annotations

from dataclasses import replace

import torch

from torchimplicit.testing.linear_suite import matrix_operator


def test_dense() -> None:
    a = torch.randn(3, 5, 5, generator=torch.Generator().manual_seed(0))
    operator = matrix_operator(a)
    torch.testing.assert_close(operator.dense(), a)
    block = replace(operator, block_product=lambda v: torch.einsum("bij,kbj->kbi", a, v))
    torch.testing.assert_close(block.dense(), a)


def test_project() -> None:
    w = torch.nn.functional.normalize(torch.ones(1, 5), dim=-1)
    v = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    operator = matrix_operator(torch.eye(5).expand(3, 5, 5))
    assert operator.project(v) is v
    projected = replace(operator, null=w).project(v)
    assert (projected @ w.T).abs().max() < 1e-6
    torch.testing.assert_close(projected, v - v.mean(-1, keepdim=True))
