"""The table phantom-precision: its measurement on layers, its looks at trainings, and what it makes of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("lightning")
pytest.importorskip("tyro")

from rich.console import Console

from torchimplicit import cli
from torchimplicit.recipes.phantom.layer import BESIDE, LABELS, LAYER, LayerConfig, LayerResults, Measurement, training
from torchimplicit.recipes.phantom.precision import TABLE, PrecisionConfig, jobs, looks_of
from torchimplicit.recipes.runtime.errors import UserError
from torchimplicit.recipes.runtime.run import Run, RunOptions, create
from torchimplicit.recipes.runtime.settings import from_plain
from torchimplicit.recipes.runtime.table import Plan

SMALL = LayerConfig(size=12, samples=3, ks=(1, 3, 9), lambdas=(0.5, 1.0), errors=(0.3, 0.01), draws=30)


@pytest.fixture(scope="module")
def small() -> LayerResults:
    return Measurement(SMALL).results()


def layer_run(path: Path, results: LayerResults) -> Run:
    run = create("phantom-layer", RunOptions(output=path))
    run.describe("phantom-layer", SMALL)
    run.write_json("results.json", results)
    return run


def training_run(path: Path, steps: int = 4) -> Run:
    """A run as training leaves it, with made-up figures."""
    run = create("phantom-training", RunOptions(output=path))
    run.describe("phantom-training", training())
    run.write_json("results.json", {"test": {"figures": {"accuracy": 0.5}}})
    where = "gradient/task.model.equilibrium/"
    figures = {"cosine": 0.5, "norm_ratio": 0.4, "adjoint_residual": 0.09, "ascent": 1.0, "steps": 3, "products": 2}
    names = [f"{where}spectral_radius", f"{where}exact_residual"]
    names += [f"{where}{name}/{figure}" for name in BESIDE for figure in figures]
    names += [f"{where}{name}/damping" for name in BESIDE if name.startswith("adaptive")]
    values = ["0.9", "1e-6", *(str(v) for _ in BESIDE for v in figures.values()), "0.8", "0.8"]
    lines = [",".join(["step", *names]), *(",".join([str(2 * i + 1), *values]) for i in range(steps))]
    run.metrics.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return run


class TestLayer:
    def test_the_exact_gradients_agree(self, small):
        assert small.residual < 1e-5
        assert small.agreement > 0.9999
        assert 0 < small.radius < SMALL.norm

    def test_the_grid_is_whole_and_rises(self, small):
        assert len(small.grid) == 2 * 3 * 2
        for estimator in ("UPG", "NPG"):
            for damping in SMALL.lambdas:
                cosines = [p.cosine for p in small.grid if (p.estimator, p.damping) == (estimator, damping)]
                assert cosines == sorted(cosines)

    def test_the_adaptive_gradient_keeps_its_error(self, small):
        assert [a.asked for a in small.adaptive] == [0.3, 0.01]
        assert all(a.error <= a.asked for a in small.adaptive)
        assert small.adaptive[0].steps < small.adaptive[1].steps

    def test_the_weight_has_the_norm(self):
        for kind in ("gaussian", "orthogonal"):
            w, _, _ = Measurement(replace(SMALL, weight=kind)).wrt
            assert float(torch.linalg.matrix_norm(w.detach(), 2)) == pytest.approx(0.9)

    def test_the_seed_decides(self, small):
        assert Measurement(SMALL).results() == small
        assert Measurement(replace(SMALL, seed=1)).results() != small

    def test_the_recipe_writes_what_it_measured(self, tmp_path, small):
        run = create("phantom-layer", RunOptions(output=tmp_path / "run"))
        run.describe("phantom-layer", SMALL)
        LAYER.check(SMALL)
        assert LAYER.train(SMALL, run, Console(quiet=True))
        assert from_plain(LayerResults, run.read_json("results.json")) == small
        LAYER.evaluate(SMALL, run, Console(quiet=True))
        assert run.read_json("evaluation.json") == run.read_json("results.json")


class TestTable:
    def test_the_gradient_is_looked_at_so_often(self):
        training = jobs(PrecisionConfig())[2].config
        assert training.machine.monitor_every == training.optimization.steps // 12

    def test_every_estimator_has_a_label(self):
        assert set(LABELS) == set(BESIDE)

    def test_what_is_there_is_summarized(self, tmp_path, small):
        config = PrecisionConfig(plan=Plan(seeds=1))
        names = [job.name for job in jobs(config)]
        runs = {
            name: layer_run(tmp_path / name, replace_grid(small))
            if name.startswith("layer")
            else training_run(tmp_path / name)
            for name in names
        }
        whole = TABLE.summarize(config, runs)
        assert len(whole.drawings) == 3
        assert len(whole.sheets) == 5
        held = {claim.statement: claim.holds for claim in whole.claims}
        assert held["The cosine rises with k for every λ, for UPG and NPG (Fig. 1)"]
        terms = "NPG(k, 0.5) is more precise with more terms in the second half of training of the model trained by UPG"
        assert not next(holds for claim, holds in held.items() if claim.startswith(terms)), "all are the same"
        assert not any("not measured" in note for note in whole.notes)
        partial = TABLE.summarize(config, {names[0]: runs[names[0]]})
        assert [len(partial.drawings), len(partial.sheets)] == [1, 3]
        assert partial.notes[-1] == f"These runs were not measured: {', '.join(names[1:])}."

    def test_looks_are_read_from_the_log(self, tmp_path):
        looks = looks_of(training_run(tmp_path / "run"))
        assert [look.step for look in looks] == [1, 3, 5, 7]
        assert looks[0].own == {"spectral_radius": 0.9, "exact_residual": 1e-6}
        assert looks[0].figure("adaptive-0.3/damping") == 0.8
        assert looks[0].figure("npg-1-1/cosine") == 0.5

    def test_a_training_without_looks_is_missing(self, tmp_path):
        run = training_run(tmp_path / "run", steps=0)
        config = PrecisionConfig(plan=Plan(seeds=1))
        assert not TABLE.gather(config, {"training_implicit_0": run})


def replace_grid(results: LayerResults) -> LayerResults:
    """The results as those of the default grid, in which the table looks for its columns."""
    usual = LayerConfig()
    points = [
        replace(results.grid[0], estimator=name, steps=k, damping=damping, cosine=1 - 0.9 ** (k * damping))
        for name in ("UPG", "NPG")
        for damping in usual.lambdas
        for k in usual.ks
    ]
    return replace(results, grid=points, adaptive=[replace(results.adaptive[0], asked=e) for e in usual.errors])


def test_from_the_command_line(tmp_path, capsys):
    """Two looks at a training of four steps on the bundled digits."""
    path = tmp_path / "run"
    words = ["--steps", "3", "--validate-every", "3", "--monitor-every", "2", "--batch-size", "8", "--model", "small"]
    fewer = ["--train-images", "40", "--validation-images", "10", "--test-images", "10"]
    assert cli.main(["train", "phantom-training", "--output", str(path), *words, *fewer]) == 0
    looks = looks_of(Run(path))
    assert [look.step for look in looks] == [1, 3]
    assert set(looks[0].beside) == set(BESIDE)
    capsys.readouterr()


@pytest.mark.parametrize(
    ("kind", "chosen", "complaint"),
    [
        (LayerConfig, {"norm": 1.0}, "--norm must lie in"),
        (LayerConfig, {"lambdas": (0.5, 2.0)}, "--lambdas must be at most 1"),
        (LayerConfig, {"ks": ()}, "--ks must be positive numbers"),
        (PrecisionConfig, {"looks": 10, "training_steps": 5}, "--looks is 10"),
    ],
)
def test_bad_settings(kind, chosen, complaint):
    with pytest.raises(UserError, match=complaint):
        kind(**chosen)
