"""The runner of a recipe that trains a task, and what a training came to."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import Any, Literal

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import Callback
from rich.console import Console

from torchimplicit.errors import ConvergenceWarning, SolveError
from torchimplicit.nn import Equilibrium
from torchimplicit.recipes.runtime.errors import DivergedError, UserError
from torchimplicit.recipes.runtime.fitting import Row, ShowProgress, fit, load_weights, loggers, read_checkpoint, rows
from torchimplicit.recipes.runtime.module import History, TrainingModule, Validation
from torchimplicit.recipes.runtime.monitor import MonitorGradient
from torchimplicit.recipes.runtime.run import Environment, Run, Runner, device, threads
from torchimplicit.recipes.runtime.settings import Machine, Trained, check_batch, from_plain, to_plain
from torchimplicit.recipes.runtime.table import Column, Table
from torchimplicit.recipes.runtime.task import Costs, Shard, Split, Task

# -- The runner of every recipe that trains one model ------------------------------------------------------------------


PRECISION = {"32": "32-true", "bf16-mixed": "bf16-mixed", "16-mixed": "16-mixed"}


class Trainer:
    """Trains, tests and measures again what a config describes.

    The weights that are tested are those of the best validation.

    Args:
        build: makes the task from the config; its initial weights may draw from the global generator, which is seeded.
        ready: raises :class:`UserError` where the config's data is missing or wrong, before a run directory is made.
        monitor: makes the callback that watches the gradient, of the steps between two looks, where the config asks
            for it.
    """

    def __init__(
        self,
        build: Callable[[Any], Task],
        ready: Callable[[Any], None] | None = None,
        monitor: Callable[[int], MonitorGradient] = MonitorGradient,
    ):
        self._build = build
        self._ready = ready
        self._monitor = monitor

    def check(self, config: Trained) -> None:
        """See :class:`~torchimplicit.recipes.runtime.run.Runner`."""
        device(config.machine.device, config.machine.devices)
        check_batch(config.optimization, config.machine)
        if self._ready is not None:
            self._ready(config)

    def module(self, config: Trained) -> TrainingModule:
        """The task of a config, with its initial weights, ready to be trained."""
        return TrainingModule.of(self._build, config)

    def train(self, config: Trained, run: Run, console: Console) -> bool:
        """See :class:`~torchimplicit.recipes.runtime.run.Runner`."""
        with threads(config.machine.threads), console.status("Reading the data"):
            module = self.module(config)
        where = device(config.machine.device, config.machine.devices)
        total = config.optimization.steps
        console.print(
            f"{module.task.describe()} {total} steps on {config.machine.devices} × {where.type.upper()}; Ctrl-C "
            f"stops and 'torchimplicit resume {run}' goes on.".strip(),
            highlight=False,
        )
        known = history(run)
        callbacks: list[Callback] = [ShowProgress(console if config.machine.devices == 1 else None, run)]
        if config.machine.monitor_every:
            callbacks.append(self._monitor(config.machine.monitor_every))
        diverged = ""
        with threads(config.machine.threads), warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # what a solve falls short by is in the log
            try:
                fit(
                    module,
                    run,
                    epochs=math.ceil(total / config.optimization.validate_every),
                    device=where,
                    devices=config.machine.devices,
                    precision=PRECISION[config.machine.precision],
                    clip_norm=config.optimization.clip_norm,
                    loggers=loggers(run, known.steps, config.machine.tensorboard),
                    callbacks=callbacks,
                )
            except (DivergedError, SolveError) as error:
                diverged = str(error)
            with console.status("Testing"):
                results = self._results(config, run, module, where, diverged)
        run.write_json("results.json", results)
        console.print(summary(results, module.task).rich())
        if diverged:
            raise DivergedError(diverged)
        return results.state == "complete"

    def _results(
        self, config: Trained, run: Run, module: TrainingModule, where: torch.device, diverged: str
    ) -> Results:
        """What the run's checkpoints and logs say, and the test at the best weights."""
        found = history(run)
        complete = found.steps >= config.optimization.steps
        test = None
        if complete:
            load_weights(module, run.best)
            test = measure(module, "test", where, config.machine)
        return Results(
            state="diverged" if diverged else "complete" if complete else "interrupted",
            parameters=sum(p.numel() for p in module.task.parameters()),
            metric=module.task.metric.name,
            best=best(found),
            test=test,
            validations=found.validations,
            steps=found.steps,
            seconds=found.seconds,
            costs=step_costs(rows(run.metrics)),
            environment=Environment.of(where),
            settings=to_plain(config),
        )

    def evaluate(self, config: Trained, run: Run, console: Console) -> None:
        """See :class:`~torchimplicit.recipes.runtime.run.Runner`."""
        where = device(config.machine.device, config.machine.devices)
        with threads(config.machine.threads):
            module = self.module(config)
            load_weights(module, run.best)
            with console.status("Evaluating"):
                found = {split: measure(module, split, where, config.machine) for split in ("validation", "test")}
        run.write_json("evaluation.json", found)
        metric = module.task.metric
        console.print(
            Table(
                [Column("Split"), *(Column(name) for name in found["test"].figures), Column("Forward evaluations")],
                [
                    [
                        split,
                        *(metric.text(v) if name == metric.name else f"{v:.4g}" for name, v in one.figures.items()),
                        f"{one.forward:.1f}",
                    ]
                    for split, one in found.items()
                ],
            ).rich()
        )


def history(run: Run) -> History:
    """What the last checkpoint knows; an empty history if there is none."""
    if not run.checkpoint.is_file():
        return History()
    try:
        return from_plain(History, read_checkpoint(run.checkpoint)["history"])
    except (KeyError, ValueError, TypeError) as error:
        raise UserError(f"{run.checkpoint} does not fit this run's settings ({error}); train again") from None


@torch.no_grad()
def measure(module: TrainingModule, split: Split, where: torch.device, machine: Machine) -> Validation:
    """A whole split at the module's present weights, on one device."""
    task = module.task.to(where)
    was_training = task.training
    task.eval()
    task.begin()
    costs = Costs([layer for layer in task.modules() if isinstance(layer, Equilibrium)], task)
    mixed = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(machine.precision)
    sums: torch.Tensor | None = None
    with warnings.catch_warnings(), torch.autocast(where.type, mixed, enabled=mixed is not None):
        warnings.simplefilter("ignore", ConvergenceWarning)
        for batch in task.held_out_batches(split, Shard()):
            scored = task.score(move_data_to_device(batch, where)).double()
            sums = scored if sums is None else sums + scored
    assert sums is not None, f"the {split} split is empty"
    figures = costs.figures()
    costs.close()
    task.train(was_training)
    return Validation(
        step=module.history.steps,
        seconds=module.history.seconds,
        figures=task.figures(sums.tolist()),
        forward=figures["forward_evaluations"] / max(1, costs.solves),
        unconverged=figures["unconverged"],
    )


def summary(results: Results, task: Task) -> Table:
    """For the terminal."""
    rows: list[list[str]] = []
    for name, found in (("validation, best", results.best), ("test", results.test)):
        if found is not None:
            rows.append(
                [
                    name,
                    task.metric.text(found.figures[task.metric.name]),
                    str(found.step),
                    f"{found.seconds:.0f}",
                    f"{found.forward:.1f}",
                    f"{100 * found.unconverged:.0f}",
                ]
            )
    columns = [
        Column("Split"),
        Column(task.metric.name[:1].upper() + task.metric.name[1:]),
        Column("At step"),
        Column("Training", "s"),
        Column("Forward evaluations"),
        Column("At the solver's budget", "%"),
    ]
    return Table(columns, rows)


# -- What a training came to: ``results.json`` -------------------------------------------------------------------------


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


# -- A recipe that trains, and then measures something at the weights that it has come to ------------------------------


@dataclass(frozen=True, kw_only=True)
class Measuring(Runner):
    """Trains as another recipe does, and measures; evaluating it measures again.

    Attributes:
        trainer: of the other recipe.
        training: its settings, out of this recipe's.
        measure: ``(config, run) -> figures``, which go into the run's directory as JSON.
        show: the figures as a table.
        name: of the file in the run's directory.
        doing: what the screen says meanwhile.
    """

    trainer: Trainer
    training: Callable[[Any], Any]
    measure: Callable[[Any, Run], Any]
    show: Callable[[Any], Table]
    name: str
    doing: str = "Measuring"

    def check(self, config: Any) -> None:
        """See :class:`~torchimplicit.recipes.runtime.run.Runner`."""
        self.trainer.check(self.training(config))

    def train(self, config: Any, run: Run, console: Console) -> bool:
        """See :class:`~torchimplicit.recipes.runtime.run.Runner`."""
        if not self.trainer.train(self.training(config), run, console):
            return False
        self._measure(config, run, console, self.name)
        return True

    def evaluate(self, config: Any, run: Run, console: Console) -> None:
        """See :class:`~torchimplicit.recipes.runtime.run.Runner`."""
        self._measure(config, run, console, "evaluation.json")

    def _measure(self, config: Any, run: Run, console: Console, name: str) -> None:
        with console.status(self.doing), threads(self.training(config).machine.threads):
            found = self.measure(config, run)
        run.write_json(name, found)
        console.print(self.show(found).rich_rows())
