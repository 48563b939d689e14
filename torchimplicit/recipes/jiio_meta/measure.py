"""How well a trained model adapts, and how fast, by JIIO and by descent."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch

from torchimplicit.errors import ConvergenceWarning
from torchimplicit.recipes.jiio_meta.adapt import Descent, Joint
from torchimplicit.recipes.jiio_meta.config import AdaptationsConfig
from torchimplicit.recipes.jiio_meta.task import RUNNER as TRAINER
from torchimplicit.recipes.jiio_meta.task import MetaLearning, judged
from torchimplicit.recipes.jiio_meta.tasks import Tasks
from torchimplicit.recipes.runtime.fitting import load_weights
from torchimplicit.recipes.runtime.run import Run, clock, device
from torchimplicit.recipes.runtime.table import Column, Table
from torchimplicit.recipes.runtime.trainer import Measuring


@dataclass(frozen=True)
class Quality:
    """One adaptation to the test tasks.

    Attributes:
        error, accuracy: on the queries, at an exact solve with the adapted context.
        seconds: CPU seconds of the process for all tasks at once, from the support's features to the contexts; on a
            GPU, wall seconds. The median of several times, all adaptations in turn.
        evaluations: of the map, and products with its Jacobian, in whole-batch equivalents.
        step_size: chosen on validation tasks.
    """

    error: float
    accuracy: float
    seconds: float
    evaluations: float
    step_size: float


def measured(config: AdaptationsConfig, run: Run) -> dict[str, Quality]:
    """Every adaptation at the run's best weights, with the step size that suits it on validation tasks."""
    module = TRAINER.module(config.training)
    load_weights(module, run.best)
    where = device(config.training.machine.device)
    task = module.task.to(where).eval()
    assert isinstance(task, MetaLearning)
    model = task.model

    def moved(split: str) -> Tasks:
        return Tasks(*(part.to(where) for part in task.held_out(split, config.adapted_tasks)))

    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", ConvergenceWarning)
        chosen = _tuned(config, task, moved("validation"))
        tasks = moved("test")
        features = model.encode(tasks.support)
        seconds: dict[str, list[float]] = {name: [] for name in chosen}
        evaluations: dict[str, float] = {}
        now = clock(where)
        for _ in range(config.repeats):
            for name, adapt in chosen.items():
                began = now()
                adapted = adapt(model, features, tasks.support_targets)
                seconds[name].append(now() - began)
                evaluations[name] = adapted.evaluations
        found = {}
        for name, adapt in chosen.items():
            error, accuracy = judged(model, adapt, tasks)
            found[name] = Quality(
                error=float(error.mean()),
                accuracy=float(accuracy.mean()),
                seconds=median(seconds[name]),
                evaluations=evaluations[name],
                step_size=adapt.step_size,
            )
    return found


def _tuned(config: AdaptationsConfig, task: MetaLearning, tasks: Tasks) -> dict[str, Joint | Descent]:
    """Every adaptation with the step size of the least error, by name."""
    own = config.training.adaptation_step_size

    def best(adapt: Any) -> Any:
        tries = [replace(adapt, step_size=own * share) for share in config.step_sizes]
        errors = [float(judged(task.model, one, tasks)[0].mean()) for one in tries]
        finite = [error if error == error else float("inf") for error in errors]
        return tries[finite.index(min(finite))]

    penalty = config.training.penalty
    return {
        **{f"JIIO-{n}": best(Joint(steps=n, step_size=own, penalty=penalty)) for n in config.jiio_steps},
        **{f"descent-{n}": best(Descent(steps=n, step_size=own, penalty=penalty)) for n in config.descent_steps},
    }


def table(found: dict[str, Quality]) -> Table:
    """For people."""
    columns = [
        Column("Adaptation"),
        Column("Error"),
        Column("Accuracy", "%"),
        Column("Time", "ms"),
        Column("Evaluations"),
        Column("Step"),
    ]
    return Table(
        columns,
        [
            [
                name,
                f"{one.error:.3f}",
                f"{100 * one.accuracy:.1f}",
                f"{1e3 * one.seconds:.0f}",
                f"{one.evaluations:.0f}",
                f"{one.step_size:g}",
            ]
            for name, one in found.items()
        ],
    )


RUNNER = Measuring(
    trainer=TRAINER,
    training=lambda config: config.training,
    measure=measured,
    show=table,
    name="adaptations.json",
    doing="Adapting",
)
