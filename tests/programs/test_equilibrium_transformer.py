"""An equilibrium transformer: causal attention with a key-value cache, weight norms, dropout by channel."""

import pytest
import torch
from costs import assert_no_dearer, cost, implicit, solved
from torch import Tensor, nn

import torchimplicit as ti
from torchimplicit.nn import VariationalDropout, apply_norm, dropout_masks, weight_norm

WIDTH, HEADS, LENGTH, BATCH, RTOL = 16, 2, 10, 3, 1e-11


class Decoder(nn.Module):
    """One layer; beside the state it returns the keys and values, which a later segment attends to."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.wide, self.narrow = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.norm, self.drop = nn.LayerNorm(WIDTH), VariationalDropout(0.1, shared=1)
        for linear in (self.qkv, self.out, self.wide, self.narrow):
            nn.init.normal_(linear.weight, std=0.3 * linear.in_features**-0.5)
        apply_norm(self, weight_norm)

    def forward(self, z: Tensor, x: Tensor, past: Tensor | None = None) -> tuple[Tensor, Tensor]:
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in (self.qkv(z) + x).chunk(3, dim=-1))
        cache = torch.cat([k, v], dim=-1)
        k, v = (cache if past is None else torch.cat([past, cache], dim=2)).chunk(2, dim=-1)
        later = torch.ones(q.shape[2], k.shape[2]).triu(1 + k.shape[2] - q.shape[2]).bool()
        weights = (q @ k.transpose(2, 3) * q.shape[-1] ** -0.5).masked_fill(later, -torch.inf).softmax(-1)
        h = self.norm(z + self.drop(self.out((weights @ v).transpose(1, 2).flatten(2))))
        return self.norm(h + self.narrow(torch.relu(self.wide(h)))), cache

    def initial_state(self, x: Tensor, past: Tensor | None = None) -> Tensor:
        return x.new_zeros(*x.shape[:2], WIDTH)


def by_hand(cell: Decoder, x: Tensor, past: Tensor | None = None) -> Tensor:
    with dropout_masks(cell):
        z = solved(lambda z: cell(z, x, past)[0], cell.initial_state(x), RTOL, dims=2)
        return implicit(lambda z: cell(z, x, past)[0], z, RTOL, dims=2)


@pytest.fixture
def program():
    torch.manual_seed(0)
    layer = ti.nn.Equilibrium(
        Decoder().double(),
        solver=ti.FixedPointIteration(rtol=RTOL, max_steps=500),
        eval_solver=ti.Anderson(rtol=RTOL),
        gradient=ti.Implicit(linear_solver=ti.Neumann(rtol=RTOL, max_steps=500)),
        has_aux=True,
    )
    x = torch.randn(BATCH, LENGTH, 3 * WIDTH, dtype=torch.float64, requires_grad=True)
    return layer, x


@pytest.mark.parametrize("training", [True, False])
def test_a_step_is_that_of_the_hook(program, training):
    layer, x = program
    layer.train(training)
    inputs = (x, *layer.parameters())
    options = {} if training else {"solver": layer.solver}
    ours = cost(lambda: layer(x, **options)[0].sin().sum(), layer.cell, inputs)
    own = cost(lambda: by_hand(layer.cell, x).sin().sum(), layer.cell, inputs)
    assert_no_dearer(ours, own, layer.cell.initial_state(x), states=0.2, rtol=1e-8)


def test_the_cache_goes_on_to_the_next_segment(program):
    """Two segments, the second with the keys and values of the first, are one causal pass over both."""
    layer, x = program
    layer.eval()
    whole, _ = layer(x)
    with torch.no_grad():
        first, cache = layer(x[:, :6])
        second, more = layer(x[:, 6:], cache)
    torch.testing.assert_close(torch.cat([first, second], dim=1), whole.detach(), rtol=1e-8, atol=1e-10)
    assert cache.shape[2] + more.shape[2] == LENGTH
    assert layer.solution.converged.all()


def test_a_loss_on_the_cache_reaches_the_weights_through_the_state(program):
    layer, x = program
    layer.eval()
    z = layer.cell.initial_state(x)
    for _ in range(400):
        z, cache = layer.cell(z, x)
    weights = tuple(layer.parameters())
    got = torch.autograd.grad(layer(x)[1].sin().sum(), weights, allow_unused=True)
    expected = torch.autograd.grad(cache.sin().sum(), weights, allow_unused=True)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)
