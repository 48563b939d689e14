"""An image classifier, and what a step of it costs with every gradient."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from statistics import fmean, median
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import Dataset, Sampler

from torchimplicit.errors import ConvergenceWarning
from torchimplicit.models import MDEQ, MDEQConfig, mdeq_imagenet, mdeq_large, mdeq_small, mdeq_tiny
from torchimplicit.nn import Equilibrium
from torchimplicit.recipes.phantom import imagenet
from torchimplicit.recipes.phantom.image_data import KINDS, Augmented, selected, standardized
from torchimplicit.recipes.phantom.image_settings import ImageConfig, digits
from torchimplicit.recipes.runtime.fitting import load_weights
from torchimplicit.recipes.runtime.run import Run, clock, device, threads
from torchimplicit.recipes.runtime.settings import Equilibria, from_plain, positive
from torchimplicit.recipes.runtime.table import Column, Table
from torchimplicit.recipes.runtime.task import (
    Costs,
    InOrder,
    Metric,
    Rows,
    Shard,
    ShuffledSteps,
    Split,
    Task,
    gradient,
    label,
    loader,
    solver,
)
from torchimplicit.recipes.runtime.trainer import Measuring, Trainer

# -- Image classification, for the framework that trains ---------------------------------------------------------------


MODELS = {"small": mdeq_small, "tiny": mdeq_tiny, "large": mdeq_large, "imagenet": mdeq_imagenet}
HELD_OUT_BATCH = 250


class Classification(Task):
    """An MDEQ and the images that it learns to tell apart."""

    metric = Metric("accuracy", "%", "max")

    def __init__(self, config: ImageConfig):
        super().__init__()
        self.config = config
        self.data: dict[str, Dataset[Any]]
        self.mean: tuple[float, ...]
        self.deviation: tuple[float, ...]
        if config.data == "imagenet":
            listings = dict(zip(("training", "validation", "test"), _listings(config), strict=True))
            seeds = {"training": config.optimization.seed}
            self.data = {
                name: imagenet.Crops(listing, config.image_size, seeds.get(name)) for name, listing in listings.items()
            }
            self.counts = {name: len(listing.paths) for name, listing in listings.items()}
            self.mean, self.deviation = imagenet.MEAN, imagenet.DEVIATION
        else:
            splits = selected(config.data, config)
            parts = {"training": splits.train, "validation": splits.validation, "test": splits.test}
            self.data = {name: Rows(*part) for name, part in parts.items()}
            self.counts = {name: len(part.labels) for name, part in parts.items()}
            self.mean, self.deviation = splits.mean, splits.deviation
        self.model = MDEQ(sizes(config), solver=solver(config.equilibria), gradient=gradient(config.equilibria))

    def training_batches(self, steps: range, shard: Shard) -> Iterable[Any]:
        """See :class:`~torchimplicit.recipes.runtime.task.Task`."""
        chosen, data = self.config.optimization, self.data["training"]
        indices = ShuffledSteps(self.counts["training"], chosen.batch_size, chosen.seed, steps, shard)
        batches: Sampler[Any] = _WithTurns(indices) if self.config.data == "imagenet" else indices
        found = loader(data, batches, workers=self.config.machine.workers, seed=chosen.seed)
        return Augmented(found, steps, chosen.seed, shard.rank) if self.config.augment else found

    def held_out_batches(self, split: Split, shard: Shard) -> Iterable[Any]:
        """See :class:`~torchimplicit.recipes.runtime.task.Task`."""
        batches = InOrder(self.counts[split], HELD_OUT_BATCH, shard)
        return loader(self.data[split], batches, workers=self.config.machine.workers)

    def scores(self, images: Tensor) -> Tensor:
        """uint8 images to the scores of the classes."""
        return self.model(standardized(images, self.mean, self.deviation))

    def loss(self, batch: Any) -> Tensor:
        """The cross-entropy."""
        images, labels = batch
        return functional.cross_entropy(self.scores(images), labels)

    def score(self, batch: Any) -> Tensor:
        """How many are right, the sum of the cross-entropies, and how many there are."""
        images, labels = batch
        scores = self.scores(images).double()
        loss = functional.cross_entropy(scores, labels, reduction="sum")
        return torch.stack([(scores.argmax(1) == labels).sum().double(), loss, loss.new_tensor(float(len(labels)))])

    def figures(self, sums: list[float]) -> dict[str, float]:
        """Accuracy and mean cross-entropy."""
        right, loss, count = sums
        return {"accuracy": right / count, "loss": loss / count}

    def describe(self) -> str:
        """The data and the model."""
        counts = ", ".join(f"{count} {name}" for name, count in self.counts.items())
        parameters = sum(p.numel() for p in self.model.parameters())
        return f"{self.config.data}: {counts} images; MDEQ {self.config.model} with {parameters} parameters."


def sizes(config: ImageConfig) -> MDEQConfig:
    """The model's sizes."""
    if config.data == "imagenet":
        channels, classes = 3, config.classes
    else:
        channels, classes = KINDS[config.data].channels, KINDS[config.data].classes
    chosen = MODELS[config.model](image_channels=channels, classes=classes, dropout=config.dropout)
    return chosen if config.downsamplings is None else replace(chosen, downsamplings=config.downsamplings)


def ready(config: ImageConfig) -> None:
    """Raise where the data is missing or wrong: small sets are read, of ImageNet only the folders are looked at."""
    if config.data == "imagenet":
        imagenet.check(config.data_dir, config.classes)
    else:
        selected(config.data, config)


def _listings(config: ImageConfig) -> tuple[imagenet.Listing, ...]:
    return imagenet.load(
        config.data_dir,
        validation=config.validation_images,
        train=config.train_images,
        test=config.test_images,
        split_seed=config.split_seed,
        classes=config.classes,
    )


class _WithTurns(Sampler[list[tuple[int, int]]]):
    """The batches of another sampler, each index with the pass over the data that it belongs to."""

    def __init__(self, batches: ShuffledSteps):
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step, batch in zip(self.batches.steps, self.batches, strict=True):
            yield [(step // self.batches.per_pass, index) for index in batch]


RUNNER = Trainer(Classification, ready)


# -- What a training step of an image model costs, by estimator, at the same trained weights ---------------------------


CONVERGED = "implicit, converged"


@dataclass(frozen=True, kw_only=True)
class CostConfig:
    """Trains an image model, then measures steps at the best weights with one estimator after the other."""

    image: ImageConfig = field(default_factory=digits)

    repeats: int = 7
    """Batches on which every estimator is measured."""

    converged_tolerance: float = 1e-6
    """Of the adjoint that counts as converged."""

    converged_steps: int = 300
    """The most steps to get there."""

    def __post_init__(self) -> None:
        positive(self, "repeats", "converged_tolerance", "converged_steps")


def default() -> CostConfig:
    """For the small model on the bundled digits."""
    return CostConfig()


@dataclass(frozen=True)
class Cost:
    """A training step with one estimator; medians over the batches unless said.

    Attributes:
        forward_seconds, backward_seconds: CPU seconds of the process; on a GPU, wall seconds.
        forward, backward: mean evaluations of the cell, and products with its Jacobian.
        residual: mean over the samples of the adjoint's relative residual; of a phantom gradient, that of its
            truncated series.
        cosine, norm: of the gradient in all parameters beside that of the converged adjoint: cosine and ratio of norms.
    """

    forward_seconds: float
    backward_seconds: float
    forward: float
    backward: float
    residual: float
    cosine: float
    norm: float

    @property
    def seconds(self) -> float:
        """Forward and backward pass."""
        return self.forward_seconds + self.backward_seconds


def estimators(config: CostConfig) -> dict[str, Equilibria]:
    """What is measured, by name."""
    own = config.image.equilibria
    implicit = replace(own, gradient="implicit")
    converged = replace(implicit, backward_tolerance=config.converged_tolerance, backward_steps=config.converged_steps)
    unrolled = replace(own, gradient="unrolled-phantom", phantom_steps=5, phantom_damping=0.5)
    neumann = replace(unrolled, gradient="neumann-phantom")
    phantom = {label(one): one for one in (unrolled, replace(unrolled, phantom_steps=9), neumann)}
    return {CONVERGED: converged, "implicit": implicit, **phantom}


def read(run: Run) -> dict[str, Cost]:
    """What a run has measured."""
    return {name: from_plain(Cost, plain) for name, plain in run.read_json("costs.json").items()}


def measured(config: CostConfig, run: Run) -> dict[str, Cost]:
    """Every estimator's cost at the run's best weights, in turn on each of a few batches."""
    module = RUNNER.module(config.image)
    load_weights(module, run.best)
    where = device(config.image.machine.device)
    task = module.task.to(where).train()
    layer = next(one for one in task.modules() if isinstance(one, Equilibrium))
    now = clock(where)
    rows: dict[str, list[Cost]] = {}
    with threads(config.image.machine.threads), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        for index, batch in enumerate(task.training_batches(range(config.repeats + 1), Shard())):
            moved = [part.to(where) for part in batch]
            exact: Tensor | None = None
            for name, settings in estimators(config).items():
                layer.gradient = gradient(settings)
                cost, found = _step(task, moved, layer, now, exact)
                exact = found if exact is None else exact
                if index:  # the first batch warms up
                    rows.setdefault(name, []).append(cost)
    return {name: _gathered(costs) for name, costs in rows.items()}


def _step(
    task: Any, batch: Any, layer: Equilibrium, now: Callable[[], float], exact: Tensor | None
) -> tuple[Cost, Tensor]:
    task.zero_grad()
    watch = Costs([layer])
    began = now()
    loss = task.loss(batch)
    forward = now()
    loss.backward()
    backward = now()
    figures = watch.figures()
    watch.close()
    found = torch.cat([p.grad.flatten() for p in task.parameters() if p.grad is not None]).double()
    beside = found if exact is None else exact
    adjoint = layer.solution.adjoint if layer.solution is not None else None
    return (
        Cost(
            forward_seconds=forward - began,
            backward_seconds=backward - forward,
            forward=figures["forward_evaluations"],
            backward=figures["backward_evaluations"],
            residual=float("nan") if adjoint is None else float(adjoint.residual.double().mean()),
            cosine=float(torch.nn.functional.cosine_similarity(found, beside, dim=0)),
            norm=float(found.norm() / beside.norm()),
        ),
        found,
    )


def _gathered(costs: list[Cost]) -> Cost:
    return Cost(
        forward_seconds=median(c.forward_seconds for c in costs),
        backward_seconds=median(c.backward_seconds for c in costs),
        forward=fmean(c.forward for c in costs),
        backward=fmean(c.backward for c in costs),
        residual=median(c.residual for c in costs),
        cosine=median(c.cosine for c in costs),
        norm=median(c.norm for c in costs),
    )


def table(found: dict[str, Cost]) -> Table:
    """For people."""
    columns = [
        Column("Gradient"),
        Column("Forward", "ms", "Seconds of the process's CPU (of the wall on a GPU), medians."),
        Column("Backward", "ms", "The same."),
        Column(
            "Evaluations", "", "Of the cell in the forward pass; those that a phantom gradient unrolls are counted."
        ),
        Column("Products", "", "With the cell's Jacobian, in the backward pass."),
        Column("Backward, evaluations", "×", "The converged implicit backward's evaluations over this one's."),
        Column("Backward, time", "×", "The converged implicit backward's time over this one's."),
        Column("Step, time", "×", "The implicit step's time over this one's, forward and backward together."),
        Column("Cosine", "", "Of the gradient in all parameters to the converged one's."),
        Column("Norm", "", "Of the gradient over the converged one's."),
    ]
    rows = []
    for name, cost in found.items():
        rows.append(
            [
                name,
                f"{1e3 * cost.forward_seconds:.0f}",
                f"{1e3 * cost.backward_seconds:.0f}",
                f"{cost.forward:.1f}",
                f"{cost.backward:.1f}",
                f"{evaluations(found[CONVERGED]) / evaluations(cost):.1f}",
                f"{found[CONVERGED].backward_seconds / cost.backward_seconds:.1f}",
                f"{found['implicit'].seconds / cost.seconds:.2f}",
                f"{cost.cosine:.3f}",
                f"{cost.norm:.2f}",
            ]
        )
    return Table(columns, rows)


def evaluations(cost: Cost) -> float:
    """Of the cell's backward pass: the products, and the last one, into the parameters."""
    return cost.backward + 1


COSTS = Measuring(
    trainer=RUNNER,
    training=lambda config: config.image,
    measure=measured,
    show=table,
    name="costs.json",
)
