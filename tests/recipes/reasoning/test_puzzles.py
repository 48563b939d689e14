"""Puzzles have one answer, of the difficulty that was asked for, and so have those that are made of them."""

from __future__ import annotations

from itertools import permutations, product

import pytest
import torch

pytest.importorskip("lightning")

from torchimplicit.recipes.reasoning.maze import END, START, WALL, Maze
from torchimplicit.recipes.reasoning.solving import made
from torchimplicit.recipes.reasoning.sudoku import Sudoku
from torchimplicit.recipes.runtime.errors import UserError

ARRANGED = list(product([(0, 1), (1, 0)], (0, 1), (0, 1)))
"""The order of two bands, and whether the lines of each change places."""


@pytest.mark.parametrize("side", [4, 6, 9])
@pytest.mark.parametrize("difficulty", ["easy", "medium", "hard"])
def test_sudoku_has_one_solution_and_keeps_it(side, difficulty):
    game = Sudoku(side, difficulty)
    puzzles = made(game, 3, seed=1)
    torch.manual_seed(0)
    for given, answer in (puzzles, game.varied(*puzzles)):
        for clues, digits in zip(given.tolist(), answer.tolist(), strict=True):
            assert game.solutions(clues, 2) == [[digit + 1 for digit in digits]]
            assert game.solvable(clues)
            assert all(sorted(digits[p] for p in unit) == list(range(side)) for unit in game.units)


def test_no_clue_can_be_missed_and_difficulty_is_what_it_says():
    game = Sudoku(6, "hard")
    given, _ = made(game, 4, seed=0)
    for clues in given.tolist():
        for place in (p for p, clue in enumerate(clues) if clue):
            assert len(game.solutions([*clues[:place], 0, *clues[place + 1 :]], 2)) == 2
    # seventeen clues that need more than singles; no deduction fills in what the solution has not
    extreme = "000000010400000000020000000000050407008000300001090000300400200050100000000806000"
    clues = [int(clue) for clue in extreme]
    (solution,) = Sudoku(9, "hard").solutions(clues, 2)
    for difficulty in ("easy", "medium"):
        filled = Sudoku(9, difficulty).deduced(clues)
        assert all(found in (0, digit) for found, digit in zip(filled, solution, strict=True))
    assert not Sudoku(9, "easy").solvable(clues)


def test_small_boards_have_few_puzzles_up_to_symmetry():
    # 36 minimal ones: every image of a puzzle under the 24 namings and 128 arrangements, and the least of them
    lines = [[2 * b + i for b, turn in zip(o, (s, t), strict=True) for i in (turn, 1 - turn)] for o, s, t in ARRANGED]
    grids = torch.tensor([[[4 * r + c for c in columns] for r in rows] for rows in lines for columns in lines])
    places = torch.cat([grids, grids.mT]).flatten(1)
    names = torch.tensor([(0, *order) for order in permutations(range(1, 5))])
    given, _ = made(Sudoku(4, "hard"), 120, seed=0)
    images = names[:, given][:, :, places]
    kinds = (images * 5 ** torch.arange(16)).sum(dim=3).amin(dim=(0, 2))
    assert 10 <= len(kinds.unique()) <= 36


def test_relations_of_places():
    relations = Sudoku(4).relations()
    # itself; the next in the row, of the same box; below, of the same box; across the box; in another box
    assert relations[0, [0, 1, 2, 4, 8, 5, 15]].tolist() == [7, 5, 1, 6, 2, 4, 0]
    apart = Maze(9).relations()
    assert (apart[0, 1] - apart[0, 0], apart[0, 9] - apart[0, 0]) == (1, 9)
    assert apart[0, 8] == apart[0, 5], "so far, and no farther"


@pytest.mark.parametrize("difficulty", ["easy", "medium", "hard"])
def test_a_maze_has_one_shortest_way_and_keeps_it(difficulty):
    game = Maze(10, 0.2, difficulty)
    mazes = made(game, 6, seed=2)
    torch.manual_seed(0)
    for given, answer in (mazes, game.varied(*mazes)):
        for board, way in zip(given.tolist(), answer.tolist(), strict=True):
            start, end = board.index(START), board.index(END)
            far, ways = game.distances(board, start)
            assert ways[end] == 1
            marked = {place for place, on in enumerate(way) if on}
            assert marked == game.shortest(board, start, end)
            assert len(marked) == far[end] + 1
            assert WALL not in {board[place] for place in marked}
            assert len(far) == sum(token != WALL for token in board), "everything free can be reached"
            if difficulty == "hard":
                assert far[end] == max(far.values())


def test_too_many_puzzles_of_a_kind_are_refused():
    with pytest.raises(UserError, match="40 different puzzles"):
        made(Maze(2, 0.0, "hard"), 40, 0)
