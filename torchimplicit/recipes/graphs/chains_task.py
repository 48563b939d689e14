"""Node classification on directed chains."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import repeat
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from torchimplicit.models import Adjacency, IdentityStart, UniformStart, ignn_chains
from torchimplicit.recipes.graphs.chains import chains
from torchimplicit.recipes.graphs.config import ChainsConfig
from torchimplicit.recipes.graphs.model import made
from torchimplicit.recipes.runtime.task import Metric, Shard, Split, Task


class _Repeated:
    """One batch, several times."""

    def __init__(self, batch: Any, times: int):
        self.batch, self.times = batch, times

    def __len__(self) -> int:
        return self.times

    def __iter__(self) -> Iterator[Any]:
        return repeat(self.batch, self.times)


class ChainsTask(Task):
    """All chains are one graph, and every step sees it whole.

    Everything is in double precision, with the solver's tolerance at its limit: what arrives at node i of a chain is
    about (2/3)ⁱ of what stands at its first node (at the identity-like start), and a residual that is small beside the
    whole state may be larger than that.
    """

    metric = Metric("accuracy", "%", "max")

    def __init__(self, config: ChainsConfig):
        super().__init__()
        self.config = config
        self.data = chains(config.length, config.optimization.seed)
        start = IdentityStart(scale=config.identity_scale) if config.start == "identity" else UniformStart()
        architecture = replace(
            ignn_chains(start=start), widths=(config.width,), kappa=config.kappa, dropout=config.dropout
        )
        self.model = made(architecture, config.equilibria).double()
        self.adjacency = Adjacency.normalized(self.data.edge_index, self.data.num_nodes, dtype=torch.float64)

    def training_batches(self, steps: range, shard: Shard) -> Iterable[Any]:
        return _Repeated(self._part(self.data.train_mask), len(steps))

    def held_out_batches(self, split: Split, shard: Shard) -> Iterable[Any]:
        return _Repeated(self._part(self.data.val_mask if split == "validation" else self.data.test_mask), 1)

    def loss(self, batch: Any) -> Tensor:
        scores, y = self._scores(batch)
        return functional.cross_entropy(scores, y)

    def score(self, batch: Any) -> Tensor:
        scores, y = self._scores(batch)
        loss = functional.cross_entropy(scores, y, reduction="sum")
        # a node that nothing reaches has scores of zero: half right, whichever class comes first
        tied = (scores == scores[:, :1]).all(dim=1)
        right = torch.where(tied, 1 / scores.shape[1], (scores.argmax(dim=1) == y).double()).sum()
        return torch.stack([right, loss, torch.full_like(loss, len(y))])

    def figures(self, sums: list[float]) -> dict[str, float]:
        right, loss, count = sums
        return {"accuracy": right / count, "loss": loss / count}

    def describe(self) -> str:
        parts = ", ".join(
            f"{int(mask.sum())} for {what}"
            for mask, what in (
                (self.data.train_mask, "training"),
                (self.data.val_mask, "validation"),
                (self.data.test_mask, "testing"),
            )
        )
        count = self.data.num_nodes // self.config.length
        return f"{count} directed chains of {self.config.length} nodes; nodes {parts}."

    def _part(self, mask: Tensor) -> tuple[Tensor, ...]:
        return self.data.x, self.data.edge_index, self.data.y, mask

    def _scores(self, batch: Any) -> tuple[Tensor, Tensor]:
        x, edges, y, mask = batch
        if self.adjacency.into.device != x.device:
            self.adjacency = Adjacency.normalized(edges, len(x), dtype=torch.float64)
        return self.model(x.double(), self.adjacency)[mask], y[mask]
