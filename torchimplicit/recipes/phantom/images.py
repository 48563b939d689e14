"""An MDEQ that classifies images, and the cost of a step with every gradient."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import Sampler

from torchimplicit.models import MDEQ, MDEQConfig, mdeq_imagenet, mdeq_large, mdeq_small, mdeq_tiny
from torchimplicit.recipes.phantom import imagenet as folders
from torchimplicit.recipes.phantom import own_images
from torchimplicit.recipes.phantom.image_data import IMAGES, Augmented, Selection, Splits, selected, standardized
from torchimplicit.recipes.phantom.own_images import Colours
from torchimplicit.recipes.runtime.errors import UserError
from torchimplicit.recipes.runtime.run import Run, device
from torchimplicit.recipes.runtime.settings import Equilibria, Machine, Optimization, not_negative, option, positive
from torchimplicit.recipes.runtime.step_cost import TIME, StepCost, beside, equilibria, flat_gradient, in_turn, one_step
from torchimplicit.recipes.runtime.table import Cell, Table, sheet
from torchimplicit.recipes.runtime.task import Metric, Rows, SampledTask, Shard, gradient, label, solver
from torchimplicit.recipes.runtime.trainer import Measuring, Trainer

# -- settings ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ImageConfig(Selection):
    """A multiscale deep equilibrium model that classifies images."""

    data: Literal["digits", "mnist", "cifar10", "imagenet", "folder"]
    """Data set. folder: your own images, one folder per class in --data-dir, or in its train and test."""

    model: Literal["small", "tiny", "large", "imagenet"] = "small"
    """Size of the MDEQ model."""

    dropout: float = 0.0
    """Probability of variational dropout in each residual block."""

    downsamplings: int | None = None
    """Number of times the resolution is halved before the equilibrium. Default: the model's usual number."""

    augment: bool = False
    """Shift training images by up to 4 pixels and mirror them, at random. ImageNet's are always cropped at random."""

    image_size: int = 224
    """Side in pixels to which ImageNet's images are cropped and your own are resized."""

    colours: Colours = "colour"
    """Channels of your own images: three (colour) or one."""

    classes: int = 1000
    """Number of classes that ImageNet's folder must have."""

    optimization: Optimization = field(default_factory=Optimization)
    equilibria: Equilibria = field(default_factory=Equilibria)
    machine: Machine = field(default_factory=Machine)

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "image_size", "classes")
        not_negative(self, "downsamplings")
        if not 0 <= self.dropout < 1:
            raise UserError(f"{option('dropout')} must lie in [0, 1), and it is {self.dropout}")
        if self.augment and self.data == "imagenet":
            raise UserError(f"{option('augment')} is for small images; ImageNet's are always cropped at random")


def _phantom(steps: int, batch_size: int, validate_every: int) -> Optimization:
    """The published training with phantom gradients (Geng et al. 2021, appendix): SGD with momentum 0.9 and a
    cosine."""
    return Optimization(
        steps=steps,
        batch_size=batch_size,
        validate_every=validate_every,
        optimizer="sgd",
        learning_rate=0.1,
        weight_decay=1e-4,
    )


def digits() -> ImageConfig:
    """The small model on the bundled digits, about twenty seconds on one core."""
    return ImageConfig(
        data="digits",
        downsamplings=0,
        validation_images=300,
        optimization=_phantom(steps=120, batch_size=64, validate_every=40),
        equilibria=Equilibria(solver="broyden", solver_steps=18, gradient="unrolled-phantom"),
    )


def mnist() -> ImageConfig:
    """The small model on MNIST: minutes on one core."""
    return ImageConfig(
        data="mnist",
        downsamplings=2,
        optimization=_phantom(steps=1000, batch_size=128, validate_every=200),
        equilibria=Equilibria(solver="broyden", solver_steps=18, gradient="unrolled-phantom"),
    )


def own() -> ImageConfig:
    """The small model on your own images, resized to 32 pixels."""
    return ImageConfig(
        data="folder",
        image_size=32,
        downsamplings=1,
        validation_images=200,
        optimization=_phantom(steps=1000, batch_size=64, validate_every=100),
        equilibria=Equilibria(solver="broyden", solver_steps=18, gradient="unrolled-phantom"),
    )


def cifar10() -> ImageConfig:
    """MDEQ-Tiny on CIFAR-10 with the settings of Geng et al. 2021, table 1: 50 epochs over 45,000 images. The backward
    settings are those of its implicit rows."""
    return ImageConfig(
        data="cifar10",
        model="tiny",
        optimization=_phantom(steps=50 * 351, batch_size=128, validate_every=351),
        equilibria=Equilibria(
            solver="broyden", solver_steps=22, backward_steps=24, gradient="unrolled-phantom", phantom_damping=0.5
        ),
    )


def cifar10_large() -> ImageConfig:
    """MDEQ-Large on CIFAR-10, augmented, 220 epochs (Geng et al. 2021, table 3), with the optimizer of the authors' own
    configuration for the phantom gradient: SGD 0.1, momentum 0.9 without Nesterov, weight decay 1e-4, cosine."""
    return ImageConfig(
        data="cifar10",
        model="large",
        augment=True,
        optimization=_phantom(steps=220 * 351, batch_size=128, validate_every=351),
        equilibria=Equilibria(solver="broyden", solver_steps=18, backward_steps=20, gradient="unrolled-phantom"),
    )


def imagenet() -> ImageConfig:
    """MDEQ-Small on ImageNet, 100 epochs, with the phantom gradient A(5, 0.6) of Geng et al. 2021, table 3, and the
    optimizer of Bai et al. 2020."""
    return ImageConfig(
        data="imagenet",
        model="imagenet",
        validation_images=10_000,
        optimization=Optimization(
            steps=100 * 9930,
            batch_size=128,
            optimizer="sgd",
            learning_rate=0.05,
            weight_decay=5e-5,
            validate_every=2500,
        ),
        equilibria=Equilibria(
            solver="broyden", solver_steps=26, backward_steps=27, gradient="unrolled-phantom", phantom_damping=0.6
        ),
        machine=Machine(workers=8),
    )


# -- the model, its data, and what is asked of it ---------------------------------------------------------------------


COUNTS = {
    ("tiny", 158_890): " (the paper says 170K)",
    ("large", 11_097_438): " (the paper says 10M)",
    ("imagenet", 16_808_936): " (as many as in the authors' code; the paper says 18M)",
}
"""Explanations of published counts that differ from ours, by model and count."""

MODELS = {"small": mdeq_small, "tiny": mdeq_tiny, "large": mdeq_large, "imagenet": mdeq_imagenet}


class Classification(SampledTask):
    """An MDEQ and its data set of images."""

    metric = Metric("accuracy", "%", "max")

    def __init__(self, config: ImageConfig):
        super().__init__()
        self.config = config
        self.sets: dict[str, Any]
        self.mean: tuple[float, ...]
        self.deviation: tuple[float, ...]
        if config.data == "imagenet":
            listings = dict(zip(("training", "validation", "test"), _listings(config), strict=True))
            seeds = {"training": config.optimization.seed}
            self.sets = {
                name: folders.Crops(listing, config.image_size, seeds.get(name)) for name, listing in listings.items()
            }
            self.mean, self.deviation = folders.MEAN, folders.DEVIATION
        else:
            splits = _in_memory(config)
            self.sets = splits.sets()
            self.mean, self.deviation = splits.mean, splits.deviation
        self.model = MDEQ(sizes(config), solver=solver(config.equilibria), gradient=gradient(config.equilibria))

    def training_batches(self, steps: range, shard: Shard) -> Iterable[Any]:
        if self.config.augment and isinstance(self.sets["training"], Rows):
            seed = self.config.optimization.seed
            self.sets = {**self.sets, "training": Augmented(*self.sets["training"].tensors, seed=seed, rank=shard.rank)}
        return super().training_batches(steps, shard)

    def order(self, steps: range, shard: Shard) -> Sampler[Any]:
        indices: Any = super().order(steps, shard)
        if self.config.data == "imagenet":
            return _Numbered(indices, indices.per_pass)
        return _Numbered(indices) if self.config.augment else indices

    def scores(self, images: Tensor) -> Tensor:
        """Class scores of uint8 images."""
        x = standardized(images, self.mean, self.deviation)
        return self.model(x.contiguous(memory_format=torch.channels_last) if self.config.machine.channels_last else x)

    def loss(self, batch: Any) -> Tensor:
        """The cross-entropy."""
        images, labels = batch
        return functional.cross_entropy(self.scores(images), labels)

    def score(self, batch: Any) -> Tensor:
        """Sums of correct predictions and of cross-entropies, and the number of images."""
        images, labels = batch
        scores = self.scores(images).double()
        loss = functional.cross_entropy(scores, labels, reduction="sum")
        among = (scores.topk(min(5, scores.shape[1])).indices == labels[:, None]).any(dim=1)
        right = torch.stack([(scores.argmax(1) == labels).sum(), among.sum()]).double()
        return torch.cat([right, loss[None], loss.new_tensor([float(len(labels))])])

    def figures(self, sums: list[float]) -> dict[str, float]:
        """Accuracy, top-5 accuracy if there are more than ten classes, and mean cross-entropy."""
        right, among, loss, count = sums
        top5 = {"top5": among / count} if sizes(self.config).classes > 10 else {}
        return {"accuracy": right / count, **top5, "loss": loss / count}

    def describe(self) -> str:
        """The data and the model."""
        name = self.config.data_dir if self.config.data == "folder" else self.config.data
        known = COUNTS.get((self.config.model, self.weights), "")
        return f"{name}: {self.counts} images; MDEQ {self.config.model} with {self.weights} parameters{known}."


def sizes(config: ImageConfig) -> MDEQConfig:
    """The model's sizes."""
    if config.data == "imagenet":
        channels, classes = 3, config.classes
    elif config.data == "folder":
        channels, classes = (3 if config.colours == "colour" else 1), len(own_images.names_of(_own(config))[0])
    else:
        channels, classes = IMAGES[config.data].channels, IMAGES[config.data].classes
    chosen = MODELS[config.model](image_channels=channels, classes=classes, dropout=config.dropout)
    return chosen if config.downsamplings is None else replace(chosen, downsamplings=config.downsamplings)


def ready(config: ImageConfig) -> None:
    """Raise if the data is missing or wrong. Small sets are read; for ImageNet only the folders are checked."""
    if config.data == "imagenet":
        folders.check(config.data_dir, config.classes)
    else:
        _in_memory(config)


def _own(config: ImageConfig) -> Path:
    if config.data_dir is None:
        raise UserError("--data-dir must hold a folder of images for each class, or train and test with such")
    return config.data_dir


def _in_memory(config: ImageConfig) -> Splits:
    if config.data == "folder":
        _own(config)
        taken = {one.name: getattr(config, one.name) for one in fields(Selection)}
        return own_images.load(Selection(**taken), config.image_size, config.colours)
    assert config.data != "imagenet"
    return selected(config.data, config)


def _listings(config: ImageConfig) -> tuple[folders.Listing, ...]:
    return folders.load(
        config.data_dir,
        validation=config.validation_images,
        train=config.train_images,
        test=config.test_images,
        split_seed=config.split_seed,
        classes=config.classes,
    )


class _Numbered(Sampler[list[tuple[int, int]]]):
    """The batches of another sampler, where each index carries the number of its span of ``length`` steps."""

    def __init__(self, batches: Any, length: int = 1):
        self.batches, self.length = batches, length

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step, batch in zip(self.batches.steps, self.batches, strict=True):
            yield [(step // self.length, index) for index in batch]


RUNNER = Trainer(Classification, ready)


# -- What a training step of an image model costs, by estimator, at the same trained weights ---------------------------


CONVERGED = "implicit, converged"

AS_PUBLISHED = ", as published"
"""Settings of rows whose solvers use their whole step budget, as the published runs do because nothing reaches their
tolerances. All others stop at the recipe's tolerance."""

UNREACHED = 1e-12
"""A relative tolerance that single precision cannot reach."""


@dataclass(frozen=True, kw_only=True)
class CostConfig:
    """Trains an image model, then measures steps at the best weights with one estimator after another."""

    image: ImageConfig = field(default_factory=digits)

    repeats: int = 7
    """Number of batches on which every estimator is measured."""

    converged_tolerance: float = 1e-6
    """Relative tolerance of an adjoint that counts as converged."""

    converged_steps: int = 300
    """Largest number of steps to reach --converged-tolerance."""

    def __post_init__(self) -> None:
        positive(self, "repeats", "converged_tolerance", "converged_steps")


def costs() -> CostConfig:
    """Return the settings for the small model on the bundled digits."""
    return CostConfig()


def estimators(config: CostConfig) -> dict[str, Equilibria]:
    """The measured estimators, by name."""
    equilibria = config.image.equilibria
    implicit = replace(equilibria, gradient="implicit")
    converged = replace(implicit, backward_tolerance=config.converged_tolerance, backward_steps=config.converged_steps)
    unrolled = replace(equilibria, gradient="unrolled-phantom", phantom_steps=5, phantom_damping=0.5)
    neumann = replace(unrolled, gradient="neumann-phantom")
    phantom = {label(one): one for one in (unrolled, replace(unrolled, phantom_steps=9), neumann)}
    published = {f"{label(one)}{AS_PUBLISHED}": run_out(one) for one in (implicit, unrolled)}
    return {CONVERGED: converged, "implicit": implicit, **phantom, **published}


def run_out(settings: Equilibria) -> Equilibria:
    """Return the same settings with solvers that use their whole step budget."""
    return replace(settings, tolerance=UNREACHED, backward_tolerance=UNREACHED)


def counterpart(name: str) -> str:
    """The implicit row to which a row is compared, with the same stopping rule."""
    return f"implicit{AS_PUBLISHED}" if name.endswith(AS_PUBLISHED) else "implicit"


def measured(config: CostConfig, run: Run) -> dict[str, StepCost]:
    """Every estimator's cost at the run's best weights, in turn on each of several batches."""
    task = RUNNER.best(config.image, run).train()
    where = device(config.image.machine.device)
    (layer,) = equilibria(task)
    batches = iter(task.training_batches(range(config.repeats + 1), Shard()))
    at: dict[str, Any] = {}

    def step(name: str, settings: Equilibria) -> StepCost:
        if name == CONVERGED:  # it comes first, and the others are held against it
            at["batch"] = [part.to(where) for part in next(batches)]
        layer.solver, layer.gradient = solver(settings), gradient(settings)
        cost = one_step(task, lambda: task.loss(at["batch"]), where)
        estimate = flat_gradient(task)
        at["exact"] = estimate if name == CONVERGED else at["exact"]
        adjoint = layer.solution.adjoint if layer.solution is not None else None
        residual = float("nan") if adjoint is None else float(adjoint.residual.double().mean())
        return replace(cost, residual=residual, **beside(estimate, at["exact"]))

    return in_turn({name: partial(step, name, one) for name, one in estimators(config).items()}, config.repeats)


def cost_table(costs: dict[str, StepCost]) -> Table:
    """Tabulate the costs."""
    converged = costs[CONVERGED]
    return sheet("", costs, [
        Cell("Gradient", lambda name: name),
        Cell("Forward", lambda name: f"{1e3 * costs[name].forward_seconds:.0f}", "ms",
             f"{TIME} of the forward pass, median over the batches."),
        Cell("Backward", lambda name: f"{1e3 * costs[name].backward_seconds:.0f}", "ms",
             f"{TIME} of the backward pass, median over the batches."),
        Cell("Evaluations", lambda name: f"{costs[name].forward:.1f}", "",
             "Evaluations of the cell in the forward pass, including those that a phantom gradient unrolls; in "
             "whole-batch equivalents, mean over the batches."),
        Cell("Products", lambda name: f"{costs[name].backward:.1f}", "",
             "Products with the cell's Jacobian in the backward pass, in whole-batch equivalents; mean over the "
             "batches."),
        Cell("Backward work saved", lambda name: f"{evaluations(converged) / evaluations(costs[name]):.1f}", "×",
             "Backward evaluations of the converged implicit gradient, divided by those of this row; the last product, "
             "with the parameters, is included."),
        Cell("Backward speed-up", lambda name: f"{converged.backward_seconds / costs[name].backward_seconds:.1f}", "×",
             "Backward time of the converged implicit gradient, divided by that of this row."),
        Cell("Step speed-up", lambda name: f"{costs[counterpart(name)].seconds / costs[name].seconds:.2f}", "×",
             "Time of both passes with the implicit gradient, divided by that of this row. Rows 'as published', whose "
             "solvers use up their step budgets, are compared with the implicit row as published."),
        Cell("Cosine", lambda name: f"{costs[name].cosine:.3f}", "",
             "Cosine similarity of the gradient in all parameters to the converged implicit one, median over the "
             "batches."),
        Cell("Norm ratio", lambda name: f"{costs[name].norm:.2f}", "",
             "Norm of that gradient, divided by the norm of the converged implicit one; median over the batches."),
    ]).table  # fmt: skip


def evaluations(cost: StepCost) -> float:
    """Products of the cell's backward pass, including the last one into the parameters."""
    return cost.backward + 1


COSTS = Measuring(
    first=RUNNER, training=lambda config: config.image, measure=measured, show=cost_table, name="costs.json"
)
