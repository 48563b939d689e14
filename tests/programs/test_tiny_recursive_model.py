"""A tiny recursive model (two states refined n times, of which autograd sees the last, under deep supervision)."""

import warnings

import pytest
import torch
from costs import assert_no_dearer, cost
from torch import Tensor, nn
from torch.nn import functional

import torchimplicit as ti

WIDTH, BATCH, TURNS, SEGMENTS = 32, 64, 3, 4


class Block(nn.Module):
    def __init__(self, inputs: int):
        super().__init__()
        self.wide, self.narrow = nn.Linear(inputs * WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, *parts: Tensor) -> Tensor:
        return self.norm(parts[0] + self.narrow(torch.relu(self.wide(torch.cat(parts, dim=-1)))))


class Recursion(nn.Module):
    """One turn: the latent is refined several times, the answer once; a logit says whether to halt."""

    def __init__(self):
        super().__init__()
        self.low, self.high, self.halt = Block(3), Block(2), nn.Linear(WIDTH, 1)

    def initial_state(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(x), torch.zeros_like(x)

    def forward(self, answer: Tensor, latent: Tensor, x: Tensor):
        for _ in range(3):
            latent = self.low(latent, answer, x)
        answer = self.high(answer, latent)
        return (answer, latent), self.halt(answer)


def by_hand(cell: Recursion, x: Tensor, state: tuple[Tensor, Tensor], turns: int = TURNS):
    with torch.no_grad():
        for _ in range(turns - 1):
            state, _ = cell(*state, x)
    return cell(*state, x)


def supervised(refine, head: nn.Module, x: Tensor, labels: Tensor, state) -> Tensor:
    """The loss of all segments, each from where the last one has ended."""
    total = x.new_zeros(())
    for _ in range(SEGMENTS):
        state, halt = refine(x, state)
        logits = head(state[0])
        right = (logits.argmax(-1) == labels).to(x.dtype)
        total = total + functional.cross_entropy(logits, labels)
        total = total + functional.binary_cross_entropy_with_logits(halt[:, 0], right)
        state = tuple(part.detach() for part in state)
    return total


@pytest.fixture
def model():
    torch.manual_seed(0)
    layer = ti.nn.Equilibrium(
        Recursion().double(),
        solver=ti.FixedPointIteration(steps=TURNS),
        eval_solver=ti.FixedPointIteration(steps=2 * TURNS),
        gradient=ti.OneStep(),
        has_aux=True,
        unpack=True,
    )
    x = torch.randn(BATCH, WIDTH, dtype=torch.float64)
    return layer, nn.Linear(WIDTH, 10).double(), x, torch.randint(10, (BATCH,))


def test_training_is_the_loop_by_hand(model):
    layer, head, x, labels = model
    start = layer.cell.initial_state(x)
    inputs = (*layer.parameters(), *head.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = cost(lambda: supervised(lambda x, s: layer(x, z0=s), head, x, labels, start), layer.cell, inputs)
    own = cost(lambda: supervised(lambda x, s: by_hand(layer.cell, x, s), head, x, labels, start), layer.cell, inputs)
    assert ours.forward == TURNS * SEGMENTS
    assert_no_dearer(ours, own, start, states=0.6)
    assert (layer.solution.status == ti.Status.STEPS_TAKEN).all()


def test_evaluation_thinks_longer(model):
    layer, _, x, _ = model
    state, halt = by_hand(layer.cell, x, layer.cell.initial_state(x), turns=2 * TURNS)
    found, logit = layer.eval()(x)
    torch.testing.assert_close((*found, logit), (*state, halt))
