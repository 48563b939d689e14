"""Generated Sudoku of three sizes, solved by a small weight-tied network at its equilibrium."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from torchimplicit.recipes.reasoning.solving import Game, Puzzles, ReasoningConfig, published

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Difficulty = Literal["easy", "medium", "hard"]

BOXES = {4: (2, 2), 6: (2, 3), 9: (3, 3)}
"""Rows and columns of a box, by side."""


# -- The game ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sudoku(Game):
    """Sudoku: every digit once in every row, column and box.

    Clues are removed in random order while the rest can still be solved: ``easy``, by naked singles (places for which
    one digit is left); ``medium``, by naked and hidden singles (digits for which one place of a row, column or box is
    left); ``hard``, by search, so that removing any clue gives a second solution.
    """

    side: int = 6
    difficulty: Difficulty = "hard"

    def __str__(self) -> str:
        return f"{self.difficulty} Sudoku of {self.side} × {self.side}"

    @property
    def tokens(self) -> int:
        return self.side + 1

    @property
    def answers(self) -> int:
        return self.side

    @cached_property
    def units(self) -> list[list[int]]:
        """The places of every row, then of every column, then of every box."""
        n, (high, wide) = self.side, BOXES[self.side]
        rows = [[n * i + j for j in range(n)] for i in range(n)]
        boxes = [
            [n * (high * a + i) + wide * b + j for i in range(high) for j in range(wide)]
            for a in range(n // high)
            for b in range(n // wide)
        ]
        return [*rows, *(list(column) for column in zip(*rows, strict=True)), *boxes]

    @cached_property
    def units_of(self) -> list[list[int]]:
        """The indices of the three units of every place."""
        return [[u for u, unit in enumerate(self.units) if place in unit] for place in range(self.side**2)]

    def relations(self) -> Tensor:
        """Return which of row, column and box two places share: eight relations, the last that of a place to itself."""
        of = torch.tensor(self.units_of)
        return ((of[:, None] == of[None]) * torch.tensor([1, 2, 4])).sum(dim=2)

    def puzzle(self, chance: torch.Generator) -> tuple[list[int], list[int]]:
        answer = next(iter(self.solutions([0] * self.side**2, 1, chance)))
        clues = list(answer)
        for place in torch.randperm(len(clues), generator=chance).tolist():
            kept, clues[place] = clues[place], 0
            if not self.solvable(clues):
                clues[place] = kept
        return clues, [digit - 1 for digit in answer]

    def solvable(self, clues: Sequence[int]) -> bool:
        """Return whether the solution is unique and the difficulty's method finds it."""
        if self.difficulty == "hard":
            return len(self.solutions(clues, 2)) == 1
        return 0 not in self.deduced(clues)

    def deduced(self, clues: Sequence[int]) -> list[int]:
        """Fill in what follows by singles, without a guess: a full board is the unique solution."""
        cells, used = list(clues), self._used(clues)
        full = (1 << self.side) - 1
        moved = True
        while moved:
            moved = False
            left = [0 if digit else full & ~self._taken(used, p) for p, digit in enumerate(cells)]
            singles = [(p, mask) for p, mask in enumerate(left) if mask.bit_count() == 1]
            if not singles and self.difficulty != "easy":
                for unit in self.units:
                    once = twice = 0
                    for p in unit:
                        once, twice = once | left[p], twice | (once & left[p])
                    if once & ~twice:
                        singles = [(p, left[p] & once & ~twice) for p in unit if left[p] & once & ~twice]
                        break
            for p, mask in singles[:1] if self.difficulty != "easy" else singles:
                if mask & ~self._taken(used, p):  # another single placed in this round may have taken the digit
                    cells[p], moved = mask.bit_length(), True
                    for u in self.units_of[p]:
                        used[u] |= mask
        return cells

    def solutions(self, clues: Sequence[int], most: int, chance: torch.Generator | None = None) -> list[list[int]]:
        """Find up to ``most`` solutions by search, in random order if ``chance`` is given."""
        cells, used = list(clues), self._used(clues)
        full = (1 << self.side) - 1
        solved: list[list[int]] = []

        def search(open_places: list[int]) -> None:
            if not open_places:
                solved.append(list(cells))
                return
            fewest, place = self.side + 1, -1
            for p in open_places:
                count = (full & ~self._taken(used, p)).bit_count()
                if count < fewest:
                    fewest, place = count, p
                    if count <= 1:
                        break
            left = full & ~self._taken(used, place)
            digits = [d for d in range(1, self.side + 1) if left >> (d - 1) & 1]
            if chance is not None:
                digits = [digits[i] for i in torch.randperm(len(digits), generator=chance).tolist()]
            rest = [p for p in open_places if p != place]
            for digit in digits:
                bit = 1 << (digit - 1)
                cells[place] = digit
                for u in self.units_of[place]:
                    used[u] |= bit
                search(rest)
                for u in self.units_of[place]:
                    used[u] &= ~bit
                cells[place] = 0
                if len(solved) >= most:
                    return

        search([p for p, digit in enumerate(cells) if not digit])
        return solved

    def _used(self, cells: Sequence[int]) -> list[int]:
        """Return the digits in every unit, as bits."""
        return [sum(1 << (cells[p] - 1) for p in unit if cells[p]) for unit in self.units]

    def _taken(self, used: list[int], place: int) -> int:
        row, column, box = self.units_of[place]
        return used[row] | used[column] | used[box]

    def varied(self, puzzle: Tensor, answer: Tensor) -> Puzzles:
        """Permute the digits, the bands and stacks, and the rows and columns within them; transpose if boxes are
        square."""
        batch, n = len(puzzle), self.side
        high, wide = BOXES[n]
        where = puzzle.device
        names = torch.rand(batch, n, device=where).argsort(dim=1)
        rows, columns = self._shuffled(batch, high, where), self._shuffled(batch, wide, where)
        places = rows[:, :, None] * n + columns[:, None, :]
        if high == wide:
            turned = torch.rand(batch, 1, 1, device=where) < 0.5
            places = torch.where(turned, places.mT, places)
        places = places.flatten(1)
        named = torch.cat([names.new_zeros(batch, 1), names + 1], dim=1)
        return named.gather(1, puzzle.gather(1, places)), names.gather(1, answer.gather(1, places))

    def _shuffled(self, batch: int, within: int, where: torch.device) -> Tensor:
        """Permute bands of ``within`` lines, and the lines in each band: indices ``[batch, side]``."""
        bands = self.side // within
        order = torch.rand(batch, bands, device=where).argsort(dim=1)
        inside = torch.rand(batch, bands, within, device=where).argsort(dim=2)
        return (order[:, :, None] * within + inside).flatten(1)

    def draw(self, panel: Axes, puzzle: Tensor, answer: Tensor, prediction: Tensor) -> None:
        n, (high, wide) = self.side, BOXES[self.side]
        for line in range(n + 1):
            panel.plot([0, n], [line, line], color="black", linewidth=1.6 if line % high == 0 else 0.4)
            panel.plot([line, line], [0, n], color="black", linewidth=1.6 if line % wide == 0 else 0.4)
        for place in range(n * n):
            row, column = divmod(place, n)
            right = prediction[place] == answer[place]
            colour = "black" if puzzle[place] else "#0b63a5" if right else "#d1495b"
            digit = str(int(prediction[place]) + 1)
            weight = "bold" if puzzle[place] else "normal"
            panel.text(column + 0.5, row + 0.53, digit, color=colour, ha="center", va="center", weight=weight)
        panel.set(xlim=(-0.05, n + 0.05), ylim=(n + 0.05, -0.05), aspect="equal")
        panel.axis("off")


# -- The recipe --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class SudokuConfig(ReasoningConfig):
    """A small weight-tied network that learns to solve Sudoku."""

    side: Literal[4, 6, 9] = 6
    """Places per side, and number of digits."""

    difficulty: Difficulty = "hard"
    """easy: solved by naked singles. medium: by naked and hidden singles. hard: minimal clues for a unique solution."""

    def game(self) -> Sudoku:
        return Sudoku(self.side, self.difficulty)


def sudoku() -> SudokuConfig:
    """Return the settings for boards of 6 × 6."""
    return SudokuConfig()


def as_published() -> SudokuConfig:
    """Return the settings of the tiny recursive model for 9 × 9; its puzzles (Sudoku-Extreme) are different ones."""
    return SudokuConfig(side=9, mixing="mixer", **published(latent_updates=6))
