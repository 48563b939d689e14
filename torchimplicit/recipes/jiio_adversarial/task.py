"""Adversarial training, for the framework that trains."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from torchimplicit.models import EquilibriumClassifier, EquilibriumClassifierConfig
from torchimplicit.problems import FixedPoint
from torchimplicit.recipes.images.data import KINDS, selected
from torchimplicit.recipes.jiio_adversarial.attack import JIIO, PGD, Attack, judged
from torchimplicit.recipes.jiio_adversarial.config import AdversarialConfig
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
from torchimplicit.regularizers import jacobian_frobenius

HELD_OUT_BATCH = 250
STRIDE = {"digits": None, "mnist": 4}


class AdversarialTraining(Task):
    """A classifier, and an adversary that changes what it learns from."""

    def __init__(self, config: AdversarialConfig):
        super().__init__()
        self.config = config
        self.metric = Metric("accuracy" if config.adversary == "none" else "attacked", "%", "max")
        splits = selected(config.data, config)
        self.data = {
            "training": Rows(*splits.train),
            "validation": Rows(*splits.validation),
            "test": Rows(*splits.test),
        }
        self.model = EquilibriumClassifier(
            EquilibriumClassifierConfig(
                image_size=KINDS[config.data].size,
                classes=KINDS[config.data].classes,
                channels=config.channels,
                stride=STRIDE[config.data],
                bound=config.bound,
                mean=splits.mean[0],
                deviation=splits.deviation[0],
            ),
            solver=solver(config.equilibria),
            gradient=gradient(config.equilibria),
        )

    @property
    def attack(self) -> Attack:
        """The adversary; where there is none in training, one that tests."""
        config = self.config
        if config.adversary == "jiio":
            return self._jiio
        steps = config.attack_steps if config.adversary == "pgd" else 10
        return PGD(steps=steps, step_size=config.attack_step_size, seen=self.solved)

    @property
    def _jiio(self) -> JIIO:
        return JIIO(steps=self.config.attack_steps, step_size=self.config.attack_step_size, seen=self.solved)

    def training_batches(self, steps: range, shard: Shard) -> Iterable[Any]:
        """See :class:`~torchimplicit.recipes.runtime.task.Task`."""
        chosen, data = self.config.optimization, self.data["training"]
        batches = ShuffledSteps(len(data), chosen.batch_size, chosen.seed, steps, shard)
        return loader(data, batches, workers=self.config.machine.workers, seed=chosen.seed)

    def held_out_batches(self, split: Split, shard: Shard) -> Iterable[Any]:
        """See :class:`~torchimplicit.recipes.runtime.task.Task`."""
        data = self.data[split]
        return loader(data, InOrder(len(data), HELD_OUT_BATCH, shard), workers=self.config.machine.workers)

    def loss(self, batch: Any) -> Tensor:
        """The cross-entropy of the images as the adversary has changed them."""
        images, labels = pixels(batch[0]), batch[1]
        if self.config.attack_gradient == "envelope":
            return self._by_envelope(images, labels)
        if self.config.adversary == "none":
            return functional.cross_entropy(self.model(images, self.model.start(images)), labels)
        found = self.attack(self.model, images, labels, self.config.radius)
        scores = self.model(images + found.change, found.state.detach())
        return functional.cross_entropy(scores, labels)

    def _by_envelope(self, images: Tensor, labels: Tensor) -> Tensor:
        """At the state that JIIO ends with, whose adjoint gives the gradient. The solve is no layer's, so that the
        Jacobian's penalty is added here: at one of its iterates, drawn at random."""
        config = self.config
        weight = config.equilibria.jacobian_weight
        found = self._jiio.solve(self.model, images, labels, config.radius, keep_trajectory=weight > 0)
        loss = functional.cross_entropy(self.model.read(found.value.z), labels)
        if weight:
            at = found.trajectory[int(torch.randint(len(found.trajectory), ()))]
            f = self.model.map()
            penalty = jacobian_frobenius(FixedPoint(f), at.z.detach(), images + at.x.detach())
            loss = loss + weight * penalty
        return loss

    def score(self, batch: Any) -> Tensor:
        """How many are right, and the sum of the cross-entropies: of the images as they are, and attacked. And how
        many there are."""
        with torch.inference_mode(False):
            images, labels = pixels(batch[0].clone()), batch[1].clone()
            change = self.attack(self.model, images, labels, self.config.radius).change.detach()
            parts: list[Tensor] = []
            for shown in (images, images + change):
                losses, right = judged(self.model, shown, labels)
                parts += [right.double().sum(), losses.double().sum()]
            return torch.stack([*parts, parts[0].new_tensor(float(len(labels)))])

    def figures(self, sums: list[float]) -> dict[str, float]:
        """Accuracy and mean cross-entropy, clean and attacked."""
        right, loss, attacked, attacked_loss, count = sums
        return {
            "accuracy": right / count,
            "loss": loss / count,
            "attacked": attacked / count,
            "attacked_loss": attacked_loss / count,
        }

    def describe(self) -> str:
        """The data and the model."""
        counts = ", ".join(f"{len(rows)} {name}" for name, rows in self.data.items())
        parameters = sum(p.numel() for p in self.model.parameters())
        adversary = {"none": "no adversary", "pgd": "PGD", "jiio": "JIIO"}[self.config.adversary]
        return f"{self.config.data}: {counts} images; {parameters} parameters, trained against {adversary}."


def pixels(images: Tensor) -> Tensor:
    """uint8 to [0, 1]."""
    return images.float() / 255


def ready(config: AdversarialConfig) -> None:
    """Raise where the data is missing or wrong."""
    selected(config.data, config)


RUNNER = Trainer(AdversarialTraining, ready)
