"""What holds of every table: its jobs, its settings, and what it makes of nothing."""

from __future__ import annotations

import json
import re
from dataclasses import is_dataclass, replace

import pytest

pytest.importorskip("lightning")
pytest.importorskip("submitit")

from torchimplicit.recipes import registry
from torchimplicit.recipes.runtime.errors import UserError
from torchimplicit.recipes.runtime.jobs import command
from torchimplicit.recipes.runtime.settings import from_plain, to_plain
from torchimplicit.recipes.runtime.table import Plan, Published

TABLES = list(registry.TABLES)


@pytest.mark.parametrize("scale", ["cpu", "paper"])
@pytest.mark.parametrize("name", TABLES)
def test_jobs_are_runs_of_recipes(name, scale):
    config = registry.settings(name)
    try:
        config = replace(config, plan=replace(config.plan, seeds=2, scale=scale))
    except UserError as refusal:  # a table has the published settings, or says that it has not
        if scale == "paper" and "--scale paper would be" in str(refusal):
            return
        raise
    jobs = registry.runner(name).jobs(config)
    assert jobs
    assert len({job.name for job in jobs}) == len({job.recorded for job in jobs}) == len(jobs)
    for job in jobs:
        assert re.fullmatch(r"[\w.,=-]+", job.name), "fit for a folder"
        assert type(registry.settings(job.recipe)) is type(job.config)
        assert from_plain(type(job.config), json.loads(json.dumps(to_plain(job.config, exact=True)))) == job.config
    by_seed = [job.key["seed"] for job in jobs if "seed" in job.key]
    assert set(by_seed) <= {0, 1}


@pytest.mark.parametrize("name", [*registry.RECIPES, *registry.TABLES, *registry.PARTS])
def test_every_name_has_settings_and_a_runner(name):
    assert is_dataclass(registry.settings(name))
    runner = registry.runner(name)
    assert all(callable(getattr(runner, method)) for method in ("check", "train", "evaluate"))


@pytest.mark.parametrize("name", TABLES)
def test_nothing_comes_of_nothing(name):
    table, config = registry.runner(name), registry.settings(name)
    assert isinstance(table, Published)
    summary = table.summarize(config, {})
    assert (summary.runs, summary.claims, summary.drawings) == ({}, [], [])
    assert summary.title
    assert summary.protocol
    assert all(isinstance(note, str) for note in summary.notes)


@pytest.mark.parametrize("name", [name for name in TABLES if hasattr(registry.settings(name), "rows")])
def test_an_unknown_row_is_refused(name):
    with pytest.raises(UserError, match=r"there is no row '?nerf'?; the rows are"):
        registry.runner(name).jobs(replace(registry.settings(name), rows=("nerf",)))


@pytest.mark.parametrize("name", TABLES)
def test_the_command_names_what_differs(name):
    config = registry.settings(name)
    assert command(name, config) == f"torchimplicit reproduce {name}"
    other = replace(config, plan=Plan(**{**vars(config.plan), "seeds": 7}))
    assert command(name, other) == f"torchimplicit reproduce {name} --seeds 7"
