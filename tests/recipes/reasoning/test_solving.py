"""Small networks that learn to solve puzzles: trainings of a few steps, and what goes on from one to the next."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

pytest.importorskip("lightning")
pytest.importorskip("matplotlib")

from running import QUIET, assert_resumes, descent, trained

from torchimplicit.models.reasoner import Reasoner, ReasonerConfig
from torchimplicit.recipes import registry
from torchimplicit.recipes.reasoning.maze import MazeConfig
from torchimplicit.recipes.reasoning.solving import PuzzleTask
from torchimplicit.recipes.reasoning.sudoku import SudokuConfig
from torchimplicit.recipes.runtime.errors import UserError
from torchimplicit.recipes.runtime.execution import opened
from torchimplicit.recipes.runtime.run import quietly
from torchimplicit.recipes.runtime.settings import Machine, Optimization
from torchimplicit.recipes.runtime.trainer import Results

pytestmark = pytest.mark.filterwarnings("ignore::torchimplicit.ConvergenceWarning")

SMALL = {
    "optimization": Optimization(steps=4, batch_size=6, validate_every=2, averaging=0.5),
    "machine": Machine(device="cpu", tensorboard=False),
    "width": 8,
    "heads": 2,
    "segments": 3,
    "training_puzzles": 12,
    "held_out_puzzles": 5,
    "evaluation_starts": 4,
}
SUDOKU = SudokuConfig(side=4, **SMALL)
MAZE = MazeConfig(side=5, **SMALL)


@pytest.mark.parametrize(("name", "config"), [("reasoning-sudoku", SUDOKU), ("reasoning-maze", MAZE)])
def test_a_training_and_its_page(tmp_path, name, config):
    run = trained(name, config, tmp_path / "run")
    found = Results.of(run)
    assert set(found.test.figures) == {"solved", "places", "segments", "residual", "loss"}
    scaling = json.loads((run.path / "scaling.json").read_text())
    assert [one["segments"] for one in scaling["depth"]] == list(range(1, 13))
    assert [one["starts"] for one in scaling["breadth"]] == [1, 2, 4]
    one, *_, most = scaling["breadth"]
    assert one["by_residual"] == one["by_vote"] == one["by_any"] <= most["by_any"]
    assert "Test puzzles as the model solves them" in (run.path / "index.html").read_text()
    run, runner, settings = opened(run.path)
    runner.evaluate(settings, run, QUIET)
    again = json.loads((run.path / "evaluation.json").read_text())
    assert again["test"]["figures"] == pytest.approx(found.test.figures)


def test_a_run_that_is_cut_goes_on(tmp_path):
    assert_resumes("reasoning-sudoku", SUDOKU, tmp_path)


@pytest.mark.parametrize("mixing", ["attention", "mixer"])
def test_it_learns(mixing):
    torch.manual_seed(0)
    task = PuzzleTask(replace(SUDOKU, width=32, mixing=mixing, latent_updates=2, augment=False, exploration=0.0))
    with quietly():
        losses = descent(task, [task.sets["training"].tensors] * 30)
    assert losses[-1] < 0.75 * losses[0]


def test_a_puzzle_goes_on_until_it_is_done():
    torch.manual_seed(0)
    task = PuzzleTask(replace(SUDOKU, augment=False, exploration=0.0))
    given, answer = task.sets["training"].tensors
    batch, other = (given[:6], answer[:6]), (given[6:], answer[6:])
    task.loss(batch)
    first = task.carried
    task.loss(other)
    assert torch.equal(task.carried.puzzle, batch[0])
    assert not torch.equal(task.carried.state[0], first.state[0])
    task.loss(other)
    assert task.carried.segments.tolist() == [3] * 6
    task.loss(other)
    assert torch.equal(task.carried.puzzle, other[0])
    assert task.carried.segments.tolist() == [1] * 6
    torch.nn.init.constant_(task.model.halt.bias, 9.0)  # sure of everything
    task.loss(batch)
    assert task.carried.done.all()
    task.loss(batch)
    assert torch.equal(task.carried.puzzle, batch[0])
    task.begin()
    assert task.carried is None


def test_puzzles_that_are_thought_solved_leave():
    torch.manual_seed(0)
    task = PuzzleTask(SUDOKU)
    given, answer = task.sets["test"].tensors
    assert task.attempt(given, answer).segments.tolist() == [3] * 5
    torch.nn.init.constant_(task.model.halt.bias, 9.0)
    assert task.attempt(given, answer).segments.tolist() == [1] * 5
    task.config = replace(task.config, halting=False)
    assert task.attempt(given, answer).segments.tolist() == [3] * 5


def test_the_network_knows_the_symmetries_of_sudoku():
    # by its relations alone: puzzles whose rows change places have answers whose rows do
    torch.manual_seed(0)
    game = SUDOKU.game()
    model = Reasoner(ReasonerConfig(tokens=5, answers=4, width=8, heads=2), game.relations())
    puzzle = torch.randint(0, 5, (2, 16))
    state = model.start(puzzle)
    order = torch.tensor([2, 3, 0, 1])[:, None] * 4 + torch.arange(4)
    moved = model(puzzle[:, order.flatten()], tuple(part[:, order.flatten()] for part in state)).value
    straight = model(puzzle, state).value
    torch.testing.assert_close(moved[0], straight[0][:, order.flatten()], atol=1e-5, rtol=1e-4)


def test_settings_that_make_no_sense():
    with pytest.raises(UserError, match="--width 10 cannot be cut into --heads 4"):
        SudokuConfig(width=10)
    with pytest.raises(UserError, match="--accumulate"):
        SudokuConfig(optimization=Optimization(accumulate=2))
    with pytest.raises(UserError, match="--side must lie between 5 and 30"):
        MazeConfig(side=31)
    assert registry.settings("reasoning-sudoku-trm").width == registry.settings("reasoning-maze-trm").width == 512
