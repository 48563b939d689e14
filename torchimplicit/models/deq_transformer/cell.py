"""The map of the DEQ transformer, and the input injection that it takes beside the state."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from torchimplicit.models.deq_transformer.attention import RelativeAttention
from torchimplicit.models.deq_transformer.config import DEQTransformerConfig
from torchimplicit.nn import VariationalDropout, weight_norm


class Memory(NamedTuple):
    """State that a segment passes on to the next one; no gradient flows through it.

    Attributes:
        states: the last equilibria, ``[batch, past, d_model]``.
        injected: what the input added to their keys and values, ``[batch, past, heads * 2 * d_head]``.
    """

    states: Tensor
    injected: Tensor


class Injection(NamedTuple):
    """The input injection, computed once per solve.

    Tensors that all samples share have a first dimension of 1, so that they are not mistaken for batched ones.

    Attributes:
        tokens: what the input adds to queries, keys and values, ``[batch, length, heads * 3 * d_head]``.
        memory: keys and values of the memory, ``[batch, heads, past, 2 * d_head]``.
        distances, offset, mask: see :class:`RelativeAttention`.
    """

    tokens: Tensor
    memory: Tensor
    distances: Tensor
    offset: Tensor
    mask: Tensor


class DecoderCell(nn.Module):
    """One decoder layer as a map of the state ``[batch, length, d_model]``.

    PostLN: ``h = N(z + attention(z)); z⁺ = N(h + feed_forward(h))``. PreLN: ``h = N(z + attention(N(z)));
    z⁺ = h + feed_forward(h)``: the skip around the feed-forward layer carries the normalized state, as in the reference
    models. Were it to carry ``z + attention`` itself, a fixed point would have to cancel the branches against each
    other. N is layer normalization without weights.

    An evaluation takes 17 kernels, nine of them in the attention. Every sequence is treated on its own, so that
    ``rowwise=True`` holds; no position sees a later one.

    Args:
        config: the sizes.
    """

    def __init__(self, config: DEQTransformerConfig):
        super().__init__()
        self.config = config
        d_model = config.d_model
        self.attention = RelativeAttention(d_model, config.heads, config.d_head, config.attention_dropout)
        self.inject = nn.Linear(d_model, config.heads * 3 * config.d_head)
        self.widen = nn.Linear(d_model, config.d_inner)
        self.narrow = nn.Linear(config.d_inner, d_model)
        self.drop_attention, self.drop_inner, self.drop_out = (
            VariationalDropout(config.dropout, shared=1) for _ in range(3)
        )
        gains = {
            self.attention.project: config.gain,
            self.attention.position: config.gain,
            self.widen: config.gain,
            self.narrow: config.gain,
            self.attention.out: 1.0,  # the state's part and the input's pass through it
            self.inject: config.injection_gain,
        }
        for linear, gain in gains.items():
            nn.init.normal_(linear.weight, std=gain * linear.in_features**-0.5)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
            if config.weight_norm and linear is not self.inject:
                weight_norm(linear)

    def injection(self, embedded: Tensor, memory: Memory | Tensor | None = None) -> tuple[Injection, Tensor]:
        """The injection of a segment, and the part of it that the next segment's memory needs.

        Args:
            embedded: ``[batch, length, d_model]``.
            memory: memory of the last segment, or its keys and values, as :attr:`Injection.memory`.
        """
        config, attention = self.config, self.attention
        batch, length, _ = embedded.shape
        tokens = attention.injected(self.inject, embedded)
        if isinstance(memory, Tensor):
            past = memory
        elif memory is None or not memory.states.shape[1]:
            past = tokens.new_zeros(batch, config.heads, 0, 2 * config.d_head)
        else:
            past = attention.keys_values(self._first(memory.states), memory.injected)
        keys = past.shape[2] + length
        distances, offset = attention.distances(_sinusoids(keys, embedded))
        x = Injection(tokens, past, distances, offset, _mask(length, keys, config.window, embedded))
        keys_values = tokens.detach().view(batch, length, config.heads, 3 * config.d_head)[..., config.d_head :]
        return x, keys_values.flatten(2)

    def after(self, x: Injection, z: Tensor) -> Injection:
        """The injection of a segment's rest, to which the first tokens are a memory.

        Args:
            x: the segment's injection.
            z: the first tokens' equilibria, ``[batch, count, d_model]``.
        """
        count, heads = z.shape[1], self.config.heads
        injected = x.tokens[:, :count].unflatten(2, (heads, -1))[..., self.config.d_head :].flatten(2)
        new = self.attention.keys_values(self._first(z), injected)
        memory = torch.cat((x.memory, new.to(x.memory.dtype)), dim=2)
        return x._replace(tokens=x.tokens[:, count:], memory=memory, mask=x.mask[:, :, count:])

    def forward(self, z: Tensor, x: Injection) -> Tensor:
        """One application of the map."""
        h = self._normalized(z + self.drop_attention(self._attended(self._first(z), x)))
        out = h + self.drop_out(self.narrow(self.drop_inner(functional.relu(self.widen(h)))))
        return self._normalized(out) if self.config.normalization == "post" else out

    def initial_state(self, x: Injection) -> Tensor:
        """Zeros, in the dtype of the parameters: under autocast the state stays in full precision."""
        u = self.attention.content_bias
        return u.new_zeros(*x.tokens.shape[:2], self.config.d_model)

    def _attended(self, z: Tensor, x: Injection) -> Tensor:
        return self.attention.out(self.attention(z, *x)).view(z.shape)

    def _first(self, z: Tensor) -> Tensor:
        return self._normalized(z) if self.config.normalization == "pre" else z

    def _normalized(self, z: Tensor) -> Tensor:
        return functional.layer_norm(z, (self.config.d_model,))


def _sinusoids(keys: int, like: Tensor) -> Tensor:
    """Sinusoids of the distances ``keys - 1`` down to 0, and a row of zeros that the relative shift needs."""
    width = like.shape[-1]
    wide = torch.promote_types(like.dtype, torch.float32)
    half = (width + 1) // 2
    frequency = 10000.0 ** -(torch.arange(half, dtype=wide, device=like.device) / half)
    angle = torch.arange(keys - 1, -1, -1, dtype=wide, device=like.device)[:, None] * frequency
    waves = torch.cat((angle.sin(), angle.cos()), dim=1)[:, :width]
    return functional.pad(waves, (0, 0, 0, 1)).to(like.dtype)


def _mask(length: int, keys: int, window: int | None, like: Tensor) -> Tensor:
    """The mask ``[1, 1, length, keys]``: minus infinity where a key comes after the query, or outside its window."""
    query = torch.arange(keys - length, keys, device=like.device)[:, None]
    distance = query - torch.arange(keys, device=like.device)
    hidden = distance < 0
    if window is not None:
        hidden = hidden | (distance >= window)
    return torch.zeros(length, keys, dtype=like.dtype, device=like.device).masked_fill(hidden, -torch.inf)[None, None]
