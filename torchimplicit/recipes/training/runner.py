"""The runner of every recipe that trains one model."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import Callback
from rich.console import Console

from torchimplicit.errors import ConvergenceWarning, SolveError
from torchimplicit.nn import Equilibrium
from torchimplicit.recipes.environment import Environment
from torchimplicit.recipes.errors import DivergedError, UserError
from torchimplicit.recipes.fitting import fit, load_weights, read_checkpoint
from torchimplicit.recipes.machine import device, threads
from torchimplicit.recipes.monitor import MonitorGradient
from torchimplicit.recipes.plain import from_plain, to_plain
from torchimplicit.recipes.progress import ShowProgress
from torchimplicit.recipes.run import Run
from torchimplicit.recipes.tables import Column, Table
from torchimplicit.recipes.training.costs import Costs
from torchimplicit.recipes.training.logs import loggers, rows
from torchimplicit.recipes.training.module import History, TrainingModule, Validation
from torchimplicit.recipes.training.results import Results, best, step_costs
from torchimplicit.recipes.training.settings import Machine, Trained, check_batch
from torchimplicit.recipes.training.task import Shard, Split, Task

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
        """See :class:`~torchimplicit.recipes.recipe.Runner`."""
        device(config.machine.device, config.machine.devices)
        check_batch(config.optimization, config.machine)
        if self._ready is not None:
            self._ready(config)

    def module(self, config: Trained) -> TrainingModule:
        """The task of a config, with its initial weights, ready to be trained."""
        return TrainingModule.of(self._build, config)

    def train(self, config: Trained, run: Run, console: Console) -> bool:
        """See :class:`~torchimplicit.recipes.recipe.Runner`."""
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
        """See :class:`~torchimplicit.recipes.recipe.Runner`."""
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
