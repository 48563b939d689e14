"""What all fits of fields share, on made-up signals."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
import torch

pytest.importorskip("lightning")
pytest.importorskip("tyro")

from rich.console import Console
from running import descent

from torchimplicit.errors import UnsupportedDerivativeError
from torchimplicit.gradients import Implicit, NeumannPhantom
from torchimplicit.recipes.representations.fit import (
    FieldRunner,
    FieldTask,
    Grid,
    Parts,
    Representation,
    accumulated,
    centres,
    check_fit,
    check_slopes,
    chunk_points,
    decibels,
    every_other,
    floats_a_point,
    full_batch,
    truncated,
    write_page,
)
from torchimplicit.recipes.runtime.errors import UserError
from torchimplicit.recipes.runtime.log import rows
from torchimplicit.recipes.runtime.run import RunOptions, create
from torchimplicit.recipes.runtime.settings import Equilibria, Machine, Optimization
from torchimplicit.recipes.runtime.step_cost import peak_bytes
from torchimplicit.recipes.runtime.task import Shard
from torchimplicit.recipes.runtime.trainer import Results


@dataclass(frozen=True, kw_only=True)
class WaveConfig:
    """A sound of a few samples."""

    samples: int = 60
    """How many."""
    representation: Representation = field(default_factory=lambda: Representation(width=8))
    optimization: Optimization = field(default_factory=lambda: full_batch(9, 3, learning_rate=1e-2))
    equilibria: Equilibria = field(default_factory=truncated)
    machine: Machine = field(default_factory=lambda: Machine(device="cpu", tensorboard=False))


def wave(config: WaveConfig) -> FieldTask:
    t = torch.linspace(0, 12, config.samples)
    grid = Grid(torch.stack([t.sin(), (2 * t).cos()], 1))
    return FieldTask(config, grid, Parts.same(grid), 4.0, about="A wave.")


RUNNER = FieldRunner(wave, lambda config, task, results, run: write_page("A wave", task, results, run, []))


def trained(path, config, runner=RUNNER):
    run = create("implicit-image", RunOptions(output=path))
    run.describe("implicit-image", config)
    assert runner.train(config, run, Console(quiet=True))
    return run


def losses(run):
    return [row["loss"] for row in rows(run.metrics) if "loss" in row]


@pytest.fixture(autouse=True)
def _seeded(one_thread):
    torch.manual_seed(0)


class TestPoints:
    def test_cells_are_cubes_whose_longest_side_spans_the_domain(self):
        grid = Grid(torch.zeros(4, 8, 1))
        x, _ = grid.at(torch.tensor([0, 7, 24, 31]))
        torch.testing.assert_close(
            x, torch.tensor([[-0.375, -0.875], [-0.375, 0.875], [0.375, -0.875], [0.375, 0.875]])
        )

    def test_a_point_has_the_value_at_its_place(self):
        values = torch.rand(3, 4, 5, 2)
        _, found = Grid(values).at(torch.tensor([1 * 20 + 2 * 5 + 3]))
        torch.testing.assert_close(found[0], values[1, 2, 3])

    def test_bytes_run_from_minus_one_to_one(self):
        _, values = Grid(torch.tensor([[0], [255]], dtype=torch.uint8)).at(torch.arange(2))
        assert values.flatten().tolist() == [-1, 1]

    def test_finer_grids_cover_the_same_domain(self):
        coarse = centres(torch.arange(5), (5,), (1.0,))
        fine = centres(torch.arange(15), (15,), (1.0,)).reshape(5, 3, 1).mean(1)
        torch.testing.assert_close(coarse, fine)

    def test_every_other_cell_in_each_direction(self):
        parts = [every_other((4, 6), offset) for offset in ((0, 0), (0, 1), (1, 0), (1, 1))]
        assert sorted(torch.cat(parts).tolist()) == list(range(24))
        assert parts[0].tolist() == [0, 2, 4, 12, 14, 16]


class TestMemory:
    @pytest.mark.parametrize("chunk", [3, 10, 100])
    def test_chunks_give_the_value_and_the_gradient_of_the_whole(self, chunk):
        weight = torch.randn(4, requires_grad=True, dtype=torch.float64)
        unused = torch.randn(2, requires_grad=True)
        x = torch.randn(20, 4, dtype=torch.float64)

        def value(index):
            return (x[index] @ weight).sin().mean().double()

        loss = 3 * accumulated(value, torch.arange(20), chunk, [weight, unused])
        loss.backward()
        expected = 3 * value(torch.arange(20))
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(weight.grad, torch.autograd.grad(expected, weight)[0])

    def test_less_memory_makes_smaller_chunks(self):
        config = WaveConfig(representation=Representation(width=256, memory_mb=64))
        less = replace(config, representation=replace(config.representation, memory_mb=32))
        assert chunk_points(config, 10) == 64 * 2**20 // (4 * floats_a_point(config))
        assert chunk_points(less, 10) < chunk_points(config, 10)

    @pytest.mark.parametrize("filter", ["siren", "fourier", "gabor"])
    @pytest.mark.parametrize(
        ("implicit", "amortize", "gradient"),
        [(False, "refresh", "implicit"), (True, "refresh", "neumann-phantom"), (True, "off", "implicit")],
    )
    def test_a_step_holds_no_more_than_is_reckoned(self, filter, implicit, amortize, gradient):
        config = WaveConfig(
            samples=2000,
            representation=Representation(width=32, depth=2, filter=filter, implicit=implicit, amortize=amortize),
            equilibria=replace(truncated(), gradient=gradient),
        )
        task = wave(config)
        (batch,) = task.training_batches(range(1), Shard())
        for _ in range(2):  # a solve, and then a single evaluation
            held = peak_bytes(lambda: task.loss(batch).backward(), torch.device("cpu"))
            assert 0.1 * 4 * 2000 * floats_a_point(config) < held < 4 * 2000 * floats_a_point(config)

    def test_nor_does_a_step_in_chunks(self):
        config = WaveConfig(samples=6000, representation=Representation(width=32, memory_mb=4))
        task = wave(config)
        (batch,) = task.training_batches(range(1), Shard())
        assert task.chunk < 1000
        for _ in range(2):
            held = peak_bytes(lambda: task.loss(batch).backward(), torch.device("cpu"))
            assert held < 1.3 * 4 * 2**20, (
                "what one chunk leaves behind is gone when the next begins, but for its state"
            )

    def test_states_that_do_not_fit_are_refused(self):
        config = WaveConfig(representation=Representation(width=1024, memory_mb=100))
        with pytest.raises(UserError, match="amortize off"):
            chunk_points(config, 10**6)
        chunk_points(replace(config, representation=replace(config.representation, amortize="off")), 10**6)

    def test_a_step_in_chunks_is_the_step_of_the_whole(self, monkeypatch):
        found = []
        for chunk in (1000, 7):
            monkeypatch.setattr("torchimplicit.recipes.representations.fit.chunk_points", lambda *given, c=chunk: c)
            torch.manual_seed(0)
            task = wave(WaveConfig(optimization=full_batch(3, 3)))
            optimizer = torch.optim.SGD(task.parameters(), lr=0.1)
            for batch in task.training_batches(range(3), Shard()):
                optimizer.zero_grad()
                loss = task.loss(batch)
                loss.backward()
                optimizer.step()
                if chunk == 1000 and len(found) == 0:
                    assert len(batch) == 60
            found.append([loss.detach(), *(p.detach().clone() for p in task.model.head.parameters())])
        for a, b in zip(*found, strict=True):
            # the power method takes a step a chunk, and a solve ends within its tolerance
            torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-3)


class TestTask:
    def test_a_step_has_all_points_in_order(self):
        task = wave(WaveConfig())
        batches = list(task.training_batches(range(2, 4), Shard()))
        assert all(torch.equal(batch, torch.arange(60)) for batch in batches)
        assert task.model.equilibrium.warm_start.samples is None

    def test_or_a_part_which_depends_on_the_step_alone(self):
        config = WaveConfig(optimization=replace(full_batch(9, 3), batch_size=16))
        task = wave(config)
        batches = list(task.training_batches(range(7), Shard()))
        again = list(task.training_batches(range(4, 7), Shard()))
        assert all(torch.equal(a, b) for a, b in zip(batches[4:], again, strict=True))
        assert len(set(torch.cat(batches[:3]).tolist())) == 48
        assert task.model.equilibrium.warm_start.samples == 60
        for batch in batches:
            task.loss(batch).backward()
        assert task.model.equilibrium.solution.evaluations == 1, "the states of a whole pass are remembered"

    def test_processes_share_a_step(self):
        config = WaveConfig(optimization=replace(full_batch(9, 3), batch_size=16))
        for one in (config, WaveConfig()):
            task = wave(one)
            (whole,) = task.training_batches(range(5, 6), Shard())
            parts = [next(iter(task.training_batches(range(5, 6), Shard(rank, 3)))) for rank in range(3)]
            assert sorted(torch.cat(parts).tolist()) == sorted(whole.tolist())

    def test_the_signal_to_noise_ratio_is_that_of_values_within_the_range(self):
        task = wave(WaveConfig())
        with torch.no_grad():
            task.model.head.weight.zero_()
            task.model.head.bias.fill_(5.0)
        sums = sum(task.score(batch) for batch in task.held_out_batches("test", Shard()))
        _, y = task.points.at(torch.arange(60))
        assert task.figures(sums.tolist())["PSNR"] == pytest.approx(decibels(float((1 - y).square().mean()), 2.0))

    def test_the_field_is_sampled_a_part_at_a_time(self, monkeypatch):
        task = wave(WaveConfig())
        whole = task.on_grid([25])
        monkeypatch.setattr(task, "chunk", 7)
        torch.testing.assert_close(task.on_grid([25], lambda values: 2 * values), 2 * whole, rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(task.cells([25], range(5, 19)), whole[5:19], rtol=1e-2, atol=1e-2)

    def test_decibels(self):
        assert decibels(0.04, 2.0) == pytest.approx(20.0)
        assert decibels(0.0, 2.0) == pytest.approx(206, abs=1)

    @pytest.mark.parametrize("filter", ["siren", "fourier", "gabor"])
    @pytest.mark.parametrize("implicit", [True, False])
    def test_every_kind_is_fitted(self, filter, implicit):
        config = WaveConfig(representation=Representation(width=12, filter=filter, implicit=implicit))
        task = wave(config)
        found = descent(task, task.training_batches(range(60), Shard()))
        assert found[-1] < 0.5 * found[0]
        assert task.describe().startswith(f"A wave. {'Implicit' if implicit else 'Explicit'}")
        assert task.on_grid([25]).shape == (25, 2)

    @pytest.mark.parametrize("amortize", ["refresh", "solve", "off"])
    def test_amortization(self, amortize):
        config = WaveConfig(representation=Representation(width=8, amortize=amortize))
        task = wave(config)
        evaluations = []
        for batch in task.training_batches(range(3), Shard()):
            task.loss(batch).backward()
            evaluations.append(task.model.equilibrium.solution.evaluations)
        assert (evaluations[1] == 1) == (amortize != "off")
        assert isinstance(task.model.equilibrium.gradient, NeumannPhantom)

    def test_the_gradient_of_the_settings(self):
        task = wave(WaveConfig(equilibria=replace(truncated(), gradient="implicit")))
        assert isinstance(task.model.equilibrium.gradient, Implicit)


class TestSettings:
    @pytest.mark.parametrize(
        ("gradient", "amortize", "good"),
        [
            ("unrolled-phantom", "refresh", False),
            ("unrolled-phantom", "solve", True),
            ("unrolled", "solve", False),
            ("unrolled", "off", True),
            ("implicit", "refresh", True),
            ("one-step", "refresh", True),
        ],
    )
    def test_estimators_and_amortization(self, gradient, amortize, good):
        config = WaveConfig(
            representation=Representation(amortize=amortize), equilibria=replace(truncated(), gradient=gradient)
        )
        if good:
            check_fit(config)
            wave(config).model
            return
        with pytest.raises(UserError, match="--amortize"):
            check_fit(config)

    def test_precision(self):
        with pytest.raises(UserError, match="round the coordinates"):
            RUNNER.check(WaveConfig(machine=Machine(device="cpu", precision="bf16-mixed")))

    def test_sizes(self):
        with pytest.raises(UserError, match="--width"):
            Representation(width=0)


class TestSlopes:
    def fitted_by_slopes(self, config):
        def criterion(field, x, y):
            x = x.requires_grad_()
            (slope,) = torch.autograd.grad(field(x)[:, 0].sum(), x, create_graph=True)
            return (slope - y[:, :1]).square().mean()

        t = torch.linspace(-1, 1, config.samples)
        grid = Grid(torch.stack([(3 * t).cos(), t], 1))
        task = FieldTask(config, grid, Parts.same(grid), 4.0, criterion)
        return descent(task, task.training_batches(range(40), Shard()))[-1]

    def config(self, **changes):
        return WaveConfig(
            representation=Representation(width=12, amortize=changes.pop("amortize", "solve")),
            equilibria=replace(truncated(), gradient=changes.pop("gradient", "implicit"), tolerance=1e-4),
        )

    def test_a_field_is_fitted_to_given_slopes(self):
        config = self.config()
        check_slopes(config)
        assert self.fitted_by_slopes(config) < 0.1

    @pytest.mark.parametrize(
        "changes", [{"gradient": "one-step"}, {"gradient": "neumann-phantom"}, {"amortize": "refresh"}]
    )
    def test_estimates_without_a_second_derivative_are_refused(self, changes):
        config = self.config(**dict(changes))
        with pytest.raises(UserError, match="second derivative"):
            check_slopes(config)
        with pytest.raises(UnsupportedDerivativeError):
            self.fitted_by_slopes(config)


class TestRuns:
    def test_a_run_leaves_its_page_and_curve(self, tmp_path):
        run = trained(tmp_path / "run", WaveConfig())
        assert (run.path / "figures" / "curve.png").is_file()
        assert "A wave. Implicit Fourier MFN" in (run.path / "index.html").read_text()
        assert Results.of(run).costs.forward == pytest.approx(1, abs=3)
        logged = [row["forward_evaluations"] for row in rows(run.metrics) if "loss" in row]
        assert [value == 1 for value in logged] == [False, True, True] * 3, "a segment begins with a solve"

    def test_a_resumed_run_has_the_losses_of_an_undisturbed_one(self, tmp_path):
        whole = trained(tmp_path / "whole", WaveConfig())
        short = replace(WaveConfig(), optimization=replace(WaveConfig().optimization, steps=6))
        cut = trained(tmp_path / "cut", short)
        assert RUNNER.train(WaveConfig(), cut, Console(quiet=True))
        assert losses(cut) == losses(whole)

    def test_evaluation_shows_the_fit_again(self, tmp_path):
        run = trained(tmp_path / "run", WaveConfig())
        (run.path / "index.html").unlink()
        RUNNER.evaluate(WaveConfig(), run, Console(quiet=True))
        assert (run.path / "index.html").is_file()
        assert run.read_json("evaluation.json")["test"]["figures"] == pytest.approx(Results.of(run).test.figures)
