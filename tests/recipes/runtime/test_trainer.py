"""The training that all recipes share: resume, pretraining, penalties, costs, several processes, faults."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("lightning")
pytest.importorskip("tyro")

import tiny
from rich.console import Console
from tiny import RUNNER, TinyConfig

from torchimplicit import cli
from torchimplicit.gradients import Unrolled
from torchimplicit.recipes import registry
from torchimplicit.recipes.runtime.errors import DivergedError, UserError
from torchimplicit.recipes.runtime.log import rows
from torchimplicit.recipes.runtime.module import rate_share
from torchimplicit.recipes.runtime.run import Run, RunOptions, create
from torchimplicit.recipes.runtime.settings import Equilibria, Machine, Optimization
from torchimplicit.recipes.runtime.task import ESTIMATORS, InOrder, Shard, ShuffledSteps
from torchimplicit.recipes.runtime.trainer import Results


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    monkeypatch.setattr(registry, "RECIPES", dict(registry.RECIPES))
    tiny.register()


def started(path: Path, config: TinyConfig) -> Run:
    run = create("tiny", RunOptions(output=path))
    run.describe("tiny", config)
    return run


def trained(path: Path, config: TinyConfig | None = None) -> Run:
    config = config or TinyConfig()
    run = started(path, config)
    assert RUNNER.train(config, run, Console(quiet=True))
    return run


def losses(run: Run) -> list[tuple[float, float]]:
    return [(row["step"], row["loss"]) for row in rows(run.metrics) if "loss" in row]


def command(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(Path(tiny.__file__)), *words],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


class TestResults:
    def test_what_a_run_leaves(self, tmp_path):
        run = trained(tmp_path / "run")
        results = Results.of(run)
        assert results.state == "complete"
        assert results.steps == 12
        assert [v.step for v in results.validations] == [4, 8, 12]
        assert results.best is not None
        assert results.best.figures["accuracy"] == max(v.figures["accuracy"] for v in results.validations)
        assert results.test is not None
        assert results.test.step == results.best.step, "the tested weights are those of the best validation"
        assert results.costs is not None
        assert results.costs.forward > 1
        assert results.costs.backward > 0
        assert results.settings["dropout"] == 0.2
        assert [step for step, _ in losses(run)] == list(range(1, 13))
        assert list((run.path / "logs").glob("events.out.tfevents.*"))
        assert run.read_json("progress.json")["done"] == 12

    def test_measuring_again_gives_the_same(self, tmp_path):
        run = trained(tmp_path / "run")
        RUNNER.evaluate(TinyConfig(), run, Console(quiet=True))
        test = Results.of(run).test
        assert test is not None
        assert run.read_json("evaluation.json")["test"]["figures"] == test.figures

    def test_the_seed_decides(self, tmp_path):
        one, same = trained(tmp_path / "1"), trained(tmp_path / "2")
        assert losses(one) == losses(same)
        other = replace(TinyConfig(), optimization=replace(TinyConfig().optimization, seed=1))
        assert losses(trained(tmp_path / "3", other)) != losses(one)


class TestResume:
    def test_after_a_kill_the_losses_are_those_of_an_undisturbed_run(self, tmp_path):
        whole, cut = tmp_path / "whole", tmp_path / "cut"
        assert command("train", "tiny", "--output", str(whole)).returncode == 0
        assert command("train", "tiny", "--output", str(cut), "--kill", "7").returncode == -9
        assert Run(cut).read()["state"] == "running", "nobody could note the kill"
        done = command("resume", str(cut), TINY_SPARE="1")
        assert done.returncode == 0, done.stderr
        assert losses(Run(cut)) == losses(Run(whole))
        assert Results.of(Run(cut)).test == replace(
            Results.of(Run(whole)).test, seconds=Results.of(Run(cut)).test.seconds
        )

    def test_a_complete_run_is_not_resumed(self, tmp_path, capsys):
        run = trained(tmp_path / "run")
        run.mark("complete")
        assert cli.main(["resume", str(run.path)]) == 2
        assert "is complete" in capsys.readouterr().err

    def test_a_checkpoint_of_another_model(self, tmp_path):
        one = trained(tmp_path / "one")
        torch.save({"state_dict": {}, "history": json.loads('{"steps": 4}')}, one.checkpoint)
        config = TinyConfig(optimization=Optimization(steps=20, batch_size=8, validate_every=4))
        with pytest.raises(UserError, match=r"last\.ckpt does not fit"):
            RUNNER.train(config, one, Console(quiet=True))

    def test_a_broken_checkpoint(self, tmp_path):
        one = trained(tmp_path / "one")
        for path in (one.checkpoint, one.previous, one.best):
            path.write_bytes(b"no checkpoint")
        with pytest.raises(UserError, match=r"last\.ckpt is damaged.*no earlier one"):
            RUNNER.train(TinyConfig(), one, Console(quiet=True))


class TestSteps:
    def test_pretraining_unrolls_and_then_does_not(self, tmp_path, monkeypatch):
        seen = []
        loss = tiny.TinyTask.loss

        def watched(self, batch):
            seen.append((type(self.equilibrium.gradient).__name__, self.equilibrium.solver.max_steps))
            return loss(self, batch)

        monkeypatch.setattr(tiny.TinyTask, "loss", watched)
        run = trained(tmp_path / "run", TinyConfig(equilibria=Equilibria(pretrain_steps=3, pretrain_depth=2)))
        assert seen[:3] == [(Unrolled.__name__, 2)] * 3
        assert set(seen[3:]) == {("Implicit", 30)}
        logged = [row for row in rows(run.metrics) if "loss" in row]
        assert [row["pretraining"] for row in logged] == [1.0] * 3 + [0.0] * 9
        # one more than the applications: the solver measures the residual of what it returns
        assert [row["forward_evaluations"] for row in logged[:3]] == [3.0] * 3

    def test_the_penalty_changes_training_with_its_probability(self, tmp_path):
        def run(name, **chosen):
            return losses(trained(tmp_path / name, TinyConfig(equilibria=Equilibria(**chosen))))

        never = run("never")
        assert run("improbable", jacobian_weight=1.0, jacobian_probability=0.0) == never
        assert run("always", jacobian_weight=1.0) != never

    def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_what_was_done(self, tmp_path):
        config = TinyConfig(poison=7)
        run = started(tmp_path / "run", config)
        with pytest.raises(DivergedError, match="loss is nan at step 7"):
            RUNNER.train(config, run, Console(quiet=True))
        results = Results.of(run)
        assert results.state == "diverged"
        assert results.steps == 4, "the last whole segment"
        assert results.best is not None

    def test_watching_the_gradient_changes_nothing(self, tmp_path):
        plain = trained(tmp_path / "plain")
        watched = trained(tmp_path / "watched", TinyConfig(machine=Machine(device="cpu", monitor_every=5)))
        assert losses(watched) == losses(plain)
        found = [row for row in rows(watched.metrics) if "gradient/task.equilibrium/cosine" in row]
        assert [row["step"] for row in found] == [1, 6, 11]
        assert all(0.9 < row["gradient/task.equilibrium/cosine"] < 1.0001 for row in found)
        one, other = Results.of(plain).costs, Results.of(watched).costs
        assert one is not None
        assert other is not None
        assert (one.forward, one.backward) == (other.forward, other.backward)

    def test_watching_goes_on_after_a_resume(self, tmp_path):
        whole, cut = tmp_path / "whole", tmp_path / "cut"
        words = ["--monitor-every", "2", "--gradient", "unbiased-neumann"]
        assert command("train", "tiny", "--output", str(whole), *words).returncode == 0
        assert command("train", "tiny", "--output", str(cut), "--kill", "7", *words).returncode == -9
        assert command("resume", str(cut), TINY_SPARE="1").returncode == 0
        name = "gradient/task.equilibrium/cosine"
        found = [
            [(row["step"], row[name]) for row in rows(Run(path).metrics) if name in row] for path in (whole, cut)
        ]  # fmt: skip
        assert found[0] == found[1]
        assert losses(Run(cut)) == losses(Run(whole))

    @pytest.mark.parametrize("name", list(ESTIMATORS))
    def test_every_estimator_trains(self, tmp_path, name):
        solver = "reversible" if name == "reversible" else "anderson"
        config = TinyConfig(
            optimization=Optimization(steps=4, batch_size=8, validate_every=4),
            equilibria=Equilibria(gradient=name, solver=solver),
        )
        assert Results.of(trained(tmp_path / "run", config)).costs is not None

    def test_divergence_is_told_in_one_line(self, tmp_path, capsys):
        assert cli.main(["train", "tiny", "--poison", "7", "--output", str(tmp_path / "run")]) == 1
        error = capsys.readouterr().err
        assert "training diverged: the loss is nan at step 7; a smaller --learning-rate may help" in error
        assert error.count("\n") == 1
        assert Run(tmp_path / "run").read()["state"] == "diverged"

    def test_mixed_precision(self, tmp_path):
        config = TinyConfig(machine=Machine(device="cpu", precision="bf16-mixed"))
        assert Results.of(trained(tmp_path / "run", config)).test is not None

    @pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
    def test_optimizers_and_clipping(self, tmp_path, optimizer):
        chosen = Optimization(steps=4, batch_size=8, validate_every=4, optimizer=optimizer, clip_norm=1e-12)
        first, *rest = [loss for _, loss in losses(trained(tmp_path / "run", TinyConfig(optimization=chosen)))]
        assert rest
        assert first > 0

    def test_two_processes_see_the_batches_of_one(self, tmp_path):
        undropped = TinyConfig(dropout=0.0, equilibria=Equilibria(tolerance=1e-6, backward_tolerance=1e-6))
        one = trained(tmp_path / "one", undropped)
        two = trained(tmp_path / "two", replace(undropped, machine=Machine(device="cpu", devices=2)))
        # the first process logs its own share's loss; weights, and so the validation, are common
        for a, b in zip(Results.of(one).validations, Results.of(two).validations, strict=True):
            assert a.figures["loss"] == pytest.approx(b.figures["loss"], rel=1e-4)
        test_one, test_two = Results.of(one).test, Results.of(two).test
        assert test_one is not None
        assert test_two is not None
        assert test_one.figures["loss"] == pytest.approx(test_two.figures["loss"], rel=1e-4)


class TestSchedules:
    def test_warmup_then_cosine(self):
        chosen = Optimization(steps=100, warmup_steps=10, final_share=0.1)
        assert rate_share(chosen, 0) == pytest.approx(0.1)
        assert rate_share(chosen, 9) == 1
        assert rate_share(chosen, 55) == pytest.approx(0.55)
        assert rate_share(chosen, 100) == pytest.approx(0.1)

    def test_milestones(self):
        chosen = Optimization(schedule="milestones", milestones=(10, 20), decay=0.5)
        assert [rate_share(chosen, step) for step in (9, 10, 19, 20)] == [1, 0.5, 0.5, 0.25]

    def test_constant(self):
        assert rate_share(Optimization(schedule="constant"), 500) == 1


class TestSampling:
    def test_a_pass_sees_every_sample_once(self):
        seen = [i for batch in ShuffledSteps(10, 5, 0, range(2), Shard()) for i in batch]
        assert sorted(seen) == list(range(10))

    def test_steps_do_not_depend_on_where_one_begins(self):
        whole = list(ShuffledSteps(10, 3, 0, range(9), Shard()))
        assert list(ShuffledSteps(10, 3, 0, range(5, 9), Shard())) == whole[5:]

    def test_processes_share_a_batch(self):
        (whole,) = ShuffledSteps(10, 6, 0, range(1), Shard())
        shares = [next(iter(ShuffledSteps(10, 6, 0, range(1), Shard(rank, 2)))) for rank in range(2)]
        assert sorted(shares[0] + shares[1]) == sorted(whole)

    def test_in_order(self):
        assert list(InOrder(5, 2, Shard())) == [[0, 1], [2, 3], [4]]
        assert [list(InOrder(5, 2, Shard(rank, 2))) for rank in range(2)] == [[[0, 2], [4]], [[1, 3]]]


class TestBadSettings:
    @pytest.mark.parametrize(
        ("kind", "chosen", "complaint"),
        [
            (Optimization, {"steps": 0}, "--steps must be positive"),
            (Optimization, {"momentum": 1.5}, r"--momentum must lie in \[0, 1\]"),
            (Optimization, {"milestones": (3,)}, "--milestones go with --schedule milestones"),
            (Equilibria, {"phantom_damping": 0.0}, "--phantom-damping must lie in"),
            (Machine, {"devices": 0}, "--devices must be positive"),
        ],
    )
    def test_say_the_option(self, kind, chosen, complaint):
        with pytest.raises(UserError, match=complaint):
            kind(**chosen)

    def test_more_devices_than_samples(self):
        with pytest.raises(UserError, match="every device must get a sample"):
            RUNNER.check(TinyConfig(optimization=Optimization(batch_size=1), machine=Machine(device="cpu", devices=2)))


def test_a_report_compares_runs(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    one = trained(tmp_path / "one")
    trained(tmp_path / "two")
    page = tmp_path / "report.html"
    monkeypatch.chdir(tmp_path)
    assert cli.main(["report", "one", "two", "--page", str(page)]) == 0
    assert "<svg" in page.read_text(encoding="utf-8")
    out = capsys.readouterr().out
    assert " one " in out
    assert " two " in out
    page.write_text("mine")
    assert cli.main(["report", str(one.path), "--page", str(page)]) == 2
    assert page.read_text() == "mine"


def test_a_report_names_a_recipe_that_is_unknown(tmp_path, capsys, monkeypatch):
    """All that it shows is in the run's folder, so a run of another version is compared, and said to be one."""
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.chdir(tmp_path)
    trained(tmp_path / "one")
    known = {name: entry for name, entry in registry.RECIPES.items() if name != "tiny"}
    monkeypatch.setattr(registry, "RECIPES", known)
    assert cli.main(["report", "one"]) == 0
    assert "no recipe of this version" in " ".join(capsys.readouterr().out.split())
