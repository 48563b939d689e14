"""The explicit twin of the DEQ transformer."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny_transformer import TINY

import torchimplicit as ti
from torchimplicit.models import DEQTransformer, ExplicitTransformer


def text(length: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    words = torch.randint(0, TINY.vocabulary, (3, length + 1), generator=torch.Generator().manual_seed(0))
    return words[:, :-1], words[:, 1:]


def test_with_equal_layers_it_is_the_looped_model():
    config = replace(TINY, memory=0)
    looped = DEQTransformer(config, solver=ti.FixedPointIteration(steps=3), gradient=ti.Unrolled()).double()
    stack = ExplicitTransformer(config, 3).double()
    stack.embedding, stack.softmax = looped.embedding, looped.softmax
    for layer in stack.layers:
        layer.load_state_dict(looped.cell.state_dict())
    losses = [model(*text())[0] for model in (looped, stack)]
    torch.testing.assert_close(losses[0], losses[1])
    losses[0].sum().backward()
    gradients = torch.autograd.grad(losses[1].sum(), [layer.widen.weight for layer in stack.layers])
    torch.testing.assert_close(torch.stack(gradients).sum(0), looped.cell.widen.weight.grad)


def test_memory_gives_a_segment_what_it_would_see_in_one():
    stack = ExplicitTransformer(replace(TINY, memory=20), 2).double()
    tokens, targets = text(10)
    whole, _ = stack(tokens, targets)
    first, memory = stack(tokens[:, :6], targets[:, :6])
    second, _ = stack(tokens[:, 6:], targets[:, 6:], memory)
    torch.testing.assert_close(torch.cat((first, second), dim=1), whole)


def test_dropout_draws_one_mask_a_call():
    stack = ExplicitTransformer(replace(TINY, dropout=0.3, attention_dropout=0.3), 2)
    assert not torch.equal(stack(*text())[0], stack(*text())[0])
    stack.eval()
    assert torch.equal(stack(*text())[0], stack(*text())[0])


def test_a_depth_of_zero_is_refused():
    with pytest.raises(ValueError, match="depth is 0"):
        ExplicitTransformer(TINY, 0)
