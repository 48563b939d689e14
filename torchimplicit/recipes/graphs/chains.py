"""Directed chains whose class stands on their first node alone (Gu et al. 2020, section 6.1)."""

from __future__ import annotations

import torch
from torch_geometric.data import Data

from torchimplicit.recipes.runtime.errors import UserError

SPLIT = (20, 100, 200)
"""Nodes for training, validation and testing, over all chains."""


def chains(length: int, seed: int, classes: int = 2, per_class: int = 20, features: int = 100) -> Data:
    """One graph of ``classes * per_class`` chains with the edges :math:`i\\to i+1`.

    The first node of a chain has the class, one-hot, in its first entries; every other feature is zero. Every node of
    a chain has the chain's label, so that its class has to travel the whole way. The nodes of the three parts are
    drawn at random.

    Args:
        length: nodes in a chain.
        seed: of the parts.
        classes, per_class, features: at most as many classes as features.

    Returns:
        ``x``, ``edge_index``, ``y`` and the bool ``[nodes]`` masks ``train_mask``, ``val_mask`` and ``test_mask``;
        ``position`` ``[nodes]`` is each node's place in its chain.

    Raises:
        UserError: the chains have fewer nodes than the parts need.
    """
    count = classes * per_class
    nodes = count * length
    if length < 1 or nodes < sum(SPLIT):
        raise UserError(
            f"--length {length} makes {max(nodes, 0)} nodes, and the parts need {sum(SPLIT)}: take chains of at least "
            f"{-(-sum(SPLIT) // count)}"
        )
    if classes > features:
        raise UserError(f"{classes} classes do not fit into {features} features")
    index = torch.arange(nodes).reshape(count, length)
    kind = torch.arange(count) // per_class
    x = torch.zeros(nodes, features)
    x[index[:, 0], kind] = 1.0
    order = torch.randperm(nodes, generator=torch.Generator().manual_seed(seed)).split([*SPLIT, nodes - sum(SPLIT)])
    masks = [torch.zeros(nodes, dtype=torch.bool).index_fill_(0, part, True) for part in order[:3]]
    return Data(
        x=x,
        edge_index=torch.stack([index[:, :-1].flatten(), index[:, 1:].flatten()]),
        y=kind.repeat_interleave(length),
        position=torch.arange(length).repeat(count),
        train_mask=masks[0],
        val_mask=masks[1],
        test_mask=masks[2],
    )
