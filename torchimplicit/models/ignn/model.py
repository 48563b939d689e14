"""Implicit graph neural networks that classify graphs or nodes."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from torchimplicit.gradients import Gradient
from torchimplicit.models.ignn.adjacency import Adjacency
from torchimplicit.models.ignn.config import IGNNConfig
from torchimplicit.models.ignn.layer import IGNNLayer
from torchimplicit.solvers import Solver


class IGNN(nn.Module):
    """A stack of implicit graph layers and a head (Gu et al. 2020, arXiv 2009.06211).

    It takes plain tensors, as torch-geometric's ``Data`` and ``Batch`` hold them:
    ``model(data.x, data.edge_index, data.edge_weight, data.batch)``.

    Args:
        config: the architecture; by name: :func:`ignn_tu`, :func:`ignn_ppi`, :func:`ignn_chains`.
        solver, gradient: solver and gradient estimator of every layer; ``None``: the equilibrium's defaults.
        per_graph: see :class:`IGNNLayer`.
    """

    def __init__(
        self,
        config: IGNNConfig,
        *,
        solver: Solver | None = None,
        gradient: Gradient | None = None,
        per_graph: bool = False,
    ):
        super().__init__()
        self.config = config
        ends = list(pairwise((config.features, *config.widths)))
        self.layers = nn.ModuleList(
            IGNNLayer(
                *end,
                kappa=config.kappa,
                perron=config.perron,
                activation=config.activation,
                bias=config.bias,
                start=config.start,
                solver=solver,
                gradient=gradient,
                per_graph=per_graph,
            )
            for end in ends
        )
        self.skips = nn.ModuleList(nn.Linear(*end) for end in ends) if config.skips else None
        self.head = _head(config)

    def forward(
        self,
        x: Tensor,
        edges: Tensor | Adjacency,
        edge_weight: Tensor | None = None,
        batch: Tensor | None = None,
        graphs: int | None = None,
    ) -> Tensor:
        """Class scores.

        Args:
            x: features of the nodes, ``[nodes, features]``.
            edges: ``edge_index``, int64 ``[2, edges]``, which is normalized in every call; or an :class:`Adjacency`
                made once for many calls.
            edge_weight: ``[edges]``, nonnegative constants; ``None``: ones. Not beside an :class:`Adjacency`.
            batch: int64 ``[nodes]``, the graph of each node; ``None``: all are one graph.
            graphs: number of graphs; ``None``: as many as ``batch`` names, which reads its maximum from the device.

        Returns:
            ``[graphs, classes]`` with ``pool="add"``, else ``[nodes, classes]``.

        Raises:
            ValueError: shapes, indices or weights that do not fit together.
        """
        if x.ndim != 2 or x.shape[1] != self.config.features:
            raise ValueError(f"x has shape {tuple(x.shape)}, and must be [nodes, {self.config.features}]")
        if isinstance(edges, Adjacency):
            if edge_weight is not None:
                raise ValueError("an Adjacency has its weights already: pass edge_weight when it is made")
            adjacency = edges
        else:
            adjacency = Adjacency.normalized(edges, x.shape[0], edge_weight, dtype=x.dtype)
        if batch is None:
            batch = torch.zeros(x.shape[0], dtype=torch.int64, device=x.device)
        for i, layer in enumerate(self.layers):
            out = layer(x, adjacency, batch)
            if self.skips is not None:
                out = out + self.skips[i](x)
                if i + 1 < len(self.layers) or self.config.head != "none":
                    out = functional.elu(out)
            x = out
        if self.config.pool == "add":
            count = int(batch.max()) + 1 if graphs is None else graphs
            x = x.new_zeros(count, x.shape[1]).index_add(0, batch, x)
        if self.config.normalize:
            x = _normalized(x)
        return self.head(x)

    def equilibria(self) -> list[Any]:
        """The equilibrium of every layer, to read its ``solution`` or to register hooks."""
        return [layer.equilibrium for layer in self.layers if isinstance(layer, IGNNLayer)]


def _normalized(x: Tensor) -> Tensor:
    """Rows of length one, however short they were (at the end of a long chain, far below the ``eps`` of PyTorch's own
    normalization); rows of zeros stay, with a gradient of ordinary size."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / torch.where(length > 0, length, 1)


def _head(config: IGNNConfig) -> nn.Module:
    width = config.widths[-1]
    if config.head == "none":
        return nn.Identity()
    if config.head == "linear":
        return nn.Sequential(nn.Dropout(config.dropout), nn.Linear(width, config.classes, bias=False))
    return nn.Sequential(
        nn.Linear(width, width), nn.ReLU(), nn.Dropout(config.dropout), nn.Linear(width, config.classes)
    )
