"""The table of shapes, on a ball, with few and short runs."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

pytest.importorskip("lightning")
pytest.importorskip("submitit")
pytest.importorskip("skimage")
pytest.importorskip("trimesh")

import trimesh
from running import run_jobs

from torchimplicit.recipes.representations.shape import build, shape
from torchimplicit.recipes.representations.shapes import (
    ROWS,
    TABLE,
    ShapesConfig,
    ShapesCostConfig,
    build_one_step,
    jobs,
    training,
)
from torchimplicit.recipes.runtime.settings import to_plain
from torchimplicit.recipes.runtime.table import Plan


@pytest.fixture(autouse=True)
def _quick(one_thread, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr("torchimplicit.recipes.representations.shape.PICTURE", 40)
    monkeypatch.setattr("torchimplicit.recipes.representations.shape.SAMPLES", 300)


def ball(tmp_path):
    trimesh.creation.icosphere(subdivisions=1).export(tmp_path / "ball.ply")
    return tmp_path / "ball.ply"


def short(config):
    """Few points and steps."""
    if isinstance(config, ShapesCostConfig):
        return replace(config, fits=tuple(short(one) for one in config.fits), warm_steps=1, rounds=1)
    model = replace(config.representation, frequencies=3.0, width=12)
    optimization = replace(config.optimization, steps=4, validate_every=2, batch_size=200, learning_rate=1e-2)
    return replace(config, held_out_samples=200, resolution=12, representation=model, optimization=optimization)


def small(tmp_path, **changes):
    return ShapesConfig(plan=Plan(seeds=1), samples=400, mesh_file=ball(tmp_path), **changes)


def test_the_papers_scale():
    one = training(ShapesConfig(plan=Plan(scale="paper")), ROWS["occupancy-fourier-implicit"], 0)
    assert (one.representation.width, one.optimization.steps, one.optimization.batch_size) == (256, 10000, 50000)
    assert (one.representation.frequencies, one.optimization.learning_rate) == (256.0, 5e-4)


def test_twins_differ_in_being_implicit_alone():
    one, other = (training(ShapesConfig(), ROWS[f"sdf-siren-{kind}"], 1) for kind in ("implicit", "explicit"))
    assert replace(one, representation=replace(one.representation, implicit=False)) == other
    assert training(ShapesConfig(), ROWS["sdf-siren-one-step"], 1) == one


def test_the_estimate_has_the_values_but_not_the_slopes(tmp_path):
    config = short(replace(shape(), task="sdf", samples=400, file=ball(tmp_path)))
    config = replace(config, equilibria=replace(config.equilibria, tolerance=1e-6))
    torch.manual_seed(0)
    exact = build(config).eval()
    torch.manual_seed(0)
    estimate = build_one_step(config).train()
    x = (torch.rand(50, 3) - 0.5).requires_grad_()
    values = [task.model(x)[:, 0] for task in (exact, estimate)]
    torch.testing.assert_close(*values, rtol=1e-3, atol=1e-4)
    slopes = [torch.autograd.grad(value.sum(), x)[0] for value in values]
    step = 1e-3 * torch.tensor([1.0, 0, 0])
    with torch.no_grad():
        measured = (exact.model(x + step) - exact.model(x - step))[:, 0] / 2e-3
    errors = [(slope[:, 0] - measured).abs().mean() for slope in slopes]
    assert errors[0] < 0.05 * errors[1]


def test_the_record(tmp_path):
    config = small(tmp_path, rows=("occupancy-siren-implicit", "occupancy-siren-explicit", "cost", "sdf-siren-implicit",
                                   "sdf-siren-one-step", "sdf-siren-explicit"))  # fmt: skip
    runs = run_jobs(jobs(config), tmp_path / "runs", short)
    summary = TABLE.summarize(config, runs)
    assert [sheet.title for sheet in summary.sheets][:2] == ["Occupancy", "Signed distance, with slopes in the loss"]
    quality, distance, costs, directions = (sheet.table for sheet in summary.sheets)
    assert [row[0] for row in quality.rows][:2] == ["iSIREN", "SIREN"]
    assert distance.rows[1][0] == "iSIREN, one step"
    assert distance.rows[0][2] != "–"
    assert distance.rows[3][2] == "–"
    assert len(costs.rows) == 15
    assert len(directions.rows) == 6
    assert len(summary.claims) == 1 + 3 + 1
    assert {drawing.name for drawing in summary.drawings} == {"training", "occupancy", "distance"}
    json.dumps(to_plain(summary.runs), allow_nan=False)
    partial = TABLE.summarize(
        config, {name: run for name, run in runs.items() if "one-step" not in name and name != "cost"}
    )
    assert len(partial.sheets) == 2
    assert TABLE.summarize(config, {}).drawings == []
