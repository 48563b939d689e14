"""Attention with relative positions; all that does not depend on the state is computed before the solve."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from torchimplicit.nn import VariationalDropout


class RelativeAttention(nn.Module):
    """Causal attention with relative positions (Dai et al. 2019, arXiv 1901.02860, section 3.3) and input injection.

    The score of query i and key j is ``((q_i + u)·k_j + (q_i + v)·r_{i-j}) / sqrt(d_head)``, ``r`` being projected
    sinusoids. The input is added to ``q``, ``k`` and ``v`` (Bai et al. 2019, section 3.2). An evaluation takes nine
    kernels: the projection with the injection added to it, a copy of ``q``, keys and values appended to those of the
    memory, the two products of the scores, the mask, the softmax, the product with the values, and its copy. The
    relative shift is a view. ``u`` is folded into the injection, and ``v - u`` into a constant row.

    Written out, and not with ``scaled_dot_product_attention``, which would take the scores of the positions as its
    mask: that is not twice differentiable, and where a gradient is taken it was slower (one core, float32).

    Args:
        d_model: width of the state.
        heads, d_head: number of attention heads, and the width of each.
        dropout: dropout rate of the attention weights.
    """

    def __init__(self, d_model: int, heads: int, d_head: int, dropout: float = 0.0):
        super().__init__()
        self.heads, self.d_head = heads, d_head
        self.scale = d_head**-0.5
        self.project = nn.Linear(d_model, heads * 3 * d_head, bias=False)
        self.position = nn.Linear(d_model, heads * d_head, bias=False)
        self.out = nn.Linear(heads * d_head, d_model)
        self.content_bias = nn.Parameter(torch.zeros(heads, d_head))
        self.position_bias = nn.Parameter(torch.zeros(heads, d_head))
        self.drop = VariationalDropout(dropout)

    def injected(self, linear: nn.Linear, embedded: Tensor) -> Tensor:
        """Return what the input adds to queries, keys and values, ``u`` with it: ``[batch, length, heads * 3 *
        d_head]``."""
        u = functional.pad(self.content_bias, (0, 2 * self.d_head)).flatten()
        return functional.linear(embedded, linear.weight, linear.bias + u)

    def keys_values(self, states: Tensor, injected: Tensor) -> Tensor:
        """Keys and values of a memory: ``[batch, heads, length, 2 * d_head]``.

        Args:
            states: ``[batch, length, d_model]``, normalized where the model is PreLN.
            injected: ``[batch, length, heads * 2 * d_head]``, without the part of the queries.
        """
        size = self.d_head
        weight = self.project.weight.view(self.heads, 3 * size, -1)[:, size:].reshape(self.heads * 2 * size, -1)
        both = functional.linear(states, weight) + injected
        return both.view(*both.shape[:2], self.heads, 2 * size).transpose(1, 2)

    def distances(self, sinusoids: Tensor) -> tuple[Tensor, Tensor]:
        """The scaled ``r`` ``[1, heads, d_head, n]`` and ``(v - u)·r`` ``[1, heads, 1, n]``, of ``[n, d_model]``."""
        r = self.scale * self.position(sinusoids)
        r = r.view(-1, self.heads, self.d_head).permute(1, 2, 0)
        offset = torch.bmm((self.position_bias - self.content_bias)[:, None].to(r.dtype), r)
        return r[None], offset[None]

    def forward(
        self, state: Tensor, injected: Tensor, memory: Tensor, distances: Tensor, offset: Tensor, mask: Tensor
    ) -> Tensor:
        """``[batch, length, d_model]``, before the output's projection ``[batch * length, heads * d_head]``.

        Args:
            state: ``[batch, length, d_model]``.
            injected: the result of :meth:`injected`.
            memory: the result of :meth:`keys_values`, with ``past`` positions.
            distances, offset: the result of :meth:`distances`, for ``past + length - 1`` down to 0, and one more.
            mask: ``[1, 1, length, past + length]``, 0 or minus infinity.
        """
        batch, length, width = state.shape
        heads, size = self.heads, self.d_head
        keys = memory.shape[2] + length
        both = torch.addmm(injected.reshape(batch * length, -1), state.reshape(-1, width), self.project.weight.t())
        both = both.view(batch, length, heads, 3 * size).permute(2, 0, 1, 3)
        q = both[..., :size].contiguous().view(heads, batch * length, size)
        kv = torch.cat((memory.permute(1, 0, 2, 3), both[..., size:]), dim=2).view(heads * batch, keys, 2 * size)
        near = torch.baddbmm(offset[0], q, distances[0])
        # Column c of row i is distance keys - 1 - c, and belongs at j = c - (length - 1 - i). In rows that are one
        # longer than there are keys, that is the same memory read with rows one shorter; what wraps around is masked.
        near = near.view(heads, batch, length * (keys + 1))[..., length - 1 : length - 1 + length * keys]
        near = near.view(heads, batch, length, keys) + mask
        scores = torch.baddbmm(
            near.view(heads * batch, length, keys),
            q.view(heads * batch, length, size),
            kv[..., :size].mT,
            alpha=self.scale,
        )
        weights = self._dropped(scores.softmax(dim=2), batch)
        mixed = torch.bmm(weights, kv[..., size:])
        return mixed.view(heads, batch, length, size).permute(1, 2, 0, 3).reshape(batch * length, heads * size)

    def _dropped(self, weights: Tensor, batch: int) -> Tensor:
        if not self.training or self.drop.p == 0:
            return weights
        # VariationalDropout keeps one mask for each entry of dim 0, which must be the batch
        apart = weights.view(self.heads, batch, *weights.shape[1:]).transpose(0, 1)
        return self.drop(apart).transpose(0, 1).reshape(weights.shape)
