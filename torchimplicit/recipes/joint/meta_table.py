"""Meta-learning: a context by joint inference and by gradient descent, on sine waves and Omniglot."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal

from torchimplicit.recipes.joint.meta import AdaptationsConfig, omniglot, sinusoid
from torchimplicit.recipes.runtime import table
from torchimplicit.recipes.runtime.page import axes, style
from torchimplicit.recipes.runtime.settings import Machine, positive
from torchimplicit.recipes.runtime.table import Cell, Claim, Drawing, Job, Plan, Runs, Sheet

if TYPE_CHECKING:
    from torchimplicit.recipes.runtime.run import Run

TITLES = {"sinusoid": "Sine waves", "omniglot": "Omniglot, 5-way 1-shot"}
UNITS = {"sinusoid": "mean squared error", "omniglot": "cross-entropy"}

ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "jiio": ("JIIO, exact", {"adaptation": "jiio"}),
    "first-order": ("JIIO, first order", {"adaptation": "jiio-first-order"}),
    "unrolled": ("JIIO, through 5 steps", {"adaptation": "jiio-unrolled", "adaptation_steps": 5}),
    "descent": ("descent, through 5 steps", {"adaptation": "descent", "adaptation_steps": 5}),
}
"""How the model was trained: a label, and the settings."""

UNROLLED = ROWS["unrolled"][1]["adaptation_steps"]

FEW = (3, 4, 5, 6, 8, 10, 25)
"""Steps of JIIO that are measured at weights trained through few."""

LONGER = {"unrolled": 3}
"""Times as many optimizer steps: one costs between a third and a half of what it costs to differentiate through
descent, so that training takes about as long."""


@dataclass(frozen=True, kw_only=True)
class MetaTableConfig:
    """Contexts by JIIO, with exact and first-order gradients, and by gradient descent."""

    plan: Plan = field(default_factory=Plan)

    problems: tuple[Literal["sinusoid", "omniglot"], ...] = ("sinusoid", "omniglot")
    """Which."""

    data_dir: Path | None = None
    """The folder with Omniglot's images_background_small1.zip."""

    steps: int | None = None
    """Of each training; by default the recipe's."""

    machine: Machine = field(default_factory=lambda: Machine(tensorboard=False))

    def __post_init__(self) -> None:
        positive(self, "steps")


def adapted(config: MetaTableConfig, problem: str, row: str, seed: int) -> AdaptationsConfig:
    """One run's settings."""
    base = sinusoid() if problem == "sinusoid" else replace(omniglot(), data_dir=config.data_dir)
    optimization = replace(base.optimization, seed=seed)
    if config.steps is not None:
        optimization = replace(
            optimization, steps=config.steps, validate_every=min(config.steps, optimization.validate_every)
        )
    factor = LONGER.get(row, 1)
    optimization = replace(
        optimization, steps=factor * optimization.steps, validate_every=factor * optimization.validate_every
    )
    if config.plan.scale == "paper":
        optimization = replace(optimization, steps=50 * optimization.steps)
    training = replace(base, **ROWS[row][1], optimization=optimization, machine=config.machine)
    usual = AdaptationsConfig(training=training)
    return replace(usual, jiio_steps=FEW) if row == "unrolled" else usual


def native(config: MetaTableConfig, problem: str, row: str) -> str:
    """The adaptation that a model was trained with."""
    training = adapted(config, problem, row, 0).training
    return f"{'descent' if training.adaptation == 'descent' else 'JIIO'}-{training.adaptation_steps}"


def jobs(config: MetaTableConfig) -> list[Job]:
    """Every way of training, of one seed after the other."""
    return [
        Job(
            f"{problem}-{row}-seed{seed}",
            "jiio-meta-adaptations",
            adapted(config, problem, row, seed),
            {"row": row, "problem": problem, "seed": seed},
        )
        for problem in config.problems
        for seed in config.plan.all_seeds
        for row in ROWS
    ]


def figures(config: MetaTableConfig, run: Run) -> dict[str, Any] | None:
    """Of a run whose adaptations are measured."""
    adaptations, trained = (table.read(name)(config, run) for name in ("adaptations.json", "results.json"))
    if adaptations is None or trained is None:
        return None
    return {"adaptations": adaptations, **{name: trained[name] for name in ("validations", "test", "seconds", "costs")}}


# -- what the runs come to ---------------------------------------------------------------------------------------------


def of(runs: Runs, row: str, name: str, what: str) -> list[float]:
    """A figure of an adaptation at the models of a row, seed by seed."""
    return runs.of(row, f"adaptations.{name}.{what}")


def adaptations(runs: Runs, row: str) -> Mapping[str, Any]:
    """Those of the first seed, by name."""
    return next((line["adaptations"] for line in runs.where(row=row)), {})


def fastest(runs: Runs, row: str, kind: str, goal: float) -> tuple[str, float, float] | None:
    """The fastest adaptation of a kind whose error comes to the goal: its name, error and seconds."""
    reached = [
        (name, error, fmean(of(runs, row, name, "seconds")))
        for name in adaptations(runs, row)
        if name.startswith(kind) and (error := fmean(of(runs, row, name, "error"))) <= goal
    ]
    return min(reached, key=lambda one: one[2], default=None)


def there(config: MetaTableConfig, runs: Runs) -> dict[str, Runs]:
    """The problems that have runs, each with its own."""
    return {problem: own for problem in config.problems if (own := runs.where(problem=problem))}


def sheets(config: MetaTableConfig, runs: Runs) -> list[Sheet]:
    """Problem by problem: training, and the adaptations of every model."""
    return [one for problem, own in there(config, runs).items() for one in sheets_of(config, problem, own)]


def sheets_of(config: MetaTableConfig, problem: str, runs: Runs) -> list[Sheet]:
    """Of one problem."""
    spread = table.spread

    def native_figure(what: str, digits: int, scale: float = 1.0) -> Any:
        return lambda row: spread(of(runs, row, native(config, problem, row), what), digits, scale)

    cells = [
        Cell[str]("Trained by", lambda row: f"{ROWS[row][0]} ({native(config, problem, row)})"),
        Cell("Error", native_figure("error", 3), "",
             f"Test {UNITS[problem]} on the queries, adapted as in training; mean ± deviation over seeds."),
        Cell("Accuracy", native_figure("accuracy", 1, 100), "%", "Likewise."),
        Cell("Adaptation", native_figure("seconds", 0, 1e3), "ms", "CPU time for all test tasks at once."),
        Cell("A training step", lambda row: spread(runs.of(row, "costs.seconds"), 0, 1e3), "ms",
             "Wall time, the median of a run; the machine was shared, so that it is rough."),
        Cell("Training steps", lambda row: str(adapted(config, problem, row, 0).training.optimization.steps)),
    ]  # fmt: skip
    shown = (cell for cell in cells if problem == "omniglot" or cell.title != "Accuracy")
    made = [table.sheet(f"{TITLES[problem]}: training", ROWS, shown)]
    return made + [adapting(problem, runs, row) for row in ROWS if adaptations(runs, row)]


def adapting(problem: str, runs: Runs, row: str) -> Sheet:
    """The adaptations of a row's models."""
    first = adaptations(runs, row)

    def told(what: str, digits: int, scale: float = 1.0) -> Any:
        return lambda name: table.spread(of(runs, row, name, what), digits, scale)

    cells = [
        Cell[str]("Adaptation", lambda name: name),
        Cell("Error", told("error", 3), "", f"Test {UNITS[problem]} on the queries."),
        Cell("Accuracy", told("accuracy", 1, 100), "%"),
        Cell("Time", told("seconds", 0, 1e3), "ms",
             "CPU time for all test tasks at once, the median of repeats taken in turn."),
        Cell("Evaluations", lambda name: f"{fmean(of(runs, row, name, 'evaluations')):.0f}", "",
             "Of the map, and products with its Jacobian, in whole-batch equivalents."),
        Cell("Step size", lambda name: f"{first[name]['step_size']:g}", "",
             "Chosen on validation tasks, the first seed's."),
    ]  # fmt: skip
    title = f"{TITLES[problem]}: adaptation of the model trained by {ROWS[row][0]}"
    return table.sheet(title, first, (c for c in cells if problem == "omniglot" or c.title != "Accuracy"))


def claims(config: MetaTableConfig, runs: Runs) -> list[Claim]:
    """Error against time, and the exact gradient against the first-order one, problem by problem."""
    return [claim for problem, own in there(config, runs).items() for claim in claims_of(config, problem, own)]


def claims_of(config: MetaTableConfig, problem: str, runs: Runs) -> list[Claim]:
    """Of one problem."""
    made = []
    rows = {line["row"] for line in runs}
    title = TITLES[problem]
    for row in ("jiio", "first-order", "unrolled"):
        if not {row, "descent"} <= rows:
            continue
        rival = native(config, problem, "descent")
        goal = fmean(of(runs, "descent", rival, "error"))
        seconds = fmean(of(runs, "descent", rival, "seconds"))
        own = fastest(runs, row, "JIIO", goal)
        names = {name for line in runs.where(row=row) for name in line["adaptations"] if "JIIO" in name}
        best = min(fmean(of(runs, row, name, "error")) for name in names)
        made.append(
            Claim(
                f"{title}: trained and adapted by {ROWS[row][0]}, the error of {rival} (its own training) is reached "
                "at least 3 times as fast",
                f"{rival} has {goal:.3f} after {1e3 * seconds:.0f} ms; "
                + (
                    f"{own[0]} has {own[1]:.3f} after {1e3 * own[2]:.0f} ms, {seconds / own[2]:.1f} times as fast"
                    if own is not None
                    else f"JIIO comes to {best:.3f} at best"
                ),
                own is not None and seconds / own[2] >= 3,
            )
        )
    for row in ("jiio", "unrolled"):
        if row not in rows:
            continue
        goal = fmean(of(runs, row, native(config, problem, row), "error"))
        own, other = (fastest(runs, row, kind, 1.02 * goal) for kind in ("JIIO", "descent"))
        assert own is not None
        made.append(
            Claim(
                f"{title}: at the same weights, those trained by {ROWS[row][0]}, it comes to its error at least 3 "
                "times as fast as descent",
                f"{own[0]} has {own[1]:.3f} after {1e3 * own[2]:.0f} ms; "
                + (
                    f"{other[0]} has {other[1]:.3f} after {1e3 * other[2]:.0f} ms: {other[2] / own[2]:.1f} times it"
                    if other is not None
                    else "descent never does in its steps"
                ),
                other is None or other[2] / own[2] >= 3,
            )
        )
    if {"jiio", "first-order"} <= rows:
        exact, cheap = (of(runs, row, native(config, problem, row), "error") for row in ("jiio", "first-order"))
        made.append(
            Claim(
                f"{title}: the exact gradient trains to a lower error than the first-order one",
                f"{table.spread(exact, 3)} instead of {table.spread(cheap, 3)}, means and deviations over the seeds",
                fmean(exact) < fmean(cheap),
            )
        )
    return made


def protocol(config: MetaTableConfig, runs: Runs) -> str:
    """What was run, in words."""
    parts = []
    for problem in there(config, runs):
        kind = adapted(config, problem, "jiio", 0)
        one = kind.training
        parts.append(
            f"{TITLES[problem]}: {one.shots} support and {one.queries} query samples"
            f"{' a character' if problem == 'omniglot' else ''}, states of {one.state_size}, a context of "
            f"{one.context_size}, {one.optimization.steps} steps of Adam on {one.optimization.batch_size} tasks, step "
            f"size {one.adaptation_step_size:g}, penalty {one.penalty:g}."
        )
    kind = adapted(config, config.problems[0], "jiio", 0)
    return (
        "A model z = tanh(Wz + γ(c) u + β(c)) whose context c adapts to a task on its support, and is judged on its "
        f"queries; {config.plan.seeds} seeds. Training: JIIO takes {kind.training.adaptation_steps} steps, "
        f"descent 5, and JIIO that is differentiated through its steps, as descent is, {UNROLLED}, in "
        f"{LONGER['unrolled']} times as many optimizer steps. "
        + " ".join(parts)
        + f" Measured on {kind.adapted_tasks} test tasks at once, at the weights of the best validation, in eval mode; "
        f"step sizes are chosen on as many validation tasks; each adaptation timed {kind.repeats} times, all in turn. "
        "Descent begins every solve at the last one's state, with a tolerance of 1e-2."
    )


def notes(config: MetaTableConfig, runs: Runs) -> list[str]:
    """What a reader must know."""
    missing = [job.name for job in jobs(config) if not runs.named(job.name)]
    return [
        *([f"Not run, or not to the end: {', '.join(missing)}."] if missing else []),
        "One task is one sample of the batch: its state holds the states of all its support samples, which share the "
        "context.",
        "The outer loss, on the queries, is not the inner one, so that the envelope theorem does not apply: the exact "
        "gradient is the adjoint of the joint map (Hessian-vector products, by truncated GMRES); the first-order one "
        "holds the context fixed, as the published code does.",
        "JIIO is not accelerated here: by Anderson's method training did not get anywhere, on a problem that is not "
        "convex and, for a fresh model, badly conditioned.",
        "Small models, few tasks and minutes of training: rows compare among themselves, and accuracies stay far below "
        "published ones. Omniglot's small background set has 136 characters, 24 of which are the test.",
        "Descent is trained through its own few steps, and so learns weights at which these few suffice: that is a "
        "strong rival. The exact gradient's weights are those of a context that has been found, which in few steps it "
        "is not; JIIO trained through its few steps, like descent, learns weights at which they suffice, and needs no "
        "adjoint solve.",
    ]


def drawings(config: MetaTableConfig, runs: Runs, folders: Mapping[str, Run]) -> list[Drawing]:
    """Error against time."""
    problems = there(config, runs)
    if not problems:
        return []
    figure, panels = axes(len(problems), width=5.6, height=3.9)
    for panel, (problem, own) in zip(panels, problems.items(), strict=True):
        index = 0
        for row, (label, _) in ROWS.items():
            kinds = ("JIIO", "descent") if row == "jiio" else ("descent",) if row == "descent" else ("JIIO",)
            for kind in kinds if own.where(row=row) else ():
                names = [name for name in adaptations(own, row) if name.startswith(kind)]
                times = [1e3 * fmean(of(own, row, name, "seconds")) for name in names]
                values = [fmean(of(own, row, name, "error")) for name in names]
                panel.plot(times, values, label=f"{kind}; trained by {label}", **style(index))
                index += 1
        panel.set(xlabel="CPU time of the adaptation, ms", ylabel=UNITS[problem], title=TITLES[problem])
        if problem == "sinusoid":
            panel.set_yscale("log")
        panel.legend(fontsize=7.5)
    caption = (
        "Error on the queries of all test tasks against the time of adapting to them, with more and more steps, "
        "each with the step size that suits it. Means over the seeds."
    )
    return [Drawing("error", figure, caption)]


TABLE = table.published(
    globals(),
    title="Meta-learning by joint inference",
    source="Gurumurthy, Bai, Manchester, Kolter 2021, Joint inference and input optimization in equilibrium "
    "networks: meta-learning on Omniglot, 5-way 1-shot, published as 2.5 to 3 times faster than descent.",
)
