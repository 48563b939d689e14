"""Table: a fixed-point language model beside explicit models, and its perplexity by evaluations at test time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from torchimplicit.recipes.phantom.language import (
    RUNNER,
    LanguageConfig,
    LanguageTask,
    equilibrium_of,
    wikitext2,
    wikitext103,
)
from torchimplicit.recipes.runtime import table
from torchimplicit.recipes.runtime.errors import UserError
from torchimplicit.recipes.runtime.page import axes, style
from torchimplicit.recipes.runtime.run import Run, device, quietly, threads
from torchimplicit.recipes.runtime.settings import Machine, known_rows, positive
from torchimplicit.recipes.runtime.table import CaptionedFigure, Cell, Claim, Job, Plan, Runs, TitledTable
from torchimplicit.recipes.runtime.task import Shard
from torchimplicit.recipes.runtime.trainer import Measuring


@dataclass(frozen=True, kw_only=True)
class Row:
    """A model: its label, and the settings by which it differs from the recipe."""

    label: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    narrow: bool = False

    @property
    def stack(self) -> bool:
        """True if its layers have weights of their own, so that no layer is iterated."""
        return self.settings.get("architecture") == "stack"

    def of(self, base: LanguageConfig) -> LanguageConfig:
        """The recipe with this model. A narrow stack has about the parameters of one layer."""
        explicit = "architecture" in self.settings  # pretraining replaces a solver, which it does not have
        equilibria = replace(base.equilibria, pretrain_steps=0) if explicit else base.equilibria
        one = replace(base, equilibria=equilibria, **self.settings)
        if not self.narrow:
            return one
        sizes = {name: max(1, getattr(one, name) // one.depth) for name in ("head_width", "inner_width")}
        return replace(one, **sizes)


ROWS = {
    "equilibrium": Row(label="equilibrium"),
    "start": Row(label="equilibrium, learned start", settings={"learned_start": True}),
    "consistent": Row(label="equilibrium, consistency loss", settings={"consistency_weight": 1.0}),
    "looped": Row(label="looped", settings={"architecture": "looped"}),
    "narrow": Row(label="stack, equal parameters", settings={"architecture": "stack"}, narrow=True),
    "stack": Row(label="stack, equal width", settings={"architecture": "stack"}),
}
"""The rows by name."""

COUNTS = (1, 2, 4, 8, 16, 32)
"""Evaluations of the layer at test time."""

FULL = "full"
"""The curve's entry with the solver or the number of layers of training."""

CURVES = "curves"


@dataclass(frozen=True, kw_only=True)
class LoopedLanguageConfig:
    """A fixed-point language model, and explicit models at equal parameters and at equal evaluations."""

    plan: Plan = field(default_factory=lambda: Plan(seeds=2, together=12))

    rows: tuple[str, ...] = tuple(ROWS)
    """Rows to run."""

    data_dir: Path | None = None
    """Your own text, or WikiText's files, as for 'train language-wikitext2'. Default: download WikiText."""

    steps: int | None = None
    """Optimizer steps of each training. Default: 400, or 300,000 at the paper's scale."""

    depth: int = 8
    """Number of applications of the explicit models' layers."""

    machine: Machine = field(default_factory=lambda: Machine(tensorboard=False))

    def __post_init__(self) -> None:
        positive(self, "steps", "depth")
        known_rows(self.rows, tuple(ROWS))


def training(config: LoopedLanguageConfig, row: Row, seed: int) -> LanguageConfig:
    """The settings of one run."""
    paper = config.plan.scale == "paper"
    base = wikitext103() if paper else replace(wikitext2(), validation_tokens=10000, test_tokens=10000)
    steps = config.steps or (base.optimization.steps if paper else 400)
    optimization = replace(base.optimization, seed=seed, steps=steps)
    if not paper:
        every, warmup = max(1, steps // 3), min(optimization.warmup_steps, steps // 5)
        optimization = replace(optimization, validate_every=every, warmup_steps=warmup)
    base = replace(base, data_dir=config.data_dir, optimization=optimization, machine=config.machine)
    return row.of(replace(base, depth=config.depth))


def jobs(config: LoopedLanguageConfig) -> list[Job]:
    """The trainings seed by seed, and at last the curves of all of them."""
    recipe = f"language-wikitext{'103' if config.plan.scale == 'paper' else '2'}"
    planned = [
        Job(f"{name}-{seed}", recipe, training(config, ROWS[name], seed), {"row": name, "seed": seed})
        for seed in config.plan.all_seeds
        for name in config.rows
    ]
    names, settings = tuple(job.name for job in planned), tuple(job.config for job in planned)
    return [*planned, Job(CURVES, "looped-language-curves", CurvesConfig(names=names, runs=settings))]


# -- Perplexity over evaluations, at the trained weights ---------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class CurvesConfig:
    """Runs of a table to test with other numbers of evaluations."""

    names: tuple[str, ...] = ()
    """Names of the runs beside this one's folder; each is tested at its best weights."""

    runs: tuple[LanguageConfig, ...] = ()
    """Settings of these runs."""


@dataclass(frozen=True)
class Tested:
    """The test of a model.

    Attributes:
        perplexity: of the test text.
        evaluations: of the layer for each segment, in whole-batch equivalents; the number of layers of a stack.
        residual: mean relative residual; ``None`` where it is not known.
    """

    perplexity: float
    evaluations: float
    residual: float | None = None


def measured(config: CurvesConfig, run: Run) -> dict[str, dict[str, Tested]]:
    """The tests by run and number of evaluations.

    Raises:
        UserError: none of the runs has been trained.
    """
    beside = {name: Run(run.path.parent / name) for name in config.names}
    pairs = [(name, one) for name, one in zip(beside, config.runs, strict=True) if beside[name].best.is_file()]
    if not pairs:
        raise UserError(f"none of the runs that {run} is to measure has been trained; resume the table")
    with threads(config.runs[0].machine.threads), quietly():
        return {name: curve(RUNNER.best(one, beside[name])) for name, one in pairs}


@torch.no_grad()
def curve(task: LanguageTask) -> dict[str, Tested]:
    """The tests of one model. Its memory comes from as many evaluations as its states. A stack has one test."""
    found = {FULL: tested(task)}
    if task.config.architecture != "stack":
        layer = equilibrium_of(task).equilibrium
        assert layer.solver is not None
        usual = replace(layer.solver, keep_trajectory=False)
        for count in COUNTS:
            layer.eval_solver = usual.given(count)
            found[str(count)] = tested(task)
        layer.eval_solver = None
    return found


def tested(task: LanguageTask) -> Tested:
    """Test the model as it is."""
    where = device(task.config.machine.device)
    solutions: list[tuple[float, float]] = []
    stack = task.config.architecture == "stack"
    handle = None
    if not stack:
        handle = equilibrium_of(task).equilibrium.register_solution_hook(
            lambda _, found: solutions.append((found.evaluations, float(found.residual.mean())))
        )
    task.begin()
    sums = sum(
        task.score(type(batch)(batch.tokens.to(where), batch.targets.to(where), batch.first))
        for batch in task.held_out_batches("test", Shard())
    )
    if handle is not None:
        handle.remove()
    assert isinstance(sums, torch.Tensor)
    perplexity = task.figures(sums.tolist())["perplexity"]
    if not solutions:
        return Tested(perplexity, task.config.depth)
    evaluations, residuals = (fmean(part) for part in zip(*solutions, strict=True))
    return Tested(perplexity, evaluations, residuals if math.isfinite(residuals) else None)


def curves_ready(config: CurvesConfig) -> None:
    """Raise if the first of the runs could not be run."""
    for one in config.runs[:1]:
        RUNNER.check(one)


MEASURING = Measuring(measure=measured, name="curves.json", ready=curves_ready)


# -- What the runs come to ---------------------------------------------------------------------------------------------


figures = table.by_name(**{CURVES: table.read("curves.json")})


def at(config: LoopedLanguageConfig, runs: Runs, row: str, count: int | str, figure: str = "perplexity") -> list[Any]:
    """A figure of a row's runs with this number of evaluations, seed by seed, where there is one."""
    curves = runs.named(CURVES)
    found = []
    for seed in config.plan.all_seeds:
        name = f"{row}-{seed}"
        tests = curves.get(name, {})
        value = tests.get(str(count), {}).get(figure)
        if value is not None:
            found.append(value)
    return found


def sheets(config: LoopedLanguageConfig, runs: Runs) -> Iterator[TitledTable]:
    """The models; and their perplexities over evaluations."""
    yield table.sheet("Perplexity and cost", config.rows, [
        Cell("Model", lambda name: ROWS[name].label),
        Cell("Parameters", runs.first("parameters")),
        Cell("Test perplexity", lambda name: table.spread(at(config, runs, name, FULL)), "",
             "Perplexity of the test text after equally many training steps, with the weights of the best validation; "
             "mean ± standard deviation over the seeds."),
        Cell("Evaluations", lambda name: table.spread(at(config, runs, name, FULL, "evaluations")), "",
             "Evaluations of the layer for a test segment, mean ± standard deviation over the seeds. A stack has as "
             "many as layers."),
        Cell("Training evaluations",
             lambda name: str(config.depth) if ROWS[name].stack else table.spread(runs.of(name, "costs.forward")), "",
             "Evaluations of the layer in the forward pass of a training step, mean ± standard deviation over the "
             "seeds. A stack has as many as layers."),
        Cell("Step", runs.told("costs.seconds", 3), "s",
             "Wall time of a training step: median over the steps, mean ± standard deviation over the seeds."),
    ])  # fmt: skip
    looped = [name for name in config.rows if at(config, runs, name, COUNTS[0])]
    if looped:
        yield table.sheet("Test perplexity by number of evaluations of the layer", looped, [
            Cell("Model", lambda name: ROWS[name].label),
            *(
                Cell(str(count), lambda name, count=count: table.spread(at(config, runs, name, count)))  # type: ignore[misc]
                for count in COUNTS
            ),
            Cell("Residual at 4", lambda name: table.spread(at(config, runs, name, 4, "residual"), 4), "",
                 "Relative residual of the last iterate that was evaluated, with 4 evaluations; mean over the test "
                 "text, then mean ± standard deviation over the seeds."),
        ])  # fmt: skip


def claims(config: LoopedLanguageConfig, runs: Runs) -> Iterator[Claim]:
    """Test published statements about these models."""

    def against(one: list[float], other: list[float]) -> str:
        return f"{table.spread(one)} against {table.spread(other)}"

    base = at(config, runs, "equilibrium", FULL)
    for other, statement in (
        ("narrow", "The equilibrium has a lower perplexity than a stack of equal parameters"),
        ("looped", "The equilibrium's perplexity is within 2 % of the looped model's"),
        ("stack", "The equilibrium's perplexity is within 2 % of a stack of equal width"),
    ):
        theirs = at(config, runs, other, FULL)
        if base and theirs:
            limit = 1.0 if other == "narrow" else 1.02
            yield Claim(statement, against(base, theirs), fmean(base) <= limit * fmean(theirs))
    for row, what in (("start", "A learned start"), ("consistent", "The consistency loss")):
        ours, plain = at(config, runs, row, 1), at(config, runs, "equilibrium", 1)
        if ours and plain:
            yield Claim(
                f"{what} lowers the perplexity after one evaluation", against(ours, plain), fmean(ours) < fmean(plain)
            )
    least, most = at(config, runs, "equilibrium", config.depth), at(config, runs, "equilibrium", COUNTS[-1])
    if least and most:
        yield Claim(
            f"{COUNTS[-1]} evaluations are no worse than {config.depth} for the equilibrium, within .1 %",
            against(most, least),
            fmean(most) <= 1.001 * fmean(least),
        )


def protocol(config: LoopedLanguageConfig, runs: Runs) -> str:
    """Describe what was run."""
    one = training(config, ROWS["equilibrium"], config.plan.first_seed)
    chosen, solve = one.optimization, one.equilibria
    words = "all words" if one.vocabulary is None else f"the {one.vocabulary} most frequent words"
    return (
        f"Every model is trained on {one.corpus} with {words}, for {chosen.steps} steps of {chosen.batch_size} × "
        f"{one.segment_length} tokens with {chosen.optimizer.capitalize()} at {chosen.learning_rate:g}. Equilibria are "
        f"solved by {solve.solver.capitalize()} to {solve.tolerance:g} within {solve.solver_steps} steps and have the "
        f"{solve.gradient} gradient. The looped model applies one layer {config.depth} times; a stack has "
        f"{config.depth} layers, and that of equal parameters has head and feed-forward widths divided by "
        f"{config.depth}. These explicit models are trained by backpropagation through all layers. The test is on "
        f"{'all' if one.test_tokens is None else f'the first {one.test_tokens}'} tokens of the test text. There are "
        f"{config.plan.seeds} seeds."
    )


def notes(config: LoopedLanguageConfig, runs: Runs) -> Iterator[str]:
    """Notes that a reader needs."""
    yield (
        "Published perplexities are at other scales and not comparable with these. On WikiText-103 they are 24.0 for a "
        "DEQ of 98M parameters (arXiv 2111.05177) and 23.2 for a reversible DEQ of 94M with 12 evaluations (arXiv "
        "2509.12917); on another text, 18.30 for attractor models of 140M against 21.48 for a transformer (arXiv "
        "2605.12466)."
    )
    if config.plan.scale == "cpu":
        yield "Training covers a small part of the text: the models are far from trained, and their order may change."
    yield (
        "An evaluation costs the same in all models except the stack of equal parameters, all of whose layers together "
        "cost as much as one evaluation. The network that predicts the learned start adds parameters, and its "
        "evaluation is not counted."
    )
    if config.plan.seeds < 3:
        yield f"A standard deviation over {config.plan.seeds} seeds says little."
    yield from table.diverged(runs)


def drawings(config: LoopedLanguageConfig, runs: Runs, folders: Mapping[str, Run]) -> Iterator[CaptionedFigure]:
    """Draw perplexity over evaluations."""
    shown = [name for name in config.rows if at(config, runs, name, FULL)]
    if not shown:
        return
    figure, (panel,) = axes()
    for index, name in enumerate(config.rows):
        points = [(count, at(config, runs, name, count)) for count in COUNTS]
        points = [(count, values) for count, values in points if values]
        if points:
            panel.plot(*zip(*((count, fmean(values)) for count, values in points), strict=True), label=ROWS[name].label,
                       **style(index))  # fmt: skip
        elif name in shown:
            panel.plot([config.depth], [fmean(at(config, runs, name, FULL))], label=ROWS[name].label, **style(index))
    panel.set(xscale="log", yscale="log", xlabel="evaluations of the layer at test time", ylabel="test perplexity")
    panel.set_xticks(COUNTS, labels=[str(count) for count in COUNTS])
    panel.minorticks_off()
    panel.legend()
    yield CaptionedFigure(
        "evaluations",
        figure,
        "Test perplexity against evaluations of the layer at test time, mean over the seeds. A stack has as many as "
        "layers.",
    )


TABLE = table.published(
    globals(),
    title="Language models: an equilibrium, a loop and stacks of layers",
    source="Bai et al. 2019 (arXiv 1909.01377) compare equilibria with explicit layers; arXiv 2605.12466 learns the "
    "start, and arXiv 2602.03024 trains for consistency. Text and sizes are ours.",
)
