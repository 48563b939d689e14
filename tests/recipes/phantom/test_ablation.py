"""The table of implicit and phantom training."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

pytest.importorskip("lightning")
pytest.importorskip("submitit")
pytest.importorskip("tyro")

from running import run_jobs

from torchimplicit import cli
from torchimplicit.recipes.phantom.ablation import (
    CONTROL,
    IMPLICIT,
    SWEEP,
    TABLE,
    TABLE_1,
    UPG,
    PhantomAblationConfig,
    jobs,
    training,
)
from torchimplicit.recipes.phantom.images import CONVERGED, CostConfig, cifar10
from torchimplicit.recipes.runtime.settings import Machine, to_plain
from torchimplicit.recipes.runtime.step_cost import costs_of
from torchimplicit.recipes.runtime.table import Plan

TINY = PhantomAblationConfig(
    plan=Plan(seeds=1), data="digits", steps=2, machine=Machine(device="cpu", tensorboard=False)
)


def smaller(config):
    """The same on few images, with few steps of the solvers."""
    if isinstance(config, CostConfig):
        return replace(config, image=smaller(config.image), repeats=1, converged_steps=8)
    return replace(
        config,
        validation_images=20,
        train_images=60,
        test_images=20,
        optimization=replace(config.optimization, batch_size=16),
        equilibria=replace(config.equilibria, solver_steps=4, backward_steps=4),
    )


class TestJobs:
    def test_all_rows_of_a_seed_come_before_the_next_seed(self):
        names = [job.name for job in jobs(PhantomAblationConfig(plan=Plan(seeds=2)))]
        assert len(names) == len(set(names)) == 2 * len(TABLE_1) + len(SWEEP) + 1
        assert max(names.index(name) for name in names if name.endswith("seed0")) < min(
            names.index(name) for name in names if name.endswith("seed1")
        )

    def test_the_papers_scale_is_the_papers(self):
        paper = PhantomAblationConfig(plan=Plan(scale="paper"))
        upg, implicit = (training(paper, TABLE_1[name], 0) for name in (UPG, IMPLICIT))
        assert upg == replace(cifar10(), machine=paper.machine)
        assert (implicit.dropout, implicit.equilibria.pretrain_steps) == (0.25, 3000)
        assert (implicit.optimization.optimizer, implicit.optimization.learning_rate) == ("adam", 1e-3)
        assert training(paper, TABLE_1["upg-9-drop"], 0).equilibria.phantom_steps == 9

    def test_the_control_differs_from_the_phantom_row_in_its_gradient_alone(self):
        upg, control = (training(PhantomAblationConfig(), TABLE_1[name], 0) for name in (UPG, CONTROL))
        assert replace(control, equilibria=upg.equilibria) == upg
        assert control.equilibria.gradient == "implicit"


def test_what_the_runs_come_to(tmp_path):
    runs = run_jobs(jobs(replace(TINY, rows=(IMPLICIT, UPG, CONTROL, "sweep-1-0.5", "cost"))), tmp_path, smaller)
    summary = TABLE.summarize(TINY, runs)
    accuracy, cost, sweep = (sheet.table for sheet in summary.sheets)
    assert [row[2] for row in accuracy.rows][:2] == ["85.0 ± 0.2", "82.3 ± 1.3"]
    assert {row[0]: row[-1] for row in accuracy.rows}["Implicit: SGD"] == "1 of 1"
    assert next(row for row in accuracy.rows if row[0].startswith("NPG"))[1] == "–"
    assert [row[0] for row in cost.rows][:2] == [CONVERGED, "implicit"]
    assert any(row[0] == "UPG(1, 0.5)" and row[1] != "–" for row in sweep.rows)
    assert [drawing.name for drawing in summary.drawings] == ["training", "sweep", "cost"]
    assert len(summary.claims) == 5
    json.dumps(to_plain(summary.runs), allow_nan=False)

    measured = costs_of(runs["cost"].read_json("costs.json"))
    assert measured[CONVERGED].cosine == pytest.approx(1)
    assert measured["UPG(5, 0.5)"].backward == 4
    assert measured["NPG(5, 0.5)"].forward < measured["UPG(5, 0.5)"].forward


def test_nothing_but_a_run_that_diverged(tmp_path):
    runs = run_jobs(jobs(replace(TINY, rows=(IMPLICIT,))), tmp_path, smaller)
    (run,) = runs.values()
    run.write_json("results.json", {**run.read_json("results.json"), "state": "diverged", "test": None})
    summary = TABLE.summarize(TINY, runs)
    assert summary.sheets[0].table.rows[0][1] == "–"
    assert any("These runs diverged: implicit-seed0" in note for note in summary.notes)
    assert not summary.claims


def test_through_the_scheduler(tmp_path, capsys):
    words = "reproduce phantom-ablation --data digits --steps 1 --seeds 1 --rows upg-5 --device cpu --no-tensorboard"
    assert cli.main([*words.split(), "--output", str(tmp_path / "table")]) == 0
    record = json.loads((tmp_path / "table" / "record.json").read_text())
    assert record["runs"]["upg-5-seed0"]["state"] == "complete"
    assert (tmp_path / "table" / "figures" / "training.png").is_file()
    assert cli.main(["evaluate", str(tmp_path / "table")]) == 0
