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
        tokens: number of symbols that a place of the puzzle can hold.
        answers: number of symbols that a place of the answer can hold.
        width: features of each place, in both states.
        heads: attention heads; must divide the width.
        blocks: residual blocks in the network.
        expansion: hidden width of a block's feed-forward network, as a multiple of ``width``.
        mixing: how places see each other: by attention, or by a network across them (an MLP mixer).
        latent_updates: updates of the latent state before each update of the answer, in one evaluation of the cell.
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
    """Scales the features of every place to a root mean square of one."""
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
    """Attention in which a learned bias for the relation of two places stands in for positional encoding.

    Args:
        width, heads: see :class:`ReasonerConfig`.
        relations: int64 ``[places, places]``, the kind of relation between two places, numbered from 0.
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
    """A gated network across the places, shared by all channels."""

    def __init__(self, places: int, expansion: int):
        super().__init__()
        self.network = GatedNetwork(places, expansion)

    def forward(self, h: Tensor) -> Tensor:
        return self.network(h.mT).mT


class Block(nn.Module):
    """Mixes places, then channels; each branch is normalized before and scaled by a learned vector after."""

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
    """Updates the latent state from both states and the puzzle, ``latent_updates`` times, then the answer from both.

    One network makes both updates. The result is normalized place by place: states stay bounded, so that an equilibrium
    exists (Brouwer).
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
    """Answers puzzles in segments: each segment is one solve of the equilibrium that starts where the last one ended.

    Args:
        config: the sizes.
        relations: int64 ``[places, places]``, see :class:`RelationAttention`; a mixer uses its size alone.
        solver, gradient: solver and gradient estimator of a segment, as for :class:`~torchimplicit.nn.Equilibrium`;
            by default at most eight plain steps.
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
        nn.init.constant_(self.halt.bias, -1.0)  # an untrained model must not halt

    def start(self, puzzles: Tensor, generator: torch.Generator | None = None) -> ReasoningState:
        """A random initial state for puzzles ``[batch, places]`` (Huang et al. 2026, arXiv 2605.21488)."""
        shape = (2, *puzzles.shape, self.config.width)
        both = torch.randn(shape, generator=generator, device=None if generator is not None else puzzles.device)
        answer, latent = normalized(both).to(puzzles.device)
        return answer, latent

    def forward(self, puzzles: Tensor, state: ReasoningState) -> Solution:
        """One segment for puzzles, int64 ``[batch, places]``: the solution whose value is the next state."""
        return self.equilibrium.solve(self.embedding(puzzles), z0=state)

    def read(self, state: ReasoningState) -> tuple[Tensor, Tensor]:
        """Scores of the answers ``[batch, places, answers]``, and the logit that all places are right ``[batch]``: a
        smooth minimum of the places' logits."""
        answer = state[0]
        return self.answer(answer), -torch.logsumexp(-self.halt(answer)[..., 0], dim=1)
