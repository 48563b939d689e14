"""Table: how the effort to find densities grows as a functional is trained, and what limits it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import fmean, median
from typing import TYPE_CHECKING, Any, Literal

from torchimplicit.recipes.density import results
from torchimplicit.recipes.density.results import cell, draw_seeds, labelled, lowered, mean, missing, shown, there, told
from torchimplicit.recipes.density.settings import MoleculeFiles, OrbitalFreeTraining
from torchimplicit.recipes.runtime import table
from torchimplicit.recipes.runtime.errors import UserError
from torchimplicit.recipes.runtime.settings import (
    OptimizerName,
    different,
    known_rows,
    not_negative,
    own_first,
    positive,
)
from torchimplicit.recipes.runtime.table import CaptionedFigure, Cell, Claim, Job, Line, Plan, Runs, TitledTable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from torchimplicit.recipes.runtime.run import Run

SLOWED, HELD = 4.0, 2.0
"""The targets: minimizations grow at least this many times longer with the slides' method, and at most this many times
with ours."""

SLOWED_AT_ALL = 1.1
"""Growth below which there is no slowdown to prevent."""

HELPED = 0.5
"""Largest share of the excess growth that may remain for a remedy to count as effective."""


@dataclass(frozen=True, kw_only=True)
class CountedTraining:
    """A training whose initial and final densities are also found by two minimizers, counting steps."""

    training: OrbitalFreeTraining = field(default_factory=lambda: OrbitalFreeTraining(spectrum=True, page=False))

    descent_tolerance: float = 1e-4
    """Tolerance of gradient descent with momentum, as in the slides."""

    descent_rate: float = 3e-3
    """Step size of gradient descent, as in the slides."""

    most_steps: int = 10_000
    """Largest number of gradient-descent steps, as in the slides."""

    tight_tolerance: float = 1e-8
    """Tolerance of L-BFGS with a kept Hessian."""

    def __post_init__(self) -> None:
        positive(self, "descent_tolerance", "descent_rate", "most_steps", "tight_tolerance")


@own_first
@dataclass(frozen=True, kw_only=True)
class StabilityConfig(MoleculeFiles):
    """Inner iterations and spectra during training: two minimizers, with and without remedies."""

    plan: Plan = field(default_factory=lambda: Plan(seeds=3, together=100))

    molecules: tuple[str, ...] = ("CH4",)
    """Training molecules, by formula; they are trained together."""

    rows: tuple[str, ...] = ()
    """Rows to run, by the names of their runs. Default: all that the optimizer can train."""

    iterations: int = 20
    """Iterations of the outer optimizer."""

    measure_every: int = 5
    """Outer iterations between two measurements of step counts and spectra."""

    weizsaecker: float = 0.2
    """Share of the von Weizsäcker kinetic energy. A smaller share gives a softer functional."""

    penalty: float = 0.0
    """Factor of ∫ρ₋² in the energy, in all rows but the one that varies it."""

    tail_weight: float = 0.0
    """Extra weight of low densities in the loss; 0 is the loss of the slides."""

    optimizer: OptimizerName = "least-squares"
    """Outer optimizer. Gauss-Newton moves far enough to soften the functional. It cannot use penalties or corrections
    drawn at random, nor damped gradients: their rows need --optimizer l-bfgs or adam."""

    learning_rate: float = 1e-2
    """Peak learning rate of Adam."""

    descent_steps: int = 2000
    """Largest number of gradient-descent steps in training with that minimizer. Before and after training the limit is
    10,000, as in the slides."""

    hessian_weight: float = 1e-6
    """Weight of the penalty on the Hessian's size, in the row that tries it."""

    floor_weight: float = 1e-2
    """Weight of the penalty on a least eigenvalue below --floor, in the row that tries it."""

    floor: float = 0.5
    """Eigenvalue below which --floor-weight penalizes, in hartree."""

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "iterations", "measure_every", "learning_rate", "descent_steps")
        positive(self, "hessian_weight", "floor_weight", "floor")
        not_negative(self, "weizsaecker", "penalty", "tail_weight")
        different(self, "molecules")
        known_rows(self.rows, list(ROWS))
        if self.optimizer == "least-squares" and (
            refused := [name for name in self.rows if ROWS[name].help.by_gradient]
        ):
            raise UserError(
                f"row '{refused[0]}' has a loss that is drawn at random, or an inexact gradient, which Gauss-Newton "
                "cannot take: it needs --optimizer l-bfgs or adam"
            )


CORRECTED, PENALTY, DECAY = 4, 100.0, 1e-6
"""Number of iterates of the fixed-point correction, factor of ∫ρ₋², and weight decay, each in the row that tries it."""

INNER_STEPS = 24
"""Largest number of L-BFGS steps in training. One more would recompute the Hessian, and a density that is lost would
take as long as ten that are found."""

Inner = Literal["descent", "l-bfgs"]
INNER: dict[Inner, str] = {"l-bfgs": "preconditioned L-BFGS", "descent": "gradient descent"}


@dataclass(frozen=True)
class Help:
    """A possible remedy.

    Attributes:
        label: label to display.
        changes: changes of the recipe's settings, by those of the table.
        by_gradient: whether Gauss-Newton cannot take it: the loss is drawn at random, or the gradient is no exact one.
    """

    label: str
    changes: Callable[[StabilityConfig], dict[str, Any]]
    by_gradient: bool = False


HELPS = {
    "plain": Help("plain", lambda config: {}),
    "cold": Help("searches from the superposition", lambda config: {"cold": True}),
    "even": Help("fixed-point correction, even", lambda config: {"cold": True, "correction": CORRECTED}),
    "random": Help(
        "fixed-point correction, random",
        lambda config: {"cold": True, "correction": CORRECTED, "correction_random": True},
        True,
    ),
    "hessian": Help("penalty on the Hessian", lambda config: {"hessian_weight": config.hessian_weight}, True),
    "floor": Help(
        "penalty on a least eigenvalue", lambda config: {"floor_weight": config.floor_weight, "floor": config.floor}
    ),
    "decay": Help("weight decay", lambda config: {"decay": DECAY}),
    "negative": Help("penalty on negative densities", lambda config: {"penalty": PENALTY}),
    "damped": Help("damped gradient", lambda config: {"gradient": "damped"}, True),
}
"""The remedies, by the second part of a row's name."""


@dataclass(frozen=True)
class Row:
    """A minimizer in training, and a remedy."""

    inner: Inner
    way: str

    @property
    def help(self) -> Help:
        return HELPS[self.way]

    @property
    def label(self) -> str:
        return f"{INNER[self.inner]}; {self.help.label}"

    @property
    def place(self) -> int:
        """Place of the remedy among all, which its colour and marker show."""
        return list(HELPS).index(self.way)


ROWS = {f"{inner}-{way}": Row(inner, way) for inner in INNER for way in HELPS}
"""The rows, by the names of their runs."""


def rows_of(config: StabilityConfig) -> list[str]:
    """The names of the rows that are asked for: by default all that the optimizer can train."""
    least_squares = config.optimizer == "least-squares"
    return [
        name
        for name, row in ROWS.items()
        if (name in config.rows if config.rows else not (least_squares and row.help.by_gradient))
    ]


def settings_of(config: StabilityConfig, row: Row, seed: int) -> CountedTraining:
    """The settings of a run."""
    counted = CountedTraining()
    slow = row.inner == "descent"
    plain = OrbitalFreeTraining(
        molecules=results.molecules(config, *config.molecules),
        weizsaecker=config.weizsaecker,
        penalty=config.penalty,
        pairs=False,
        tail_weight=config.tail_weight,
        optimizer=config.optimizer,
        iterations=config.iterations,
        learning_rate=config.learning_rate,
        decay=0.0,
        measure_every=config.measure_every,
        inner=row.inner,
        inner_tolerance=counted.descent_tolerance if slow else counted.tight_tolerance,
        inner_steps=config.descent_steps if slow else INNER_STEPS,
        inner_rate=counted.descent_rate,
        spectrum=True,
        page=False,
        seed=seed,
    )
    return replace(counted, training=replace(plain, **row.help.changes(config)))


def jobs(config: StabilityConfig) -> list[Job]:
    """All jobs, seed by seed; those of gradient descent at the end, as they take far longer."""
    return [
        Job(
            f"{name}-{seed}",
            "ofdft-stability-training",
            settings_of(config, ROWS[name], seed),
            {"row": name, "seed": seed},
        )
        for inner in INNER
        for seed in config.plan.all_seeds
        for name in rows_of(config)
        if ROWS[name].inner == inner
    ]


def figures(config: StabilityConfig, run: Run) -> dict[str, Any] | None:
    """Figures of a training with counted minimizations. ``growth`` is the largest number of steps counted during
    training relative to the start, with the row's own minimizer; ``None`` if a minimization did not finish."""
    one, counted = results.figures(config, run), table.read("counted.json")(config, run)
    if one is None or counted is None:
        return None
    looks = one["looks"]
    most = max((math.inf if look["unconverged"] else look["mean_steps"] for look in looks[1:]), default=math.nan)
    return {
        **one,
        "growth": most / looks[0]["mean_steps"],
        "least": min(look["least"] for look in looks),
        "largest": max(look["largest"] for look in looks),
        "counted": counted,
    }


# -- what the runs come to ---------------------------------------------------------------------------------------------


def steps(counted: Iterable[Mapping[str, Any]]) -> float:
    """Mean number of steps of a minimization over the molecules; infinite if one did not finish."""
    every = list(counted)
    return fmean(one["steps"] for one in every) if all(one["converged"] for one in every) else math.inf


def grown(line: Line) -> float:
    """See :func:`figures`."""
    return math.inf if line["growth"] is None else float(line["growth"])


def counted(line: Line, way: str, when: str) -> float:
    """Steps of a minimization by a way (``descent``, ``l_bfgs``) before or after training; NaN if not counted."""
    counts = line[f"counted.{way}_{when}"]
    return math.nan if counts is None else steps(counts)


def slowdown(line: Line, way: str = "descent") -> float:
    """Steps after training relative to those before."""
    return counted(line, way, "after") / counted(line, way, "before")


def many(values: Iterable[float]) -> str:
    """Format numbers that may be infinite."""
    every = list(values)
    lost = sum(math.isinf(value) for value in every)
    return f"not found ({lost} of {len(every)})" if lost else told(every, 3)


def sheets(config: StabilityConfig, runs: Runs) -> Iterator[TitledTable]:
    """Tables of the history, and of both minimizers before and after training."""
    rows = there(rows_of(config), runs)
    if not rows:
        return
    label, of = lambda name: ROWS[name].label, partial(cell, runs)

    def each(figure: Callable[[Line], float], say: Callable[[list[float]], str] = many) -> Callable[[str], str]:
        return lambda row: say([figure(line) for line in runs.where(row=row)])

    def nearness(line: Line) -> float:
        ends = [line[f"counted.{way}_after"] for way in ("descent", "l_bfgs")]
        if None in ends:
            return math.nan
        descent, quick = (fmean(one["loss"] for one in runs_of) for runs_of in ends)
        return descent / quick

    yield table.sheet("Along training", rows, [
        Cell("Densities found by; help", label),
        Cell("Growth", each(grown), "",
             "steps of a minimization, the most that were counted during training over the start"),
        Cell("Least eigenvalue", of("least", 2), "hartree",
             "the least during training, of the Hessian on the constraint"),
        Cell("Largest", of("largest"), "hartree", "the largest during training"),
        Cell("Loss", lambda row: told(map(lowered, runs.where(row=row)), 2), "",
             "at the end over its start, the penalties included"),
        Cell("L, finer grid", of("train.finer_loss", 3, 1e3), "10⁻³",
             "of the trained functional's minimum there"),
        Cell("Not found", lambda row: f"{sum(runs.of(row, 'rejected'))} of {sum(runs.of(row, 'evaluations'))}", "",
             "of the evaluations of the loss, those with a density not found within the budget"),
        Cell("Time", of("seconds", 2), "s", "of the processor"),
        Cell("Seeds", lambda row: str(len(runs.where(row=row)))),
    ])  # fmt: skip
    yield table.sheet("Both ways, before and after", rows, [
        Cell("Trained with; help", label),
        Cell("Descent, before", each(lambda line: counted(line, "descent", "before")), "steps",
             "to 1e-4, from the superposition of atoms, mean of the molecules"),
        Cell("Descent, after", each(lambda line: counted(line, "descent", "after")), "steps"),
        Cell("Descent, ratio", each(slowdown)),
        Cell("Its L", each(nearness, told), "",
             "after training, over L of what L-BFGS finds: 1 where both find the same density"),
        Cell("L-BFGS, before", each(lambda line: counted(line, "l_bfgs", "before")), "steps",
             "to 1e-8, the Hessian of the superposition as preconditioner"),
        Cell("L-BFGS, after", each(lambda line: counted(line, "l_bfgs", "after")), "steps"),
        Cell("L-BFGS, ratio", each(lambda line: slowdown(line, "l_bfgs"))),
    ])  # fmt: skip


def claims(config: StabilityConfig, runs: Runs) -> Iterator[Claim]:
    """The slowdown, what limits it, and the effect of each remedy."""
    for inner in INNER:
        if plain := runs.where(row=f"{inner}-plain"):
            yield Claim(
                f"Trained with densities by {INNER[inner]}: the slides' way to find them (gradient descent with "
                f"momentum to 1e-4) takes at least {SLOWED:g} times as many steps after training as before "
                "(median of the seeds)",
                f"{times(map(slowdown, plain))}; least eigenvalue {soft(plain)}",
                median(map(slowdown, plain)) >= SLOWED,
            )
    if ours := runs.where(row="l-bfgs-plain"):
        yield Claim(
            f"Preconditioned L-BFGS to 1e-8, along the same training: at most {HELD:g} times as many, with every seed",
            f"{times(map(grown, ours))}; least eigenvalue {soft(ours)}",
            max(map(grown, ours)) <= HELD,
        )
    for name, row in ROWS.items():
        pairs = runs.couples(f"{row.inner}-plain", name)
        if row.way != "plain" and pairs:
            yield helps(row, pairs)


def helps(row: Row, pairs: list[tuple[Line, Line]]) -> Claim:
    """Compares the seeds that both rows have."""
    plain, helped = (Runs(pair[i] for pair in pairs) for i in (0, 1))
    before, after = (mean(map(slowdown, one)) for one in (plain, helped))
    losses = [told(map(lowered, one), 2) for one in (plain, helped)]
    return Claim(
        f"Densities by {INNER[row.inner]}: with {row.help.label}, gradient descent slows down at most half "
        "as much (mean of the seeds)",
        f"{times(map(slowdown, plain))} without, {times(map(slowdown, helped))} with; least eigenvalue "
        f"{soft(plain)} and {soft(helped)}; loss {losses[0]} and {losses[1]} of its start",
        math.isfinite(after) and (not math.isfinite(before) or after - 1 <= HELPED * (before - 1))
        if before > SLOWED_AT_ALL
        else None,
    )


def times(values: Iterable[float]) -> str:
    """Format the factors of every seed."""
    return ", ".join("not found" if math.isinf(one) else f"{shown(one, 3)}" for one in values) + " times"


def soft(runs: Runs) -> str:
    """Format the least eigenvalue of every seed."""
    return ", ".join(shown(one, 2) for one in runs.column("least"))


def protocol(config: StabilityConfig, runs: Runs) -> str:
    """Describe what was run, and how the figures were selected."""
    how = {
        "least-squares": "Gauss-Newton (SciPy's trust region) with exact Jacobians",
        "l-bfgs": "L-BFGS (SciPy's) with exact implicit gradients",
        "adam": f"Adam from {config.learning_rate:g} with a cosine and exact implicit gradients",
    }[config.optimizer]
    return (
        f"{', '.join(config.molecules)}; {labelled(config.grid)}. Thomas-Fermi, {config.weizsaecker:g} of von "
        "Weizsäcker's energy, LDA, a network as enhancement factor and a linear term fitted first; ∫ρ₋² weighs "
        f"{config.penalty:g}. {config.iterations} iterations of {how}, {config.plan.seeds} seeds. Every "
        f"{config.measure_every} iterations all densities are found from the superposition of atoms and the steps are "
        "counted. Gradient descent as in the slides: rate 3e-3, momentum 0.9, to 1e-4, at most 10,000 steps "
        f"({config.descent_steps} in training by it); L-BFGS: to 1e-8, with the Hessian of the start as "
        f"preconditioner, at most {INNER_STEPS} steps in training. There a search begins at the density found last, "
        "and its Hessian is made anew after more than 15 steps; in the rows with fixed-point correction, and in one "
        f"that is for comparison, at the superposition. The correction: {CORRECTED} iterates more in the loss, weights "
        "0.8 to the power of their distance. Penalties: "
        + (
            ""
            if config.optimizer == "least-squares"
            else f"{config.hessian_weight:g} times the Hessian's mean square (along random vectors), "
        )
        + f"{config.floor_weight:g} times the square of what a least eigenvalue lacks of {config.floor:g}, relative to "
        f"it; {PENALTY:g} times ∫ρ₋² in the energy. The network's weights decay only in the row that tries it, by "
        f"{DECAY:g} times half their squares."
    )


def notes(config: StabilityConfig, runs: Runs) -> Iterator[str]:
    """Caveats for the reader."""
    yield (
        "A count always begins at the superposition of atoms, so that what the training had found before does not "
        "help; the steps during training itself, from the density before, are fewer."
    )
    yield (
        "Both ways run in coordinates of the overlap, in which the Hessian is far better conditioned than in those of "
        "the raw coefficients. Descent with momentum 0.9 takes a number of steps that hardly depends on the least "
        "eigenvalue as long as that is above (1 − √0.9)²/rate, some 0.9 hartree; only below does it slow down."
    )
    if config.optimizer == "least-squares":
        yield (
            "Gauss-Newton cannot take what is drawn at random in every evaluation: fixed-point correction at random "
            "iterates and the penalty on the Hessian are rows of --optimizer l-bfgs and adam."
        )
    yield from missing(len(jobs(config)), runs)


# -- figures -----------------------------------------------------------------------------------------------------------


def drawings(config: StabilityConfig, runs: Runs, folders: Mapping[str, Run]) -> Iterator[CaptionedFigure]:
    """A figure for each minimizer that has runs, and one for all."""
    rows = there(rows_of(config), runs)
    for inner, title in INNER.items():
        if of_inner := [name for name in rows if ROWS[name].inner == inner]:
            yield CaptionedFigure(
                f"by-{inner}",
                along_training(runs, of_inner),
                f"Trained with densities found by {title}: steps of a minimization from the superposition of atoms "
                "(mean of the molecules), the least and the largest eigenvalue of their Hessians, during training; "
                "a line a seed.",
            )
    if rows:
        yield CaptionedFigure(
            "by-eigenvalue",
            by_eigenvalue(runs, rows),
            "Steps after training (mean of the molecules) over the least eigenvalue then, a point a run: filled by "
            "gradient descent, hollow by L-BFGS with the Hessian of the start; dotted, what they were before. "
            "What was not found within the budget is left out.",
        )


def look_of(row: str) -> dict[str, Any]:
    """Colour and marker of the row's remedy."""
    from torchimplicit.recipes.runtime.page import COLOURS, MARKERS

    place = ROWS[row].place
    return {"color": COLOURS[place % len(COLOURS)], "marker": MARKERS[place % len(MARKERS)]}


def by_eigenvalue(runs: Runs, rows: list[str]) -> Figure:
    """The figure, with a point per run and minimizer."""
    from torchimplicit.recipes.runtime.page import axes, legend_beside

    figure, (panel,) = axes(1, width=6.4, height=3.9)
    for place, row in enumerate(rows):
        look = look_of(row)
        for number, line in enumerate(runs.where(row=row)):
            named = ROWS[row].help.label if not number and ROWS[row].inner == ROWS[rows[0]].inner else None
            for way, face in (("descent", look["color"]), ("l_bfgs", "none")):
                panel.scatter(
                    line["train.least"],
                    counted(line, way, "after"),
                    s=26 + 30 * (len(rows) - 1 - place),  # where runs coincide, all rows are to be seen
                    marker=look["marker"],
                    facecolor=face,
                    edgecolor=look["color"],
                    label=named if way == "descent" else None,
                )
    for way in ("descent", "l_bfgs"):
        before = counted(runs.where(row=rows[0])[0], way, "before")
        panel.axhline(before, color="0.6", linewidth=0.8, linestyle=":")
    panel.set(xscale="log", yscale="log", xlabel="least eigenvalue, hartree", ylabel="steps")
    legend_beside(panel)
    return figure


def along_training(runs: Runs, rows: list[str]) -> Figure:
    """Steps and spectra during training, a line per run."""
    from torchimplicit.recipes.runtime.page import axes, legend_beside

    figure, panels = axes(3, width=4.0, height=3.6)
    for place, row in enumerate(rows):
        thick = {
            "markersize": 3.5,
            "linewidth": 1.0 + 0.45 * (len(rows) - 1 - place),
        }  # rows that coincide are all seen
        for panel, what in zip(panels, ("mean_steps", "least", "largest"), strict=True):
            look = {**look_of(row), **thick}
            draw_seeds(panel, runs.where(row=row), "looks", "iteration", what, ROWS[row].help.label, **look)
    for panel, title in zip(panels, ("steps", "least eigenvalue, hartree", "largest, hartree"), strict=True):
        panel.set(xlabel="iteration", title=title)
        low, high = panel.dataLim.y0, panel.dataLim.y1
        if low > 0 and high < 10 * low:
            panel.set_ylim(0, 1.1 * high)
        else:
            panel.set_yscale("symlog", linthresh=max(1e-2, 1e-4 * high))
    legend_beside(panels[-1])
    return figure


TABLE = table.published(
    globals(),
    "How hard a density is to find while its functional is trained",
    "Slides on fine-tuning density functionals under an electron-number constraint (Adamowicz): with many "
    "molecules the search takes longer and longer, and fixed-point correction helps but may cost performance; no "
    "figures. Those here are ours.",
)
