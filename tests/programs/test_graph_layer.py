"""A graph layer: the nodes' features are the equilibrium of a graph convolution, called with the edges as they are."""

import pytest
import torch
from costs import Cost, assert_no_dearer, cost, implicit, solved
from torch import Tensor, nn

import torchimplicit as ti

convolutions = pytest.importorskip("torch_geometric.nn")

NODES, EDGES, FEATURES, WIDTH, RTOL = 40, 120, 8, 16, 1e-11


class GraphCell(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix, self.inject = convolutions.GCNConv(WIDTH, WIDTH), nn.Linear(FEATURES, WIDTH)
        with torch.no_grad():
            self.mix.lin.weight.mul_(0.3)

    def initial_state(self, x: Tensor, edges: Tensor) -> Tensor:
        return x.new_zeros(len(x), WIDTH)

    def forward(self, z: Tensor, x: Tensor, edges: Tensor) -> Tensor:
        return torch.tanh(self.mix(z, edges) + self.inject(x))


def by_hand(cell: GraphCell, x: Tensor, edges: Tensor) -> Tensor:
    z = solved(lambda z: cell(z, x, edges), cell.initial_state(x, edges), RTOL, dims=2)
    return implicit(lambda z: cell(z, x, edges), z, RTOL, dims=2)


def made() -> tuple[ti.nn.Equilibrium, Tensor, Tensor]:
    torch.manual_seed(0)
    layer = ti.nn.Equilibrium(
        GraphCell().double(),
        solver=ti.FixedPointIteration(rtol=RTOL, max_steps=500),
        eval_solver=ti.Anderson(rtol=1e-9),
        gradient=ti.Implicit(linear_solver=ti.Neumann(rtol=RTOL, max_steps=500)),
        batched=False,
    )
    x = torch.randn(NODES, FEATURES, dtype=torch.float64, requires_grad=True)
    return layer, x, torch.randint(NODES, (2, EDGES))


def costs(layer: ti.nn.Equilibrium, x: Tensor, edges: Tensor) -> tuple[Cost, Cost]:
    """Of a training step, by the layer and by the program's own solver."""
    inputs = (x, *layer.parameters())
    ours = cost(lambda: layer(x, edges).sin().sum(), layer.cell, inputs)
    return ours, cost(lambda: by_hand(layer.cell, x, edges).sin().sum(), layer.cell, inputs)


@pytest.fixture
def program():
    return made()


@pytest.mark.alone
def test_a_step_is_that_of_the_hook(program):
    layer, x, edges = program
    ours, own = costs(*program)
    assert_no_dearer(ours, own, layer.cell.initial_state(x, edges), states=1, rtol=1e-8)
    assert ours.peak <= 1.005 * own.peak


def test_evaluation_has_its_own_solver(program):
    layer, x, edges = program
    trained = layer(x, edges)
    slow = layer.solution.evaluations
    torch.testing.assert_close(layer.eval()(x, edges), trained, rtol=1e-7, atol=1e-9)
    assert layer.solution.evaluations < slow


def test_the_edges_are_no_initial_state(program):
    layer, x, edges = program
    with pytest.raises(TypeError, match="called with 1 inputs"):
        layer(x)
    z = layer(x, edges)
    layer(x, edges, z0=z.detach())
    assert layer.solution.steps == 0
