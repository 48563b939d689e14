"""An upper bound of the Perron eigenvalue of a nonnegative matrix."""

from __future__ import annotations

import torch
from torch import Tensor

_MAX_STEPS = 2000
_RTOL = 1e-9


def perron_bound(source: Tensor, target: Tensor, weight: Tensor, nodes: int) -> float:
    """An upper bound of the largest eigenvalue of the nonnegative matrix with ``weight`` at ``[source, target]``.

    A node on no cycle but its self-loop contributes that loop's weight, exactly: such nodes are taken away first, so
    that an acyclic graph, on which a power iteration would take for ever (its matrix is a Jordan block), needs none.
    For the rest, :math:`\\max_i (Bx)_i/x_i` bounds the eigenvalue of :math:`B` from above for every positive
    :math:`x` (Collatz and Wielandt), and the power iteration brings it down to it; the shift in :math:`B=A+sI` keeps
    it from swinging on bipartite graphs. Where it is stopped early the bound is loose, never wrong.

    Args:
        source, target: int64 ``[edges]``.
        weight: ``[edges]``, nonnegative.
        nodes: number of nodes.
    """
    kept = weight > 0
    source, target, weight = source[kept], target[kept], weight[kept].double()
    is_loop = source == target
    loops = torch.zeros(nodes, dtype=torch.float64, device=weight.device).index_add_(
        0, source[is_loop], weight[is_loop]
    )
    largest = float(loops.max())
    source, target, weight = source[~is_loop], target[~is_loop], weight[~is_loop]
    while source.numel():  # edges from nodes that none enters, or to nodes that none leaves, are on no cycle
        enters = torch.zeros(nodes, dtype=torch.bool, device=source.device).index_fill_(0, target, True)
        leaves = torch.zeros(nodes, dtype=torch.bool, device=source.device).index_fill_(0, source, True)
        inside = enters[source] & leaves[target]
        if bool(inside.all()):
            break
        source, target, weight = source[inside], target[inside], weight[inside]
    if not source.numel():
        return largest
    core, place = torch.unique(torch.cat([source, target]), return_inverse=True)
    source, target = place.chunk(2)
    return max(largest, _power_iteration(source, target, weight, loops[core]))


def _power_iteration(source: Tensor, target: Tensor, weight: Tensor, loops: Tensor) -> float:
    """The bound for the matrix of these edges, with ``loops`` on its diagonal."""

    def product(x: Tensor) -> Tensor:
        return (loops * x).index_add_(0, target, weight * x[source])

    x = torch.ones_like(loops)
    smallest = torch.finfo(x.dtype).tiny ** 0.5
    shift = 0.5 * float(product(x).mean())
    bound = float("inf")
    for _ in range(_MAX_STEPS):
        y = product(x) + shift * x
        ratio = y / x
        bound = min(bound, float(ratio.max()))
        if bound - float(ratio.min()) <= _RTOL * bound:
            break
        x = (y / y.max()).clamp_min(smallest)
    return bound - shift
