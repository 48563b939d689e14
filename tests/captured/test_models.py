"""Models of ours with compiled solves, and cells with parametrized weights, against the eager loop."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import torchimplicit as ti
from torchimplicit.captured import compilations
from torchimplicit.captured.compiled import spelt
from torchimplicit.errors import CaptureWarning
from torchimplicit.models import DEQTransformer
from torchimplicit.models.deq_transformer import DEQTransformerConfig
from torchimplicit.models.ignn import Adjacency, IGNNLayer

pytestmark = pytest.mark.usefixtures("interpreted")
DIM = 6


@pytest.fixture(autouse=True)
def nothing_is_said():
    with warnings.catch_warnings():
        warnings.simplefilter("error", CaptureWarning)
        yield


class Cell(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.inner = norm(nn.Linear(DIM, DIM, dtype=torch.float64))

    def forward(self, z, x):
        return 0.5 * torch.tanh(self.inner(z) + x)


def gradients(model, *inputs):
    model.zero_grad()
    model(*inputs).square().sum().backward()
    return [p.grad.clone() for p in model.parameters()]


def agree(one, two, rtol=1e-8):
    for a, b in zip(one, two, strict=True):
        assert (a - b).norm() <= rtol * (b.norm() + 1e-3)


@pytest.mark.parametrize("norm", [ti.nn.weight_norm, ti.nn.spectral_norm], ids=["weight norm", "spectral norm"])
def test_parametrized_weights_are_those_of_each_solve(norm):
    torch.manual_seed(0)
    cell = Cell(norm).eval()
    x = torch.randn(4, DIM, dtype=torch.float64)
    layers = [ti.nn.Equilibrium(cell, solver=ti.Anderson(rtol=1e-12), compile=c) for c in (False, True)]
    before = compilations()
    for _ in range(3):
        one, two = (gradients(layer, x) for layer in layers)
        agree(two, one)
        with torch.no_grad():
            for p, g in zip(cell.parameters(), one, strict=True):
                p -= 0.1 * g
    assert compilations() == before + 1
    value = layers[1](x)
    with torch.no_grad():
        cell.inner.bias += 1
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation|changed since"):
        value.sum().backward()


@pytest.mark.parametrize("per_graph", [False, pytest.param(True, marks=pytest.mark.long)])
def test_a_graph_layer(per_graph):
    torch.manual_seed(0)
    edges = torch.tensor([[0, 1, 2, 3, 3, 5], [1, 2, 0, 4, 5, 4]])
    graph = Adjacency.normalized(edges, 6, dtype=torch.float64)
    batch = torch.tensor([0, 0, 0, 1, 1, 1])
    solver, gradient = ti.FixedPointIteration(rtol=1e-12, max_steps=500), ti.Implicit(linear_solver=ti.Neumann())
    layer = IGNNLayer(3, 5, solver=solver, gradient=gradient, per_graph=per_graph).double()
    u = torch.randn(6, 3, dtype=torch.float64)
    expected, before = gradients(layer, u, graph, batch), compilations()
    layer.equilibrium.compiles = True
    for _ in range(2):
        agree(gradients(layer, u, graph, batch), expected)
    assert compilations() == before + 1


@pytest.mark.parametrize("weight_norm", [False, True])
def test_a_transformer_of_any_batch(weight_norm):
    torch.manual_seed(0)
    config = DEQTransformerConfig(
        vocabulary=11, d_model=8, heads=2, d_head=4, d_inner=12, weight_norm=weight_norm, memory=3
    )
    gradient = ti.Implicit(linear_solver=ti.GMRES(rtol=1e-11))
    model = DEQTransformer(config, solver=ti.Anderson(rtol=1e-11), gradient=gradient).double()
    before = compilations()
    for batch in (3, 2, 5):
        tokens, targets = torch.randint(11, (2, batch, 4))
        found = []
        for compile in (False, True):
            model.equilibrium.compiles = compile
            model.zero_grad()
            model(tokens, targets)[0].sum().backward()
            found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        agree(*found, rtol=1e-7)
    assert compilations() == before + 1


def test_what_is_joined_in_another_order_is_contiguous():
    # as outside of the compiler, which would have it otherwise when it reads the graph again
    def joined(a):
        return torch.cat((a.permute(1, 0, 2), a.permute(1, 0, 2)), dim=2).reshape(-1, 2 * a.shape[-1])

    a = torch.randn(3, 2, 4)
    graph = make_fx(spelt(joined))(a)
    assert any(node.target is torch.ops.aten.clone.default for node in graph.graph.nodes)
    assert torch.equal(graph(a), joined(a))
