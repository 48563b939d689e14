"""A small convolutional equilibrium classifier of scikit-learn's 8×8 digits: ``demo`` and ``digits``.

One config serves both. It trains one classifier for each gradient estimator, side by side: from the same initial
weights, on the same batches in the same order, each step of one beside the same step of the others, so that whatever
else the machine does slows all alike.
"""

from __future__ import annotations

import math
import time

import torch
from lightning.pytorch.loggers import CSVLogger
from rich.console import Console

from torchimplicit.recipes.phantom import demo_task as data
from torchimplicit.recipes.phantom.demo_page import write_report
from torchimplicit.recipes.phantom.demo_results import EstimatorResult, Results, label, summarize, summary_table
from torchimplicit.recipes.phantom.demo_settings import DigitsConfig
from torchimplicit.recipes.phantom.demo_task import DigitsTask, LogTracks, Split, profiles, validate
from torchimplicit.recipes.runtime.fitting import ShowProgress, fit, load_weights
from torchimplicit.recipes.runtime.run import Environment, Run, device, threads
from torchimplicit.recipes.runtime.table import Column, Table

# -- The recipe, from the data to the page -----------------------------------------------------------------------------


PROFILED = 128
"""Validation images whose solves are shown iteration by iteration."""


def train_all(config: DigitsConfig, run: Run, console: Console) -> bool:
    """See :meth:`torchimplicit.recipes.runtime.run.Recipe.train`."""
    began = time.perf_counter()
    where = device(config.device)
    training, validation = data.load(config.split_seed)
    loader = data.batches(training, config.batch_size, config.seed)
    task = DigitsTask(config, planned_steps(config, len(loader)), validation)
    console.print(opening(config, training, validation, task.total_steps, where), highlight=False)
    fit(
        task,
        run,
        train=loader,
        device=where,
        epochs=math.ceil(task.total_steps / len(loader)),
        loggers=[CSVLogger(run.path, name=None, version="logs")],
        callbacks=[ShowProgress(console, run), LogTracks()],
    )
    finished = task.steps_done >= task.total_steps
    with console.status("Measuring and drawing the results"):
        task.to(where)
        task.validate()
        images = validation.images[:PROFILED].to(where)
        results = Results(
            state="complete" if finished else "interrupted",
            planned_steps=task.total_steps,
            training_images=len(training.labels),
            validation_images=len(validation.labels),
            parameters=sum(p.numel() for p in task.classifier(config.estimators[0]).parameters()),
            wall_seconds=time.perf_counter() - began,
            config=config,
            environment=Environment.of(where),
            estimators={
                name: EstimatorResult(
                    label(name), summarize(track, len(loader)), profiles(task.classifier(name), images), track
                )
                for name, track in task.tracks.items()
            },
        )
        run.write_json("results.json", results)
        write_report(results, run)
    console.print(summary_table(results.estimators).rich())
    return finished


def planned_steps(config: DigitsConfig, epoch: int) -> int:
    """Optimizer steps of each classifier; ``epoch`` is an epoch's number of them."""
    steps = config.epochs * epoch
    return steps if config.max_steps is None else min(steps, config.max_steps)


def opening(config: DigitsConfig, training: Split, validation: Split, steps: int, device: torch.device) -> str:
    """What is about to happen, in one sentence."""
    names = ", ".join(label(name) for name in config.estimators)
    return (
        f"Training on {len(training.labels)} digits, validating on {len(validation.labels)} others: {steps} steps with "
        f"{names}, on {device.type.upper()}. Ctrl-C stops and keeps what is done."
    )


# -- A trained run, measured again -------------------------------------------------------------------------------------


COLUMNS = [
    Column("Estimator"),
    Column("Validation accuracy", "%"),
    Column("Validation loss", "nats"),
    Column("Forward evaluations"),
    Column("Converged", "%"),
    Column("Largest residual", "relative"),
]


def measure_again(config: DigitsConfig, run: Run, console: Console) -> None:
    """See :meth:`torchimplicit.recipes.runtime.run.Recipe.evaluate`."""
    where = device(config.device)
    _, validation = data.load(config.split_seed)
    task = DigitsTask(config, total_steps=1, validation=validation)
    load_weights(task, run.checkpoint)
    task.to(where)
    with console.status("Evaluating"):
        found = {name: validate(task.classifier(name), validation) for name in config.estimators}
    run.write_json("evaluation.json", {"steps": task.steps_done, "estimators": found})
    rows = [
        [
            label(name),
            f"{100 * v.accuracy:.1f}",
            f"{v.loss:.4f}",
            f"{v.evaluations:.1f}",
            f"{100 * v.converged:.0f}",
            f"{v.residual:.1e}",
        ]
        for name, v in found.items()
    ]
    console.print(f"After {task.steps_done} steps, on {len(validation.labels)} validation images:", highlight=False)
    console.print(Table(COLUMNS, rows).rich())


# -- What the command line calls: see :class:`torchimplicit.recipes.runtime.run.Runner` --------------------------------


def check(config: DigitsConfig) -> None:
    """A GPU that is asked for must be there."""
    device(config.device)


def train(config: DigitsConfig, run: Run, console: Console) -> bool:
    """Train, and write ``results.json``, ``figures/`` and ``index.html``."""
    with threads(config.threads):
        return train_all(config, run, console)


def evaluate(config: DigitsConfig, run: Run, console: Console) -> None:
    """Measure every classifier on the validation split again."""
    with threads(config.threads):
        measure_again(config, run, console)
