"""A run's results: what ``results.json`` holds, and the table that sums them up."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import fmean, median

from torchimplicit.recipes.phantom.demo_settings import DigitsConfig, EstimatorName
from torchimplicit.recipes.phantom.demo_task import ESTIMATORS, Profile, Track
from torchimplicit.recipes.runtime.run import Environment
from torchimplicit.recipes.runtime.table import Column, Table

MISSING = math.nan


@dataclass(frozen=True)
class Summary:
    """One estimator's figures; not a number (null in JSON) where there are none.

    Attributes:
        steps: optimizer steps taken.
        validation_accuracy: after the last of them, as a share.
        training_loss: mean over the last epoch's worth of steps (nats).
        seconds_a_step: median over all steps.
        training_seconds: all steps together.
        forward_evaluations, backward_evaluations: of the cell and of products with its Jacobian, a step, means over
            all steps.
        unconverged: share of the samples whose forward solve missed its tolerance, over all steps.
        adjoint_residual, cosine: medians over the audits.
        cosine_least: over the audits.
        spectral_radius: at the last audit, median over the samples.
    """

    steps: int
    validation_accuracy: float
    training_loss: float
    seconds_a_step: float
    training_seconds: float
    forward_evaluations: float
    backward_evaluations: float
    unconverged: float
    adjoint_residual: float
    cosine: float
    cosine_least: float
    spectral_radius: float


@dataclass(frozen=True)
class EstimatorResult:
    """Everything about one estimator."""

    label: str
    summary: Summary
    profiles: list[Profile]
    track: Track


@dataclass(frozen=True)
class Results:
    """Everything about a run.

    Attributes:
        state: ``complete`` or ``interrupted``.
        planned_steps: optimizer steps of each classifier.
        training_images, validation_images: how many.
        parameters: of one classifier.
        wall_seconds: from start to results, audits and validation included; of the last sitting, if resumed.
    """

    state: str
    planned_steps: int
    training_images: int
    validation_images: int
    parameters: int
    wall_seconds: float
    config: DigitsConfig
    environment: Environment
    estimators: dict[EstimatorName, EstimatorResult]


def summarize(track: Track, epoch: int) -> Summary:
    """The figures of one track; ``epoch`` is an epoch's number of steps."""
    steps, audits = track.steps, track.audits
    return Summary(
        steps=len(steps),
        validation_accuracy=track.validations[-1].accuracy if track.validations else MISSING,
        training_loss=_mean([step.loss for step in steps[-epoch:]]),
        seconds_a_step=_median([step.seconds for step in steps]),
        training_seconds=sum(step.seconds for step in steps),
        forward_evaluations=_mean([step.forward for step in steps]),
        backward_evaluations=_mean([step.backward for step in steps]),
        unconverged=_mean([step.unconverged for step in steps]),
        adjoint_residual=_median([audit.adjoint_residual for audit in audits]),
        cosine=_median([audit.cosine for audit in audits]),
        cosine_least=min((audit.cosine for audit in audits), default=MISSING),
        spectral_radius=audits[-1].spectral_radius if audits else MISSING,
    )


COLUMNS = [
    Column("Estimator"),
    Column("Validation accuracy", "%", "images classified right among those never trained on, after the last step"),
    Column("Time a step", "ms", "median over all steps of forward, backward and update; audits are not counted"),
    Column("Forward evaluations", "a step", "evaluations of the cell until every sample has its equilibrium (mean)"),
    Column("Backward evaluations", "a step", "products with the cell's transposed Jacobian (mean)"),
    Column(
        "Adjoint residual",
        "relative",
        "‖u − (I − Jᵀ)g‖ / ‖u‖: by how much the adjoint vector g that the estimator uses misses the equation that "
        "the exact one solves (median over the audits)",
    ),
    Column("Cosine to exact", "", "of the angle between estimate and exact gradient; 1 is the same direction (median)"),
    Column(
        "Spectral radius of J",
        "",
        "at the equilibrium, at the last audit; the closer to 1, the slower plain iteration and the longer the "
        "memory that a truncated gradient cuts off",
    ),
]


def summary_table(estimators: dict[EstimatorName, EstimatorResult]) -> Table:
    """One row an estimator; columns that no estimator has figures for are left out."""
    rows = []
    for result in estimators.values():
        s = result.summary
        rows.append(
            [
                result.label,
                _shown(100 * s.validation_accuracy, ".1f"),
                _shown(1000 * s.seconds_a_step, ".1f"),
                _shown(s.forward_evaluations, ".1f"),
                _shown(s.backward_evaluations, ".1f"),
                _shown(s.adjoint_residual, ".1e"),
                _shown(s.cosine, ".4f"),
                _shown(s.spectral_radius, ".2f"),
            ]
        )
    kept = [i for i in range(len(COLUMNS)) if i == 0 or any(row[i] != "–" for row in rows)]
    return Table([COLUMNS[i] for i in kept], [[row[i] for i in kept] for row in rows])


def label(name: EstimatorName) -> str:
    """The estimator's name for people."""
    return ESTIMATORS[name].label


def _mean(values: list[float]) -> float:
    return fmean(values) if values else MISSING


def _median(values: list[float]) -> float:
    return median(values) if values else MISSING


def _shown(value: float, form: str) -> str:
    return "–" if math.isnan(value) else format(value, form)
