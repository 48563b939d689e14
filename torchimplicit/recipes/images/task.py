"""Image classification, for the framework that trains."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import Dataset, Sampler

from torchimplicit.models import MDEQ, MDEQConfig, mdeq_imagenet, mdeq_large, mdeq_small, mdeq_tiny
from torchimplicit.recipes.images import imagenet
from torchimplicit.recipes.images.augment import Augmented
from torchimplicit.recipes.images.config import ImageConfig
from torchimplicit.recipes.images.data import KINDS, selected
from torchimplicit.recipes.images.split import standardized
from torchimplicit.recipes.runtime.task import (
    InOrder,
    Metric,
    Rows,
    Shard,
    ShuffledSteps,
    Split,
    Task,
    gradient,
    loader,
    solver,
)
from torchimplicit.recipes.runtime.trainer import Trainer

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
