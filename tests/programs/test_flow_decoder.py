"""An optical-flow decoder: hidden features and a flow are refined together, and several of the flows are judged."""

import pytest
import torch
from costs import assert_no_dearer, cost
from torch import Tensor, nn
from torch.nn import functional

import torchimplicit as ti

CHANNELS, SIZE, BATCH, STEPS, PLACES, GAMMA = 8, 12, 2, 12, (4, 8), 0.8


class Update(nn.Module):
    """A convolutional GRU that looks up, at the flow of now, how well the two images' features agree."""

    def __init__(self):
        super().__init__()
        width = 2 * CHANNELS + 3
        self.gates = nn.Conv2d(width, 2 * CHANNELS, 3, padding=1)
        self.candidate = nn.Conv2d(width, CHANNELS, 3, padding=1)
        self.step = nn.Conv2d(CHANNELS, 2, 3, padding=1)

    def initial_state(self, context: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(context), context.new_zeros(len(context), 2, SIZE, SIZE)

    def forward(self, hidden: Tensor, flow: Tensor, context: Tensor, first: Tensor, second: Tensor):
        line = torch.linspace(-1, 1, SIZE, dtype=flow.dtype)
        grid = torch.stack(torch.meshgrid(line, line, indexing="xy"), dim=-1)
        there = functional.grid_sample(second, grid + flow.movedim(1, -1), align_corners=True)
        agreement = (first * there).mean(dim=1, keepdim=True)
        seen = torch.cat([context, agreement, flow], dim=1)
        update, reset = torch.sigmoid(self.gates(torch.cat([hidden, seen], dim=1))).chunk(2, dim=1)
        new = torch.tanh(self.candidate(torch.cat([reset * hidden, seen], dim=1)))
        hidden = (1 - update) * hidden + update * new
        return hidden, 0.9 * flow + 0.1 * torch.tanh(self.step(hidden))


def sequence_loss(flows: list[Tensor], truth: Tensor) -> Tensor:
    return sum(GAMMA ** (len(flows) - 1 - k) * (flow - truth).abs().mean() for k, flow in enumerate(flows))


@pytest.fixture
def program():
    torch.manual_seed(0)
    solver = ti.FixedPointIteration(steps=STEPS, keep_trajectory=PLACES)
    gradient = ti.UnrolledPhantom(steps=1, damping=1.0)
    layer = ti.nn.Equilibrium(Update().double(), solver=solver, gradient=gradient, unpack=True)
    images = [torch.randn(BATCH, CHANNELS, SIZE, SIZE, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    return layer, images, torch.randn(BATCH, 2, SIZE, SIZE, dtype=torch.float64)


def by_hand(cell: Update, images, places=(*PLACES, STEPS)) -> list[Tensor]:
    """The iteration without gradients, then one step with them from each of the states that were picked."""
    state, picked = cell.initial_state(*images), []
    with torch.no_grad():
        for step in range(1, STEPS + 1):
            state = cell(*state, *images)
            if step in places:
                picked.append(state)
    return [cell(*state, *images)[1] for state in picked]


def test_states_on_the_way_are_those_of_the_loop(program):
    layer, images, truth = program
    inputs = (*images, *layer.parameters())
    ours = cost(lambda: sequence_loss([flow for _, flow in layer.solve(*images).states()], truth), layer.cell, inputs)
    own = cost(lambda: sequence_loss(by_hand(layer.cell, images), truth), layer.cell, inputs)
    assert ours.forward == own.forward == STEPS + len(PLACES) + 1
    assert_no_dearer(ours, own, layer.cell.initial_state(*images), states=0)


def test_solves_that_go_on_from_each_other(program):
    """Of each stretch autograd sees the last step, which leads to the flow that is judged: not one step is repeated."""
    layer, images, truth = program
    inputs = (*images, *layer.parameters())
    stretch = ti.FixedPointIteration(steps=STEPS // 3)

    def ours():
        state, flows = None, []
        for _ in range(3):
            state = layer(*images, z0=state, solver=stretch, gradient=ti.OneStep())
            flows.append(state[1])
            state = tuple(part.detach() for part in state)
        return sequence_loss(flows, truth)

    def own():
        state, flows = layer.cell.initial_state(*images), []
        for step in range(1, STEPS + 1):
            with torch.set_grad_enabled(step % stretch.steps == 0):
                state = layer.cell(*(part.detach() for part in state), *images)
            if step % stretch.steps == 0:
                flows.append(state[1])
        return sequence_loss(flows, truth)

    state = layer.cell.initial_state(*images)
    assert_no_dearer(cost(ours, layer.cell, inputs), cost(own, layer.cell, inputs), state, states=0.1)
