"""The explicit counterpart of the DEQ transformer: decoder layers with weights of their own, each applied once."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn

from torchimplicit.models.deq_transformer.cell import DecoderCell, Memory
from torchimplicit.models.deq_transformer.config import DEQTransformerConfig
from torchimplicit.models.deq_transformer.language_model import LanguageModel
from torchimplicit.nn import dropout_masks
from torchimplicit.validation import at_least


@final
class ExplicitTransformer(LanguageModel):
    """A language model of ``depth`` decoder layers, each of them the :class:`DEQTransformer`'s with its own weights.

    The first layer's state is zero, and the input is added in every layer. A layer attends to what it got itself at the
    positions of the memory, as in Transformer-XL (Dai et al. 2019); the memory holds all layers' states side by side,
    ``[batch, past, depth * d_model]``.

    Args:
        config: the sizes of a layer; with ``d_head`` and ``d_inner`` divided by ``depth``, all layers have together
            about as many parameters as one.
        depth: the number of layers.
    """

    def __init__(self, config: DEQTransformerConfig, depth: int):
        super().__init__(config)
        at_least("ExplicitTransformer", "depth", depth, 1)
        self.layers = nn.ModuleList(DecoderCell(config) for _ in range(depth))

    def hidden(self, embedded: Tensor, memory: Memory | None) -> tuple[Tensor, Memory]:
        """See :meth:`LanguageModel.hidden`."""
        depth = len(self.layers)
        parts = [None] * depth if memory is None else list(map(Memory, *(part.chunk(depth, dim=2) for part in memory)))
        z = embedded.new_zeros(embedded.shape)
        seen = []
        with dropout_masks(self):
            for layer, past in zip(self.layers, parts, strict=True):
                assert isinstance(layer, DecoderCell)
                x, injected = layer.injection(embedded, past)
                seen.append(Memory(z.detach(), injected))
                z = layer(z, x)
        return z, Memory(*(torch.cat(part, dim=2) for part in zip(*seen, strict=True)))
