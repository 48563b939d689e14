"""An implicit graph network that classifies the nodes of your own graph."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from torchimplicit.models import Adjacency, IGNNConfig
from torchimplicit.recipes.phantom.graphs import EQUILIBRIA, check_model, made
from torchimplicit.recipes.phantom.own_graph import SAID, read, split
from torchimplicit.recipes.runtime.errors import UserError
from torchimplicit.recipes.runtime.settings import Equilibria, Machine, Optimization, not_negative, positive
from torchimplicit.recipes.runtime.task import Batches, Metric, Shard, Split, Task
from torchimplicit.recipes.runtime.trainer import Trainer

NODES = Optimization(
    steps=300, batch_size=1, learning_rate=0.01, weight_decay=5e-4, schedule="constant", validate_every=10
)


@dataclass(frozen=True, kw_only=True)
class NodesConfig:
    """Classify the nodes of a graph of your own."""

    optimization: Optimization = NODES
    equilibria: Equilibria = EQUILIBRIA
    machine: Machine = field(default_factory=Machine)

    data_dir: Path | None = None
    """An .npz file with x, edge_index and y, or a folder with nodes.csv and edges.csv."""

    directed: bool = False
    """Use edges only in their given direction. By default every edge goes both ways."""

    train_share: float = 0.6
    """Share of the nodes for training, if the file defines no splits."""

    validation_share: float = 0.2
    """Share of the nodes for validation, which selects the weights. The rest is the test set."""

    split_seed: int = 0
    """Random seed of the split."""

    layers: int = 1
    """Number of implicit layers."""

    width: int = 64
    """Features per node in each layer."""

    kappa: float = 0.9
    """Bound on ‖W‖∞ · λ(A), below 1."""

    dropout: float = 0.5
    """Dropout probability in the head."""

    def __post_init__(self) -> None:
        positive(self, "layers", "width", "train_share", "validation_share")
        not_negative(self, "split_seed")
        check_model(self.kappa, self.dropout)
        if self.train_share + self.validation_share >= 1:
            raise UserError("--train-share and --validation-share must leave some nodes for the test")
        if self.machine.devices > 1:
            raise UserError("--devices: the graph is one, which one device solves; take --devices 1")


def nodes() -> NodesConfig:
    """One layer of width 64."""
    return NodesConfig()


class NodesTask(Task):
    """Node classification; every step sees the whole graph."""

    metric = Metric("accuracy", "%", "max")

    def __init__(self, config: NodesConfig):
        super().__init__()
        assert config.data_dir is not None
        self.config = config
        self.graph = read(config.data_dir, undirected=not config.directed)
        shares = config.train_share, config.validation_share
        parts = split(self.graph, shares, config.split_seed)
        self.parts = dict(zip(("training", "validation", "test"), parts, strict=True))
        architecture = IGNNConfig(
            features=self.graph.x.shape[1],
            classes=len(self.graph.names),
            widths=(config.width,) * config.layers,
            kappa=config.kappa,
            dropout=config.dropout,
        )
        self.model = made(architecture, config.equilibria)
        self.adjacency: Adjacency | None = None

    def training_batches(self, steps: range, shard: Shard) -> Iterable[Any]:
        batch = self._part("training")
        return Batches(len(steps), lambda: repeat(batch, len(steps)))

    def held_out_batches(self, split: Split, shard: Shard) -> Iterable[Any]:
        batch = self._part(split)
        return Batches(1, lambda: iter([batch]))

    def loss(self, batch: Any) -> Tensor:
        scores, y = self._scores(batch)
        return functional.cross_entropy(scores, y)

    def score(self, batch: Any) -> Tensor:
        scores, y = self._scores(batch)
        loss = functional.cross_entropy(scores, y, reduction="sum").double()
        return torch.stack([(scores.argmax(dim=1) == y).sum().double(), loss, torch.full_like(loss, len(y))])

    def figures(self, sums: list[float]) -> dict[str, float]:
        right, loss, count = sums
        return {"accuracy": right / count, "loss": loss / count}

    def describe(self) -> str:
        counts = ", ".join(f"{len(part)} for {name}" for name, part in self.parts.items())
        return (
            f"{len(self.graph.y)} nodes of {len(self.graph.names)} classes ({counts}), {self.graph.x.shape[1]} "
            f"features each, {self.graph.edges.shape[1]} edges."
        )

    def _part(self, name: str) -> tuple[Tensor, ...]:
        return self.graph.x, self.graph.edges, self.graph.y, self.parts[name]

    def _scores(self, batch: Any) -> tuple[Tensor, Tensor]:
        x, edges, y, part = batch
        if self.adjacency is None or self.adjacency.into.device != x.device:
            weights = None if self.graph.weights is None else self.graph.weights.to(x.device)
            self.adjacency = Adjacency.normalized(edges, len(x), weights)
        return self.model(x, self.adjacency)[part], y[part]


def ready(config: NodesConfig) -> None:
    """Check that the graph can be read."""
    if config.data_dir is None:
        raise UserError(SAID)
    split(read(config.data_dir), (config.train_share, config.validation_share), config.split_seed)


RUNNER = Trainer(NodesTask, ready)
