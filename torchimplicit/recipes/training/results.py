"""What a training came to: ``results.json``."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import Any, Literal

from torchimplicit.recipes.environment import Environment
from torchimplicit.recipes.plain import from_plain
from torchimplicit.recipes.run import Run
from torchimplicit.recipes.training.logs import Row
from torchimplicit.recipes.training.module import History, Validation


@dataclass(frozen=True)
class StepCosts:
    """A training step after pretraining.

    Attributes:
        seconds, forward_seconds, backward_seconds: medians: of the whole step, the forward pass, the backward pass.
        forward, backward: means: evaluations of the cells, and products with their Jacobians, in whole-batch
            equivalents.
        unconverged: mean share of the samples whose solve stopped at its budget.
    """

    seconds: float
    forward_seconds: float
    backward_seconds: float
    forward: float
    backward: float
    unconverged: float


@dataclass(frozen=True)
class Results:
    """A training and its test.

    Attributes:
        state: ``diverged`` where the loss or an equilibrium stopped being finite.
        parameters: of the model.
        metric: by which the tested weights were selected on the validation split.
        best: the validation that they had; ``None`` if there was none.
        test: the figures of the test split at those weights; ``None`` if it was not measured.
        validations: all of them.
        steps, seconds: done, and spent in them.
        costs: of a step; ``None`` before the first.
        settings: the recipe's.
    """

    state: Literal["complete", "interrupted", "diverged"]
    parameters: int
    metric: str
    best: Validation | None
    test: Validation | None
    validations: list[Validation]
    steps: int
    seconds: float
    costs: StepCosts | None
    environment: Environment
    settings: dict[str, Any] = field(default_factory=dict)

    @staticmethod
    def of(run: Run) -> Results:
        """What a run has written.

        Raises:
            OSError, ValueError, KeyError, TypeError: if it has not, or not this.
        """
        plain = run.read_json("results.json")
        settings = plain.pop("settings")
        read = from_plain(Results, {**plain, "settings": {}})
        read.settings.update(settings)
        return read


def best(history: History) -> Validation | None:
    """The best validation."""
    return next((v for v in history.validations if v.step == history.best), None)


def step_costs(rows: list[Row]) -> StepCosts | None:
    """From the CSV log; the first step, which warms the machine up, is left out where there are others."""
    steps = [row for row in rows if "loss" in row and not row["pretraining"]]
    steps = steps[1:] or steps
    if not steps:
        return None
    column = {name: [row[name] for row in steps] for name in steps[0] if all(name in row for row in steps)}
    return StepCosts(
        seconds=median(column["seconds"]),
        forward_seconds=median(column["forward_seconds"]),
        backward_seconds=median(column["backward_seconds"]),
        forward=fmean(column["forward_evaluations"]),
        backward=fmean(column["backward_evaluations"]),
        unconverged=fmean(column["unconverged"]),
    )


def still_rising(runs: Collection[Results]) -> list[str]:
    """The note on trainings that had not levelled off; none where all had."""
    rising = sum(one.best is not None and one.best.step == one.steps for one in runs)
    if not rising:
        return []
    return [
        f"In {rising} of {len(runs)} runs the last validation was the best: with more steps they would come further, "
        "and not all alike."
    ]


def steps_to_best(own: Results | None, other: Results | None, figure: str) -> tuple[int | None, int] | None:
    """After how many steps a run's validation first reaches the best one of another in a figure of which more is
    better, ``None`` if it never does; and the step at which the other had it. ``None`` where there is none to reach."""
    if own is None or other is None or other.best is None:
        return None
    goal = other.best.figures[figure]
    return next((v.step for v in own.validations if v.figures[figure] >= goal), None), other.best.step
