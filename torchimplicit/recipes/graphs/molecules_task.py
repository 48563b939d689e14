"""Graph classification on a fold of a TU data set."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch_geometric.data import Batch

from torchimplicit.models import ignn_tu
from torchimplicit.recipes.graphs import tu
from torchimplicit.recipes.graphs.config import MoleculesConfig
from torchimplicit.recipes.graphs.folds import Fold, folds
from torchimplicit.recipes.graphs.model import made
from torchimplicit.recipes.training.sampling import InOrder, ShuffledSteps, loader
from torchimplicit.recipes.training.task import Metric, Shard, Split, Task


class MoleculesTask(Task):
    """Chooses among the epochs by the validation loss: the accuracy on some tens of graphs has many ties."""

    metric = Metric("loss", "", "min")

    def __init__(self, config: MoleculesConfig):
        super().__init__()
        self.config = config
        self.set, self.fold = _fold(
            config.data,
            config.data_dir,
            config.attributes,
            config.folds,
            config.validation_share,
            config.fold_seed,
            config.fold,
        )
        architecture = replace(
            ignn_tu(self.set.features, self.set.classes),
            widths=(config.width,) * config.layers,
            kappa=config.kappa,
            dropout=config.dropout,
        )
        self.model = made(architecture, config.equilibria)

    def training_batches(self, steps: range, shard: Shard) -> Iterable[Any]:
        chosen = self.config.optimization
        data = self._part(self.fold.train)
        batches = ShuffledSteps(len(data), chosen.batch_size, chosen.seed, steps, shard)
        return loader(data, batches, workers=self.config.machine.workers, collate=Batch.from_data_list)

    def held_out_batches(self, split: Split, shard: Shard) -> Iterable[Any]:
        data = self._part(self.fold.validation if split == "validation" else self.fold.test)
        batches = InOrder(len(data), self.config.optimization.batch_size, shard)
        return loader(data, batches, workers=self.config.machine.workers, collate=Batch.from_data_list)

    def loss(self, batch: Any) -> Tensor:
        return functional.cross_entropy(self._scores(batch), batch.y)

    def score(self, batch: Any) -> Tensor:
        scores = self._scores(batch)
        loss = functional.cross_entropy(scores, batch.y, reduction="sum").double()
        right = (scores.argmax(dim=1) == batch.y).sum()
        return torch.stack([right.double(), loss, torch.full_like(loss, len(batch.y))])

    def figures(self, sums: list[float]) -> dict[str, float]:
        right, loss, count = sums
        return {"accuracy": right / count, "loss": loss / count}

    def describe(self) -> str:
        parts = ", ".join(f"{len(part)} for {what}" for part, what in zip(self.fold, _PARTS, strict=True))
        return f"{self.config.data}, fold {self.config.fold} of {self.config.folds}: graphs {parts}."

    def _scores(self, batch: Any) -> Tensor:
        return self.model(batch.x, batch.edge_index, batch=batch.batch, graphs=batch.num_graphs)

    def _part(self, indices: list[int]) -> Any:
        return [self.set.graphs[i] for i in indices]


_PARTS = ("training", "validation", "testing")


@lru_cache(maxsize=2)
def _set(name: tu.TUName, data_dir: Path | None, attributes: bool) -> tu.GraphSet:
    """Read once by a process that trains many folds."""
    return tu.load(name, data_dir, attributes)


def _fold(
    name: tu.TUName, data_dir: Path | None, attributes: bool, count: int, share: float, seed: int, which: int
) -> tuple[tu.GraphSet, Fold]:
    read = _set(name, data_dir, attributes)
    return read, folds(read.labels, count, share, seed)[which]
