"""The table phantom-language: its jobs, its costs, and the record that some of its runs make."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("lightning")
pytest.importorskip("matplotlib")

import made_up_text
from rich.console import Console

from torchimplicit.recipes import registry
from torchimplicit.recipes.phantom import language_table as settings
from torchimplicit.recipes.phantom.language import KINDS, CostConfig, Measured
from torchimplicit.recipes.phantom.language_table import ROWS, TABLE, PhantomLanguage, Trained, jobs
from torchimplicit.recipes.runtime.errors import UserError
from torchimplicit.recipes.runtime.run import Run, RunOptions, create
from torchimplicit.recipes.runtime.settings import Machine, from_plain, to_plain
from torchimplicit.recipes.runtime.table import Line, Plan, Runs

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def tiny(tmp_path, monkeypatch) -> PhantomLanguage:
    """The table with one seed, two steps a run and a narrow model."""
    text = made_up_text.write(tmp_path / "text")
    usual = settings.language

    def narrow(config, row, seed):
        one = usual(config, row, seed)
        return replace(
            one,
            **made_up_text.NARROW,
            cutoffs=(6,),
            optimization=replace(one.optimization, batch_size=4, validate_every=1),
            validation_tokens=100,
            test_tokens=100,
        )

    monkeypatch.setattr(settings, "language", narrow)
    machine = Machine(device="cpu", tensorboard=False)
    return PhantomLanguage(plan=Plan(seeds=1), data_dir=text, steps=2, repeats=1, machine=machine)


def run_some(config: PhantomLanguage, folder: Path, names: set[str]) -> dict[str, Run]:
    runs = {}
    for job in jobs(config):
        if job.name in names:
            run = create(job.recipe, RunOptions(output=folder / job.name))
            run.describe(job.recipe, job.config)
            assert registry.runner(job.recipe).train(job.config, run, Console(quiet=True))
            run.mark("complete")
            runs[job.name] = run
    return runs


def test_jobs_come_by_seed_and_survive_the_disk():
    for plan in (Plan(seeds=2), Plan(seeds=2, scale="paper")):
        made = jobs(replace(PhantomLanguage(), plan=plan))
        published = [name for name, row in ROWS.items() if row.perplexity is not None]
        assert [job.name for job in made[:8]] == [f"{name}-{seed}" for seed in (0, 1) for name in published]
        assert {job.name for job in made} == {"costs"} | {f"{name}-{seed}" for seed in (0, 1) for name in ROWS}
        assert [job.config.optimization.seed for job in made[:8]] == [0] * 4 + [1] * 4
        assert set(made[-1].config.names) == {f"{name}-0" for name in ROWS}
        assert made[-1].recipe == "language-costs"


def test_the_published_scale_has_the_published_settings():
    config = replace(PhantomLanguage(), plan=Plan(scale="paper"))
    made = {job.name: job.config for job in jobs(config)}
    assert made["post-implicit-0"].optimization.steps == 300_000
    assert made["post-implicit-0"].width == 700
    pre = made["pre-jacobian-phantom-0"]
    assert (pre.memory_length, pre.equilibria.jacobian_weight, pre.equilibria.gradient) == (
        300,
        2.0,
        "unrolled-phantom",
    )


def test_a_record_of_some_runs(tiny, tmp_path):
    names = {"post-implicit-0", "post-phantom-0", "pre-jacobian-implicit-0", "pre-jacobian-phantom-0", "costs"}
    runs = run_some(tiny, tmp_path / "runs", names)
    summary = TABLE.summarize(tiny, runs)
    perplexity, steps = summary.sheets
    assert [row[0] for row in perplexity.table.rows] == [row.label for row in ROWS.values()][:4]
    assert [row[1] for row in perplexity.table.rows] == ["24.0", "25.7", "24.5", "24.4"]
    assert all(float(row[3]) > 1 for row in perplexity.table.rows)
    assert perplexity.table.rows[0][-1] == "1.00×"
    assert len(steps.table.rows) == 4 * len(KINDS)
    assert len(summary.claims) == 5
    assert {d.name for d in summary.drawings} == {"perplexity-steps", "perplexity-seconds"}
    assert any(note.startswith("These rows were not run: PreLN, implicit") for note in summary.notes)
    assert set(summary.runs) == names
    json.dumps(to_plain(summary.runs), allow_nan=False)
    measured = from_plain(Measured, runs["costs"].read_json("results.json"))
    for kinds in measured.costs.values():
        assert kinds["phantom"].forward >= kinds["implicit"].forward
        assert kinds["converged"].backward > kinds["implicit"].backward


def test_a_record_without_costs_and_of_a_diverged_run(tiny, tmp_path):
    runs = run_some(tiny, tmp_path / "runs", {"post-implicit-0"})
    broken = Run(tmp_path / "runs" / "post-phantom-0")
    broken.path.mkdir()
    found = runs["post-implicit-0"].read_json("results.json")
    broken.write_json("results.json", found | {"state": "diverged", "test": None, "best": None, "validations": []})
    summary = TABLE.summarize(tiny, {**runs, "post-phantom-0": broken})
    rows = summary.sheets[0].table.rows
    assert rows[1][0] == "PostLN, UPG(5, 0.8) (1 of 1 diverged)"
    assert rows[1][3] == "–"
    assert [d.name for d in summary.drawings] == ["perplexity-steps"]
    assert summary.claims == []


def test_costs_need_a_trained_run(tmp_path):
    run = create("language-costs", RunOptions(output=tmp_path / "costs"))
    with pytest.raises(UserError, match="none of the runs"):
        registry.runner("language-costs").train(CostConfig(), run, Console(quiet=True))


def test_equal_time_is_read_off_between_validations():
    validations = [{"step": step, "figures": {"perplexity": p}} for step, p in ((10, 400.0), (20, 100.0))]
    runs = Runs([Line("post-implicit-0", {}, {"validations": validations})])
    trained = Trained(ROWS["post-implicit"], runs, step_seconds=2.0, radius=None)
    assert trained.validated_after(30.0) == pytest.approx([200.0])
    assert trained.validated_after(40.0) == pytest.approx([100.0])
    assert trained.validated_after(19.0) == []
