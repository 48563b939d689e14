"""What the runs of the table measured, by kind of layer and by training."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from statistics import fmean
from typing import Literal

from torchimplicit.recipes.phantom_precision.layer import LayerResults
from torchimplicit.recipes.run import Run
from torchimplicit.recipes.training.logs import rows

WEIGHTS: tuple[Literal["gaussian", "orthogonal"], ...] = ("gaussian", "orthogonal")
GRADIENTS: tuple[Literal["implicit", "unrolled-phantom"], ...] = ("implicit", "unrolled-phantom")
TRAINED = {"implicit": "trained by the exact gradient", "unrolled-phantom": "trained by UPG(5, 0.5)"}

LAYER = "gradient/task.model.equilibrium/"


@dataclass(frozen=True)
class Look:
    """The gradient at one step of a training.

    Attributes:
        step: from 1 on.
        own: figures of the estimator that trains, the spectral radius, and how exact the exact gradient is.
        beside: those of the others, by name.
    """

    step: int
    own: dict[str, float]
    beside: dict[str, dict[str, float]]

    def figure(self, name: str) -> float:
        """``FIGURE`` of the estimator that trains, or ``ESTIMATOR/FIGURE``; NaN where it was not measured."""
        estimator, _, figure = name.rpartition("/")
        return (self.beside.get(estimator, {}) if estimator else self.own).get(figure, float("nan"))


@dataclass
class Gathered:
    """The runs that are there.

    Attributes:
        layers: by the kind of weight, one for each seed.
        trainings: the looks of each training, by the gradient that trains.
        accuracies: on the test images, likewise.
        missing: the names of runs that are not there, or have measured nothing.
    """

    layers: dict[str, list[LayerResults]] = field(default_factory=lambda: defaultdict(list))
    trainings: dict[str, list[list[Look]]] = field(default_factory=lambda: defaultdict(list))
    accuracies: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    missing: list[str] = field(default_factory=list)

    def looks(self, gradient: str, late: bool = False) -> list[Look]:
        """All looks at the trainings by a gradient; ``late``: those of the second half only."""
        found = []
        for training in self.trainings[gradient]:
            last = training[-1].step
            found += [look for look in training if not late or look.step > last / 2]
        return found


def gather(runs: dict[str, Run], expected: Iterable[str]) -> Gathered:
    """Read the runs, by the names that :func:`~.table.jobs` gives them."""
    found = Gathered()
    for name in expected:
        kind, which, _ = name.split("_")
        run = runs.get(name)
        try:
            if run is None:
                raise FileNotFoundError(name)
            if kind == "layer":
                found.layers[which].append(LayerResults.of(run))
            else:
                looks = looks_of(run)
                if not looks:
                    raise ValueError(name)
                found.trainings[which].append(looks)
                tested = run.read_json("results.json")["test"]
                if tested is not None:
                    found.accuracies[which].append(tested["figures"]["accuracy"])
        except (OSError, ValueError, KeyError, TypeError):
            found.missing.append(name)
    return found


def looks_of(run: Run) -> list[Look]:
    """From the run's log."""
    found = []
    for row in rows(run.metrics):
        figures = {name.removeprefix(LAYER): value for name, value in row.items() if name.startswith(LAYER)}
        if not figures:
            continue
        beside: dict[str, dict[str, float]] = defaultdict(dict)
        for name, value in figures.items():
            if "/" in name:
                estimator, figure = name.split("/")
                beside[estimator][figure] = value
        found.append(Look(int(row["step"]), {n: v for n, v in figures.items() if "/" not in n}, dict(beside)))
    return found


def mean(values: Iterable[float]) -> float:
    """NaN for none."""
    listed = list(values)
    return fmean(listed) if listed else float("nan")
