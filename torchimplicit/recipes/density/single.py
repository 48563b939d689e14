"""Table: one molecule's density functional, trained by implicit differentiation and by equilibrium propagation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite, nan
from typing import TYPE_CHECKING, Any, Literal

from torchimplicit.recipes.density import results
from torchimplicit.recipes.density.results import INNER_STEPS, cell, lowered, mean, missing, seconds_to, shown, told
from torchimplicit.recipes.density.settings import EstimatorName, MoleculeFiles, OrbitalFreeTraining
from torchimplicit.recipes.runtime import table
from torchimplicit.recipes.runtime.errors import UserError
from torchimplicit.recipes.runtime.settings import different, fraction, not_negative, own_first, positive
from torchimplicit.recipes.runtime.table import CaptionedFigure, Cell, Claim, Job, Plan, Runs, TitledTable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from torchimplicit.recipes.runtime.run import Run

GradientOptimizer = Literal["l-bfgs", "adam"]
"""Optimizers that take a gradient from any estimator."""


@own_first
@dataclass(frozen=True, kw_only=True)
class SingleConfig(MoleculeFiles):
    """One molecule, four gradient estimators, two optimizers: final loss and time of each."""

    plan: Plan = field(default_factory=lambda: Plan(seeds=2, together=100))

    molecule: str = "H2O"
    """The molecule, by formula."""

    estimators: tuple[EstimatorName, ...] = ("implicit", "damped", "eqprop", "eqprop-one-sided")
    """Gradient estimators: exact and damped implicit differentiation, symmetric and one-sided equilibrium
    propagation."""

    optimizers: tuple[GradientOptimizer, ...] = ("l-bfgs", "adam")
    """Optimizers, each run with every estimator."""

    l_bfgs_iterations: int = 40
    """Iterations of L-BFGS."""

    adam_iterations: int = 120
    """Iterations of Adam."""

    learning_rate: float = 3e-2
    """Peak learning rate of Adam."""

    level: float = 0.6
    """Share of its initial value to which the loss must fall; the time until then is reported."""

    pairs: bool = False
    """Let the linear term depend on the positions of an atom's neighbours. With a single geometry it can then fit
    almost everything."""

    tail_weight: float = 0.0
    """Extra weight of low densities in the loss; 0 is the loss of the slides."""

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "l_bfgs_iterations", "adam_iterations", "learning_rate")
        not_negative(self, "tail_weight")
        fraction(self, "level")
        different(self, "estimators", "optimizers")


ESTIMATORS: dict[EstimatorName, str] = {
    "implicit": "implicit",
    "damped": "implicit, damped",
    "eqprop": "propagation, symmetric",
    "eqprop-one-sided": "propagation, one-sided",
}
OPTIMIZERS: dict[GradientOptimizer, str] = {"l-bfgs": "L-BFGS", "adam": "Adam"}

APART, BELOW = 0.05, 0.6
"""The targets: largest ratio of two final losses, and largest final loss as a share of the initial one."""

FALLEN = 0.9
"""Share of the initial loss. If implicit differentiation ends above it, estimators are not compared."""

Row = tuple[EstimatorName, GradientOptimizer]


def settings_of(config: SingleConfig, row: Row, seed: int) -> OrbitalFreeTraining:
    """The settings of a run."""
    estimator, optimizer = row
    iterations = {"l-bfgs": config.l_bfgs_iterations, "adam": config.adam_iterations}[optimizer]
    return OrbitalFreeTraining(
        molecules=results.molecules(config, config.molecule),
        pairs=config.pairs,
        tail_weight=config.tail_weight,
        gradient=estimator,
        optimizer=optimizer,
        iterations=iterations,
        learning_rate=config.learning_rate,
        inner_steps=INNER_STEPS,
        measure_every=max(1, iterations // 4),
        page=False,
        seed=seed,
    )


def jobs(config: SingleConfig) -> list[Job]:
    """All jobs, seed by seed so that a slow phase of the machine affects all rows."""
    return [
        Job(
            f"{estimator}-{optimizer}-{seed}",
            "ofdft-one",
            settings_of(config, (estimator, optimizer), seed),
            {"row": (estimator, optimizer), "seed": seed},
        )
        for seed in config.plan.all_seeds
        for optimizer in config.optimizers
        for estimator in config.estimators
    ]


# -- what the runs come to ---------------------------------------------------------------------------------------------


figures = results.figures


def there(config: SingleConfig, runs: Runs) -> list[Row]:
    """The rows that have a run."""
    return results.there([(one, other) for other in config.optimizers for one in config.estimators], runs)


def sheets(config: SingleConfig, runs: Runs) -> Iterator[TitledTable]:
    """A table of loss, time and work; below it, the density before training and the superposition of atoms."""
    rows = there(config, runs)
    if not rows:
        return

    def ends(row: Row, place: int = 1) -> str:
        return told([loss[place] for loss in runs.of(row, "loss")], 3, 1e3)

    cells = [
        Cell[Row]("Gradient; optimizer", lambda row: f"{ESTIMATORS[row[0]]}; {OPTIMIZERS[row[1]]}"),
        Cell("Loss at the end", ends, "10⁻³", "Training loss: mean over the seeds."),
        Cell("Relative to start", lambda row: told(map(lowered, runs.where(row=row))), "",
             "Final loss divided by the initial loss."),
        Cell("L, finer grid", cell(runs, "train.finer_loss", 3, 1e3), "10⁻³", "Error L at the minimum of the "
             "trained functional on a finer grid."),
        Cell("L1 per electron", cell(runs, "train.l1"), "", "∫|Δρ|/N at the end of training."),
        Cell(f"Time to {config.level:g} of the start",
             lambda row: told((seconds_to(line, config.level) for line in runs.where(row=row)), 2), "s",
             "CPU time until the loss is that share of its start, without measurements: mean over the seeds "
             "that reach it."),
        Cell("Time per iteration", cell(runs, "pace", 2, 1e3), "ms", "CPU time: median over the iterations."),
        Cell("Evaluations", cell(runs, "evaluations", 2), "", "Evaluations of the loss with its gradient in the "
             "whole training."),
        Cell("Inner steps", cell(runs, "inner_steps", 2), "",
             "Steps of a minimization that begins at the previous density: mean over the training."),
        Cell("Backward", cell(runs, "adjoint", 2), "",
             "Products with the Hessian, or gradients of the nudged energies, per evaluation."),
        Cell("Seeds", lambda row: str(len(runs.where(row=row))), "", "Runs that finished."),
    ]  # fmt: skip
    guess = runs.where(row=rows[0])[0]["start"]
    below = [
        ["before training (linear term fitted)", ends(rows[0], 0), "1", cell(runs, "start.finer_loss", 3, 1e3)(rows[0]),
         cell(runs, "start.l1")(rows[0])],
        ["superposition of atoms (L)", f"{1e3 * guess['guess_loss']:.3g}", *[table.NONE] * 2,
         f"{guess['guess_l1']:.3g}"],
    ]  # fmt: skip
    yield table.sheet(f"{config.molecule}: loss, time and work", rows, cells, below)


def claims(config: SingleConfig, runs: Runs) -> Iterator[Claim]:
    """For each optimizer: how far implicit differentiation lowers the loss, whether the other estimators end at the
    same loss, and the time of propagation."""
    for optimizer in config.optimizers:
        exact: Row = ("implicit", optimizer)
        others: list[Row] = [(name, optimizer) for name in ("eqprop", "eqprop-one-sided", "damped")]
        if runs.where(row=exact):
            yield fallen(runs, exact)
            yield from (together(runs, exact, other) for other in results.there(others, runs))
            if runs.where(row=others[0]):
                yield slower(config, runs, exact, others[0])


def fallen(runs: Runs, exact: Row) -> Claim:
    """How far the loss falls."""
    ratios = [lowered(line) for line in runs.where(row=exact)]
    return Claim(
        f"{OPTIMIZERS[exact[1]]}: exact implicit differentiation lowers the loss by at least {100 * (1 - BELOW):.0f} % "
        "with every seed",
        f"the loss falls to {shown(max(ratios), 2)} of the start at worst ({number(ratios)})",
        max(ratios) <= BELOW,
    )


def together(runs: Runs, exact: Row, other: Row) -> Claim:
    """Compares final losses, seed by seed. Where the loss has not fallen, the comparison says nothing."""
    pairs = runs.couples(exact, other)
    apart = max((abs(b["loss"][1] - a["loss"][1]) / a["loss"][1] for a, b in pairs), default=nan)
    fell = bool(pairs) and all(lowered(a) <= FALLEN for a, _ in pairs)
    return Claim(
        f"{OPTIMIZERS[exact[1]]}: {ESTIMATORS[other[0]]} ends within {100 * APART:g} % of the loss of exact implicit "
        "differentiation with every seed",
        f"the largest difference is {shown(100 * apart, 2)} % ({number(pairs)})",
        apart <= APART if fell else None,
    )


def number(of_seeds: Sequence[Any]) -> str:
    """How many, in words."""
    return f"{len(of_seeds)} {'seed' if len(of_seeds) == 1 else 'seeds'}"


def slower(config: SingleConfig, runs: Runs, exact: Row, other: Row) -> Claim:
    """Compares times: the slides found propagation to be slower."""
    times = [mean(seconds_to(line, config.level) for line in runs.where(row=row)) for row in (exact, other)]
    both = all(map(isfinite, times))
    return Claim(
        f"{OPTIMIZERS[exact[1]]}: symmetric propagation takes longer than exact implicit differentiation, as "
        "the slides report",
        f"{shown(times[1], 2)} s against {shown(times[0], 2)} s of CPU time to {config.level:g} of the starting loss"
        if both
        else f"not every run reaches {config.level:g} of its starting loss",
        times[1] > times[0] if both else None,
    )


def protocol(config: SingleConfig, runs: Runs) -> str:
    """Describe what was run, and how the figures were selected."""
    how = {
        "l-bfgs": f"{config.l_bfgs_iterations} iterations of L-BFGS (SciPy's)",
        "adam": f"{config.adam_iterations} iterations of Adam with a cosine from {config.learning_rate:g}",
    }
    extra = f", and {config.tail_weight:g} times its square over the density" if config.tail_weight else ""
    return (
        f"The reference is the Kohn-Sham density (LDA, def2-SVP) of {config.molecule} at its own geometry, in an "
        f"even-tempered basis with grid level {config.grid}. The functional is the sum of Thomas-Fermi, von Weizsäcker "
        "and LDA, with a network as enhancement factor and a linear term that is fitted first. The loss is half the "
        f"squared density error per electron{extra}, at the density of least energy, which preconditioned L-BFGS finds "
        f"to a projected gradient of 1e-8. Training takes {', or '.join(how[name] for name in config.optimizers)}, "
        f"with {config.plan.seeds} seeds of the network's weights. Implicit differentiation solves its adjoint system "
        "by preconditioned MINRES to 1e-8; equilibrium propagation chooses its nudge from the least eigenvalue. "
        "Everything runs in double precision with one thread, and times are CPU times."
    )


def notes(config: SingleConfig, runs: Runs) -> Iterator[str]:
    """Caveats for the reader."""
    yield (
        "The loss contains a small decay of the network's weights, which is equal in all rows. One-sided propagation "
        "with a curved nudge is damped implicit differentiation; both choose the damping by one rule."
    )
    if rejected := sum(runs.column("rejected")):
        yield (
            f"In {rejected} evaluations the density was not found within the step budget. This happens at the "
            "first step "
            "of L-BFGS, which has length one: that evaluation takes most of the time of every row."
        )
    yield from missing(len(jobs(config)), runs)


# -- figures -----------------------------------------------------------------------------------------------------------


def drawings(config: SingleConfig, runs: Runs, folders: Mapping[str, Run]) -> Iterator[CaptionedFigure]:
    """Figures of the loss, and of the density's error along a line if the molecule is available."""
    if not runs:
        return
    yield CaptionedFigure(
        "loss",
        loss_along(config, runs, folders),
        "Loss divided by the initial loss, against iterations and against CPU time, with a line per seed.",
    )
    if (along := line_through(config, runs, folders)) is not None:
        yield CaptionedFigure(
            "line",
            along,
            f"{config.molecule}: error of the density along the line through the first two atoms (grey), before and "
            f"after training, with seed {config.plan.first_seed}. The scale is linear within 0.001.",
        )


def colour(estimator: EstimatorName) -> str:
    """Colour of an estimator."""
    from torchimplicit.recipes.runtime.page import COLOURS

    return COLOURS[list(ESTIMATORS).index(estimator)]


def loss_along(config: SingleConfig, runs: Runs, folders: Mapping[str, Run]) -> Figure:
    """The figure, with two panels per optimizer."""
    from torchimplicit.recipes.runtime.page import LINES, axes

    rows = there(config, runs)
    shown_here = [optimizer for optimizer in OPTIMIZERS if any(row[1] == optimizer for row in rows)]
    figure, panels = axes(2 * len(shown_here), width=4.0, height=3.6)
    for place, optimizer in enumerate(shown_here):
        pair = panels[2 * place : 2 * place + 2]
        for row in (row for row in rows if row[1] == optimizer):
            for number, line in enumerate(runs.where(row=row)):
                looks = folders[line.name].read_json("results.json")["looks"]
                losses = [look["loss"] / looks[0]["loss"] for look in looks]
                style: dict[str, Any] = {"color": colour(row[0]), "linestyle": LINES[number % len(LINES)]}
                label = None if number else ESTIMATORS[row[0]]
                for panel, what in zip(pair, ("iteration", "seconds"), strict=True):
                    panel.plot([look[what] for look in looks], losses, linewidth=1.2, label=label, **style)
        for panel, label in zip(pair, ("iteration", "seconds"), strict=True):
            panel.set(title=OPTIMIZERS[optimizer], xlabel=label, yscale="log")
    panels[0].set_ylabel("loss / initial loss")
    for panel in panels[1::2]:
        panel.legend(fontsize=7.5)
    return figure


def line_through(config: SingleConfig, runs: Runs, folders: Mapping[str, Run]) -> Figure | None:
    """The error of the density along the line through two atoms; ``None`` if the molecule is not available."""
    import torch

    from torchimplicit.recipes.density import split as data
    from torchimplicit.recipes.density import storage
    from torchimplicit.recipes.density.case import Case
    from torchimplicit.recipes.density.pictures import error_along_line
    from torchimplicit.recipes.density.training import started
    from torchimplicit.recipes.runtime.fitting import read_checkpoint
    from torchimplicit.recipes.runtime.page import COLOURS, legend_beside

    seed = config.plan.first_seed
    shown_here = [line for line in runs.where(seed=seed) if line["row"][1] == config.optimizers[0]]
    if not shown_here:
        return None
    settings = {line.name: settings_of(config, line["row"], seed) for line in shown_here}
    try:
        split = data.load(settings[shown_here[0].name].molecules)
    except UserError:  # neither computed nor computable here
        return None
    (molecule,) = split.train
    case = Case.of(molecule)
    errors = {"superposition of atoms": molecule.guess - molecule.reference}
    looks = [(COLOURS[7], ":"), (COLOURS[6], ":"), *((colour(line["row"][0]), "-") for line in shown_here)]
    with torch.no_grad():
        for line in shown_here:
            functional = started(settings[line.name], [case])
            if "before" not in errors:
                errors["before"] = case.solved(functional, settings[line.name], cold=True).value - molecule.reference
            functional.load_state_dict(read_checkpoint(folders[line.name].best)["weights"])
            found = case.solved(functional, settings[line.name], cold=True).value
            errors[ESTIMATORS[line["row"][0]]] = found - molecule.reference
    basis = storage.read(split.files[molecule.name]).basis
    figure, panel = error_along_line(molecule.name, basis, errors, looks, width=7.2)
    legend_beside(panel)
    return figure


TABLE = table.published(
    globals(),
    "One molecule by implicit differentiation and by equilibrium propagation",
    "Slides on fine-tuning density functionals under an electron-number constraint (Adamowicz): implicit "
    "differentiation failed, equilibrium propagation trained a single molecule, slower; no figures. Those here "
    "are ours.",
)
