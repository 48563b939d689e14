"""The table of gradients, from runs of a few steps."""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("lightning")
pytest.importorskip("submitit")

from running import run_jobs

from torchimplicit.recipes.reasoning.gradients import TABLE, ReasoningGradientsConfig, at_equal_time
from torchimplicit.recipes.runtime.errors import UserError
from torchimplicit.recipes.runtime.settings import Equilibria
from torchimplicit.recipes.runtime.table import Plan, Runs


def smaller(config):
    if hasattr(config, "puzzles"):
        return replace(config, puzzles=smaller(config.puzzles))
    few = {"width": 8, "heads": 2, "segments": 2, "training_puzzles": 8, "held_out_puzzles": 4}
    optimization = replace(config.optimization, batch_size=4, warmup_steps=0)
    return replace(config, optimization=optimization, **few)


def test_the_table(tmp_path):
    config = ReasoningGradientsConfig(plan=Plan(seeds=1), rows=("full", "reversible", "one-step"), steps=4, looks=2)
    runs = run_jobs(TABLE.jobs(config), tmp_path, smaller)
    found = TABLE.summarize(config, runs)
    first, costs = found.sheets
    assert [row[0] for row in first.table.rows] == ["full backpropagation", "reversible (0.5)", "one step"]
    assert len(costs.table.rows) == 3
    # only of estimators that need no more than the state
    assert [len(found.runs[f"{name}-seed0"]["cosines"]) for name in config.rows] == [0, 0, 2]
    assert found.runs["cost"]["full"]["cosine"] == pytest.approx(1)
    assert 0 < found.runs["cost"]["one-step"]["cosine"] < 1
    assert found.runs["cost"]["full"]["megabytes"] > found.runs["cost"]["one-step"]["megabytes"] > 0
    assert len(found.claims) == 1
    assert [one.name for one in found.drawings] == ["gradients"]


def test_equal_time_is_that_of_the_cheapest_row():
    config = ReasoningGradientsConfig(plan=Plan(seeds=1), rows=("full", "one-step"), steps=300, looks=3)
    cost = {"forward_seconds": 0.5, "forward": 1.0, "backward": 1.0}
    validations = [{"step": step, "solved": step / 300} for step in (100, 200, 300)]
    figures = {
        "cost": {"full": {**cost, "backward_seconds": 0.7}, "one-step": {**cost, "backward_seconds": 0.3}},
        "full-seed0": {"validations": validations},
        "one-step-seed0": {"validations": validations},
    }
    runs = Runs.made_by(TABLE.jobs(config), figures)
    assert at_equal_time(config, runs, "one-step") == [1.0]
    assert at_equal_time(config, runs, "full") == [200 / 300], "two thirds of the steps"


def test_settings_that_make_no_sense():
    with pytest.raises(UserError, match="there is no row two-step"):
        ReasoningGradientsConfig(rows=("two-step",))
    with pytest.raises(UserError, match="--gradient reversible needs --solver reversible"):
        Equilibria(gradient="reversible")
