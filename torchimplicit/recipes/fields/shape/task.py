"""The recipe that fits shapes."""

from __future__ import annotations

from functools import lru_cache

from torchimplicit.recipes.fields.runner import FieldRunner
from torchimplicit.recipes.fields.settings import check_slopes
from torchimplicit.recipes.fields.shape.config import ShapeConfig
from torchimplicit.recipes.fields.shape.criteria import DistanceLoss, Overlap, cross_entropy
from torchimplicit.recipes.fields.shape.points import Counts, ShapePoints, TaskName, drawn
from torchimplicit.recipes.fields.shape.show import export, show
from torchimplicit.recipes.fields.shape.subject import Subject, subject
from torchimplicit.recipes.fields.task import FieldTask, Parts

FREQUENCIES = {"occupancy": 16.0, "sdf": 10.0}
"""Their scale, by the task."""


def build(config: ShapeConfig) -> FieldTask:
    """The task."""
    points, parts = _drawn(
        subject(config), config.task, Counts(config.samples, config.held_out_samples), config.sample_seed
    )
    distance = config.task == "sdf"
    return FieldTask(
        config,
        points,
        parts,
        FREQUENCIES[config.task],
        _distance_loss(config) if distance else cross_entropy,
        about=f"{subject(config).describe()} {'Signed distance' if distance else 'Occupancy'}.",
        scoring=Overlap(distance),
        slopes=distance,
    )


def _distance_loss(config: ShapeConfig) -> DistanceLoss:
    return DistanceLoss(
        distance=config.distance_weight,
        normal=config.normal_weight,
        eikonal=config.eikonal_weight,
        surface_only=config.supervision == "surface",
    )


@lru_cache(maxsize=1)
def _drawn(of: Subject, task: TaskName, counts: Counts, seed: int) -> tuple[ShapePoints, Parts]:
    """Kept, for training and showing both ask for it."""
    return drawn(of.mesh, of.tree, task, counts, seed)


def ready(config: ShapeConfig) -> None:
    """Raise where the mesh cannot be used, or the settings do not go with its slopes."""
    if config.task == "sdf":
        check_slopes(config)
    subject(config)


RUNNER = FieldRunner(build, show, ready, export)
