"""What a training step costs, with every estimator at the same trained weights, measured in turn.

Runs of one table see a machine that is more or less busy; kinds of steps that take turns in one process see the same.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

import torch
from rich.console import Console

from torchimplicit.diagnostics import spectral_radius
from torchimplicit.errors import ConvergenceWarning
from torchimplicit.gradients import Gradient
from torchimplicit.problems import FixedPoint
from torchimplicit.recipes.phantom.language import RUNNER as LANGUAGE
from torchimplicit.recipes.phantom.language import LanguageTask
from torchimplicit.recipes.phantom.language_data import Segment
from torchimplicit.recipes.phantom.language_settings import LanguageConfig
from torchimplicit.recipes.phantom.language_table import CONVERGED, KINDS
from torchimplicit.recipes.runtime.errors import UserError
from torchimplicit.recipes.runtime.fitting import load_weights
from torchimplicit.recipes.runtime.run import Run, device, threads
from torchimplicit.recipes.runtime.task import Costs, Stopwatch, gradient
from torchimplicit.regularizers import jacobian_frobenius
from torchimplicit.state import detached


@dataclass(frozen=True, kw_only=True)
class CostConfig:
    """Which runs of a table to measure."""

    names: tuple[str, ...] = ()
    """The runs, beside this one's folder; every one is measured at its best weights."""

    runs: tuple[LanguageConfig, ...] = ()
    """Their settings."""

    repeats: int = 8
    """Of every kind of step."""


@dataclass(frozen=True)
class Cost:
    """Medians over the repeats.

    Attributes:
        forward_seconds, backward_seconds: of the two passes.
        forward, backward: evaluations of the cell, and products with its Jacobian.
    """

    forward_seconds: float
    backward_seconds: float
    forward: float
    backward: float

    @property
    def seconds(self) -> float:
        """Of both passes."""
        return self.forward_seconds + self.backward_seconds


@dataclass(frozen=True)
class Measured:
    """What was measured, by the run at whose weights.

    Attributes:
        costs: by the kind of step.
        radius: spectral radius of the Jacobian at the equilibria of a validation segment, mean over its rows.
    """

    costs: dict[str, dict[str, Cost]] = field(default_factory=dict)
    radius: dict[str, float] = field(default_factory=dict)


def default() -> CostConfig:
    """Nothing: a table says what to measure."""
    return CostConfig()


class CostRunner:
    """See :class:`~torchimplicit.recipes.runtime.run.Runner`."""

    def check(self, config: CostConfig) -> None:
        """One of the runs is checked."""
        for one in config.runs[:1]:
            LANGUAGE.check(one)

    def train(self, config: CostConfig, run: Run, console: Console) -> bool:
        """Measure all."""
        run.write_json("results.json", measure(config, run))
        return True

    def evaluate(self, config: CostConfig, run: Run, console: Console) -> None:
        """Measure again."""
        run.write_json("evaluation.json", measure(config, run))


RUNNER = CostRunner()


def measure(config: CostConfig, run: Run) -> Measured:
    """All kinds of steps at the weights of all runs, in turn.

    Raises:
        UserError: none of the runs has been trained.
    """
    probes = {}
    for name, one in zip(config.names, config.runs, strict=True):
        best = Run(run.path.parent / name).best
        if best.is_file():
            probes[name] = _Probe(one, best)
    if not probes:
        raise UserError(f"none of the runs that {run} is to measure has been trained; resume the table")
    found: dict[str, dict[str, list[Cost]]] = {name: {kind: [] for kind in KINDS} for name in probes}
    machine = config.runs[0].machine
    with threads(machine.threads):
        for turn in range(config.repeats + 1):
            for name, probe in probes.items():
                for kind in KINDS:
                    cost = probe.step(kind)
                    if turn:  # the first warms the machine up
                        found[name][kind].append(cost)
        radius = {name: probe.radius() for name, probe in probes.items()}
    costs = {name: {kind: _median(several) for kind, several in kinds.items()} for name, kinds in found.items()}
    return Measured(costs, radius)


def _median(costs: list[Cost]) -> Cost:
    return Cost(*(median(getattr(cost, name) for cost in costs) for name in Cost.__dataclass_fields__))


class _Probe:
    """One trained model and the batches of its training."""

    def __init__(self, config: LanguageConfig, best: Any):
        module = LANGUAGE.module(config)
        load_weights(module, best)
        task = module.task
        assert isinstance(task, LanguageTask)
        self.where = device(config.machine.device, 1)
        self.task = task.to(self.where).train()
        self.gradients: dict[str, Gradient] = {
            "implicit": gradient(replace(config.equilibria, gradient="implicit")),
            "converged": gradient(
                replace(
                    config.equilibria,
                    gradient="implicit",
                    backward_tolerance=CONVERGED,
                    backward_steps=max(200, config.equilibria.backward_steps),
                )
            ),
            "phantom": gradient(replace(config.equilibria, gradient="unrolled-phantom")),
        }
        self.gradients["penalty"] = self.gradients["implicit"]
        self.batches = self._batches()
        self.batch = next(self.batches)
        self.left = 0

    def _batches(self) -> Iterator[Segment]:
        while True:
            for tokens, targets, first in self.task.training_stream:
                yield Segment(tokens.to(self.where), targets.to(self.where), first)

    @torch.no_grad()
    def radius(self) -> float:
        """See :class:`Measured`. Of the second segment, with a memory, as nearly all are."""
        task, model = self.task.eval(), self.task.model
        first, second = (task.held_out["validation"].segment(step) for step in range(2))
        _, memory = model(first.tokens.to(self.where), first.targets.to(self.where))
        x, _ = model.cell.injection(model.embedding(second.tokens.to(self.where)), memory)
        found = spectral_radius(FixedPoint(model.cell), model.equilibrium(x), x, subspace=32, restarts=2)
        task.train()
        return float(found.mean())

    def step(self, kind: str) -> Cost:
        """One step's cost; every kind sees the same batches, and the memory goes on after the last of them."""
        task, layer = self.task, self.task.model.equilibrium
        layer.gradient = self.gradients[kind]
        memory, costs, watch = task.memory, Costs([layer]), Stopwatch()
        kept: list[Any] = []
        handle = layer.register_solution_hook(lambda _, solution: kept.append(solution))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            watch.start(self.where)
            loss = task.loss(self.batch)
            if kind == "penalty":  # alone: what it adds
                solution = kept[-1]
                watch.start(self.where)
                loss = jacobian_frobenius(solution.problem, detached(solution.value), *solution.args)
            watch.lap("forward", self.where)
            loss.backward()
            watch.lap("backward", self.where)
        seconds = watch.stop(self.where)
        handle.remove()
        figures = costs.figures()
        costs.close()
        task.zero_grad(set_to_none=True)
        self.left += 1
        if self.left == len(KINDS):
            self.left, self.batch = 0, next(self.batches)
        else:
            task.memory = memory
        penalty = kind == "penalty"
        return Cost(
            seconds["forward"],
            seconds["backward"],
            1.0 if penalty else figures["forward_evaluations"],
            1.0 if penalty else figures["backward_evaluations"],
        )
