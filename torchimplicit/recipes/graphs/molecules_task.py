"""Graph classification on a fold of a TU data set."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import lru_cache
from itertools import chain
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
from torchimplicit.recipes.runtime.task import InOrder, Metric, Shard, ShuffledSteps, Split, Task, loader


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
        if split == "test":
            return self._in_order(self.fold.test, shard, Batch.from_data_list)
        own = self._in_order(self.fold.validation, shard, Batch.from_data_list)
        return _After(own, self._in_order(self.fold.test, shard, _peeked)) if self.config.peek else own

    def loss(self, batch: Any) -> Tensor:
        return functional.cross_entropy(self._scores(batch), batch.y)

    def score(self, batch: Any) -> Tensor:
        scores = self._scores(batch)
        loss = functional.cross_entropy(scores, batch.y, reduction="sum").double()
        right = (scores.argmax(dim=1) == batch.y).sum()
        sums = torch.stack([right.double(), loss, torch.full_like(loss, len(batch.y))])
        nothing = torch.zeros_like(sums)
        return torch.cat([nothing, sums] if "peeked" in batch else [sums, nothing])

    def figures(self, sums: list[float]) -> dict[str, float]:
        right, loss, count, peeked_right, _, peeked = sums
        found = {"accuracy": right / count, "loss": loss / count}
        return {**found, "test_accuracy": peeked_right / peeked} if peeked else found

    def describe(self) -> str:
        parts = ", ".join(f"{len(part)} for {what}" for part, what in zip(self.fold, _PARTS, strict=True))
        return f"{self.config.data}, fold {self.config.fold} of {self.config.folds}: graphs {parts}."

    def _scores(self, batch: Any) -> Tensor:
        return self.model(batch.x, batch.edge_index, batch=batch.batch, graphs=batch.num_graphs)

    def _in_order(self, indices: list[int], shard: Shard, collate: Any) -> Any:
        data = self._part(indices)
        batches = InOrder(len(data), self.config.optimization.batch_size, shard)
        return loader(data, batches, workers=self.config.machine.workers, collate=collate)

    def _part(self, indices: list[int]) -> Any:
        return [self.set.graphs[i] for i in indices]


class _After:
    """The batches of one loader, then those of another."""

    def __init__(self, *loaders: Any):
        self.loaders = loaders

    def __len__(self) -> int:
        return sum(len(one) for one in self.loaders)

    def __iter__(self) -> Iterator[Any]:
        return chain.from_iterable(self.loaders)


def _peeked(graphs: list[Any]) -> Any:
    """A batch of the test part, marked: the choice of the epoch does not see it."""
    batch = Batch.from_data_list(graphs)
    batch.peeked = True
    return batch


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
