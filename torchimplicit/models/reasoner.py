"""A small weight-tied network that carries an answer and a latent state, for puzzles on a board.

As hierarchical and tiny recursive models do (Wang et al. 2025, arXiv 2506.21734; Jolicoeur-Martineau 2025, arXiv
2510.04871), with one application of the network to both states as the cell of an equilibrium.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor, nn
from torch.nn import functional

from torchimplicit.gradients import Gradient
from torchimplicit.nn import Equilibrium
from torchimplicit.solution import Solution
from torchimplicit.solvers import FixedPointIteration, Solver

ReasoningState = tuple[Tensor, Tensor]
"""The answer and the latent state, ``[batch, places, width]`` each."""


@dataclass(frozen=True, kw_only=True)
class ReasonerConfig:
    """The sizes of a :class:`Reasoner`.

    Args:
        tokens: what a place of the puzzle can hold.
        answers: what a place of the answer can hold.
        width: numbers of a place in each of the two states.
        heads: of the attention; they divide the width.
        blocks: of the network, one after the other.
        expansion: of the width, within the blocks.
        mixing: how places see each other: by attention, or by a network across them (an MLP mixer).
        latent_updates: of the latent state for each one of the answer, in one evaluation of the cell.
    """

    tokens: int
    answers: int
    width: int = 64
    heads: int = 4
    blocks: int = 2
    expansion: int = 4
    mixing: Literal["attention", "mixer"] = "attention"
    latent_updates: int = 1

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"a width of {self.width} cannot be cut into {self.heads} heads")


def normalized(h: Tensor) -> Tensor:
    """Every place brought to a root mean square of one."""
    return functional.rms_norm(h, h.shape[-1:], eps=1e-5)


class GatedNetwork(nn.Module):
    """Two layers with a gate (SwiGLU; Shazeer 2020, arXiv 2002.05202), on the last dimension."""

    def __init__(self, width: int, expansion: int):
        super().__init__()
        hidden = max(1, round(expansion * width * 2 / 3))
        self.into = nn.Linear(width, 2 * hidden, bias=False)
        self.out = nn.Linear(hidden, width, bias=False)

    def forward(self, h: Tensor) -> Tensor:
        gate, value = self.into(h).chunk(2, dim=-1)
        return self.out(functional.silu(gate) * value)


class RelationAttention(nn.Module):
    """Attention whose scores get a learned number for the relation of two places, in the place of their positions.

    Args:
        width, heads: see :class:`ReasonerConfig`.
        relations: int64 ``[places, places]``, the kind of relation of every two, from 0 on.
    """

    relations: Tensor

    def __init__(self, width: int, heads: int, relations: Tensor):
        super().__init__()
        self.heads = heads
        self.project = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.bias = nn.Parameter(torch.randn(heads, int(relations.max()) + 1))
        self.register_buffer("relations", relations, persistent=False)

    def forward(self, h: Tensor) -> Tensor:
        batch, places, width = h.shape
        q, k, v = self.project(h).view(batch, places, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        scores = (q * (width // self.heads) ** -0.5) @ k.mT + self.bias[:, self.relations]
        return self.out((scores.softmax(dim=-1) @ v).transpose(1, 2).reshape(batch, places, width))


class PlaceMixer(nn.Module):
    """A gated network across the places, the same for every channel; it knows each place by its number."""

    def __init__(self, places: int, expansion: int):
        super().__init__()
        self.network = GatedNetwork(places, expansion)

    def forward(self, h: Tensor) -> Tensor:
        return self.network(h.mT).mT


class Block(nn.Module):
    """Places mixed, then channels; each is normalized before and scaled by a learned vector after."""

    def __init__(self, config: ReasonerConfig, relations: Tensor):
        super().__init__()
        self.mix = (
            RelationAttention(config.width, config.heads, relations)
            if config.mixing == "attention"
            else PlaceMixer(len(relations), config.expansion)
        )
        self.network = GatedNetwork(config.width, config.expansion)
        self.scales = nn.Parameter(torch.ones(2, config.width))

    def forward(self, h: Tensor) -> Tensor:
        h = h + self.scales[0] * self.mix(normalized(h))
        return h + self.scales[1] * self.network(normalized(h))


@final
class ReasoningCell(nn.Module):
    """One network for both states: the latent state from both and the puzzle, some times, then the answer from both.

    What it returns is normalized place by place: the states stay bounded, and there is an equilibrium (Brouwer).
    """

    def __init__(self, config: ReasonerConfig, relations: Tensor):
        super().__init__()
        self.latent_updates = config.latent_updates
        self.network = nn.Sequential(*(Block(config, relations) for _ in range(config.blocks)))

    def forward(self, answer: Tensor, latent: Tensor, puzzle: Tensor) -> ReasoningState:
        for _ in range(self.latent_updates):
            latent = normalized(self.network(latent + answer + puzzle))
        return normalized(self.network(answer + latent)), latent


@final
class Reasoner(nn.Module):
    """Puzzles to answers, by segments: a segment is one solve of the equilibrium, from where the last one ended.

    Args:
        config: the sizes.
        relations: int64 ``[places, places]``, see :class:`RelationAttention`; a mixer takes its size alone.
        solver, gradient: of a segment, as for :class:`~torchimplicit.nn.Equilibrium`; by default eight plain steps at
            most.
    """

    def __init__(
        self,
        config: ReasonerConfig,
        relations: Tensor,
        *,
        solver: Solver | None = None,
        gradient: Gradient | None = None,
    ):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.tokens, config.width)
        self.equilibrium = Equilibrium(
            ReasoningCell(config, relations),
            solver=solver or FixedPointIteration(max_steps=8, return_last=True),
            gradient=gradient,
            rowwise=True,
            unpack=True,
        )
        self.answer = nn.Linear(config.width, config.answers)
        self.halt = nn.Linear(config.width, 1)
        nn.init.zeros_(self.halt.weight)
        nn.init.constant_(self.halt.bias, -1.0)  # no puzzle is thought solved before one was

    def start(self, puzzles: Tensor, generator: torch.Generator | None = None) -> ReasoningState:
        """A random start for each of ``[batch, places]`` (Huang et al. 2026, arXiv 2605.21488)."""
        shape = (2, *puzzles.shape, self.config.width)
        both = torch.randn(shape, generator=generator, device=None if generator is not None else puzzles.device)
        answer, latent = normalized(both).to(puzzles.device)
        return answer, latent

    def forward(self, puzzles: Tensor, state: ReasoningState) -> Solution:
        """One segment for int64 ``[batch, places]``: the solution whose value is the next state."""
        return self.equilibrium.solve(self.embedding(puzzles), z0=state)

    def read(self, state: ReasoningState) -> tuple[Tensor, Tensor]:
        """Scores of the answers ``[batch, places, answers]``, and the logit that all are right ``[batch]``, which is
        about that of the place that is least sure."""
        answer = state[0]
        return self.answer(answer), -torch.logsumexp(-self.halt(answer)[..., 0], dim=1)
