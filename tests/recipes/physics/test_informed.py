"""The table of physics-informed models: its runs, and what it makes of them."""

from __future__ import annotations

from collections import Counter

import pytest

pytest.importorskip("lightning")

from rich.console import Console

from torchimplicit.recipes.physics import informed as planned
from torchimplicit.recipes.physics import solve_equation as runner
from torchimplicit.recipes.physics.informed import TABLE, PhysicsInformedConfig, constant
from torchimplicit.recipes.registry import settings
from torchimplicit.recipes.runtime.errors import UserError
from torchimplicit.recipes.runtime.jobs import prepare
from torchimplicit.recipes.runtime.table import Plan, Runs

TINY = PhysicsInformedConfig(
    plan=Plan(seeds=1),
    equations=("van-der-pol", "helmholtz"),
    optimizers=("least-squares",),
    ordinary_seconds=0.02,
    partial_seconds=0.02,
    ordinary_points=5,
    partial_points=9,
    equal_iterations=1,
)


def test_every_row_has_every_seed():
    made = planned.jobs(PhysicsInformedConfig())
    assert len(made) == len({job.name for job in made}) == 4 * (8 + 5 + 5) * 3
    assert Counter(job.config.seed for job in made) == {0: 72, 1: 72, 2: 72}
    assert Counter(job.config.bound for job in made) == {None: 180, 1.0: 24, 2.0: 12}
    for job in made:
        assert settings(job.recipe).equation == job.config.equation
    assert settings("physics-informed") == PhysicsInformedConfig()


def test_models_of_one_size_have_about_as_many_weights():
    for states in (5, 20):
        sizes = [
            sum(p.numel() for p in runner.field(planned.settings_of(TINY, "burgers", model, "adam", 0)).parameters())
            for model in (f"equilibrium-{states}", f"network-{states}")
        ]
        assert sizes[1] - sizes[0] == states


def test_the_scale_of_the_thesis():
    paper = PhysicsInformedConfig(plan=Plan(seeds=1, scale="paper"))
    made = planned.jobs(paper)
    assert {job.recipe for job in made} == {"physics-van-der-pol"}
    assert {(job.config.optimizer, job.config.points, job.config.learning_rate) for job in made} == {
        ("adam", 100_000, 1e-3)
    }


def test_a_table_of_what_is_there(tmp_path):
    jobs = planned.jobs(TINY)
    runs = {job.name: prepare(job, tmp_path) for job in jobs}
    done = {}
    for job in jobs:
        if job.name != "helmholtz-network-thesis-least-squares-0":
            assert runner.train(job.config, runs[job.name], Console(quiet=True))
            assert not (runs[job.name].path / "index.html").is_file()
            done[job.name] = runs[job.name]
    summary = TABLE.summarize(TINY, done)
    assert [len(sheet.table.rows) for sheet in summary.sheets] == [9, 8]
    for sheet in summary.sheets:
        assert all(len(row) == len(sheet.table.columns) for row in sheet.table.rows)
    names = [drawing.name for drawing in summary.drawings]
    assert names == ["van-der-pol-solution", "van-der-pol-seconds", "helmholtz-solution", "helmholtz-seconds"]
    assert len(summary.claims) == 2 + 2 * (2 + 2 + 1) + 1
    assert any("1 of 16 runs are not done" in note for note in summary.notes)
    assert set(summary.runs) == set(done)


def test_claims_follow_the_figures():
    def holding(errors: dict[str, float], **validation: float | None) -> list[bool]:
        figures = {
            f"van-der-pol-{model}-least-squares-0": {
                **{"iae": error, "relative_l2": error, "unconverged": 0.0, "validation": 1.0},
                **{"equal": {"iae": 2 * error}, **({"validation": validation[model]} if model in validation else {})},
            }
            for model, error in errors.items()
        }
        return [claim.holds for claim in planned.claims(TINY, Runs.made_by(planned.jobs(TINY), figures))]

    assert holding({"equilibrium-5": 1e-3, "network-5": 1e-2}) == [True, True, True, True]
    assert holding({"equilibrium-5": 1e-3, "network-5": 1e-4}) == [True, False, False, True]
    assert holding({"equilibrium-5": 2e-2, "network-5": 1e-4}) == [False, False, False, True]
    three = {"equilibrium-5": 1e-3, "equilibrium-5-bound-1": 1e-5, "network-5": 1e-4}
    assert holding(three, **{"equilibrium-5-bound-1": 0.5}) == [True, True, True, True]  # chosen by the held-out loss
    assert holding(three, **{"equilibrium-5-bound-1": None}) == [True, False, False, True]  # never chosen


def test_a_constant():
    assert constant("helmholtz") == {"relative_l2": pytest.approx(1.0)}
    assert constant("van-der-pol")["iae"] > 0.1


def test_settings_that_make_no_sense():
    with pytest.raises(UserError, match="--ordinary-seconds must be positive"):
        PhysicsInformedConfig(ordinary_seconds=0.0)
