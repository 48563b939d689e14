"""The DEQ transformer as a language model."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from torchimplicit.gradients import Gradient
from torchimplicit.models.deq_transformer.cell import DecoderCell, Memory
from torchimplicit.models.deq_transformer.config import DEQTransformerConfig
from torchimplicit.models.deq_transformer.embedding import AdaptiveEmbedding, AdaptiveSoftmax
from torchimplicit.nn import Equilibrium
from torchimplicit.solvers import Solver


class DEQTransformer(nn.Module):
    """A language model whose hidden states are the fixed point of one decoder layer (Bai et al. 2019).

    Args:
        config: the sizes; see :func:`deq_transformer_wikitext103` and :func:`deq_transformer_small`.
        solver, gradient: solver and gradient estimator of the equilibrium layer; ``None``: its defaults.

    Attributes:
        embedding, softmax: the input and the output.
        equilibrium: the layer; its cell is a :class:`DecoderCell`.
    """

    def __init__(self, config: DEQTransformerConfig, *, solver: Solver | None = None, gradient: Gradient | None = None):
        super().__init__()
        self.config = config
        self.embedding = AdaptiveEmbedding(config)
        self.softmax = AdaptiveSoftmax(config, self.embedding)
        self.equilibrium = Equilibrium(DecoderCell(config), solver=solver, gradient=gradient, rowwise=True)

    @property
    def cell(self) -> DecoderCell:
        """The map whose fixed point the hidden states are."""
        cell = self.equilibrium.cell
        assert isinstance(cell, DecoderCell)
        return cell

    def forward(self, tokens: Tensor, targets: Tensor, memory: Memory | None = None) -> tuple[Tensor, Memory | None]:
        """The loss of every token, and the memory for the next segment.

        Args:
            tokens: int64 ``[batch, length]``.
            targets: int64 ``[batch, length]``: for each token, the one that follows it.
            memory: the memory that the last call returned; ``None`` at the beginning of a text.

        Returns:
            the negative log-likelihood of each target in nats, ``[batch, length]``, and the memory, a constant;
            ``None`` where ``config.memory`` is 0.

        Raises:
            ValueError: shapes that do not fit, a segment longer than the context, a token outside the vocabulary.
        """
        self._check(tokens, targets, memory)
        x, injected = self.cell.injection(self._dropped(self.embedding(tokens)), memory)
        z = self.equilibrium(x)
        loss = self.softmax(self._dropped(z).flatten(0, 1), targets.flatten())
        return loss.view(targets.shape), self._remembered(z, injected, memory)

    def _dropped(self, y: Tensor) -> Tensor:
        """Dropout with one mask for all positions."""
        if not self.training or not self.config.dropout:
            return y
        return functional.dropout1d(y.transpose(1, 2), self.config.dropout).transpose(1, 2)

    def _remembered(self, z: Tensor, injected: Tensor, memory: Memory | None) -> Memory | None:
        keep = self.config.memory
        if not keep:
            return None
        new = Memory(z.detach(), injected)
        if memory is not None:
            new = Memory(*(torch.cat(pair, dim=1) for pair in zip(memory, new, strict=True)))
        return Memory(*(part[:, -keep:].contiguous() for part in new))

    def _check(self, tokens: Tensor, targets: Tensor, memory: Memory | None) -> None:
        if tokens.ndim != 2 or not tokens.shape[1]:
            raise ValueError(f"tokens have shape {tuple(tokens.shape)}, and must be [batch, length] with length >= 1")
        if targets.shape != tokens.shape:
            raise ValueError(
                f"targets have shape {tuple(targets.shape)} and tokens {tuple(tokens.shape)}: each token needs the one "
                "that comes next"
            )
        past = 0 if memory is None else memory.states.shape[1]
        if memory is not None and memory.states.shape[0] != tokens.shape[0]:
            raise ValueError(
                f"the memory holds {memory.states.shape[0]} sequences, and tokens {tokens.shape[0]}: pass "
                "memory=None where the batch changes"
            )
        length = tokens.shape[1]
        if length + past > self.config.context:
            raise ValueError(
                f"a segment of {length} tokens with a memory of {past} positions is longer than the context of "
                f"{self.config.context}: give shorter segments, or a config with a larger context"
            )
