"""Node classification on PPI: 121 labels a node."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch_geometric.data import Batch

from torchimplicit.models import ignn_ppi
from torchimplicit.recipes.graphs import ppi
from torchimplicit.recipes.graphs.config import PPIConfig
from torchimplicit.recipes.graphs.model import made
from torchimplicit.recipes.runtime.task import InOrder, Metric, Shard, ShuffledSteps, Split, Task, loader


class PPITask(Task):
    """Judged by the micro-averaged F1 over all labels of all nodes of a split."""

    metric = Metric("f1", "%", "max")

    def __init__(self, config: PPIConfig):
        super().__init__()
        self.config = config
        train, validation, test = ppi.load(config.data_dir)
        self.splits = {"training": train, "validation": validation, "test": test}
        features, labels = train[0].x.shape[1], train[0].y.shape[1]
        architecture = replace(ignn_ppi(features, labels), widths=(*config.widths, labels), kappa=config.kappa)
        self.model = made(architecture, config.equilibria)

    def training_batches(self, steps: range, shard: Shard) -> Iterable[Any]:
        chosen = self.config.optimization
        data: Any = self.splits["training"]
        batches = ShuffledSteps(len(data), chosen.batch_size, chosen.seed, steps, shard)
        return loader(data, batches, workers=self.config.machine.workers, collate=Batch.from_data_list)

    def held_out_batches(self, split: Split, shard: Shard) -> Iterable[Any]:
        data: Any = self.splits[split]
        batches = InOrder(len(data), self.config.optimization.batch_size, shard)
        return loader(data, batches, workers=self.config.machine.workers, collate=Batch.from_data_list)

    def loss(self, batch: Any) -> Tensor:
        return functional.binary_cross_entropy_with_logits(self.model(batch.x, batch.edge_index), batch.y)

    def score(self, batch: Any) -> Tensor:
        scores = self.model(batch.x, batch.edge_index)
        said, true = scores > 0, batch.y > 0.5
        loss = functional.binary_cross_entropy_with_logits(scores, batch.y, reduction="sum")
        sums = [(said & true).sum(), (said & ~true).sum(), (~said & true).sum(), loss, torch.tensor(batch.y.numel())]
        return torch.stack([s.to(scores.device).double() for s in sums])

    def figures(self, sums: list[float]) -> dict[str, float]:
        hits, false_alarms, misses, loss, count = sums
        said_or_true = 2 * hits + false_alarms + misses
        return {"f1": 2 * hits / said_or_true if said_or_true else 0.0, "loss": loss / count}

    def describe(self) -> str:
        sizes = {name: (len(graphs), sum(g.num_nodes for g in graphs)) for name, graphs in self.splits.items()}
        return "PPI: " + ", ".join(f"{name} {g} graphs of {n} nodes" for name, (g, n) in sizes.items()) + "."
