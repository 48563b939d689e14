"""The table looped-language: its models, and the record that its runs make."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

pytest.importorskip("lightning")
pytest.importorskip("matplotlib")

import made_up_text
from rich.console import Console

from torchimplicit.recipes import registry
from torchimplicit.recipes.phantom import looped_language as settings
from torchimplicit.recipes.phantom.language import LanguageTask, made, wikitext2
from torchimplicit.recipes.phantom.looped_language import COUNTS, FULL, ROWS, TABLE, LoopedLanguageConfig, jobs
from torchimplicit.recipes.runtime.errors import UserError
from torchimplicit.recipes.runtime.run import RunOptions, create
from torchimplicit.recipes.runtime.settings import Equilibria, Machine, from_plain, to_plain
from torchimplicit.recipes.runtime.table import Plan
from torchimplicit.recipes.runtime.task import Shard

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def tiny(tmp_path, monkeypatch) -> LoopedLanguageConfig:
    """The table with one seed, two steps a run and a narrow model."""
    usual = settings.wikitext2

    def narrow():
        one = usual()
        return replace(
            one,
            **made_up_text.NARROW,
            cutoffs=(6,),
            optimization=replace(one.optimization, batch_size=4),
        )

    monkeypatch.setattr(settings, "wikitext2", narrow)
    machine = Machine(device="cpu", tensorboard=False)
    text = made_up_text.write(tmp_path / "text")
    return LoopedLanguageConfig(plan=Plan(seeds=1), data_dir=text, steps=2, depth=4, machine=machine)


def test_a_record(tiny, tmp_path):
    runs = {}
    for job in jobs(tiny):
        assert from_plain(type(job.config), to_plain(job.config, exact=True)) == job.config
        run = create(job.recipe, RunOptions(output=tmp_path / "runs" / job.name))
        run.describe(job.recipe, job.config)
        assert registry.runner(job.recipe).train(job.config, run, Console(quiet=True))
        run.mark("complete")
        runs[job.name] = run
    summary = TABLE.summarize(tiny, runs)
    models, curves = (sheet.table.rows for sheet in summary.sheets)
    assert [row[0] for row in models] == [row.label for row in ROWS.values()]
    for column in (3, 4):
        assert [float(row[column]) for row in models[3:]] == [4.0, 4.0, 4.0]
    assert [row[0] for row in curves] == [row.label for row in ROWS.values()][:4]
    assert len(summary.claims) == 6
    assert [drawing.name for drawing in summary.drawings] == ["evaluations"]
    json.dumps(to_plain(summary.runs), allow_nan=False)
    tests = runs["curves"].read_json("curves.json")
    assert tests["looped-0"]["4"]["perplexity"] == pytest.approx(tests["looped-0"][FULL]["perplexity"])
    assert [tests["equilibrium-0"][str(count)]["evaluations"] for count in COUNTS] == list(COUNTS)
    full, most = (tests["equilibrium-0"][name]["perplexity"] for name in (FULL, "32"))
    assert full == pytest.approx(most, rel=1e-3)


def test_the_published_scale():
    planned = {job.name: job.config for job in jobs(LoopedLanguageConfig(plan=Plan(seeds=1, scale="paper")))}
    assert planned["equilibrium-0"].equilibria.pretrain_steps == 32_000
    assert (planned["narrow-0"].inner_width, planned["narrow-0"].depth) == (6000, 8)


def test_twins_have_equal_parameters():
    sizes = {}
    for name, row in ROWS.items():
        config = row.of(replace(wikitext2(), vocabulary=3000))
        sizes[name] = sum(p.numel() for p in made(config, 3000).parameters())
    assert sizes["looped"] == sizes["equilibrium"] == sizes["consistent"]
    assert sizes["narrow"] == pytest.approx(sizes["equilibrium"], rel=0.01)
    assert sizes["stack"] > 2 * sizes["equilibrium"]


@pytest.mark.parametrize("changed", [{"learned_start": True}, {"consistency_weight": 1.0}])
def test_losses_on_solutions_have_gradients(tiny, changed):
    task = LanguageTask(replace(settings.training(tiny, ROWS["equilibrium"], 0), **changed))
    batch = next(iter(task.training_batches(range(1), Shard())))
    loss = task.loss(batch)
    loss.backward()
    assert all(p.grad is not None for p in task.parameters())
    with torch.no_grad():
        task.begin()
        more = loss.detach() - task._losses(batch).mean()
    assert float(more) > 1e-6


@pytest.mark.parametrize(
    ("option", "changed"),
    [
        ("--learned-start", {"learned_start": True}),
        ("--consistency-weight", {"consistency_weight": 1.0}),
        ("--pretrain-steps", {"equilibria": Equilibria(pretrain_steps=10)}),
        ("--evaluation-steps", {"equilibria": Equilibria(evaluation_steps=10)}),
    ],
)
def test_explicit_models_take_no_settings_of_solves(option, changed):
    for architecture in ("looped", "stack"):
        with pytest.raises(UserError, match=f"{option} has no effect"):
            replace(wikitext2(), architecture=architecture, **changed)
    with pytest.raises(UserError, match="--jacobian-weight"):
        replace(wikitext2(), architecture="stack", equilibria=Equilibria(jacobian_weight=1.0))
