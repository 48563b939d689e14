"""How tests run recipes: small runs in this process, runs in two halves, and commands that are refused."""

from __future__ import annotations

from dataclasses import replace

import torch
from rich.console import Console

from torchimplicit import cli
from torchimplicit.recipes import registry
from torchimplicit.recipes.runtime.execution import go, opened
from torchimplicit.recipes.runtime.jobs import prepare
from torchimplicit.recipes.runtime.log import rows
from torchimplicit.recipes.runtime.run import RunOptions, create

QUIET = Console(quiet=True)


def trained(recipe, config, path, *parts):
    """A run of these settings; with ``parts`` in several sittings, each of its own settings."""
    runner, run = registry.runner(recipe), create(recipe, RunOptions(output=path))
    run.describe(recipe, config)
    runner.check(config)
    for part in parts or (config,):
        assert runner.train(part, run, QUIET)
    return run


def descent(task, batches, rate=1e-2):
    """The loss of one step on each of these batches."""
    rule, found = torch.optim.Adam(task.parameters(), rate), []
    for batch in batches:
        loss = task.loss(batch)
        rule.zero_grad()
        loss.backward()
        rule.step()
        found.append(float(loss.detach()))
    return found


def logged(run):
    """The loss and the evaluations of every step."""
    return [(row["loss"], row["forward_evaluations"]) for row in rows(run.metrics) if "loss" in row]


def assert_resumes(recipe, config, folder, steps=4):
    """A run that is cut in two has the losses and the evaluations of an undisturbed one, which are returned."""
    optimization = replace(config.optimization, steps=steps, validate_every=steps // 2, schedule="constant")
    config = replace(config, optimization=optimization)
    half = replace(config, optimization=replace(optimization, steps=steps // 2))
    whole = logged(trained(recipe, config, folder / "whole"))
    assert logged(trained(recipe, config, folder / "cut", half, config)) == whole
    assert len(whole) == steps
    return whole


def assert_refused(capsys, recipe, output, complaints):
    """The command line says what is wrong with each list of words, and makes no run."""
    for words, message in complaints:
        assert cli.main(["train", recipe, *words, "--output", str(output)]) == 2, words
        assert message in capsys.readouterr().err
        assert not output.exists()


def run_jobs(jobs, folder, smaller=lambda config: config):
    """The runs of a table, made smaller, in this process, which is faster than a scheduler's."""
    runs = {}
    for job in jobs:
        run, runner, settings = opened(prepare(replace(job, config=smaller(job.config)), folder).path)
        assert go(runner, settings, run, QUIET) == 0
        runs[job.name] = run
    return runs
