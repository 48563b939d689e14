"""Memories of vectors that the steps of compiled loops write to in place, and passes over them."""

from __future__ import annotations

import torch
from torch import Tensor

from torchimplicit.linear import basis

Rings = tuple[Tensor, ...]
"""Memories ``[batch, memory, ...]``; ``memory`` is the number of slots. What has not been written yet is garbage."""


def write(ring: Tensor, slot: Tensor, vector: Tensor) -> None:
    """Put ``vector`` (``[batch, ...]``) into the ``slot`` of a ring."""
    ring.index_copy_(1, slot.reshape(1), vector[:, None])


def written(ring: Tensor, count: Tensor) -> Tensor:
    """The ring, with zeros in the slots that nothing has been written to, all but the first ``count``."""
    return torch.where((torch.arange(ring.shape[1], device=ring.device) < count)[:, None], ring, 0)


def inner(ring: Tensor, count: Tensor, vectors: Tensor) -> Tensor:
    """The inner products ``[batch, n, memory]`` of ``vectors`` (``[batch, n, dim]``) with the ring's
    (``[batch, memory, dim]``); zero for slots that nothing has been written to."""
    return _inner(ring, count, vectors)


def less(v: Tensor, weights: Tensor, ring: Tensor, count: Tensor) -> Tensor:
    """``v`` (``[batch, dim]``) without the sum of the ring's vectors times ``weights`` (``[batch, memory]``)."""
    return _less(v, weights, ring, count)


# On a CPU the number of written slots can be read, and only these are: so the passes are operations of their own, and
# that number is no size of the graph.
_library = torch.library.Library("torchimplicit", "FRAGMENT")
_library.define("ring_inner(Tensor ring, Tensor count, Tensor vectors) -> Tensor")
_library.define("ring_less(Tensor v, Tensor weights, Tensor ring, Tensor count) -> Tensor")
_inner, _less = torch.ops.torchimplicit.ring_inner.default, torch.ops.torchimplicit.ring_less.default


def _inner_read(ring: Tensor, count: Tensor, vectors: Tensor) -> Tensor:
    products = vectors.new_zeros(*vectors.shape[:2], ring.shape[1])
    k = int(count)
    products[:, :, :k] = torch.bmm(vectors, ring[:, :k].mT)
    return products


def _inner_masked(ring: Tensor, count: Tensor, vectors: Tensor) -> Tensor:
    return torch.bmm(vectors, written(ring, count).mT)


def _less_read(v: Tensor, weights: Tensor, ring: Tensor, count: Tensor) -> Tensor:
    k = int(count)
    return basis.less(v, weights[:, :k], ring[:, :k]) if k else v.clone()


def _less_masked(v: Tensor, weights: Tensor, ring: Tensor, count: Tensor) -> Tensor:
    return basis.less(v, weights, written(ring, count))


for _name, _read, _masked in (("ring_inner", _inner_read, _inner_masked), ("ring_less", _less_read, _less_masked)):
    _library.impl(_name, _read, "CPU")
    _library.impl(_name, _masked, "CUDA")
torch.library.register_fake(
    "torchimplicit::ring_inner",
    lambda ring, count, vectors: vectors.new_empty(*vectors.shape[:2], ring.shape[1]),
    lib=_library,
)
torch.library.register_fake(
    "torchimplicit::ring_less", lambda v, weights, ring, count: torch.empty_like(v), lib=_library
)
