"""What attacks do to a trained classifier, and what they cost."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch
from torch import Tensor

from torchimplicit.errors import ConvergenceWarning
from torchimplicit.models import EquilibriumClassifier
from torchimplicit.recipes.jiio_adversarial.attack import JIIO, PGD, Attack, judged
from torchimplicit.recipes.jiio_adversarial.config import CLEAN, AttacksConfig
from torchimplicit.recipes.jiio_adversarial.task import RUNNER as TRAINER
from torchimplicit.recipes.jiio_adversarial.task import AdversarialTraining, pixels
from torchimplicit.recipes.runtime import files
from torchimplicit.recipes.runtime.fitting import load_weights
from torchimplicit.recipes.runtime.run import Run, clock, device
from torchimplicit.recipes.runtime.table import Column, Table
from torchimplicit.recipes.runtime.trainer import Measuring
from torchimplicit.solvers import Anderson

SHOWN = 8
"""Images of the picture."""


@dataclass(frozen=True)
class Strength:
    """One attack on the test images.

    Attributes:
        accuracy, cross_entropy: under the attack, after an exact solve at the changed images.
        seconds: CPU seconds of the process for all images at once; on a GPU, wall seconds. The median of several
            times, all attacks in turn.
        evaluations: of the map, and products with its Jacobian, in whole-batch equivalents.
        step_size: chosen, as a share of the radius.
        tolerance: chosen, of PGD's solves.
    """

    accuracy: float
    cross_entropy: float
    seconds: float = 0.0
    evaluations: float = 0.0
    step_size: float = 0.0
    tolerance: float = 0.0


def measured(config: AttacksConfig, run: Run) -> dict[str, Strength]:
    """Every attack at the run's best weights, with the step size and the tolerance that suit it on the validation
    images; some of the images, attacked by the longest of each
    kind, go into the run's directory."""
    module = TRAINER.module(config.training)
    load_weights(module, run.best)
    where = device(config.training.machine.device)
    task = module.task.to(where).eval()
    assert isinstance(task, AdversarialTraining)
    model, radius = task.model, config.training.radius
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        attacks = tuned(config, model, *_images(task, "validation", config.tuning_images, where))
        images, labels = _images(task, "test", config.attacked_images, where)
        losses, right = judged(model, images, labels)
        found = {CLEAN: Strength(float(right.double().mean()), float(losses.double().mean()))}
        seconds: dict[str, list[float]] = {name: [] for name in attacks}
        changed: dict[str, Tensor] = {}
        evaluations: dict[str, float] = {}
        now = clock(where)
        for _ in range(config.repeats):
            for name, attack in attacks.items():
                began = now()
                result = attack(model, images, labels, radius)
                seconds[name].append(now() - began)
                changed[name], evaluations[name] = images + result.change.detach(), result.evaluations
        for name, attack in attacks.items():
            losses, right = judged(model, changed[name], labels)
            found[name] = Strength(
                accuracy=float(right.double().mean()),
                cross_entropy=float(losses.double().mean()),
                seconds=median(seconds[name]),
                evaluations=evaluations[name],
                step_size=attack.step_size,
                tolerance=attack.tolerance if isinstance(attack, PGD) else 0.0,
            )
        shown = {
            CLEAN: images,
            **{name: changed[name] for name in (config.strongest("PGD"), config.strongest("JIIO"))},
        }
        with torch.no_grad():
            pictures = {
                name: (one[:SHOWN].cpu(), model(one[:SHOWN], model.start(one[:SHOWN])).argmax(1).cpu())
                for name, one in shown.items()
            }
    files.save(pictures, run.path / "pictures.pt")
    return found


def tuned(config: AttacksConfig, model: EquilibriumClassifier, images: Tensor, labels: Tensor) -> dict[str, PGD | JIIO]:
    """Every attack as it is strongest on these images, by name."""

    def strength(attack: Attack) -> float:
        return float(
            judged(model, images + attack(model, images, labels, config.training.radius).change, labels)[0].mean()
        )

    def best(attack: Any) -> tuple[float, Any]:
        tries = [replace(attack, step_size=size) for size in config.step_sizes]
        return max(((strength(one), one) for one in tries), key=lambda pair: pair[0])

    found: dict[str, PGD | JIIO] = {}
    for steps in config.pgd_steps:
        tries = [best(PGD(steps=steps, step_size=1.0, tolerance=one)) for one in sorted(config.tolerances)]
        enough = (1 - config.tolerated) * max(value for value, _ in tries)
        found[f"PGD-{steps}"] = [attack for value, attack in tries if value >= enough][-1]  # the loosest
    for steps in config.jiio_steps:
        found[f"JIIO-{steps}"] = best(JIIO(steps=steps, step_size=1.0))[1]
    steps = sorted(config.jiio_steps)[len(config.jiio_steps) // 2]
    accelerated = JIIO(steps=steps, step_size=1.0, solver=Anderson(memory=20, rtol=1e-3, max_steps=steps))
    found[f"JIIO-{steps}, Anderson"] = best(accelerated)[1]
    return found


def table(found: dict[str, Strength]) -> Table:
    """For people."""
    columns = [
        Column("Attack"),
        Column("Accuracy", "%"),
        Column("Cross-entropy"),
        Column("Time", "ms"),
        Column("Evaluations"),
        Column("Step", "radii"),
    ]
    return Table(
        columns,
        [
            [
                name,
                f"{100 * one.accuracy:.1f}",
                f"{one.cross_entropy:.3f}",
                f"{1e3 * one.seconds:.0f}",
                f"{one.evaluations:.0f}",
                f"{one.step_size:g}",
            ]
            for name, one in found.items()
        ],
    )


def _images(task: AdversarialTraining, split: str, count: int, where: torch.device) -> tuple[Tensor, Tensor]:
    images, labels = (part[:count].to(where) for part in task.data[split].tensors)
    return pixels(images), labels


RUNNER = Measuring(
    trainer=TRAINER,
    training=lambda config: config.training,
    measure=measured,
    show=table,
    name="attacks.json",
    doing="Attacking",
)
