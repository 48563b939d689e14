"""The gradients that reasoning models are trained with, side by side on Sudoku."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal

import torch

from torchimplicit.recipes.reasoning import sudoku
from torchimplicit.recipes.reasoning.solving import TRAINER, PuzzleTask, segment
from torchimplicit.recipes.reasoning.sudoku import Difficulty, SudokuConfig
from torchimplicit.recipes.runtime import table
from torchimplicit.recipes.runtime.page import axes, style
from torchimplicit.recipes.runtime.run import device
from torchimplicit.recipes.runtime.settings import Equilibria, EstimatorName, Machine, known_rows, positive
from torchimplicit.recipes.runtime.step_cost import (
    StepCost,
    beside,
    costs_of,
    equilibria,
    flat_gradient,
    in_turn,
    one_step,
    peak_bytes,
    step_table,
)
from torchimplicit.recipes.runtime.table import CaptionedFigure, Cell, Claim, Job, Plan, Runs, TitledTable
from torchimplicit.recipes.runtime.task import Shard, gradient
from torchimplicit.recipes.runtime.trainer import Measuring

if TYPE_CHECKING:
    from torchimplicit.recipes.runtime.run import Run


@dataclass(frozen=True, kw_only=True)
class Row:
    """A gradient estimator: its label, and its settings."""

    label: str
    gradient: EstimatorName
    steps: int = 1
    damping: float = 1.0

    def of(self, settings: Equilibria) -> Equilibria:
        """Return the settings with this estimator; the reversible solver's steps have two evaluations each."""
        if self.gradient == "reversible":
            half = max(1, settings.solver_steps // 2)
            settings = replace(settings, solver="reversible", solver_steps=half)
        return replace(settings, gradient=self.gradient, phantom_steps=self.steps, phantom_damping=self.damping)


FULL = "full"

ROWS = {
    FULL: Row(label="full backpropagation", gradient="unrolled"),
    "reversible": Row(label="reversible (0.5)", gradient="reversible"),
    "implicit": Row(label="implicit", gradient="implicit"),
    "phantom": Row(label="unrolled phantom (5, 0.5)", gradient="unrolled-phantom", steps=5, damping=0.5),
    "k-step": Row(label="last 4 steps", gradient="unrolled-phantom", steps=4),
    "neumann": Row(label="Neumann (2, 1)", gradient="neumann-phantom", steps=2),
    "one-step": Row(label="one step", gradient="one-step"),
}
"""The rows by name. ``neumann`` is the gradient of the attractor models (arXiv 2605.12466), ``one-step`` that of the
hierarchical reasoning model (arXiv 2506.21734)."""

COST = "cost"


@dataclass(frozen=True, kw_only=True)
class ReasoningGradientsConfig:
    """The same network and puzzles, trained with different gradients of its equilibrium."""

    plan: Plan = field(default_factory=lambda: Plan(seeds=3, together=21))

    rows: tuple[str, ...] = tuple(ROWS)
    """Rows to run."""

    side: Literal[4, 6, 9] = 4
    """Places per side, and number of digits."""

    difficulty: Difficulty = "hard"
    """Difficulty of the puzzles."""

    steps: int | None = None
    """Optimizer steps of each training. Default: 150, and the published number at the paper's scale."""

    looks: int = 5
    """Validations, and comparisons with the exact gradient, along each training."""

    repeats: int = 5
    """Batches on which the cost of a step is measured."""

    machine: Machine = field(default_factory=lambda: Machine(tensorboard=False))

    def __post_init__(self) -> None:
        positive(self, "steps", "looks", "repeats")
        known_rows(self.rows, tuple(ROWS))


def training(config: ReasoningGradientsConfig, row: Row, seed: int) -> SudokuConfig:
    """Return the settings of one run."""
    paper = config.plan.scale == "paper"
    one = sudoku.as_published() if paper else replace(sudoku.sudoku(), side=config.side, difficulty=config.difficulty)
    steps = config.steps or (one.optimization.steps if paper else 150)
    every, warmup = max(1, steps // config.looks), min(one.optimization.warmup_steps, steps // 10)
    return replace(
        one,
        optimization=replace(one.optimization, steps=steps, warmup_steps=warmup, validate_every=every, seed=seed),
        equilibria=row.of(one.equilibria),
        machine=replace(config.machine, monitor_every=every),
        halting=False,
        held_out_puzzles=one.held_out_puzzles if paper else 300,
    )


def jobs(config: ReasoningGradientsConfig) -> list[Job]:
    """The trainings seed by seed, with the cost after those of the first seed."""
    planned = []
    for seed in config.plan.all_seeds:
        for name in config.rows:
            one = training(config, ROWS[name], seed)
            planned.append(Job(f"{name}-seed{seed}", "reasoning-sudoku", one, {"row": name, "seed": seed}))
        if seed == config.plan.first_seed:
            first = training(config, ROWS[config.rows[0]], seed)
            cost = PuzzleCostConfig(puzzles=first, rows=config.rows, repeats=config.repeats)
            planned.append(Job(COST, "reasoning-sudoku-cost", cost))
    return planned


# -- The cost of a step with every gradient, at the same trained weights -----------------------------------------------


@dataclass(frozen=True, kw_only=True)
class PuzzleCostConfig:
    """Train on Sudoku, then measure a training step at the best weights with every gradient in turn."""

    puzzles: SudokuConfig = field(default_factory=sudoku.sudoku)

    rows: tuple[str, ...] = tuple(ROWS)
    """Rows of the table to measure."""

    repeats: int = 5
    """Batches on which every gradient is measured."""

    def __post_init__(self) -> None:
        positive(self, "repeats")
        known_rows(self.rows, tuple(ROWS))


def measured(config: PuzzleCostConfig, run: Run) -> dict[str, StepCost]:
    """Measure the second segment of a few batches; gradients are compared with full backpropagation through it."""
    task: PuzzleTask = TRAINER.best(config.puzzles, run).train()
    where = device(config.puzzles.machine.device)
    (layer,) = equilibria(task)
    batches = iter(task.training_batches(range(config.repeats + 1), Shard()))
    at: dict[str, Any] = {}

    def loss(name: str) -> torch.Tensor:
        settings = ROWS[name].of(config.puzzles.equilibria)
        layer.solver, layer.gradient = segment(settings), gradient(settings)
        torch.manual_seed(0)
        task.carried = at["carried"]
        return task.loss(at["batch"])

    def step(name: str) -> StepCost:
        if name == FULL:  # it comes first, and the others are compared with it
            at["batch"] = [part.to(where) for part in next(batches)]
            task.begin()
            with torch.no_grad():
                task.loss(at["batch"])
            at["carried"] = task.carried
        cost = one_step(task, lambda: loss(name), where)
        estimate = flat_gradient(task)
        at["full"] = estimate if name == FULL else at["full"]
        return replace(cost, **beside(estimate, at["full"]))

    def both_passes(name: str) -> None:
        loss(name).backward()

    names = [FULL, *(name for name in config.rows if name != FULL)]
    costs = in_turn({name: partial(step, name) for name in names}, config.repeats)
    peaks = {name: peak_bytes(partial(both_passes, name), where) for name in names}
    return {name: replace(cost, megabytes=peaks[name] / 1e6) for name, cost in costs.items()}


MEASURING = Measuring(
    first=TRAINER,
    training=lambda config: config.puzzles,
    measure=measured,
    show=lambda found: step_table(found, {name: ROWS[name].label for name in found}, update=False),
    name="costs.json",
)


# -- What the runs come to ---------------------------------------------------------------------------------------------


def figures(config: ReasoningGradientsConfig, run: Run) -> Any:
    """Return a training's results, with its cosines to the exact gradient by step; or the costs."""
    if run.path.name == COST:
        return table.read("costs.json")(config, run)
    results = table.trained(config, run)
    if results is not None:
        from torchimplicit.recipes.runtime.log import rows

        name = "gradient/task.model.equilibrium/cosine"
        results["cosines"] = [
            {"step": int(row["step"]), "cosine": row[name]} for row in rows(run.metrics) if name in row
        ]
    return results


def at_equal_time(config: ReasoningGradientsConfig, runs: Runs, name: str) -> list[float]:
    """Return what the runs of a row had solved in validation when the cheapest row had finished, at the rows' costs per
    step measured in turn."""
    cost = costs_of(runs.named(COST))
    if name not in cost:
        return []
    steps = training(config, ROWS[name], config.plan.first_seed).optimization.steps
    budget = min(one.seconds for row, one in cost.items() if row in config.rows) * steps / cost[name].seconds
    shares = []
    for line in runs.where(row=name):
        done = [v["solved"] for v in line["validations"] or () if v["step"] <= budget + 1e-9]
        shares += done[-1:]
    return shares


def along(runs: Runs, name: str, last: bool) -> list[float]:
    """Return the cosines of a row's runs to the exact gradient, in the first or the last half of training."""
    cosines: list[float] = []
    for line in runs.where(row=name):
        looks = [look["cosine"] for look in line["cosines"] or ()]
        half = len(looks) // 2
        cosines += looks[half:] if last else looks[:half]
    return cosines


def sheets(config: ReasoningGradientsConfig, runs: Runs) -> Iterator[TitledTable]:
    """The accuracies and the gradients; and the cost of a step."""
    cost = costs_of(runs.named(COST))
    beside_implicit = (
        "Cosine similarity of the equilibrium's gradient to the converged implicit gradient at the same state: mean "
        "over the measurements in the {} half of training and over the seeds."
    )
    yield table.sheet("Accuracy, and gradients during training", config.rows, [
        Cell("Gradient", lambda name: ROWS[name].label),
        Cell("Solved", runs.told("test.solved", 1, 100), "%",
             "Test puzzles with every place right, after the same number of steps in every row; mean ± standard "
             "deviation over the seeds."),
        Cell("Solved in equal time", lambda name: table.spread(at_equal_time(config, runs, name), 1, 100), "%",
             "Validation puzzles solved at the row's last validation before the row with the cheapest step would have "
             "finished, by the step times below; mean ± standard deviation over the seeds."),
        Cell("Residual", runs.told("test.residual", 4), "",
             "Relative residual of a test puzzle after its last segment: mean over the puzzles, then mean ± standard "
             "deviation over the seeds."),
        Cell("Cosine, first half", lambda name: table.mean(along(runs, name, last=False), ".3f"), "",
             beside_implicit.format("first")),
        Cell("Cosine, second half", lambda name: table.mean(along(runs, name, last=True), ".3f"), "",
             beside_implicit.format("second")),
        Cell("Cosine to full", lambda name: table.shown(cost[name].cosine if name in cost else None, ".3f"), "",
             "Cosine similarity of the gradient in all weights to full backpropagation through the segment, at the "
             "weights of one run; median over the batches on which the cost of a step is measured."),
    ])  # fmt: skip
    if cost:
        labels = {name: ROWS[name].label for name in config.rows}
        yield TitledTable("Cost of a training step, at the same weights", step_table(cost, labels, update=False))


def claims(config: ReasoningGradientsConfig, runs: Runs) -> Iterator[Claim]:
    """The claims that the field disagrees on."""
    for name, other, statement in (
        (FULL, "one-step", "Full backpropagation solves more puzzles than the one-step gradient with every seed"),
        (
            "neumann",
            "one-step",
            "Neumann (2, 1), the attractor models' gradient, solves more puzzles than the one-step gradient with every "
            "seed",
        ),
        (
            "implicit",
            FULL,
            "The implicit gradient solves at most one percentage point fewer puzzles than full backpropagation",
        ),
    ):
        if gaps := runs.gaps(name, other, "test.solved"):
            gap = 100 * fmean(gaps)
            holds = gap > -1 if other == FULL else min(gaps) > 0
            each = ", ".join(f"{100 * one:+.1f}" for one in gaps)
            yield Claim(
                statement, f"{gap:+.1f} percentage points of the test puzzles on average ({each} by seed)", holds
            )


def protocol(config: ReasoningGradientsConfig, runs: Runs) -> str:
    """Describe what was run."""
    one = training(config, ROWS[config.rows[0]], config.plan.first_seed)
    chosen = one.optimization
    return (
        f"The puzzles are {one.game()}: {one.training_puzzles} for training, varied by symmetry, "
        f"{one.held_out_puzzles} for validation and as many for the test. The network has width {one.width} and "
        f"{one.blocks} block{'s' * (one.blocks > 1)}. A segment takes at most {one.equilibria.solver_steps} plain "
        f"fixed-point steps on a batch of {chosen.batch_size} puzzles; a training has {chosen.steps} segments with an "
        f"AdamW update after each, and a puzzle stays for up to {one.segments} segments, in the test too. The tested "
        f"weights are a moving average with decay {chosen.averaging:g}. Every row has {config.plan.seeds} seeds."
    )


def notes(config: ReasoningGradientsConfig, runs: Runs) -> Iterator[str]:
    """Notes that a reader needs."""
    yield (
        "Full backpropagation goes through one segment and not through earlier ones, as published. It is the exact "
        "gradient of the steps that were taken; the implicit gradient is exact at an equilibrium, which these steps "
        "may not have reached."
    )
    yield (
        "The unrolled phantom gradients, 'last 4 steps' among them, take further steps from the solver's state, so "
        "that their segments are longer. The reversible row runs another iteration, which is damped and takes half as "
        "many steps of two evaluations each."
    )
    if config.plan.scale == "cpu":
        yield (
            f"This record is small, with boards of {config.side} × {config.side} and short trainings. It does not tell "
            "how the gradients compare on large puzzles."
        )
    if config.side == 4:
        yield (
            "Boards of 4 × 4 have only 36 minimal puzzles up to symmetry. The test puzzles are among those of "
            "training, so that the test measures how fast a network fits."
        )
    yield from table.still_rising(runs)
    yield from table.diverged(runs)


def drawings(config: ReasoningGradientsConfig, runs: Runs, folders: Mapping[str, Run]) -> Iterator[CaptionedFigure]:
    """Draw accuracy and cosine during training."""
    if not any(line.key for line in runs):
        return
    figure, (quality, cosine) = axes(2, width=4.8)
    looks = {name: style(index) for index, name in enumerate(config.rows)}
    table.curves(
        quality, ((ROWS[name].label, runs.where(row=name), looks[name]) for name in config.rows), "solved", 100
    )
    quality.set_ylabel("validation puzzles solved, %")
    for name in config.rows:
        together = list(zip(*(line["cosines"] or () for line in runs.where(row=name)), strict=False))
        if together:
            values = [fmean(look["cosine"] for look in each) for each in together]
            cosine.plot([each[0]["step"] for each in together], values, **looks[name])
    cosine.set(xlabel="steps", ylabel="cosine to the implicit gradient")
    yield CaptionedFigure(
        "gradients",
        figure,
        "During training, mean over the seeds: validation puzzles solved (left), and cosine similarity of each "
        "gradient to the converged implicit one at the same state (right).",
    )


TABLE = table.published(
    globals(),
    title="Gradients of small reasoning models on Sudoku",
    source="The question of arXiv 2510.04871 (rejects implicit gradients), 2506.21734 (one step) and 2605.12466 "
    "(attractor models); puzzles, network and figures are ours",
)
