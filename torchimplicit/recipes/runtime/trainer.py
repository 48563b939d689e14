"""The runner of recipes that train a task, the results of a training, and measurements at its weights.

Lightning is imported when something is trained: a recipe's settings are there without it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import TYPE_CHECKING, Any, Literal

import torch

from torchimplicit.errors import SolveError
from torchimplicit.recipes.runtime import launch
from torchimplicit.recipes.runtime.errors import DivergedError, UserError
from torchimplicit.recipes.runtime.run import Environment, Run, Runner, device, quietly, threads
from torchimplicit.recipes.runtime.settings import Machine, Trained, check_batch, from_plain, to_plain
from torchimplicit.recipes.runtime.table import NONE, Cell, Column, Table, sheet
from torchimplicit.recipes.runtime.task import Costs, Shard, Split, Task, told

if TYPE_CHECKING:
    from lightning.pytorch.loggers import Logger
    from rich.console import Console

    from torchimplicit.recipes.runtime.log import Row
    from torchimplicit.recipes.runtime.module import TrainingModule
    from torchimplicit.recipes.runtime.monitor import MonitorGradient

# -- A training so far -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Validation:
    """Results on the validation split after a number of steps.

    Attributes:
        step: optimizer steps done.
        seconds: spent in training steps until then.
        figures: see :meth:`Task.figures`.
        forward: evaluations of the cells a batch, in whole-batch equivalents.
        unconverged: share of the samples whose solve stopped at its budget.
    """

    step: int
    seconds: float
    figures: dict[str, float]
    forward: float
    unconverged: float


@dataclass
class History:
    """The history of a training so far; saved in the checkpoint.

    Attributes:
        steps: optimizer steps done.
        seconds: spent in them: forward, backward and update, and nothing else.
        best: the step of the best validation so far; ``None`` before the first.
    """

    steps: int = 0
    seconds: float = 0.0
    best: int | None = None
    validations: list[Validation] = field(default_factory=list)


# -- What a training came to: ``results.json`` -------------------------------------------------------------------------


@dataclass(frozen=True)
class StepCosts:
    """Costs of a training step after pretraining.

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
    """Results of a training and its test.

    Attributes:
        state: ``diverged`` where the loss or an equilibrium stopped being finite.
        parameters: number of parameters of the model.
        metric: by which the tested weights were selected on the validation split.
        best: the validation that they had; ``None`` if there was none.
        test: the figures of the test split at those weights; ``None`` if it was not measured.
        validations: all of them.
        steps, seconds: done, and spent in them.
        costs: costs of a step; ``None`` before the first.
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
        """Read the results of a run.

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
    """Step costs from the CSV log, without the first step, which warms the machine up, if there are others."""
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


# -- The runner of every recipe that trains one model ------------------------------------------------------------------


PRECISION = {"32": "32-true", "bf16-mixed": "bf16-mixed", "16-mixed": "16-mixed"}


class Trainer(Runner):
    """Trains, tests and re-evaluates the task of a config.

    The weights that are tested are those of the best validation.

    Args:
        build: makes the task from the config; its initial weights may draw from the global generator, which is seeded.
        ready: raises :class:`UserError` where the config's data is missing or wrong, before a run directory is made.
        monitor: makes the callback that watches the gradient, of the steps between two looks, where the config asks
            for it; by default :class:`.monitor.MonitorGradient`.
    """

    def __init__(
        self,
        build: Callable[[Any], Task],
        ready: Callable[[Any], None] | None = None,
        monitor: Callable[[int], MonitorGradient] | None = None,
    ):
        self._build, self._ready, self._monitor = build, ready, monitor

    def check(self, config: Trained) -> None:
        _device(config.machine)
        check_batch(config.optimization, config.machine)
        if self._ready is not None:
            self._ready(config)

    def module(self, config: Trained) -> TrainingModule:
        """The task of a config, with its initial weights, ready to be trained."""
        from torchimplicit.recipes.runtime.module import TrainingModule

        return TrainingModule.of(self._build, config)

    def best(self, config: Trained, run: Run) -> Any:
        """The task with the weights of the run's best validation, in eval mode, on the config's device."""
        from torchimplicit.recipes.runtime.fitting import load_weights

        module = self.module(config)
        load_weights(module, run.best)
        for name, p in module.task.named_parameters():
            if name in module.average:
                p.data.copy_(module.average[name])
        return module.task.to(device(config.machine.device)).eval()

    def train(self, config: Trained, run: Run, console: Console) -> bool:
        from torchimplicit.recipes.runtime.fitting import loggers

        with threads(config.machine.threads), console.status("Reading the data"):
            module = self.module(config)
        where = _device(config.machine)
        _allow_tf32(config.machine)
        if config.machine.evaluate_only:
            return self._evaluate_only(config, run, console, module, where)
        for name, value in module.task.beside_weights().items():
            run.write_json(name, value)
        total = config.optimization.steps
        console.print(
            f"{module.task.describe()} {total} steps on {config.machine.devices} × {where.type.upper()}; Ctrl-C "
            f"stops and 'torchimplicit resume {run}' continues.".strip(),
            highlight=False,
        )
        launch.announce(run.path)
        diverged = ""
        with threads(config.machine.threads), quietly():  # what a solve falls short by is in the log
            try:
                self._fit(
                    config,
                    run,
                    module,
                    loggers(run, history(run).steps, config.machine.tensorboard, config.machine.log_every),
                    console if config.machine.devices == 1 or launch.environment() is not None else None,
                )
            except (DivergedError, SolveError) as error:
                diverged = str(error)
            with console.status("Testing"):
                results = self._results(config, run, module, where, diverged)
        run.write_json("results.json", results)
        if not run.read().get("table"):  # a table has a page of its own
            _write_page(run)
        console.print(summary(results, module.task).rich())
        if diverged:
            raise DivergedError(diverged)
        return results.state == "complete"

    def follow(self, config: Trained, run: Run) -> None:
        _allow_tf32(config.machine)
        with threads(config.machine.threads), quietly():
            self._fit(config, run, self.module(config))

    def _fit(
        self,
        config: Trained,
        run: Run,
        module: TrainingModule,
        loggers: Sequence[Logger] = (),
        console: Console | None = None,
    ) -> None:
        from torchimplicit.recipes.runtime.fitting import ShowProgress, fit
        from torchimplicit.recipes.runtime.monitor import MonitorGradient

        callbacks: list[Any] = [ShowProgress(console, run)]
        if config.machine.monitor_every:
            callbacks.append((self._monitor or MonitorGradient)(config.machine.monitor_every))
        fit(
            module,
            run,
            epochs=math.ceil(config.optimization.steps / config.optimization.validate_every),
            device=_device(config.machine),
            devices=config.machine.devices,
            precision=PRECISION[config.machine.precision],
            clip_norm=config.optimization.clip_norm,
            loggers=loggers,
            callbacks=callbacks,
        )

    def _evaluate_only(
        self, config: Trained, run: Run, console: Console, module: TrainingModule, where: torch.device
    ) -> bool:
        console.print(f"{module.task.describe()} Weights of {config.machine.weights}.", highlight=False)
        with threads(config.machine.threads), console.status("Evaluating"):
            measured = {split: measure(module, split, where, config.machine) for split in ("validation", "test")}
        run.write_json("evaluation.json", measured)
        console.print(_figures(measured, module.task).rich())
        return True

    def _results(
        self, config: Trained, run: Run, module: TrainingModule, where: torch.device, diverged: str
    ) -> Results:
        """The results from the run's checkpoints and logs, and the test at the best weights."""
        from torchimplicit.recipes.runtime.fitting import load_weights
        from torchimplicit.recipes.runtime.log import rows

        records = history(run)
        complete = records.steps >= config.optimization.steps
        test = None
        if complete:
            load_weights(module, run.best)
            test = measure(module, "test", where, config.machine)
        return Results(
            state="diverged" if diverged else "complete" if complete else "interrupted",
            parameters=sum(p.numel() for p in module.task.parameters()),
            metric=module.task.metric.name,
            best=best(records),
            test=test,
            validations=records.validations,
            steps=records.steps,
            seconds=records.seconds,
            costs=step_costs(rows(run.metrics)),
            environment=Environment.of(where),
            settings=to_plain(config),
        )

    def evaluate(self, config: Trained, run: Run, console: Console) -> None:
        from torchimplicit.recipes.runtime.fitting import load_weights

        where = _device(config.machine)
        with threads(config.machine.threads):
            module = self.module(config)
            load_weights(module, run.best)
            with console.status("Evaluating"):
                measured = {split: measure(module, split, where, config.machine) for split in ("validation", "test")}
        run.write_json("evaluation.json", measured)
        console.print(_figures(measured, module.task).rich())


def _device(machine: Machine) -> torch.device:
    return device(machine.device, machine.devices // launch.nodes())


def _allow_tf32(machine: Machine) -> None:
    if machine.tf32:
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True


def _label(name: str) -> str:
    return name[:1].upper() + name[1:].replace("_", " ")


def _figures(validations: dict[str, Validation], task: Task) -> Table:
    rows = [
        [split, *told(one.figures, task.metric).values(), f"{one.forward:.1f}"] for split, one in validations.items()
    ]
    names = ("Split", *map(_label, told(validations["test"].figures, task.metric)), "Forward evaluations")
    return Table([Column(name) for name in names], rows)


def _write_page(run: Run) -> None:
    from torchimplicit.recipes.runtime import report

    one = report.finished(run.path)
    report.write([one], run.path / "index.html", f"{one.recipe}: {one.results.metric} during training")


def history(run: Run) -> History:
    """The history in the last checkpoint; empty if there is none."""
    from torchimplicit.recipes.runtime.fitting import read_checkpoint

    if not run.checkpoint.is_file():
        return History()
    try:
        return from_plain(History, read_checkpoint(run.checkpoint)["history"])
    except (KeyError, ValueError, TypeError) as error:
        raise UserError(f"{run.checkpoint} does not fit this run's settings ({error}); train again") from None


@torch.no_grad()
def measure(module: TrainingModule, split: Split, where: torch.device, machine: Machine) -> Validation:
    """Validate a whole split at the module's present weights, on one device."""
    from lightning.fabric.utilities import move_data_to_device

    from torchimplicit.recipes.runtime.module import evaluation_budget

    task = module.task.to(where)
    module.average = {name: value.to(where) for name, value in module.average.items()}
    was_training = task.training
    task.eval()
    task.begin()
    costs = Costs(module.layers, task)
    mixed = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(machine.precision)
    sums: torch.Tensor | None = None
    averaged, budget = module.averaged(), evaluation_budget(module.layers, module.equilibria)
    with quietly(), averaged, budget, torch.autocast(where.type, mixed, enabled=mixed is not None):
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
    """A table for the terminal."""
    validations = {"validation, best": results.best, "test": results.test}
    splits = [(split, one) for split, one in validations.items() if one is not None]
    names = list(dict.fromkeys(name for _, one in reversed(splits) for name in told(one.figures, task.metric)))

    def figure(name: str) -> Callable[[tuple[str, Validation]], str]:
        return lambda pair: told(pair[1].figures, task.metric).get(name, NONE)

    return sheet("", splits, [
        Cell("Split", lambda pair: pair[0]),
        *(Cell(_label(name), figure(name)) for name in names),
        Cell("At step", lambda pair: str(pair[1].step)),
        Cell("Training", lambda pair: f"{pair[1].seconds:.0f}", "s"),
        Cell("Forward evaluations", lambda pair: f"{pair[1].forward:.1f}"),
        Cell("At the solver's budget", lambda pair: f"{100 * pair[1].unconverged:.0f}", "%"),
    ]).table  # fmt: skip


# -- A recipe that trains, or not, and then measures something at the weights that it has come to ----------------------


@dataclass(frozen=True, kw_only=True)
class Measuring(Runner):
    """Runs a measurement, at the weights of a training if there is one. Evaluating such a run measures again.

    Attributes:
        measure: ``(config, run) -> figures``, which go into the run's directory as JSON.
        name: name of the file in the run's directory.
        show: the figures as a table, or ``None``.
        first: trains before.
        training: its settings, out of this recipe's.
        ready: what else raises where this machine cannot run it.
        again: the file of another measurement; ``None``: the same, and the training is evaluated again too.
        doing: what the screen says meanwhile.
    """

    measure: Callable[[Any, Run], Any]
    name: str
    show: Callable[[Any], Table] | None = None
    first: Runner | None = None
    training: Callable[[Any], Any] = lambda config: config
    ready: Callable[[Any], None] = lambda config: None
    again: str | None = "evaluation.json"
    doing: str = "Measuring"

    def check(self, config: Any) -> None:
        if self.first is not None:
            self.first.check(self.training(config))
        self.ready(config)

    def train(self, config: Any, run: Run, console: Console) -> bool:
        if self.first is not None and not self.first.train(self.training(config), run, console):
            return False
        self._measure(config, run, console, self.name)
        return True

    def evaluate(self, config: Any, run: Run, console: Console) -> None:
        if self.again is None and self.first is not None:
            self.first.evaluate(self.training(config), run, console)
        self._measure(config, run, console, self.again or self.name)

    def _measure(self, config: Any, run: Run, console: Console, name: str) -> None:
        machine = getattr(self.training(config), "machine", Machine())
        with console.status(self.doing), threads(machine.threads), quietly():
            measured = self.measure(config, run)
        run.write_json(name, measured)
        if self.show is not None:
            console.print(self.show(measured).rich_rows(console.width))
