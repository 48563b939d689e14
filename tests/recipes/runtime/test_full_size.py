"""What training at full size asks for: batches in parts, averaged weights, rare logs, weights of others."""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("lightning")

import tiny
import torch
from rich.console import Console
from tiny import RUNNER, TinyConfig

from torchimplicit.recipes import registry
from torchimplicit.recipes.runtime.errors import UserError
from torchimplicit.recipes.runtime.fitting import read_checkpoint
from torchimplicit.recipes.runtime.log import rows
from torchimplicit.recipes.runtime.run import RunOptions, create
from torchimplicit.recipes.runtime.settings import Equilibria, Machine, Optimization, check_batch
from torchimplicit.recipes.runtime.task import Shard, ShuffledSteps
from torchimplicit.recipes.runtime.trainer import Results

CALM = TinyConfig(dropout=0.0, equilibria=Equilibria(tolerance=1e-10, backward_tolerance=1e-10, solver_steps=60))


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    monkeypatch.setattr(registry, "RECIPES", dict(registry.RECIPES))
    tiny.register()


def trained(path, config):
    run = create("tiny", RunOptions(output=path))
    run.describe("tiny", config)
    assert RUNNER.train(config, run, Console(quiet=True))
    return run


def weights(run):
    return {name: p for name, p in read_checkpoint(run.checkpoint)["state_dict"].items() if p.is_floating_point()}


def changed(config, **optimization):
    return replace(config, optimization=replace(config.optimization, **optimization))


def test_a_batch_in_parts_is_the_batch(tmp_path):
    whole = weights(trained(tmp_path / "whole", CALM))
    run = trained(tmp_path / "parts", changed(CALM, accumulate=3))
    for name, p in weights(run).items():
        torch.testing.assert_close(p, whole[name], rtol=1e-4, atol=1e-5)
    assert len([row for row in rows(run.metrics) if "loss" in row]) == 12
    with pytest.raises(UserError, match="cuts the batch of one device"):
        check_batch(Optimization(accumulate=2), Machine(devices=2))
    with pytest.raises(UserError, match="cannot be cut into --accumulate 9 parts"):
        check_batch(Optimization(accumulate=9, batch_size=8), Machine())
    with pytest.raises(UserError, match="cannot be cut; take a smaller"):
        tiny.TinyTask(CALM).cut({"x": 1}, 2)


def test_the_average_of_the_weights_is_what_is_tested(tmp_path):
    config = changed(CALM, averaging=0.5, validate_every=12)
    run = trained(tmp_path / "run", config)
    read = read_checkpoint(run.checkpoint)
    average = read["average"]
    assert set(average) == {name.removeprefix("task.") for name in weights(run)}
    assert any(not torch.equal(average[name], read["state_dict"][f"task.{name}"]) for name in average)
    task = RUNNER.best(config, run)
    for name, p in task.named_parameters():
        torch.testing.assert_close(p, average[name])
    batch = next(iter(task.held_out_batches("validation", Shard())))
    tested = sum(task.score(batch) for batch in task.held_out_batches("test", Shard()))
    assert Results.of(run).test.figures == pytest.approx(task.figures(tested.tolist()))
    assert batch is not None


def test_the_average_goes_on_where_a_run_was_cut(tmp_path):
    config = changed(CALM, averaging=0.5, schedule="constant")
    whole = read_checkpoint(trained(tmp_path / "whole", config).checkpoint)["average"]
    run = trained(tmp_path / "cut", changed(config, steps=8))
    assert RUNNER.train(config, run, Console(quiet=True))
    for name, p in read_checkpoint(run.checkpoint)["average"].items():
        torch.testing.assert_close(p, whole[name])


def test_evaluation_has_a_budget_of_its_own(tmp_path):
    one = replace(CALM, equilibria=replace(CALM.equilibria, evaluation_steps=2))
    found = Results.of(trained(tmp_path / "run", one))
    assert found.validations[0].forward <= 3 < found.costs.forward
    assert found.test.forward <= 3


def test_steps_between_logs_are_not_logged(tmp_path):
    run = trained(tmp_path / "run", replace(CALM, machine=replace(CALM.machine, log_every=5)))
    assert [row["step"] for row in rows(run.metrics) if "loss" in row] == [5, 10, 12]
    found = Results.of(run)
    assert found.steps == 12
    assert found.seconds > 0
    same = weights(trained(tmp_path / "same", CALM))
    for name, p in weights(run).items():
        torch.testing.assert_close(p, same[name])


def test_weights_of_a_file(tmp_path):
    run = trained(tmp_path / "first", CALM)
    task = RUNNER.best(CALM, run)
    file = tmp_path / "weights.pt"
    torch.save({"state_dict": {f"module.{name}": p for name, p in task.state_dict().items()}}, file)
    only = replace(CALM, machine=replace(CALM.machine, weights=file, evaluate_only=True))
    again = trained(tmp_path / "again", only)
    found = again.read_json("evaluation.json")["test"]["figures"]
    assert found == pytest.approx(Results.of(run).test.figures)
    torch.save({name: p[:1] for name, p in task.state_dict().items()}, file)
    with pytest.raises(UserError, match=r"is of another model: .* in the model"):
        trained(tmp_path / "other", only)
    torch.save({"state_dict": dict(task.state_dict())}, file)
    whole = file.read_bytes()
    at = whole.index(task.equilibrium.cell.linear.weight.detach().numpy().tobytes())
    for damaged in (whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :], whole[:-1]):
        file.write_bytes(damaged)
        with pytest.raises(UserError, match="is damaged"):
            trained(tmp_path / f"damaged {len(damaged)}", only)
    file.write_bytes(b"")
    with pytest.raises(UserError, match="no file of tensors alone"):
        trained(tmp_path / "empty", only)
    file.write_bytes(b"no tensors")
    with pytest.raises(UserError, match="no file of tensors alone"):
        trained(tmp_path / "none", only)
    with pytest.raises(UserError, match="--evaluate-only needs --weights"):
        Machine(evaluate_only=True)


def test_a_pass_may_end_with_a_smaller_batch():
    steps = ShuffledSteps(10, 4, 0, range(6), Shard(), whole=True)
    batches = list(steps)
    assert [len(batch) for batch in batches] == [4, 4, 2] * 2
    assert sorted(index for batch in batches[:3] for index in batch) == list(range(10))


def test_settings_that_make_no_sense():
    with pytest.raises(UserError, match="--nesterov needs a positive --momentum"):
        Optimization(nesterov=True, momentum=0.0)
    with pytest.raises(UserError, match="--averaging must lie in"):
        Optimization(averaging=1.0)
    with pytest.raises(UserError, match="--log-every must be positive"):
        Machine(log_every=0)
