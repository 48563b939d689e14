"""One implicit graph layer."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize

from torchimplicit.gradients import Gradient
from torchimplicit.models.ignn.adjacency import Adjacency
from torchimplicit.models.ignn.ball import InfinityNormBall, project_rows
from torchimplicit.models.ignn.start import Start, UniformStart
from torchimplicit.nn import Equilibrium
from torchimplicit.solvers import Solver

Activation = Literal["relu", "elu"]


class IGNNCell(nn.Module):
    """The map :math:`Z\\mapsto\\phi(A^T Z W^T + B)`, the transposed of :math:`\\phi(WXA+b)` in the paper.

    Both activations have slopes in [0, 1], so that the map has one fixed point, which plain iteration finds, if
    :math:`\\lambda_{pf}(|W|)\\,\\lambda_{pf}(A)<1` (Gu et al. 2020, theorem 4.1); the ball on which ``weight`` is
    projected gives :math:`\\lambda_{pf}(|W|)\\le\\lVert W\\rVert_\\infty\\le\\kappa/\\lambda_{pf}(A)`.

    Args:
        features: features of the state.
        radius: radius of the ball.
        activation: :math:`\\phi`.
        start: how the weight is initialized.

    Shapes: the state ``[nodes, features]``, or ``[graphs, nodes, features]`` with the graphs padded to one size.
    """

    def __init__(self, features: int, radius: float, activation: Activation, start: Start):
        super().__init__()
        self.activation = activation
        # strictly inside the ball, where every entry has a gradient; on its border there is none
        self.weight = nn.Parameter(project_rows(start.weight(features), 0.999 * radius))
        parametrize.register_parametrization(self, "weight", InfinityNormBall(radius))

    def forward(self, z: Tensor, injection: Tensor, adjacency: Adjacency) -> Tensor:
        """One application, given the injection, like ``z``, and the graph."""
        flat = functional.linear(z, self.weight).reshape(-1, z.shape[-1])
        inner = adjacency.sum_in(flat).reshape(z.shape) + injection
        return torch.relu(inner) if self.activation == "relu" else functional.elu(inner)


class IGNNLayer(nn.Module):
    """The implicit graph layer :math:`X=\\phi(WXA+\\Omega_1UA+b)` (Gu et al. 2020, arXiv 2009.06211), with nodes in
    dim 0.

    The weight is projected by a parametrization: what is trained is never changed by a forward pass, and training and
    evaluation are the same. The gradient is that of the layer as it is computed, on directed graphs too.

    Derivatives are those of the gradient estimator: :class:`~torchimplicit.gradients.Implicit` and
    :class:`~torchimplicit.gradients.Unrolled` to every order and in every mode, others as they say. The weights of the
    edges are constants.

    Args:
        in_features, out_features: features of each node before and after the layer.
        kappa: :math:`\\kappa` in (0, 1), the bound of :math:`\\lVert W\\rVert_\\infty\\lambda_{pf}(A)`.
        perron: :math:`\\lambda_{pf}(A)` of the graphs that the layer is for; those with a larger one are refused. It
            is 1 for :meth:`Adjacency.normalized`, whatever the graph.
        activation: :math:`\\phi`.
        bias: whether there is b.
        start: how W is initialized.
        solver, gradient: solver and gradient estimator of the equilibrium; ``None``: its defaults.
        per_graph: whether each graph of a batch is a system of its own, with its own tolerance and status. The graphs
            are padded to the size of the largest; otherwise the batch, a block-diagonal matrix, is one system.

    Raises:
        ValueError: a number out of range.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        kappa: float = 0.9,
        perron: float = 1.0,
        activation: Activation = "relu",
        bias: bool = True,
        start: Start | None = None,
        solver: Solver | None = None,
        gradient: Gradient | None = None,
        per_graph: bool = False,
    ):
        super().__init__()
        if not 0 < kappa < 1:
            raise ValueError(f"IGNNLayer: kappa is {kappa}, and must lie in (0, 1) for the layer to be well-posed")
        if not 0 < perron < float("inf"):
            raise ValueError(f"IGNNLayer: perron is {perron}, and must be a positive finite number")
        if activation not in get_args(Activation):
            raise ValueError(f"IGNNLayer: activation is {activation!r}, and must be one of {get_args(Activation)}")
        self.perron = perron
        self.per_graph = per_graph
        self.injection = nn.Linear(in_features, out_features, bias=False)
        nn.init.uniform_(self.injection.weight, -(out_features**-0.5), out_features**-0.5)
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None
        cell = IGNNCell(out_features, kappa / perron, activation, start or UniformStart())
        self.equilibrium = Equilibrium(cell, solver=solver, gradient=gradient, batched=per_graph)

    def forward(self, u: Tensor, adjacency: Adjacency, batch: Tensor | None = None) -> Tensor:
        """The equilibrium features.

        Args:
            u: ``[nodes, in_features]``.
            adjacency: the graph, or the disjoint union of a batch of graphs.
            batch: int64 ``[nodes]``, which graph each node belongs to, in increasing order; for ``per_graph``.

        Returns:
            ``[nodes, out_features]``.

        Raises:
            ValueError: the features do not fit the graph, or the graph's Perron eigenvalue is larger than the layer's.
        """
        if adjacency.perron > self.perron * (1 + 1e-6):
            raise ValueError(
                f"the graph's Perron eigenvalue is {adjacency.perron:.6g}, and the layer is well-posed up to "
                f"{self.perron:.6g}: make it with perron={adjacency.perron:.6g}, or normalize the graph "
                "(Adjacency.normalized)"
            )
        injection = adjacency.sum_in(self.injection(u))
        if self.bias is not None:
            injection = injection + self.bias
        if not self.per_graph:
            return self.equilibrium(injection, adjacency)
        slots, shape = _slots(batch, u.shape[0])
        padded = injection.new_zeros(shape[0] * shape[1], injection.shape[1]).index_copy(0, slots, injection)
        graph = adjacency.padded(slots, shape[0] * shape[1])
        state = self.equilibrium(padded.unflatten(0, shape), graph)
        return state.flatten(0, 1).index_select(0, slots)


def _slots(batch: Tensor | None, nodes: int) -> tuple[Tensor, tuple[int, int]]:
    """The rows to which padding graphs to one size moves the nodes, and ``(graphs, nodes of the largest)``."""
    if batch is None or batch.shape != (nodes,) or (nodes > 1 and bool((batch.diff() < 0).any())):
        raise ValueError(
            f"per_graph=True needs batch, the graph of every node in increasing order, of shape ({nodes},), and it is "
            + ("None" if batch is None else f"of shape {tuple(batch.shape)}, or not in order")
        )
    sizes = torch.bincount(batch)
    largest = int(sizes.max())
    first = sizes.cumsum(0) - sizes
    place = torch.arange(nodes, device=batch.device) - first[batch]
    return batch * largest + place, (len(sizes), largest)
