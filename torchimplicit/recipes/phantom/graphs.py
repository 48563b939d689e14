"""Implicit graph networks on molecules, PPI and chains, and the cost of a step with every gradient."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from importlib.util import find_spec
from itertools import chain, repeat
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

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
from torchimplicit.recipes.phantom import graph_data as data
from torchimplicit.recipes.runtime.errors import UserError
from torchimplicit.recipes.runtime.run import Run, device
from torchimplicit.recipes.runtime.settings import Equilibria, Machine, Optimization, not_negative, positive
from torchimplicit.recipes.runtime.step_cost import StepCost, equilibria, in_turn, one_step, step_table
from torchimplicit.recipes.runtime.task import (
    Batches,
    InOrder,
    Metric,
    SampledTask,
    Shard,
    Split,
    Task,
    gradient,
    solver,
)
from torchimplicit.recipes.runtime.trainer import Measuring, Trainer

# -- settings ----------------------------------------------------------------------------------------------------------


EQUILIBRIA = Equilibria(solver="fixed-point", solver_steps=300, backward_steps=300)
"""The map contracts by construction, so plain iteration suffices and is the fastest."""

EXACT = replace(EQUILIBRIA, solver_steps=1000, tolerance=1e-14, backward_steps=1000, backward_tolerance=1e-14)
"""Long chains are solved to machine precision."""

PPI = Optimization(steps=10_000, batch_size=2, learning_rate=0.005, schedule="constant", validate_every=50)
CHAINS = Optimization(
    steps=100, batch_size=1, learning_rate=0.01, weight_decay=5e-4, schedule="constant", validate_every=10
)


@dataclass(frozen=True, kw_only=True)
class MoleculesConfig:
    """Graph classification on one fold of a TU data set."""

    optimization: Optimization
    equilibria: Equilibria = EQUILIBRIA
    machine: Machine = field(default_factory=Machine)

    data: str = "COX2"
    """Name of a set in the TU collection: COX2, PROTEINS, MUTAG, ...; empty: the set in --data-dir."""

    data_dir: Path | None = None
    """Folder of the set's text files, or its parent. Default: torch-geometric downloads them."""

    attributes: bool = False
    """Give each node its real-valued attributes in addition to its label, if the set has them."""

    edge_weights: Literal["ones", "labels", "as-published"] = "ones"
    """Weight of an edge: 1; the number of its label; or, as in the code published for MUTAG, the number of its label in
    training and 2 in tests."""

    folds: int = 10
    """Number of folds of the cross-validation."""

    fold: int = 0
    """The fold to test on, counted from 0."""

    fold_seed: int = 42
    """Random seed of the shuffle before the split into folds."""

    validation_share: float = 0.1
    """Share of the graphs outside the test fold set aside to choose the epoch."""

    layers: int = 3
    """Number of implicit layers."""

    width: int = 64
    """Features per node in each layer."""

    kappa: float = 0.9
    """Bound on ‖W‖∞ · λ(A), below 1."""

    dropout: float = 0.5
    """Dropout probability in the head."""

    peek: bool = False
    """Also record the test accuracy at every validation, as published results report its best value. It never selects
    anything."""

    def __post_init__(self) -> None:
        positive(self, "layers", "width")
        not_negative(self, "fold", "fold_seed")
        check_model(self.kappa, self.dropout)
        if self.folds < 2 or self.fold >= self.folds:
            raise UserError(f"--fold {self.fold} must lie below --folds {self.folds}, which must be at least 2")
        if not 0 < self.validation_share < 1:
            raise UserError(f"--validation-share must lie between 0 and 1, and it is {self.validation_share}")


@dataclass(frozen=True, kw_only=True)
class PPIConfig:
    """Node classification on PPI."""

    optimization: Optimization = PPI
    equilibria: Equilibria = EQUILIBRIA
    machine: Machine = field(default_factory=Machine)

    data_dir: Path | None = None
    """Folder with train_graph.json and the other files. Default: torch-geometric downloads them."""

    widths: tuple[int, ...] = (1024, 512, 512, 256)
    """Widths of the implicit layers before the last one, which gives the scores."""

    kappa: float = 0.98
    """Bound on ‖W‖∞ · λ(A), below 1."""

    def __post_init__(self) -> None:
        check_model(self.kappa, 0.0)
        if any(width < 1 for width in self.widths):
            raise UserError(f"--widths must be positive, and they are {' '.join(map(str, self.widths))}")


@dataclass(frozen=True, kw_only=True)
class ChainsConfig:
    """Node classification on directed chains, in double precision."""

    optimization: Optimization = CHAINS
    equilibria: Equilibria = EXACT
    machine: Machine = field(default_factory=lambda: Machine(device="cpu"))

    length: int = 100
    """Nodes in a chain."""

    start: Literal["identity", "uniform"] = "identity"
    """Initial recurrent weight: a multiple of the identity, or uniform as in the paper."""

    identity_scale: float = 0.8
    """Multiple of the identity for --start identity."""

    width: int = 16
    """Features of a node's state."""

    kappa: float = 0.9
    """Bound on ‖W‖∞ · λ(A), below 1."""

    dropout: float = 0.5
    """Dropout probability in the head."""

    def __post_init__(self) -> None:
        positive(self, "length", "identity_scale", "width")
        check_model(self.kappa, self.dropout)
        if self.machine.devices > 1:
            raise UserError("--devices: all chains are one graph, which one device solves; take --devices 1")
        if self.machine.precision != "32":
            raise UserError(
                "--precision: chains are solved in double precision, or the end of a long one would be lost to rounding"
            )


def cox2() -> MoleculesConfig:
    """COX2 with the published epochs and rates: 200 passes of three batches, with the rate halved at the 51st."""
    return MoleculesConfig(data="COX2", optimization=_published(steps_per_pass=3))


def proteins() -> MoleculesConfig:
    """PROTEINS with the published epochs and rates."""
    return MoleculesConfig(data="PROTEINS", optimization=_published(steps_per_pass=8))


def tu() -> MoleculesConfig:
    """Any set: 60 passes over a few hundred graphs take a minute or two per fold."""
    return MoleculesConfig(
        data="", optimization=Optimization(steps=600, batch_size=32, learning_rate=2e-3, validate_every=10)
    )


def ppi() -> PPIConfig:
    """PPI."""
    return PPIConfig()


def chains() -> ChainsConfig:
    """Chains of 100 nodes."""
    return ChainsConfig()


def _published(steps_per_pass: int) -> Optimization:
    steps, halved = 200 * steps_per_pass, (50 * steps_per_pass,)
    return Optimization(
        steps=steps, schedule="milestones", milestones=halved, validate_every=steps_per_pass, whole_passes=True
    )


def check_model(kappa: float, dropout: float) -> None:
    """The bound and the dropout must lie in (0, 1)."""
    if not 0 < kappa < 1:
        raise UserError(f"--kappa must lie between 0 and 1 for the layers to be well-posed, and it is {kappa}")
    if not 0 <= dropout < 1:
        raise UserError(f"--dropout must lie in [0, 1), and it is {dropout}")


# -- The models of the graph recipes, with the solver and the estimator that the settings name -------------------------


def made(architecture: IGNNConfig, settings: Equilibria) -> IGNN:
    """The network."""
    return IGNN(architecture, solver=solver(settings), gradient=estimator(settings))


def estimator(settings: Equilibria) -> Gradient:
    """The estimator of the settings; the exact one uses the plain Neumann series.

    An IGNN's map contracts by construction, so that the series converges. On directed chains, whose Jacobian is close
    to a Jordan block, GMRES would have to keep as many directions as a chain has nodes.
    """
    if settings.gradient == "implicit":
        return Implicit(linear_solver=Neumann(rtol=settings.backward_tolerance, max_steps=settings.backward_steps))
    return gradient(settings)


# -- Graph classification on a fold of a TU data set -------------------------------------------------------------------


class MoleculesTask(SampledTask):
    """Selects the epoch by the validation loss, because accuracies on a few tens of graphs are often tied."""

    metric = Metric("loss", "", "min")
    held_out_batch = None
    collate = staticmethod(data.batch)

    def __init__(self, config: MoleculesConfig):
        super().__init__()
        self.config = config
        self.set = _set(config.data, config.data_dir, config.attributes)
        folds = data.folds(self.set.labels, config.folds, config.validation_share, config.fold_seed)
        parts = zip(("training", "validation", "test"), folds[config.fold], strict=True)
        self.sets = {name: [self.set.graphs[i] for i in part] for name, part in parts}
        architecture = replace(
            ignn_tu(self.set.features, self.set.classes),
            widths=(config.width,) * config.layers,
            kappa=config.kappa,
            dropout=config.dropout,
        )
        self.model = made(architecture, config.equilibria)
        if config.edge_weights != "ones" and any((graph.edge_label < 0).any() for graph in self.set.graphs):
            raise UserError("--edge-weights: this set has negative edge labels, and weights must not be negative")

    def held_out_batches(self, split: Split, shard: Shard) -> Iterable[Any]:
        batches = super().held_out_batches(split, shard)
        if split == "test" or not self.config.peek:
            return batches
        order = InOrder(len(self.sets["test"]), self.config.optimization.batch_size, shard)
        both: list[Any] = [batches, self._loaded(self.sets["test"], order, _peeked)]
        return Batches(sum(map(len, both)), lambda: chain.from_iterable(both))

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
        figures = {"accuracy": right / count, "loss": loss / count}
        return {**figures, "test_accuracy": peeked_right / peeked} if peeked else figures

    def describe(self) -> str:
        train, validation, test = (len(part) for part in self.sets.values())
        parts = f"{train} for training, {validation} for validation, {test} for testing"
        name = self.config.data or self.config.data_dir
        said = f"{name}, {self.weights} parameters, {self.set.classes} classes, fold {self.config.fold} of"
        return f"{said} {self.config.folds}: graphs {parts}."

    def _scores(self, batch: Any) -> Tensor:
        return self.model(
            batch.x, batch.edge_index, self._edge_weights(batch), batch=batch.batch, graphs=batch.num_graphs
        )

    def _edge_weights(self, batch: Any) -> Tensor | None:
        if self.config.edge_weights == "ones":
            return None
        if self.config.edge_weights == "as-published" and not self.training:
            # that code tests on A + Aᵀ of an undirected A, and leaves the labels out there
            return batch.x.new_full((batch.edge_index.shape[1],), 2.0)
        return batch.edge_label.to(batch.x.dtype)


def _peeked(graphs: list[Any]) -> Any:
    """Mark a batch of the test part, which the choice of the epoch does not see."""
    batch = data.batch(graphs)
    batch.peeked = True
    return batch


@lru_cache(maxsize=2)
def _set(name: str, data_dir: Path | None, attributes: bool) -> data.GraphSet:
    """Read a set; cached for processes that train many folds."""
    return data.load(name, data_dir, attributes)


# -- Node classification on PPI: 121 labels a node ---------------------------------------------------------------------


class PPITask(SampledTask):
    """Judged by the micro-averaged F1 score over all labels and nodes of a split."""

    metric = Metric("f1", "%", "max")
    held_out_batch = None
    collate = staticmethod(data.batch)

    def __init__(self, config: PPIConfig):
        super().__init__()
        self.config = config
        train, validation, test = data.load_ppi(config.data_dir)
        self.sets = {"training": train, "validation": validation, "test": test}
        features, labels = train[0].x.shape[1], train[0].y.shape[1]
        architecture = replace(ignn_ppi(features, labels), widths=(*config.widths, labels), kappa=config.kappa)
        self.model = made(architecture, config.equilibria)

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
        sizes = {name: (len(graphs), sum(g.num_nodes for g in graphs)) for name, graphs in self.sets.items()}
        return "PPI: " + ", ".join(f"{name} {g} graphs of {n} nodes" for name, (g, n) in sizes.items()) + "."


# -- Node classification on directed chains ----------------------------------------------------------------------------


class ChainsTask(Task):
    """All chains form one graph, which every step sees as a whole.

    Everything is in double precision, with the solver's tolerance at its limit: what arrives at node i of a chain is
    about (2/3)ⁱ of what stands at its first node (at the identity-like start), and a residual that is small beside the
    whole state may be larger than that.
    """

    metric = Metric("accuracy", "%", "max")

    def __init__(self, config: ChainsConfig):
        super().__init__()
        self.config = config
        self.data = data.chains(config.length, config.optimization.seed)
        start = IdentityStart(scale=config.identity_scale) if config.start == "identity" else UniformStart()
        architecture = replace(
            ignn_chains(start=start), widths=(config.width,), kappa=config.kappa, dropout=config.dropout
        )
        self.model = made(architecture, config.equilibria).double()
        self.adjacency = Adjacency.normalized(self.data.edge_index, self.data.num_nodes, dtype=torch.float64)

    def training_batches(self, steps: range, shard: Shard) -> Iterable[Any]:
        batch = self._part(self.data.train_mask)
        return Batches(len(steps), lambda: repeat(batch, len(steps)))

    def held_out_batches(self, split: Split, shard: Shard) -> Iterable[Any]:
        batch = self._part(self.data.val_mask if split == "validation" else self.data.test_mask)
        return Batches(1, lambda: iter([batch]))

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
        masks = {"training": self.data.train_mask, "validation": self.data.val_mask, "testing": self.data.test_mask}
        parts = ", ".join(f"{int(mask.sum())} for {what}" for what, mask in masks.items())
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
    if isinstance(config, MoleculesConfig):
        return MoleculesTask(config)
    return PPITask(config) if isinstance(config, PPIConfig) else ChainsTask(config)


def ready(config: Any) -> None:
    """Raise :class:`UserError` if torch-geometric is missing or the given folder is wrong."""
    if find_spec("torch_geometric") is None:
        raise UserError("this recipe needs torch-geometric: pip install 'torchimplicit[graphs]'")
    if isinstance(config, ChainsConfig):
        data.chains(config.length, config.optimization.seed)
    elif isinstance(config, PPIConfig) and config.data_dir is not None:
        data.locate_ppi(config.data_dir)
    elif isinstance(config, MoleculesConfig) and (config.data_dir is not None or not config.data):
        data.locate(config.data, config.data_dir)


RUNNER = Trainer(build, ready)


# -- What a step of each estimator costs, at the same weights and on the same batch ------------------------------------


@dataclass(frozen=True, kw_only=True)
class CostConfig:
    """Steps of all estimators, timed in turn at the same trained weights."""

    training: MoleculesConfig = field(default_factory=cox2)

    repeats: int = 15
    """Number of timed steps per estimator; the median is reported."""

    dampings: tuple[float, ...] = (0.5, 0.8, 1.0)
    """Dampings λ of the phantom gradients, with 5 steps each."""

    def __post_init__(self) -> None:
        positive(self, "repeats")
        check_dampings(self.dampings)


def cost() -> CostConfig:
    """Costs on COX2."""
    return CostConfig()


def check_dampings(dampings: tuple[float, ...]) -> None:
    """The dampings must lie in (0, 1]."""
    if not all(0 < damping <= 1 for damping in dampings):
        raise UserError(f"--dampings must lie in (0, 1], and they are {' '.join(map(str, dampings))}")


def rows(dampings: tuple[float, ...]) -> dict[str, float | None]:
    """Estimators by the names of their runs, with λ (``None`` for the exact one)."""
    return {"implicit": None, **{f"upg-{damping:g}": damping for damping in dampings}}


def differentiated(equilibria: Equilibria, damping: float | None) -> Equilibria:
    """Return the same solves with another estimator."""
    if damping is None:
        return replace(equilibria, gradient="implicit")
    return replace(equilibria, gradient="unrolled-phantom", phantom_steps=5, phantom_damping=damping)


def measured(config: CostConfig, run: Run) -> dict[str, StepCost]:
    """Measure every estimator, by name, on a fold trained with the exact gradient."""
    task, where = RUNNER.best(config.training, run).train(), device(config.training.machine.device)
    (batch,) = (one.to(where) for one in task.training_batches(range(1), Shard()))

    def step(equilibria_settings: Equilibria) -> StepCost:
        for layer in equilibria(task):
            layer.gradient = estimator(equilibria_settings)
        return one_step(task, lambda: task.loss(batch), where)

    usual = config.training.equilibria
    kinds = {name: partial(step, differentiated(usual, damping)) for name, damping in rows(config.dampings).items()}
    return in_turn(kinds, config.repeats)


COSTS = Measuring(
    first=RUNNER,
    training=lambda config: config.training,
    measure=measured,
    show=lambda found: step_table(found, update=False),
    name="costs.json",
)
