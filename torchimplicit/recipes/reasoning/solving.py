"""Puzzle recipes: the game, and a small weight-tied network that learns to solve it.

Training follows Jolicoeur-Martineau (2025, arXiv 2510.04871). Every optimizer step is one segment with its own loss
(deep supervision). A puzzle continues from the state at the end of its last segment, and a new puzzle replaces it when
the network predicts that it is solved, or after a maximum number of segments.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from torchimplicit.models.reasoner import Reasoner, ReasonerConfig, ReasoningState
from torchimplicit.nn import Vote, least_residual
from torchimplicit.recipes.runtime.errors import UserError
from torchimplicit.recipes.runtime.page import axes, saved, style, styled
from torchimplicit.recipes.runtime.run import Run, device
from torchimplicit.recipes.runtime.settings import Equilibria, Machine, Optimization, not_negative, positive, share
from torchimplicit.recipes.runtime.table import NONE, CaptionedFigure, Cell, Table, sheet
from torchimplicit.recipes.runtime.task import Metric, Rows, SampledTask, generator, gradient, solver
from torchimplicit.recipes.runtime.trainer import Measuring, Trainer
from torchimplicit.solution import Solution
from torchimplicit.solvers import Solver

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


# -- What a game is ----------------------------------------------------------------------------------------------------


Puzzles = tuple[Tensor, Tensor]
"""The puzzles and their answers, int64 ``[count, places]`` each."""


class Game(ABC):
    """Puzzles of one kind on one board, each with a unique answer. Hashable."""

    @property
    @abstractmethod
    def tokens(self) -> int:
        """The number of tokens in a puzzle."""

    @property
    @abstractmethod
    def answers(self) -> int:
        """The number of classes in an answer."""

    @abstractmethod
    def relations(self) -> Tensor:
        """Return the relation of every two places, int64 ``[places, places]``, numbered from 0."""

    @abstractmethod
    def puzzle(self, chance: torch.Generator) -> tuple[list[int], list[int]]:
        """Generate one puzzle and its answer."""

    @abstractmethod
    def varied(self, puzzle: Tensor, answer: Tensor) -> Puzzles:
        """Transform every puzzle by a random symmetry of the game."""

    @abstractmethod
    def draw(self, panel: Axes, puzzle: Tensor, answer: Tensor, prediction: Tensor) -> None:
        """Draw a puzzle ``[places]`` with the predicted answer and its errors."""


@lru_cache(maxsize=8)
def made(game: Game, count: int, seed: int) -> Puzzles:
    """Generate ``count`` different puzzles."""
    chance = generator(seed)
    answers: dict[tuple[int, ...], list[int]] = {}
    for _ in range(20 * count):
        puzzle, answer = game.puzzle(chance)
        answers.setdefault(tuple(puzzle), answer)
        if len(answers) == count:
            return torch.tensor(list(answers)), torch.tensor(list(answers.values()))
    raise UserError(f"20 x {count} draws did not give {count} different puzzles: ask for fewer, or for a larger --side")


# -- Settings ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ReasoningConfig(ABC):
    """A small weight-tied network that learns to solve puzzles."""

    optimization: Optimization = field(
        default_factory=lambda: Optimization(
            steps=1500,
            batch_size=32,
            optimizer="adamw",
            learning_rate=4e-3,
            weight_decay=0.1,
            warmup_steps=50,
            clip_norm=1.0,
            averaging=0.99,
            validate_every=150,
        )
    )
    equilibria: Equilibria = field(
        default_factory=lambda: Equilibria(
            solver="fixed-point",
            solver_steps=4,
            tolerance=1e-3,
            gradient="unrolled-phantom",
            phantom_steps=2,
            phantom_damping=1.0,
        )
    )
    machine: Machine = field(default_factory=Machine)

    width: int = 64
    """Channels of each place, in each of the two states."""

    heads: int = 4
    """Attention heads. They must divide --width."""

    blocks: int = 1
    """Transformer or mixer blocks in the network."""

    expansion: int = 4
    """Hidden width of a block's gated network, as a multiple of --width."""

    mixing: Literal["attention", "mixer"] = "attention"
    """How places exchange information. attention: with a learned bias for the relation of two places. mixer: by a gated
    network across all places."""

    latent_updates: int = 1
    """Updates of the latent state for each update of the answer, in one evaluation of the cell."""

    segments: int = 8
    """Most segments of a puzzle in training, after which a new one replaces it."""

    exploration: float = 0.1
    """Probability with which a training puzzle may not halt before a random number of segments."""

    halt_weight: float = 0.5
    """Weight of the halting loss: the cross-entropy of predicting whether the puzzle is solved."""

    evaluation_segments: int | None = None
    """Most segments of a puzzle in validation and test. Default: the same as in training."""

    evaluation_starts: int = 8
    """Most random starts per test puzzle, of which one is chosen by residual or by vote, in the scaling curves."""

    halting: bool = True
    """In validation and test, remove puzzles from the batch that the network predicts to be solved."""

    augment: bool = True
    """Transform every training puzzle by a random symmetry of the game."""

    training_puzzles: int = 2000
    """Number of puzzles for training."""

    held_out_puzzles: int = 500
    """Number of puzzles for validation, and the same number for the test. They are not among the training puzzles."""

    data_seed: int = 0
    """Random seed of the puzzles."""

    def __post_init__(self) -> None:
        positive(self, "width", "heads", "blocks", "expansion", "latent_updates", "segments", "evaluation_segments")
        positive(self, "evaluation_starts", "training_puzzles", "held_out_puzzles")
        not_negative(self, "halt_weight", "data_seed")
        share(self, "exploration")
        if self.width % self.heads:
            raise UserError(f"--width {self.width} cannot be cut into --heads {self.heads}")
        if self.optimization.accumulate > 1:
            raise UserError(
                "--accumulate: a batch goes on from its last segment, and cannot be cut; take a smaller one"
            )

    @abstractmethod
    def game(self) -> Game:
        """Return the game."""


def published(latent_updates: int) -> dict[str, Any]:
    """Return the settings of the tiny recursive model (Jolicoeur-Martineau 2025), for GPUs: three evaluations of the
    cell in a segment, the last of which is differentiated.

    Differences: it normalizes after each layer, and has a "stablemax" cross-entropy, puzzle embeddings, rotary
    positions, and 0.95 for AdamW's second moment.
    """
    return {
        "optimization": Optimization(
            steps=65_000,
            batch_size=768,
            optimizer="adamw",
            learning_rate=1e-4,
            weight_decay=1.0,
            warmup_steps=2000,
            schedule="constant",
            averaging=0.999,
            validate_every=1000,
        ),
        "equilibria": Equilibria(
            solver="fixed-point",
            solver_steps=2,
            tolerance=1e-12,  # single precision does not reach it: both steps are taken
            gradient="unrolled-phantom",
            phantom_steps=1,
            phantom_damping=1.0,
        ),
        "width": 512,
        "heads": 8,
        "blocks": 2,
        "latent_updates": latent_updates,
        "segments": 16,
        "halting": False,
        "training_puzzles": 1000,
    }


# -- The task ----------------------------------------------------------------------------------------------------------


@dataclass
class Carried:
    """The batch of a training step, for the next step.

    Attributes:
        puzzle, answer: ``[batch, places]``.
        state: at the end of the last segment.
        segments: number of segments of each puzzle so far, int64 ``[batch]``.
        done: whether a new puzzle replaces this one, bool ``[batch]``.
    """

    puzzle: Tensor
    answer: Tensor
    state: ReasoningState
    segments: Tensor
    done: Tensor


@dataclass(frozen=True)
class Attempt:
    """The result for a batch of puzzles.

    Attributes:
        prediction: the answer, int64 ``[batch, places]``.
        loss: its cross-entropy, ``[batch]``.
        segments: number of segments that each took, int64 ``[batch]``.
        residual: relative residual after the last segment, ``[batch]``.
    """

    prediction: Tensor
    loss: Tensor
    segments: Tensor
    residual: Tensor


def segment(settings: Equilibria) -> Solver:
    """Return the solver of a segment. It gives its last iterate, not the one of the least residual: the next segment
    continues from it."""
    return replace(solver(settings), return_last=True)


class PuzzleTask(SampledTask):
    """Judged by the share of puzzles with every place right."""

    metric = Metric("solved", "%", "max")

    def __init__(self, config: ReasoningConfig):
        super().__init__()
        self.config = config
        self.game = config.game()
        trained, held_out = config.training_puzzles, config.held_out_puzzles
        puzzles, answer = made(self.game, trained + 2 * held_out, config.data_seed)
        parts = zip(*(t.split([trained, held_out, held_out]) for t in (puzzles, answer)), strict=True)
        self.sets = {name: Rows(*part) for name, part in zip(("training", "validation", "test"), parts, strict=True)}
        sizes = ReasonerConfig(
            tokens=self.game.tokens,
            answers=self.game.answers,
            width=config.width,
            heads=config.heads,
            blocks=config.blocks,
            expansion=config.expansion,
            mixing=config.mixing,
            latent_updates=config.latent_updates,
        )
        self.model = Reasoner(
            sizes, self.game.relations(), solver=segment(config.equilibria), gradient=gradient(config.equilibria)
        )
        self.carried: Carried | None = None

    def begin(self) -> None:
        self.carried = None

    def loss(self, batch: Any) -> Tensor:
        """Return the cross-entropy of the answer after one segment, plus the weighted halting loss."""
        at = self._taken(batch)
        state = self.model(at.puzzle, at.state).value
        scores, sure = self.model.read(state)
        right = (scores.argmax(dim=2) == at.answer).all(dim=1)
        segments = at.segments + 1
        with torch.no_grad():
            longer = torch.randint_like(segments, 2, max(3, self.config.segments + 1))
            least = torch.where(torch.rand_like(sure) < self.config.exploration, longer, 1)
            done = (segments >= self.config.segments) | ((sure > 0) & (segments >= least))
        self.carried = Carried(at.puzzle, at.answer, (state[0].detach(), state[1].detach()), segments, done)
        halt = functional.binary_cross_entropy_with_logits(sure, right.to(sure.dtype))
        return functional.cross_entropy(scores.mT, at.answer) + self.config.halt_weight * halt

    def _taken(self, batch: Any) -> Carried:
        """Return the carried batch, with new puzzles in place of those that are done."""
        puzzle, answer = self.game.varied(*batch) if self.config.augment else batch
        new = Carried(puzzle, answer, self.model.start(puzzle), torch.zeros_like(puzzle[:, 0]), puzzle[:, 0] < 0)
        old = self.carried
        if old is None or len(old.done) != len(puzzle):
            return new
        done, wide = old.done[:, None], old.done[:, None, None]
        return Carried(
            torch.where(done, new.puzzle, old.puzzle),
            torch.where(done, new.answer, old.answer),
            (torch.where(wide, new.state[0], old.state[0]), torch.where(wide, new.state[1], old.state[1])),
            torch.where(old.done, 0, old.segments),
            new.done,
        )

    def decoded(self, state: ReasoningState) -> Tensor:
        """Return the answer in a state, int64 ``[batch, places]``."""
        return self.model.read(state)[0].argmax(dim=2)

    @torch.no_grad()
    def trail(self, puzzles: Tensor, number: int, segments: int) -> Iterator[Solution]:
        """Yield the solutions after each of so many segments, without halting, from random start ``number``; the
        evaluations are those since the start."""
        state, spent = self.model.start(puzzles, generator(self.config.optimization.seed, -4, number)), 0.0
        for _ in range(segments):
            solution = self.model(puzzles, state)
            state, spent = solution.value, spent + solution.evaluations
            yield replace(solution, evaluations=spent)

    @torch.no_grad()
    def attempt(self, puzzles: Tensor, answer: Tensor) -> Attempt:
        """Solve puzzles, each until the network predicts that it is solved, from reproducible random starts."""
        config = self.config
        there = torch.arange(len(puzzles), device=puzzles.device)
        state = self.model.start(puzzles, generator(config.optimization.seed, -4, 0))
        predictions, segments = torch.empty_like(puzzles), torch.zeros_like(puzzles[:, 0])
        loss, residual = state[0].new_zeros(2, len(puzzles))
        for _ in range(config.evaluation_segments or config.segments):
            solution = self.model(puzzles[there], state)
            scores, sure = self.model.read(solution.value)
            predictions[there] = scores.argmax(dim=2)
            loss[there] = functional.cross_entropy(scores.mT, answer[there], reduction="none").mean(dim=1)
            residual[there] = solution.residual.to(loss)
            segments[there] += 1
            on = sure <= 0 if config.halting else torch.ones_like(sure, dtype=torch.bool)
            there, state = there[on], (solution.value[0][on], solution.value[1][on])
            if not len(there):
                break
        return Attempt(predictions, loss, segments, residual)

    def score(self, batch: Any) -> Tensor:
        puzzles, answer = batch
        attempt = self.attempt(puzzles, answer)
        right = attempt.prediction == answer
        sums = [right.all(dim=1), right.float().mean(dim=1), attempt.segments, attempt.residual, attempt.loss]
        return torch.stack(
            [*(one.double().sum() for one in sums), torch.tensor(float(len(puzzles))).to(puzzles.device)]
        )

    def figures(self, sums: list[float]) -> dict[str, float]:
        *totals, count = sums
        return dict(zip(("solved", "places", "segments", "residual", "loss"), (t / count for t in totals), strict=True))

    def describe(self) -> str:
        return f"{self.game}: {self.counts} puzzles; {self.weights} weights."


# -- The best weights' solutions ---------------------------------------------------------------------------------------


TRAINER = Trainer(PuzzleTask)

SHOWN = 4
"""Number of puzzles on the page."""


@dataclass(frozen=True)
class Depth:
    """Test puzzles after a fixed number of segments, without halting.

    Attributes:
        segments: how many.
        evaluations: mean number of cell evaluations per puzzle.
        solved: share of puzzles with every place right.
        residual: median relative residual at the end.
    """

    segments: int
    evaluations: float
    solved: float
    residual: float


@dataclass(frozen=True)
class Breadth:
    """Test puzzles from several random starts, without halting.

    Attributes:
        starts: how many.
        evaluations: number of cell evaluations per puzzle, over all starts.
        by_residual, by_vote: share of puzzles solved by the start with the least residual, and by the answer that most
            starts agree on.
        by_any: share of puzzles solved from at least one start.
    """

    starts: int
    evaluations: float
    by_residual: float
    by_vote: float
    by_any: float


@dataclass(frozen=True)
class Scaling:
    """Accuracy against test-time computation: more segments from one start, and more starts."""

    depth: list[Depth] = field(default_factory=list)
    breadth: list[Breadth] = field(default_factory=list)


def deeper(task: PuzzleTask, puzzles: Tensor, answer: Tensor, segments: int) -> list[Depth]:
    """Measure puzzles after 1, 2, ..., ``segments`` segments."""
    depths = []
    for count, solution in enumerate(task.trail(puzzles, 0, segments), start=1):
        right = (task.decoded(solution.value) == answer).all(dim=1)
        share, residual = float(right.double().mean()), float(solution.residual.median())
        depths.append(Depth(count, solution.evaluations, share, residual))
    return depths


def broader(task: PuzzleTask, puzzles: Tensor, answer: Tensor, segments: int, starts: int) -> list[Breadth]:
    """Measure puzzles from 1, 2, 4, ... up to ``starts`` starts, with so many segments from each."""
    solutions = [list(task.trail(puzzles, number, segments))[-1] for number in range(starts)]
    right = torch.stack([(task.decoded(one.value) == answer).all(dim=1) for one in solutions])
    vote, breadths = Vote(decode=task.decoded), []
    for count in (2**k for k in range(starts.bit_length()) if 2**k <= starts):
        tried = solutions[:count]
        residual, voted = (
            float(right.gather(0, choose(tried)[None]).double().mean()) for choose in (least_residual, vote)
        )
        evaluations = sum(one.evaluations for one in tried)
        some = float(right[:count].any(dim=0).double().mean())
        breadths.append(Breadth(count, evaluations, by_residual=residual, by_vote=voted, by_any=some))
    return breadths


def looked(config: ReasoningConfig, run: Run) -> Scaling:
    """Measure accuracy against test-time computation, and write the page with solved puzzles."""
    from torchimplicit.recipes.runtime import report  # it brings Lightning

    if run.read().get("table"):  # which measures for itself, and has a page of its own
        return Scaling()
    task: PuzzleTask = TRAINER.best(config, run)
    boards, answer = (t.to(device(config.machine.device)) for t in task.sets["test"].tensors)
    segments = config.evaluation_segments or config.segments
    result = Scaling(
        deeper(task, boards, answer, 4 * segments),
        broader(task, boards, answer, segments, config.evaluation_starts),
    )
    tried = task.attempt(boards[:SHOWN], answer[:SHOWN])
    with styled():
        puzzles, panels = axes(SHOWN, width=2.4, height=2.4)
        for panel, *one in zip(panels, boards.cpu(), answer.cpu(), tried.prediction.cpu(), strict=False):
            task.game.draw(panel, *one)
        pictures = saved(
            [
                CaptionedFigure("puzzles", puzzles, "Test puzzles as the model solves them. Errors are red."),
                CaptionedFigure(
                    "scaling",
                    scaling(result, segments),
                    "Test puzzles solved, and their residual, against cell evaluations per puzzle, without halting.",
                ),
            ],
            run,
        )
    report.write([report.finished(run.path)], run.path / "index.html", str(task.game), pictures)
    return result


def scaling(result: Scaling, segments: int) -> Figure:
    """Draw accuracy and residual against evaluations."""
    drawn, (solved, residual) = axes(2, width=4.6)
    spent = [one.evaluations for one in result.depth]
    solved.plot(spent, [100 * one.solved for one in result.depth], label="more segments", **style(0))
    spread = [one.evaluations for one in result.breadth]
    for index, (name, label) in enumerate(
        (("by_residual", "by residual"), ("by_vote", "by vote"), ("by_any", "any of them")), start=1
    ):
        shares = [100 * getattr(one, name) for one in result.breadth]
        solved.plot(spread, shares, label=f"starts of {segments} segments, {label}", **style(index))
    solved.set(xlabel="evaluations of the cell", ylabel="puzzles solved, %", xscale="log")
    solved.legend()
    residual.plot(spent, [one.residual for one in result.depth], **style(0))
    residual.set(xlabel="evaluations of the cell", ylabel="median relative residual", xscale="log", yscale="log")
    return drawn


def scaling_table(result: Scaling) -> Table:
    """Tabulate accuracy after 1, 2, 4, ... segments, and from as many starts."""
    rows: list[tuple[str, float, float, float | None]] = [
        (f"{one.segments} segments", one.evaluations, one.solved, None)
        for one in result.depth
        if one.segments.bit_count() == 1
    ]
    rows += [(f"{one.starts} starts", one.evaluations, one.by_residual, one.by_vote) for one in result.breadth]
    return sheet("", rows, [
        Cell("Test-time computation", lambda row: row[0]),
        Cell("Evaluations", lambda row: f"{row[1]:.0f}", "", "Evaluations of the cell per puzzle."),
        Cell("Solved", lambda row: f"{100 * row[2]:.1f}", "%",
             "Puzzles that are solved; with several starts, by the answer of the least residual."),
        Cell("By vote", lambda row: NONE if row[3] is None else f"{100 * row[3]:.1f}", "%"),
    ]).table  # fmt: skip


RUNNER = Measuring(
    first=TRAINER, measure=looked, show=scaling_table, name="scaling.json", again=None, doing="Solving puzzles"
)
