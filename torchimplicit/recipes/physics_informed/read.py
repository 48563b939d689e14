"""The figures of the table, from its runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

from torchimplicit.recipes.physics.config import EquationName
from torchimplicit.recipes.physics.history import Results
from torchimplicit.recipes.physics_informed.config import OptimizerName, PhysicsInformedConfig
from torchimplicit.recipes.physics_informed.jobs import MODELS, equations, name_of, optimizers
from torchimplicit.recipes.plain import from_plain
from torchimplicit.recipes.run import Run

MEASURE = {"van-der-pol": "iae", "four-tanks": "relative_l2", "burgers": "relative_l2", "helmholtz": "relative_l2"}
"""What an equation's error is; the thesis measures the integral of the absolute error (IAE)."""


@dataclass(frozen=True)
class Cell:
    """The runs of one model with one optimizer on one equation.

    Attributes:
        equation, model, optimizer: which.
        results: by seed.
    """

    equation: EquationName
    model: str
    optimizer: OptimizerName
    results: dict[int, Results]

    def errors(self, name: str | None = None) -> list[float]:
        """The errors of all seeds, by default those that the equation is measured by."""
        return [one.errors[name or MEASURE[self.equation]] for one in self.results.values()]

    def error(self) -> float:
        """Their median."""
        return median(self.errors())

    def loss(self) -> float:
        """The median of the losses at the end; what may select an optimizer."""
        return median(one.loss for one in self.results.values())

    def pace(self) -> float:
        """Milliseconds an iteration."""
        return 1000 * median(one.seconds / max(1, one.iterations) for one in self.results.values())


@dataclass(frozen=True)
class Found:
    """Everything.

    Attributes:
        cells: those that have at least one run, by equation, model and optimizer.
        left: the names of the runs that are not done, or diverged.
        raw: figures of every run.
    """

    cells: dict[tuple[EquationName, str, OptimizerName], Cell]
    left: list[str]
    raw: dict[str, Any]

    def of(self, equation: EquationName, optimizer: OptimizerName | None = None) -> list[Cell]:
        """The cells of an equation, and of an optimizer."""
        return [
            cell
            for (where, _, how), cell in self.cells.items()
            if where == equation and (optimizer is None or how == optimizer)
        ]


def read(config: PhysicsInformedConfig, runs: Mapping[str, Run]) -> Found:
    """What the runs have left; those that are missing are left out."""
    cells, left, raw = {}, [], {}
    for equation in equations(config):
        for optimizer in optimizers(config):
            for model in MODELS:
                results = {}
                for seed in config.plan.all_seeds:
                    name = name_of(equation, model, optimizer, seed)
                    one = _results(runs.get(name))
                    if one is None:
                        left.append(name)
                    else:
                        results[seed], raw[name] = one, _raw(one)
                if results:
                    cells[equation, model, optimizer] = Cell(equation, model, optimizer, results)
    return Found(cells, left, raw)


def _results(run: Run | None) -> Results | None:
    if run is None or not (run.path / "results.json").is_file():
        return None
    one = from_plain(Results, run.read_json("results.json"))
    return one if one.state == "complete" else None


def _raw(one: Results) -> dict[str, Any]:
    return {
        **one.errors,
        "loss": one.loss,
        "parameters": one.parameters,
        "iterations": one.iterations,
        "seconds": one.seconds,
        "residual_evaluations": one.residuals,
        "jacobian_evaluations": one.jacobians,
        "rejected": one.rejected,
        "unconverged": one.unconverged,
    }
