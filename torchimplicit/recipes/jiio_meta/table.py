"""The table ``jiio-meta``: its jobs, and what they come to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

from torchimplicit.recipes.jiio_meta.config import AdaptationsConfig, MetaTableConfig, omniglot, sinusoid
from torchimplicit.recipes.jiio_meta.measure import Quality, read
from torchimplicit.recipes.plain import to_plain
from torchimplicit.recipes.plotting import axes, style
from torchimplicit.recipes.reproduce.jobs import Job
from torchimplicit.recipes.reproduce.record import Claim, Sheet, spread
from torchimplicit.recipes.reproduce.runner import Drawing, Reproduction, Summary
from torchimplicit.recipes.run import Run
from torchimplicit.recipes.tables import Column, Table
from torchimplicit.recipes.training.results import Results

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
"""Times as many optimizer steps: one costs about a third of what it costs to differentiate through descent, so that
training takes no longer."""

TITLES = {"sinusoid": "Sine waves", "omniglot": "Omniglot, 5-way 1-shot"}
UNITS = {"sinusoid": "mean squared error", "omniglot": "cross-entropy"}

Key = tuple[str, str, int]
Found = dict[Key, dict[str, Quality]]


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


def jobs(config: MetaTableConfig) -> list[Job]:
    """Every way of training, of one seed after the other."""
    return [
        Job(_named(problem, row, seed), "jiio-meta-adaptations", adapted(config, problem, row, seed))
        for problem in config.problems
        for seed in config.plan.all_seeds
        for row in ROWS
    ]


def summarize(config: MetaTableConfig, runs: dict[str, Run]) -> Summary:
    """The table of what is there."""
    there: dict[Key, Run] = {
        (problem, row, seed): runs[name]
        for problem in config.problems
        for row in ROWS
        for seed in config.plan.all_seeds
        if (name := _named(problem, row, seed)) in runs and (runs[name].path / "adaptations.json").is_file()
    }
    found = {key: read(run) for key, run in there.items()}
    trained = {key: Results.of(run) for key, run in there.items()}
    problems = [problem for problem in config.problems if any(key[0] == problem for key in there)]
    sheets, claims = [], []
    for problem in problems:
        sheets.append(Sheet(f"{TITLES[problem]}: training", _training(config, problem, found, trained)))
        for row in ROWS:
            if any(key[:2] == (problem, row) for key in found):
                title = f"{TITLES[problem]}: adaptation of the model trained by {ROWS[row][0]}"
                sheets.append(Sheet(title, _adaptations(problem, row, found)))
        claims += _claims(config, problem, found)
    return Summary(
        title="Meta-learning by joint inference",
        source=(
            "Gurumurthy, Bai, Manchester, Kolter 2021, Joint inference and input optimization in equilibrium "
            "networks: meta-learning on Omniglot, 5-way 1-shot, published as 2.5 to 3 times faster than descent."
        ),
        protocol=_protocol(config, problems),
        sheets=sheets,
        claims=claims,
        drawings=_drawings(problems, found),
        notes=_notes([job.name for job in jobs(config) if job.name not in runs]),
        runs={
            _named(*key): {
                "adaptations": to_plain(found[key]),
                "validations": to_plain(trained[key].validations),
                "test": to_plain(trained[key].test),
                "seconds": trained[key].seconds,
                "costs": to_plain(trained[key].costs),
            }
            for key in there
        },
    )


def _named(problem: str, row: str, seed: int) -> str:
    return f"{problem}-{row}-seed{seed}"


def _of(found: Found, problem: str, row: str, name: str, what: str) -> list[float]:
    return [
        getattr(one[name], what)
        for (own, kind, _), one in found.items()
        if (own, kind) == (problem, row) and name in one
    ]


def _native(config: MetaTableConfig, problem: str, row: str) -> str:
    """The adaptation that a model was trained with."""
    training = adapted(config, problem, row, 0).training
    return f"{'descent' if training.adaptation == 'descent' else 'JIIO'}-{training.adaptation_steps}"


def _training(config: MetaTableConfig, problem: str, found: Found, trained: dict[Key, Results]) -> Table:
    columns = [
        Column("Trained by"),
        Column(
            "Error", "", f"Test {UNITS[problem]} on the queries, adapted as in training; mean ± deviation over seeds."
        ),
        *([Column("Accuracy", "%", "Likewise.")] if problem == "omniglot" else []),
        Column("Adaptation", "ms", "CPU time for all test tasks at once."),
        Column("A training step", "ms", "Wall time, the median of a run; the machine was shared, so that it is rough."),
        Column("Training steps"),
    ]
    rows = []
    for row, (label, _) in ROWS.items():
        name = _native(config, problem, row)
        costs = [
            one.costs.seconds for key, one in trained.items() if key[:2] == (problem, row) and one.costs is not None
        ]
        line = [f"{label} ({name})", spread(_of(found, problem, row, name, "error"), 3)]
        if problem == "omniglot":
            line.append(spread(_of(found, problem, row, name, "accuracy"), 1, 100))
        steps = adapted(config, problem, row, 0).training.optimization.steps
        seconds = spread(_of(found, problem, row, name, "seconds"), 0, 1e3)
        rows.append([*line, seconds, spread(costs, 0, 1e3), str(steps)])
    return Table(columns, rows)


def _adaptations(problem: str, row: str, found: Found) -> Table:
    first = next(one for key, one in found.items() if key[:2] == (problem, row))
    columns = [
        Column("Adaptation"),
        Column("Error", "", f"Test {UNITS[problem]} on the queries."),
        *([Column("Accuracy", "%")] if problem == "omniglot" else []),
        Column("Time", "ms", "CPU time for all test tasks at once, the median of repeats taken in turn."),
        Column("Evaluations", "", "Of the map, and products with its Jacobian, in whole-batch equivalents."),
        Column("Step size", "", "Chosen on validation tasks, the first seed's."),
    ]
    rows = []
    for name, one in first.items():
        line = [name, spread(_of(found, problem, row, name, "error"), 3)]
        if problem == "omniglot":
            line.append(spread(_of(found, problem, row, name, "accuracy"), 1, 100))
        rows.append(
            [
                *line,
                spread(_of(found, problem, row, name, "seconds"), 0, 1e3),
                f"{fmean(_of(found, problem, row, name, 'evaluations')):.0f}",
                f"{one.step_size:g}",
            ]
        )
    return Table(columns, rows)


def _fastest(found: Found, problem: str, row: str, kind: str, goal: float) -> tuple[str, float, float] | None:
    """The fastest adaptation of a kind whose error comes to the goal: its name, error and seconds."""
    names = next((list(one) for key, one in found.items() if key[:2] == (problem, row)), [])
    reached = [
        (name, error, fmean(_of(found, problem, row, name, "seconds")))
        for name in names
        if name.startswith(kind) and (error := fmean(_of(found, problem, row, name, "error"))) <= goal
    ]
    return min(reached, key=lambda one: one[2], default=None)


def _claims(config: MetaTableConfig, problem: str, found: Found) -> list[Claim]:
    made = []
    rows = {row for own, row, _ in found if own == problem}
    title = TITLES[problem]
    for row in ("jiio", "first-order", "unrolled"):
        if not {row, "descent"} <= rows:
            continue
        rival = _native(config, problem, "descent")
        goal = fmean(_of(found, problem, "descent", rival, "error"))
        seconds = fmean(_of(found, problem, "descent", rival, "seconds"))
        own = _fastest(found, problem, row, "JIIO", goal)
        names = {name for key, one in found.items() if key[:2] == (problem, row) for name in one if "JIIO" in name}
        best = min(fmean(_of(found, problem, row, name, "error")) for name in names)
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
        goal = fmean(_of(found, problem, row, _native(config, problem, row), "error"))
        own, other = (_fastest(found, problem, row, kind, 1.02 * goal) for kind in ("JIIO", "descent"))
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
        exact, cheap = (
            _of(found, problem, row, _native(config, problem, row), "error") for row in ("jiio", "first-order")
        )
        made.append(
            Claim(
                f"{title}: the exact gradient trains to a lower error than the first-order one",
                f"{spread(exact, 3)} instead of {spread(cheap, 3)}, means and deviations over the seeds",
                fmean(exact) < fmean(cheap),
            )
        )
    return made


def _drawings(problems: Sequence[str], found: Found) -> list[Drawing]:
    if not found:
        return []
    figure, panels = axes(len(problems), width=5.6, height=3.9)
    for panel, problem in zip(panels, problems, strict=True):
        index = 0
        for row, (label, _) in ROWS.items():
            first = next((one for key, one in found.items() if key[:2] == (problem, row)), None)
            kinds = ("JIIO", "descent") if row == "jiio" else ("descent",) if row == "descent" else ("JIIO",)
            for kind in kinds if first is not None else ():
                names = [name for name in first or {} if name.startswith(kind)]
                times = [1e3 * fmean(_of(found, problem, row, name, "seconds")) for name in names]
                values = [fmean(_of(found, problem, row, name, "error")) for name in names]
                panel.plot(times, values, label=f"{kind}; trained by {label}", **style(index))
                index += 1
        panel.set(xlabel="CPU time of the adaptation, ms", ylabel=UNITS[problem], title=TITLES[problem])
        if problem == "sinusoid":
            panel.set_yscale("log")
        panel.legend(fontsize=7.5)
    return [
        Drawing(
            "error",
            figure,
            "Error on the queries of all test tasks against the time of adapting to them, with more and more steps, "
            "each with the step size that suits it. Means over the seeds.",
        )
    ]


def _protocol(config: MetaTableConfig, problems: Sequence[str]) -> str:
    parts = []
    for problem in problems:
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


def _notes(missing: Sequence[str]) -> list[str]:
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


TABLE = Reproduction(jobs, summarize)
