"""Table: language modelling with implicit and phantom gradients, and Jacobian regularization (Geng et al. 2021, Table
3)."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal

from torchimplicit.recipes.phantom.language import CONVERGED, KINDS, CostConfig, LanguageConfig, wikitext2, wikitext103
from torchimplicit.recipes.runtime import table
from torchimplicit.recipes.runtime.page import axes, style
from torchimplicit.recipes.runtime.settings import Machine, positive
from torchimplicit.recipes.runtime.step_cost import TIME
from torchimplicit.recipes.runtime.table import CaptionedFigure, Cell, Claim, Job, Plan, Runs, TitledTable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from torchimplicit.recipes.runtime.run import Run

COSTS = "costs"
"""Name of the job that measures steps in turn."""

PAIRS = {"PostLN": ("post-implicit", "post-phantom"), "PreLN + JR": ("pre-jacobian-implicit", "pre-jacobian-phantom")}
"""The published pairs of implicit and unrolled phantom gradients."""


@dataclass(frozen=True)
class Row:
    """A row: one way to train.

    Attributes:
        label: label to display.
        normalization: see :class:`DEQTransformerConfig`.
        gradient: the estimator.
        jacobian: whether the Jacobian is regularized.
        perplexity, speed: published, of the test on WikiText-103, and of training against the first row.
    """

    label: str
    normalization: Literal["post", "pre"]
    gradient: Literal["implicit", "unrolled-phantom"]
    jacobian: bool
    perplexity: float | None = None
    speed: float | None = None


ROWS = {
    "post-implicit": Row("PostLN, implicit", "post", "implicit", False, 24.0, 1.0),
    "post-phantom": Row("PostLN, UPG(5, 0.8)", "post", "unrolled-phantom", False, 25.7, 1.7),
    "pre-jacobian-implicit": Row("PreLN + JR, implicit", "pre", "implicit", True, 24.5, 1.7),
    "pre-jacobian-phantom": Row("PreLN + JR, UPG(5, 0.8)", "pre", "unrolled-phantom", True, 24.4, 2.2),
    "pre-implicit": Row("PreLN, implicit", "pre", "implicit", False),
    "pre-phantom": Row("PreLN, UPG(5, 0.8)", "pre", "unrolled-phantom", False),
}
"""The rows. JR is Jacobian regularization with weight 2.0 and probability 0.4, as published."""


@dataclass(frozen=True, kw_only=True)
class PhantomLanguage:
    """A language model with implicit and phantom gradients, with and without Jacobian regularization."""

    plan: Plan = field(default_factory=Plan)
    machine: Machine = field(default_factory=Machine)

    data_dir: Path | None = None
    """Folder with wiki.train.tokens, wiki.valid.tokens and wiki.test.tokens of WikiText-2, or of WikiText-103 with
    --scale paper. Default: download them."""

    steps: int | None = None
    """Optimizer steps per run. Default: 400, or 300,000 with --scale paper."""

    repeats: int = 8
    """Number of times every kind of step is timed."""

    def __post_init__(self) -> None:
        positive(self, "steps", "repeats")


def language(config: PhantomLanguage, row: Row, seed: int) -> LanguageConfig:
    """The settings of one run."""
    paper = config.plan.scale == "paper"
    base = wikitext103(row.normalization) if paper else wikitext2()
    steps = config.steps or (base.optimization.steps if paper else 400)
    optimization = replace(base.optimization, seed=seed, steps=steps)
    if not paper:
        optimization = replace(optimization, validate_every=max(1, steps // 5))
        base = replace(base, normalization=row.normalization, validation_tokens=10000, test_tokens=30000)
    return replace(
        base,
        data_dir=config.data_dir,
        optimization=optimization,
        equilibria=replace(
            base.equilibria,
            gradient=row.gradient,
            jacobian_weight=2.0 if row.jacobian else 0.0,
            jacobian_probability=0.4,
        ),
        machine=config.machine,
    )


def jobs(config: PhantomLanguage) -> list[Job]:
    """All jobs: the published rows seed by seed, then the others, then the costs at the weights of the first seed."""
    recipe = f"language-wikitext{'103' if config.plan.scale == 'paper' else '2'}"
    planned = [
        Job(f"{name}-{seed}", recipe, language(config, row, seed), {"row": name, "seed": seed})
        for published in (True, False)
        for seed in config.plan.all_seeds
        for name, row in ROWS.items()
        if (row.perplexity is not None) == published
    ]
    first = [job for job in planned if job.key["seed"] == config.plan.first_seed]
    names, settings = tuple(job.name for job in first), tuple(job.config for job in first)
    return [*planned, Job(COSTS, "language-costs", CostConfig(names=names, runs=settings, repeats=config.repeats))]


def figures(config: PhantomLanguage, run: Run) -> dict[str, Any]:
    """Everything a run has written except its settings; only its state if it has written nothing."""
    try:
        results = run.read_json("results.json")
    except (OSError, json.JSONDecodeError):
        return {"state": run.read()["state"]}
    return {name: value for name, value in results.items() if name != "settings"}


@dataclass(frozen=True, eq=False)
class Trained:
    """A row's runs.

    Attributes:
        row: what it is.
        runs: runs of its seeds, those that there are.
        step_seconds: seconds of a training step, in turn with the others'; ``None`` where it was not measured.
        radius: spectral radius of the Jacobian at the equilibria of a validation segment; likewise.
    """

    row: Row
    runs: Runs
    step_seconds: float | None
    radius: float | None

    @property
    def tested(self) -> list[float]:
        """Test perplexities at the best validation of each seed."""
        return self.runs.column("test.figures.perplexity")

    @property
    def seconds(self) -> float | None:
        """The seconds of a whole training."""
        steps = self.runs.column("steps")
        return self.step_seconds * max(steps) if self.step_seconds is not None and steps else None

    def costs(self, name: str) -> list[float]:
        """A figure of the steps, for every seed."""
        return self.runs.column(f"costs.{name}")

    def validated_after(self, seconds: float) -> list[float]:
        """Validation perplexities after this much training time, interpolated linearly in the logarithm between
        validations. Seeds whose first validation is later are left out."""
        validations = []
        steps = seconds / self.step_seconds if self.step_seconds else math.nan
        for line in self.runs:
            points = [(v["step"], math.log(v["figures"]["perplexity"])) for v in line["validations"]]
            for (low, one), (high, other) in pairwise(points):
                if low <= steps <= high * (1 + 1e-9):
                    validations.append(math.exp(one + (other - one) * (steps - low) / (high - low)))
                    break
        return validations


def measured(runs: Runs) -> Mapping[str, Any]:
    """The timings: ``costs`` by run and kind of step, and ``radius`` by run; empty if there are none."""
    costs = runs.named(COSTS)
    return costs if "costs" in costs else {}


def both(cost: Mapping[str, float]) -> float:
    """Seconds of both passes."""
    return cost["forward_seconds"] + cost["backward_seconds"]


def trained(config: PhantomLanguage, runs: Runs) -> dict[str, Trained]:
    """The rows that have runs."""
    by_row = {}
    for name, row in ROWS.items():
        lines = Runs(line for line in runs.where(row=name) if line["validations"] is not None)
        first = f"{name}-{config.plan.first_seed}"
        costs = measured(runs).get("costs", {}).get(first)
        seconds = None
        if costs is not None:
            seconds = both(costs["implicit" if row.gradient == "implicit" else "phantom"])
            if row.jacobian:
                seconds += language(config, row, 0).equilibria.jacobian_probability * both(costs["penalty"])
        if lines:
            by_row[name] = Trained(row, lines, seconds, measured(runs).get("radius", {}).get(first))
    return by_row


def sheets(config: PhantomLanguage, runs: Runs) -> Iterator[TitledTable]:
    """Tables of perplexity and cost, and of steps at the same weights."""
    rows = trained(config, runs)
    base = rows["post-implicit"].step_seconds if "post-implicit" in rows else None
    budget = min((one.seconds for one in rows.values() if one.seconds is not None), default=None)

    def label(one: Trained) -> str:
        lost = sum(line["state"] == "diverged" for line in one.runs)
        return one.row.label + (f" ({lost} of {len(one.runs)} diverged)" if lost else "")

    yield table.sheet("Perplexity and cost", rows.values(), [
        Cell("Training", label),
        Cell("Published perplexity", lambda one: table.shown(one.row.perplexity, ".1f"), "",
             "Published perplexity on the test text of WikiText-103, with 98 million parameters."),
        Cell("Published speed", lambda one: f"{one.row.speed:.1f}×" if one.row.speed else table.NONE, "",
             "Published speed of training, relative to the row 'PostLN, implicit'."),
        Cell("Perplexity at equal steps", lambda one: table.spread(one.tested), "",
             "Perplexity on the test text at the weights of the best validation, after the same number of steps in "
             "every row: mean ± standard deviation over the seeds."),
        Cell("Perplexity at equal time",
             lambda one: table.NONE if budget is None else table.spread(one.validated_after(budget)), "",
             "Perplexity on the validation text after the time in which the fastest row finishes its training, "
             "interpolated between validations: mean ± standard deviation over the seeds."),
        Cell("Forward evaluations", lambda one: table.spread(one.costs("forward")), "",
             "Evaluations of the cell in the forward pass of a step, UPG's own steps included: mean over the steps, "
             "then mean ± standard deviation over the seeds."),
        Cell("Backward evaluations", lambda one: table.spread(one.costs("backward")), "",
             "Products with the Jacobian in the backward pass of a step: mean over the steps, then mean ± standard "
             "deviation over the seeds."),
        Cell("Spectral radius", lambda one: table.shown(one.radius, ".2f"), "",
             "Spectral radius of the Jacobian at the equilibria of one segment of the validation text, mean over its "
             "rows, at the first seed's weights."),
        Cell("Step", lambda one: table.shown(one.step_seconds, ".3f"), "s",
             f"{TIME} of the forward and the backward pass, median over steps that take turns with those of the other "
             "rows, at the first seed's weights. With JR, the time of the penalty times its probability is added."),
        Cell("Speed",
             lambda one: f"{base / one.step_seconds:.2f}×" if base and one.step_seconds else table.NONE, "",
             "Speed of a step, relative to the row 'PostLN, implicit'."),
    ])  # fmt: skip
    steps = [
        (ROWS[name.removesuffix(f"-{config.plan.first_seed}")].label, kind, kinds[kind], kinds[counterpart(kind)])
        for name, kinds in measured(runs).get("costs", {}).items()
        for kind in KINDS
        if kind in kinds
    ]
    if not steps:
        return
    yield table.sheet("Cost of a training step, at the same weights", steps, [
        Cell("Weights of", lambda step: step[0], "", "The row whose weights are used, at its first seed."),
        Cell("Step", lambda step: KINDS[step[1]], "", "The kind of step; all kinds take turns on the same batches."),
        Cell("Forward", lambda step: f"{step[2]['forward_seconds']:.3f}", "s",
             f"{TIME} of the forward pass, median over the batches."),
        Cell("Backward", lambda step: f"{step[2]['backward_seconds']:.3f}", "s",
             f"{TIME} of the backward pass, median over the batches."),
        Cell("Forward evaluations", lambda step: f"{step[2]['forward']:.1f}", "",
             "Evaluations of the cell in the forward pass, mean over the batches."),
        Cell("Backward evaluations", lambda step: f"{step[2]['backward']:.1f}", "",
             "Products with the Jacobian in the backward pass, mean over the batches."),
        Cell("Speed", lambda step: table.NONE if step[1] == "penalty" else f"{both(step[3]) / both(step[2]):.2f}×", "",
             "Speed of both passes, relative to the implicit step at the same weights. Steps as published are compared "
             "with the implicit step as published."),
    ])  # fmt: skip


def counterpart(kind: str) -> str:
    """The implicit step to which a kind of step is compared, with the same stopping rule."""
    return "published" if kind.startswith("published") else "implicit"


def claims(config: PhantomLanguage, runs: Runs) -> Iterator[Claim]:
    """Compare the results with the targets."""
    rows = trained(config, runs)
    for label, names in PAIRS.items():
        if not {*names} <= {*rows}:
            continue
        one, other = (rows[name] for name in names)
        if one.tested and other.tested:
            yield Claim(
                f"{label}: after equal steps, the perplexity with UPG(5, 0.8) is at most 2 % above that with the "
                "implicit gradient",
                f"{table.spread(other.tested)} against {table.spread(one.tested)} "
                f"(published: {other.row.perplexity} against {one.row.perplexity})",
                fmean(other.tested) <= 1.02 * fmean(one.tested),
            )
        if one.step_seconds and other.step_seconds and one.row.speed and other.row.speed:
            aim, ratio = other.row.speed / one.row.speed, one.step_seconds / other.step_seconds
            yield Claim(
                f"{label}: a step with UPG(5, 0.8) is at least {aim:.1f} times as fast as one with the implicit "
                "gradient when both solve to the same tolerance",
                f"{ratio:.2f} times as fast",
                ratio >= round(aim, 1),
            )
            kinds = measured(runs).get("costs", {}).get(f"{names[0]}-{config.plan.first_seed}", {})
            if "published-phantom" in kinds and not one.row.jacobian:
                ratio = both(kinds["published"]) / both(kinds["published-phantom"])
                yield Claim(
                    f"{label}: a step with UPG(5, 0.8) is at least {aim:.1f} times as fast as one with the implicit "
                    "gradient when solvers take 30 steps forward and 35 backward, as published",
                    f"{ratio:.2f} times as fast",
                    ratio >= round(aim, 1),
                )
    pair = [rows[name] for name in ("pre-implicit", "pre-jacobian-implicit") if name in rows]
    if len(pair) == 2 and all(one.costs("forward") for one in pair):
        without, penalized = (fmean(one.costs("forward")) for one in pair)
        yield Claim(
            "Jacobian regularization saves forward evaluations",
            f"{penalized:.1f} a step with it and {without:.1f} without, for PreLN with the implicit gradient",
            penalized < without,
        )
    radii = [one.radius for one in pair if one.radius is not None]
    if len(radii) == 2:
        yield Claim(
            "Jacobian regularization lowers the spectral radius at the equilibrium",
            f"{radii[1]:.2f} with it and {radii[0]:.2f} without, for the first seed of PreLN, implicit",
            radii[1] < radii[0],
        )


def protocol(config: PhantomLanguage, runs: Runs) -> str:
    """Describe what was run, and how the figures were selected."""
    one = language(config, ROWS["post-implicit"], config.plan.first_seed)
    chosen, at = one.optimization, one.equilibria
    sizes = {size for size in runs.column("parameters") if size}
    words = "all words" if one.vocabulary is None else f"the {one.vocabulary} most frequent words (others are <unk>)"
    millions = "/".join(f"{size / 1e6:.2f}M" for size in sorted(sizes))
    part = ""
    if one.validation_tokens and one.test_tokens:
        part = (
            f" Validation reads the first {one.validation_tokens} tokens of its text, the test the first "
            f"{one.test_tokens}."
        )
    return (
        f"A DEQ transformer of {millions} parameters is trained on {one.corpus} with {words}, in {chosen.steps} steps "
        f"of {chosen.batch_size} × {one.segment_length} tokens by {chosen.optimizer.capitalize()} with learning rate "
        f"{chosen.learning_rate:g}. Forward solves stop at a relative residual of {at.tolerance:g} or after "
        f"{at.solver_steps} steps, implicit backward solves at {at.backward_tolerance:g} or after {at.backward_steps} "
        "steps. JR is Jacobian regularization with weight 2.0 and probability 0.4. The tested weights are those of the "
        f"best validation.{part} The seeds are {', '.join(map(str, config.plan.all_seeds))}."
    )


def notes(config: PhantomLanguage, runs: Runs) -> Iterator[str]:
    """Caveats for the reader."""
    rows, seeds = trained(config, runs), config.plan.seeds
    if config.plan.scale == "cpu":
        yield (
            "Text, vocabulary and model are smaller than those of the published table, and training sees a small part "
            "of the text once: compare rows with each other, not perplexities with the published ones."
        )
    if seeds < 3:
        yield f"With {seeds} seeds a standard deviation says little."
    yield (
        "Equal time means steps times the seconds of a step, which were measured in turn at trained weights. The "
        "seconds of the logs depend on what else the machine did. The perplexity is that of the validation text, since "
        "the test text is not read in the middle of a training."
    )
    if costs := measured(runs).get("costs"):
        exact, converged, phantom = (
            fmean(kinds[kind]["backward"] for kinds in costs.values()) for kind in ("implicit", "converged", "phantom")
        )
        yield (
            f"A backward pass with the implicit gradient needs {exact:.1f} products with the Jacobian here "
            f"({converged:.1f} to a residual of {CONVERGED:g}); UPG needs {phantom:.1f}, and 5 more forward "
            "evaluations. The phantom gradient saves time where the backward solver needs many products, up to 35 in "
            "the published runs."
        )
    for one in rows.values():
        unconverged = one.costs("unconverged")
        if unconverged and fmean(unconverged) > 0.01:
            share = f"{100 * fmean(unconverged):.0f} %"
            yield f"{one.row.label}: {share} of the samples stopped at the solver's step budget."
    if missing := [row.label for name, row in ROWS.items() if name not in rows]:
        yield f"These rows were not run: {', '.join(missing)}."
    if short := [f"{one.row.label} ({len(one.runs)})" for one in rows.values() if len(one.runs) < seeds]:
        yield f"These rows have fewer than {seeds} seeds: {', '.join(short)}."


def drawings(config: PhantomLanguage, runs: Runs, folders: Mapping[str, Run]) -> Iterator[CaptionedFigure]:
    """Validation perplexity against steps and against time."""
    rows = trained(config, runs)
    if rows:
        yield CaptionedFigure(
            "perplexity-steps",
            _curves(dict.fromkeys(rows.values(), 1.0), "Optimizer steps"),
            "Perplexity on the validation text against optimizer steps, mean over the seeds. Lower is better; rows "
            "whose lines coincide learn equally much from a step.",
        )
    if known := {one: one.step_seconds for one in rows.values() if one.step_seconds is not None}:
        yield CaptionedFigure(
            "perplexity-seconds",
            _curves(known, "Seconds of training"),
            "Perplexity on the validation text against training time, mean over the seeds. Time is steps times the "
            "seconds of a step, which were measured for all rows in turn. A row whose line is further to the left "
            "learns as much in less time.",
        )


def _curves(rows: dict[Trained, float], label: str) -> Figure:
    """The rows' curves, with a given step width."""
    figure, (ax,) = axes()
    for index, (one, width) in enumerate(rows.items()):
        curves: dict[int, list[float]] = {}
        for line in one.runs:
            for validation in line["validations"]:
                curves.setdefault(validation["step"], []).append(validation["figures"]["perplexity"])
        steps = sorted(curves)
        means = [fmean(curves[step]) for step in steps]
        ax.plot([width * step for step in steps], means, label=one.row.label, **style(index))
    ax.set(yscale="log", xlabel=label, ylabel="Validation perplexity")
    ax.legend()
    return figure


TABLE = table.published(
    globals(),
    title="Language modelling with implicit and phantom gradients",
    source="Geng et al. 2021, On Training Implicit Models (arXiv 2111.05177), Table 3: DEQ on WikiText-103.",
)
