"""Generated mazes, whose shortest path is marked by a small weight-tied network at its equilibrium."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from torchimplicit.recipes.reasoning.solving import Game, Puzzles, ReasoningConfig, published
from torchimplicit.recipes.runtime.errors import UserError
from torchimplicit.recipes.runtime.settings import share

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Difficulty = Literal["easy", "medium", "hard"]

WALL, FREE, START, END = range(4)

REACH = 4
"""Largest offset along each axis that attention distinguishes; larger ones count as this one."""


# -- The game ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Maze(Game):
    """The unique shortest path from a start to an end. The answer is 1 on the path and its ends, 0 elsewhere.

    Corridors are carved by randomized depth-first search, then a share ``loops`` of the walls between two corridors is
    opened. The end is anywhere (``easy``), at least half as far from the start as the farthest place (``medium``), or
    the farthest place from a start that is itself the farthest from a random place (``hard``).
    """

    side: int = 9
    loops: float = 0.1
    difficulty: Difficulty = "medium"

    @property
    def tokens(self) -> int:
        return 4

    @property
    def answers(self) -> int:
        return 2

    def __str__(self) -> str:
        return f"{self.difficulty} mazes of {self.side} × {self.side}"

    def relations(self) -> Tensor:
        """Return the offset of two places along both axes, clipped to :data:`REACH`."""
        place = torch.arange(self.side**2)
        row, column = place // self.side, place % self.side
        apart = [(line[None] - line[:, None]).clamp(-REACH, REACH) + REACH for line in (row, column)]
        return apart[0] * (2 * REACH + 1) + apart[1]

    def puzzle(self, chance: torch.Generator) -> tuple[list[int], list[int]]:
        while True:
            board = self._dug(chance)
            if (ends := self._ends(board, chance)) is not None:
                break
        start, end = ends
        way = self.shortest(board, start, end)
        board[start], board[end] = START, END
        return board, [int(place in way) for place in range(len(board))]

    def beside(self, place: int) -> Iterator[int]:
        """Yield the neighbours of a place."""
        row, column = divmod(place, self.side)
        if row:
            yield place - self.side
        if row < self.side - 1:
            yield place + self.side
        if column:
            yield place - 1
        if column < self.side - 1:
            yield place + 1

    def distances(self, board: list[int], start: int) -> tuple[dict[int, int], dict[int, int]]:
        """Return the distance from the start of every reachable place, and its number of shortest paths."""
        far, ways, front = {start: 0}, {start: 1}, [start]
        while front:
            ahead: list[int] = []
            for place in front:
                for other in self.beside(place):
                    if board[other] == WALL:
                        continue
                    if other not in far:
                        far[other], ways[other] = far[place] + 1, 0
                        ahead.append(other)
                    if far[other] == far[place] + 1:
                        ways[other] += ways[place]
            front = ahead
        return far, ways

    def shortest(self, board: list[int], start: int, end: int) -> set[int]:
        """Return the places on a shortest path."""
        far, _ = self.distances(board, start)
        way = [end]
        while way[-1] != start:
            way.append(next(p for p in self.beside(way[-1]) if far.get(p) == far[way[-1]] - 1))
        return set(way)

    def _dug(self, chance: torch.Generator) -> list[int]:
        """Carve corridors, on every other row and column."""
        n = self.side
        board = [WALL] * n**2
        rooms = (n + 1) // 2
        trail = [2 * n * _drawn(rooms, chance) + 2 * _drawn(rooms, chance)]
        board[trail[0]] = FREE
        while trail:
            row, column = divmod(trail[-1], n)
            open_ways = [
                (step, 2 * step)
                for step, there in ((-n, row > 1), (n, row < n - 2), (-1, column > 1), (1, column < n - 2))
                if there and board[trail[-1] + 2 * step] == WALL
            ]
            if not open_ways:
                trail.pop()
                continue
            wall, room = open_ways[_drawn(len(open_ways), chance)]
            board[trail[-1] + wall] = board[trail[-1] + room] = FREE
            trail.append(trail[-1] + room)
        for place in range(n**2):
            row, column = divmod(place, n)
            between = (row % 2) != (column % 2) and row < 2 * rooms - 1 and column < 2 * rooms - 1
            if board[place] == WALL and between and float(torch.rand((), generator=chance)) < self.loops:
                board[place] = FREE
        return board

    def _ends(self, board: list[int], chance: torch.Generator) -> tuple[int, int] | None:
        """Draw a start and an end with a unique shortest path; ``None`` if the start drawn has no such end."""
        free = [place for place, token in enumerate(board) if token == FREE]
        start = free[_drawn(len(free), chance)]
        far, ways = self.distances(board, start)
        if self.difficulty == "hard":
            start = max(far, key=far.__getitem__)
            far, ways = self.distances(board, start)
        least = {"easy": 1, "medium": max(1, max(far.values()) // 2), "hard": max(far.values())}[self.difficulty]
        ends = [place for place in free if far[place] >= least and ways[place] == 1]
        return (start, ends[_drawn(len(ends), chance)]) if ends else None

    def varied(self, puzzle: Tensor, answer: Tensor) -> Puzzles:
        """Apply one of the eight rotations and reflections to each board."""
        n = self.side
        board = torch.arange(n * n, device=puzzle.device).view(n, n)
        turned = [torch.rot90(one, k) for one in (board, board.mT) for k in range(4)]
        places = torch.stack(turned).flatten(1)[torch.randint(8, (len(puzzle),), device=puzzle.device)]
        return puzzle.gather(1, places), answer.gather(1, places)

    def draw(self, panel: Axes, puzzle: Tensor, answer: Tensor, prediction: Tensor) -> None:
        colours = torch.tensor([[55, 65, 81], [255, 255, 255], [255, 255, 255], [255, 255, 255]])[puzzle]
        for marked, colour in (
            ((prediction == 1) & (answer == 1), (11, 99, 165)),
            ((prediction == 1) & (answer == 0), (209, 73, 91)),
            ((prediction == 0) & (answer == 1), (240, 190, 120)),
        ):
            colours[marked] = torch.tensor(colour)
        panel.imshow(colours.view(self.side, self.side, 3).numpy().astype("uint8"))
        for token, name in ((START, "S"), (END, "E")):
            row, column = divmod(int((puzzle == token).nonzero()), self.side)
            panel.text(column, row, name, ha="center", va="center", color="black", size=7)
        panel.axis("off")


def _drawn(count: int, chance: torch.Generator) -> int:
    return int(torch.randint(count, (), generator=chance))


# -- The recipe --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class MazeConfig(ReasoningConfig):
    """A small weight-tied network that learns to mark the shortest path through mazes."""

    side: int = 9
    """Places per side, 5 to 30."""

    loops: float = 0.1
    """Share of the walls between two corridors that are opened."""

    difficulty: Difficulty = "medium"
    """easy: the end is anywhere. medium: at least half as far from the start as the farthest place. hard: start and end
    are about as far apart as possible."""

    def __post_init__(self) -> None:
        super().__post_init__()
        share(self, "loops")
        if not 5 <= self.side <= 30:
            raise UserError(f"--side must lie between 5 and 30, and it is {self.side}")

    def game(self) -> Maze:
        return Maze(self.side, self.loops, self.difficulty)


def maze() -> MazeConfig:
    """Return the settings for mazes of 9 × 9."""
    return MazeConfig()


def as_published() -> MazeConfig:
    """Return the settings of the tiny recursive model for 30 × 30; its mazes (Maze-Hard) are different ones."""
    return MazeConfig(side=30, difficulty="hard", **published(latent_updates=4))
