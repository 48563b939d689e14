"""Measurements during the training of a functional, and its results."""

from __future__ import annotations

from dataclasses import dataclass, field

from torchimplicit.recipes.density.quality import Quality, Summary
from torchimplicit.recipes.density.settings import OrbitalFreeTraining
from torchimplicit.recipes.runtime.optimize import Clock
from torchimplicit.recipes.runtime.run import Environment


@dataclass(frozen=True)
class Measurement:
    """The state of a training at one iteration.

    Attributes:
        iteration: iterations done; 0 is the start, with the linear terms fitted.
        seconds: CPU seconds, spent in the optimizer until then.
        loss: with its penalties.
        inner_steps, adjoint: steps of the minimizations and products of the adjoint solves in the last evaluation of
            the loss, from the densities found before, the mean of a molecule.
        unconverged: minimizations in it that were not done.
        train, validation: all densities, found from the superposition of atoms; ``None`` where they were not measured.
        score: what selects the weights, the least being the best: the validation molecules' L, and what their energies
            add to the loss where energies are trained.
    """

    iteration: int
    seconds: float
    loss: float
    inner_steps: float
    adjoint: float
    unconverged: int
    train: Summary | None = None
    validation: Summary | None = None
    score: float | None = None


@dataclass
class History(Clock):
    """All measurements so far; saved in the checkpoint.

    Attributes:
        looks: in their order.
        weights: number of trained weights.
        best: the iteration of the least score, whose weights are kept; -1 before the first measurement.
    """

    looks: list[Measurement] = field(default_factory=list)
    weights: int = 0
    best: int = -1


@dataclass(frozen=True)
class Results:
    """``results.json``.

    Attributes:
        weights: number of trained weights.
        start, train, validation, test: every molecule, with the linear terms alone (of the training molecules) and at
            the weights that were selected.
        start_test: the test molecules with the linear terms alone.
        selected: the iteration whose weights they are.
        free_energies: whether the elements' constants alone give every training molecule its energy, whatever the
            densities: their energy errors after the fit say nothing then.
        skipped: molecules that could not be computed.
    """

    state: str
    weights: int
    start: list[Quality]
    start_test: list[Quality]
    train: list[Quality]
    validation: list[Quality]
    test: list[Quality]
    selected: int
    skipped: list[str]
    iterations: int
    seconds: float
    residuals: int
    jacobians: int
    rejected: int
    looks: list[Measurement]
    environment: Environment
    config: OrbitalFreeTraining
    free_energies: bool = False
