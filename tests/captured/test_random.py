"""What is refused because it draws random numbers, and what only could."""

from __future__ import annotations

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.functional import dropout, scaled_dot_product_attention

from torchimplicit.captured.compiled import _draws


@pytest.mark.parametrize(
    ("function", "draws"),
    [
        (lambda x: scaled_dot_product_attention(x, x, x, is_causal=True), False),
        (lambda x: scaled_dot_product_attention(x, x, x, dropout_p=0.1), True),
        (lambda x: dropout(x, 0.5), True),
        (lambda x: x + torch.randn_like(x), True),
        (torch.tanh, False),
    ],
    ids=["attention", "attention with dropout", "dropout", "noise", "tanh"],
)
def test_what_draws_random_numbers(function, draws):
    graph = make_fx(function)(torch.randn(2, 2, 5, 8))
    assert any(map(_draws, graph.graph.nodes)) == draws
