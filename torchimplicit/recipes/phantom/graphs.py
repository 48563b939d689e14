"""Implicit graph networks on molecules, on PPI and on chains."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import lru_cache
from importlib.util import find_spec
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch_geometric.data import Batch

from torchimplicit.gradients import Gradient, Implicit
from torchimplicit.linear import Neumann
from torchimplicit.models import (
    IGNN,
    Adjacency,
    IdentityStart,
    IGNNConfig,
    UniformStart,
    ignn_chains,
    ignn_ppi,
    ignn_tu,
)
from torchimplicit.recipes.phantom import graph_data as tu
from torchimplicit.recipes.phantom import ppi
from torchimplicit.recipes.phantom.graph_data import Fold, chains, folds
from torchimplicit.recipes.phantom.graphs_settings import ChainsConfig, MoleculesConfig, PPIConfig
from torchimplicit.recipes.runtime.errors import UserError
from torchimplicit.recipes.runtime.settings import Equilibria
from torchimplicit.recipes.runtime.task import (
    InOrder,
    Metric,
    Shard,
    ShuffledSteps,
    Split,
    Task,
    gradient,
    loader,
    solver,
)
from torchimplicit.recipes.runtime.trainer import Trainer

# -- The models of the graph recipes, with the solver and the estimator that the settings name -------------------------


def made(architecture: IGNNConfig, settings: Equilibria) -> IGNN:
    """The network."""
    return IGNN(architecture, solver=solver(settings), gradient=estimator(settings))


def estimator(settings: Equilibria) -> Gradient:
    """The estimator that the settings name, the exact one with the plain series.

    An IGNN's map contracts by construction, so that the series converges. On directed chains, whose Jacobian is close
    to a Jordan block, GMRES would have to keep as many directions as a chain has nodes.
    """
    if settings.gradient == "implicit":
        return Implicit(linear_solver=Neumann(rtol=settings.backward_tolerance, max_steps=settings.backward_steps))
    return gradient(settings)


# -- Graph classification on a fold of a TU data set -------------------------------------------------------------------


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


# -- Node classification on PPI: 121 labels a node ---------------------------------------------------------------------


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


# -- Node classification on directed chains ----------------------------------------------------------------------------


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


# -- What runs the graph recipes. torch-geometric is imported when it is known to be there -----------------------------


def build(config: Any) -> Task:
    """The task of the settings."""

    kinds: dict[type, Callable[[Any], Task]] = {
        MoleculesConfig: MoleculesTask,
        PPIConfig: PPITask,
        ChainsConfig: ChainsTask,
    }
    return kinds[type(config)](config)


def ready(config: Any) -> None:
    """Raise :class:`UserError` where torch-geometric is missing, or the folder that is given is the wrong one."""
    if find_spec("torch_geometric") is None:
        raise UserError("this recipe needs torch-geometric: pip install 'torchimplicit[graphs]'")
    from torchimplicit.recipes.phantom import graph_data as chains
    from torchimplicit.recipes.phantom import graph_data as tu
    from torchimplicit.recipes.phantom import ppi

    if isinstance(config, ChainsConfig):
        chains.chains(config.length, config.optimization.seed)
    elif isinstance(config, PPIConfig) and config.data_dir is not None:
        ppi.locate(config.data_dir)
    elif isinstance(config, MoleculesConfig) and config.data_dir is not None:
        tu.locate(config.data, config.data_dir)


TRAINER = Trainer(build, ready)
