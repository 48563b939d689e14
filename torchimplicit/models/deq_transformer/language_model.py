"""The parts that the DEQ transformer and the explicit transformer share: embedding, softmax, and the memory of past
segments."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from torch.nn import functional

from torchimplicit.models.deq_transformer.cell import Memory
from torchimplicit.models.deq_transformer.config import DEQTransformerConfig
from torchimplicit.models.deq_transformer.embedding import AdaptiveEmbedding, AdaptiveSoftmax


class LanguageModel(nn.Module, ABC):
    """Hidden states between an adaptive embedding and an adaptive softmax.

    Args:
        config: the sizes.

    Attributes:
        embedding, softmax: the input and the output.
    """

    def __init__(self, config: DEQTransformerConfig):
        super().__init__()
        self.config = config
        self.embedding = AdaptiveEmbedding(config)
        self.softmax = AdaptiveSoftmax(config, self.embedding)

    @abstractmethod
    def hidden(self, embedded: Tensor, memory: Memory | None) -> tuple[Tensor, Memory]:
        """The hidden states ``[batch, length, d_model]`` of embedded tokens, and what these add to the memory."""

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
        z, new = self.hidden(self._dropped(self.embedding(tokens)), memory)
        loss = self.softmax(self._dropped(z).flatten(0, 1), targets.flatten())
        keep = self.config.memory
        return loss.view(targets.shape), joined(memory, new, keep) if keep else None

    def _dropped(self, y: Tensor) -> Tensor:
        """Dropout with one mask for all positions."""
        if not self.training or not self.config.dropout:
            return y
        return functional.dropout1d(y.transpose(1, 2), self.config.dropout).transpose(1, 2)

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


def joined(memory: Memory | None, new: Memory, keep: int) -> Memory:
    """The last ``keep`` positions of a memory and what follows it, as constants."""
    if memory is not None:
        new = Memory(*(torch.cat(pair, dim=1) for pair in zip(memory, new, strict=True)))
    return Memory(*(part[:, -keep:].detach().contiguous() for part in new))
