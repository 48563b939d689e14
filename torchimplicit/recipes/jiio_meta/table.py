"""The table: what its runs come to."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from torchimplicit.recipes.jiio_meta.claims import claims_of
from torchimplicit.recipes.jiio_meta.config import MetaTableConfig
from torchimplicit.recipes.jiio_meta.drawings import drawings
from torchimplicit.recipes.jiio_meta.gathered import TITLES, UNITS, Found, Key, of
from torchimplicit.recipes.jiio_meta.measure import read
from torchimplicit.recipes.jiio_meta.rows import LONGER, ROWS, UNROLLED, adapted, jobs, named, native
from torchimplicit.recipes.plain import to_plain
from torchimplicit.recipes.reproduce.runner import Reproduction
from torchimplicit.recipes.run import Run
from torchimplicit.recipes.runtime.table import Sheet, Summary, spread
from torchimplicit.recipes.tables import Column, Table
from torchimplicit.recipes.training.results import Results


def summarize(config: MetaTableConfig, runs: dict[str, Run]) -> Summary:
    """The table of what is there."""
    there: dict[Key, Run] = {
        (problem, row, seed): runs[name]
        for problem in config.problems
        for row in ROWS
        for seed in config.plan.all_seeds
        if (name := named(problem, row, seed)) in runs and (runs[name].path / "adaptations.json").is_file()
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
        claims += claims_of(config, problem, found)
    return Summary(
        title="Meta-learning by joint inference",
        source=(
            "Gurumurthy, Bai, Manchester, Kolter 2021, Joint inference and input optimization in equilibrium "
            "networks: meta-learning on Omniglot, 5-way 1-shot, published as 2.5 to 3 times faster than descent."
        ),
        protocol=_protocol(config, problems),
        sheets=sheets,
        claims=claims,
        drawings=drawings(problems, found),
        notes=_notes([job.name for job in jobs(config) if job.name not in runs]),
        runs={
            named(*key): {
                "adaptations": to_plain(found[key]),
                "validations": to_plain(trained[key].validations),
                "test": to_plain(trained[key].test),
                "seconds": trained[key].seconds,
                "costs": to_plain(trained[key].costs),
            }
            for key in there
        },
    )


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
        name = native(config, problem, row)
        costs = [
            one.costs.seconds for key, one in trained.items() if key[:2] == (problem, row) and one.costs is not None
        ]
        line = [f"{label} ({name})", spread(of(found, problem, row, name, "error"), 3)]
        if problem == "omniglot":
            line.append(spread(of(found, problem, row, name, "accuracy"), 1, 100))
        steps = adapted(config, problem, row, 0).training.optimization.steps
        seconds = spread(of(found, problem, row, name, "seconds"), 0, 1e3)
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
        line = [name, spread(of(found, problem, row, name, "error"), 3)]
        if problem == "omniglot":
            line.append(spread(of(found, problem, row, name, "accuracy"), 1, 100))
        rows.append(
            [
                *line,
                spread(of(found, problem, row, name, "seconds"), 0, 1e3),
                f"{fmean(of(found, problem, row, name, 'evaluations')):.0f}",
                f"{one.step_size:g}",
            ]
        )
    return Table(columns, rows)


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
