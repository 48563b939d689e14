"""A pre-training and several fine-tunings from its weights: one run of the table of fine-tuning."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from torchimplicit.recipes.density import finetune, pretrain
from torchimplicit.recipes.density.learning_settings import Finetuning, Schooling
from torchimplicit.recipes.runtime.errors import UserError
from torchimplicit.recipes.runtime.run import Run, Runner, RunOptions, create

PRETRAINED, LONGER = "pretrained", "pretrained-longer"
"""Names of the nested runs: the pre-training, and one that takes as long as pre-training and the first fine-tuning
together."""


# -- The runner; see :class:`torchimplicit.recipes.runtime.run.Runner` -------------------------------------------------


def check(config: Schooling) -> None:
    """Check the pre-training's settings."""
    pretrain.check(config.pretraining)


def train(config: Schooling, run: Run, console: Console) -> bool:
    """Run one after another; finished runs are not repeated."""
    if not _done(run, PRETRAINED, "pretrain", pretrain, config.pretraining, console):
        return False
    for name in config.ways:
        if not _done(run, name, "finetune", finetune, _way(config, run, name), console):
            return False
    if not config.longer or not config.ways:
        return True
    first = within(run, next(iter(config.ways))).read_json("results.json")
    seconds = first["pretraining_seconds"] + first["course"]["seconds"]
    stepping = replace(config.pretraining.stepping, steps=10**7, seconds=seconds)
    longer = replace(config.pretraining, stepping=stepping)
    return _done(run, LONGER, "pretrain", pretrain, longer, console)


def evaluate(config: Schooling, run: Run, console: Console) -> None:
    """Evaluate each nested run."""
    longer = [LONGER] if config.longer and config.ways else []
    for name in (PRETRAINED, *config.ways, *longer):
        one = within(run, name)
        if not (one.path / "results.json").is_file():
            raise UserError(f"{one} is not done: 'resume' {run} first")
        if name in config.ways:
            finetune.evaluate(_way(config, run, name), one, console)
        else:
            pretrain.evaluate(config.pretraining, one, console)


def _way(config: Schooling, run: Run, name: str) -> Finetuning:
    """The settings of a fine-tuning, which begins at the weights of the pre-training."""
    return replace(config.ways[name], run=within(run, PRETRAINED).path)


def within(run: Run, name: str) -> Run:
    """One of the nested runs."""
    return Run(Path(run.path) / name)


def _done(run: Run, name: str, recipe: str, runner: Runner, settings: Any, console: Console) -> bool:
    """Return whether the run has finished, now or before."""
    one = within(run, name)
    if one.description.is_file():
        if one.read()["state"] == "complete":
            return True
    else:
        one = create(recipe, RunOptions(output=one.path))
        one.describe(recipe, settings)
    console.print(f"{name}:", highlight=False)
    one.mark("running")
    done = runner.train(settings, one, console)
    one.mark("complete" if done else "interrupted")
    return done
