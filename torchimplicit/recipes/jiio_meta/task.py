"""Meta-learning, for the framework that trains."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torchimplicit.gradients import Gradient, Unrolled
from torchimplicit.models import ContextEquilibrium, ContextEquilibriumConfig
from torchimplicit.recipes.jiio_meta import omniglot, sinusoids
from torchimplicit.recipes.jiio_meta.adapt import Adapt, Descent, Joint, errors, exact
from torchimplicit.recipes.jiio_meta.config import MetaConfig
from torchimplicit.recipes.jiio_meta.tasks import Tasks
from torchimplicit.recipes.runtime.task import (
    InOrder,
    Metric,
    Rows,
    Shard,
    Split,
    Task,
    generator,
    gradient,
    loader,
    solver,
)
from torchimplicit.recipes.runtime.trainer import Trainer

HELD_OUT_BATCH = 50
PLACES = {"validation": -10, "test": -11}
"""Of the held-out tasks, among the seeds: the same for every seed of training."""


class MetaLearning(Task):
    """A model that adapts, and tasks."""

    def __init__(self, config: MetaConfig):
        super().__init__()
        self.config = config
        self.metric = Metric("error", "", "min") if config.data == "sinusoid" else Metric("accuracy", "%", "max")
        self.characters: dict[str, Tensor] = {}
        if config.data == "omniglot":
            self.characters = dict(_characters(config.data_dir))
            self.characters["training"] = omniglot.turned(self.characters["training"])
        self.model = ContextEquilibrium(
            _encoder(config),
            ContextEquilibriumConfig(
                state=config.state_size,
                context=config.context_size,
                outputs=1 if config.data == "sinusoid" else config.ways,
                bound=config.bound,
            ),
            solver=solver(config.equilibria),
            gradient=gradient(config.equilibria),
        )

    def draw(self, split: str, count: int, source: torch.Generator) -> Tasks:
        """Random tasks of a split."""
        config = self.config
        if config.data == "sinusoid":
            return sinusoids.draw(count, config.shots, config.queries, source)
        return omniglot.draw(self.characters[split], count, config.ways, config.shots, config.queries, source)

    def training_batches(self, steps: range, shard: Shard) -> Iterable[Any]:
        """See :class:`~torchimplicit.recipes.runtime.task.Task`."""
        return _Drawn(self, steps, shard)

    def held_out_batches(self, split: Split, shard: Shard) -> Iterable[Any]:
        """See :class:`~torchimplicit.recipes.runtime.task.Task`."""
        tasks = Rows(*self.held_out(split, self.config.held_out_tasks))
        return loader(tasks, InOrder(len(tasks), HELD_OUT_BATCH, shard))

    def held_out(self, split: str, count: int) -> Tasks:
        """The first tasks of a split, always the same."""
        return self.draw(split, count, generator(0, PLACES[split]))

    def adapt(self, learning: bool) -> Adapt:
        """The recipe's adaptation; with the weights' gradient, or without."""
        config = self.config
        shared: Any = {
            "steps": config.adaptation_steps,
            "step_size": config.adaptation_step_size,
            "penalty": config.penalty,
        }
        if config.adaptation == "descent":
            return Descent(**shared, differentiable=learning)
        first_order = config.adaptation == "jiio-first-order" or not learning
        through: Gradient | None = None
        if not first_order:
            unrolled = config.adaptation == "jiio-unrolled"
            through = Unrolled() if unrolled else exact(config.adjoint_steps, config.adjoint_tolerance)
        return Joint(**shared, gradient=through, seen=self.solved)

    def loss(self, batch: Any) -> Tensor:
        """The error on the queries, at the context that the support gives."""
        tasks = Tasks(*batch)
        features = self.model.encode(tasks.support)
        context = self.adapt(learning=True)(self.model, features, tasks.support_targets).context
        return errors(self.model(self.model.encode(tasks.query), context), tasks.query_targets).mean()

    def score(self, batch: Any) -> Tensor:
        """Sums over the tasks: of the error and of the accuracy on the queries; and how many tasks there are."""
        with torch.inference_mode(False), torch.no_grad():
            tasks = Tasks(*(part.clone() for part in batch))
            error, accuracy = judged(self.model, self.adapt(learning=False), tasks)
            return torch.stack([error.sum(), accuracy.sum(), error.new_tensor(float(len(error)))])

    def figures(self, sums: list[float]) -> dict[str, float]:
        """Mean error, and accuracy where there are classes."""
        error, accuracy, count = sums
        found = {"error": error / count, "loss": error / count}
        return found if self.config.data == "sinusoid" else {**found, "accuracy": accuracy / count}

    def describe(self) -> str:
        """The tasks and the model."""
        config = self.config
        parameters = sum(p.numel() for p in self.model.parameters())
        kind = f"{config.ways} characters" if config.data == "omniglot" else "a sine wave"
        return (
            f"{config.data}: tasks of {kind}, {config.shots} samples each; {parameters} parameters, a context of "
            f"{config.context_size} adapted by {config.adaptation}."
        )


class _Drawn:
    """The training tasks of some steps, drawn when they are due."""

    def __init__(self, task: MetaLearning, steps: range, shard: Shard):
        self.task, self.steps, self.shard = task, steps, shard

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        chosen = self.task.config.optimization
        for step in self.steps:
            tasks = self.task.draw("training", chosen.batch_size, generator(chosen.seed, step, -5))
            yield tuple(part[self.shard.rank :: self.shard.world] for part in tasks)


def judged(model: ContextEquilibrium, adapt: Adapt, tasks: Tasks) -> tuple[Tensor, Tensor]:
    """Error and accuracy on the queries ``[tasks]`` (float64), at an exact solve from zero."""
    context = adapt(model, model.encode(tasks.support), tasks.support_targets).context.detach()
    with torch.no_grad():
        outputs = model(model.encode(tasks.query), context)
    error = errors(outputs, tasks.query_targets).double()
    if tasks.query_targets.is_floating_point():
        return error, torch.zeros_like(error)
    return error, (outputs.argmax(-1) == tasks.query_targets).double().mean(1)


def ready(config: MetaConfig) -> None:
    """Raise where the data is missing or wrong."""
    if config.data == "omniglot":
        _characters(config.data_dir)


@lru_cache(maxsize=1)
def _characters(folder: Path | None) -> dict[str, Tensor]:
    return omniglot.load(folder)


def _encoder(config: MetaConfig) -> nn.Module:
    size = config.state_size
    if config.data == "sinusoid":
        return nn.Sequential(nn.Linear(1, size), nn.Tanh(), nn.Linear(size, size))
    layers: list[nn.Module] = []
    for channels in (1, 32, 32):
        layers += [nn.Conv2d(channels, 32, 3, stride=2, padding=1), nn.GroupNorm(4, 32), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * 16, size))


RUNNER = Trainer(MetaLearning, ready)
