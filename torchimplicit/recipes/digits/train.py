"""The recipe, from the data to the page."""

from __future__ import annotations

import math
import time

import torch
from lightning.pytorch.loggers import CSVLogger
from rich.console import Console

from torchimplicit.recipes.digits import data
from torchimplicit.recipes.digits.config import DigitsConfig
from torchimplicit.recipes.digits.data import Split
from torchimplicit.recipes.digits.log import LogTracks
from torchimplicit.recipes.digits.profile import profiles
from torchimplicit.recipes.digits.report import write_report
from torchimplicit.recipes.digits.results import EstimatorResult, Results, label, summarize, summary_table
from torchimplicit.recipes.digits.task import DigitsTask
from torchimplicit.recipes.runtime.fitting import ShowProgress, fit
from torchimplicit.recipes.runtime.run import Environment, Run, device

PROFILED = 128
"""Validation images whose solves are shown iteration by iteration."""


def train(config: DigitsConfig, run: Run, console: Console) -> bool:
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
