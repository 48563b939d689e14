"""Table: density functionals for several molecules, tested on unseen geometries and molecules."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from math import nan
from statistics import fmean
from typing import TYPE_CHECKING, Any

from torchimplicit.recipes.density import results
from torchimplicit.recipes.density.results import (
    INNER_STEPS,
    PRECISION,
    cell,
    draw_seeds,
    labelled,
    missing,
    ratio,
    shown,
    there,
    told,
)
from torchimplicit.recipes.density.settings import MoleculeFiles, OrbitalFreeTraining
from torchimplicit.recipes.runtime import table
from torchimplicit.recipes.runtime.errors import UserError
from torchimplicit.recipes.runtime.settings import different, known_rows, not_negative, own_first, positive
from torchimplicit.recipes.runtime.table import CaptionedFigure, Cell, Claim, Job, Plan, Runs, TitledTable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from torchimplicit.recipes.runtime.run import Run

LOWERED, SHARE = 0.4, 0.8
"""The targets: by what factor the training molecules' L falls, and the share of test molecules that beat the
superposition of atoms."""

ENDLESS = 10**6
"""Number of iterations that no run reaches: runs end by their time."""


FINER = (("trained_energy_error", 1e3), ("finer_loss", 1e3), ("finer_l1", 1.0), ("finer_energy_error", 1e3))
"""Figures reported for the finer grid, with their units, and the energy error on the training grid."""


@dataclass(frozen=True)
class Row:
    """A row: how it differs from the recipe.

    Attributes:
        label: label to display.
        changes: changes of the recipe's settings.
        energy: whether energies are trained.
        qm9: whether it is on those molecules.
    """

    label: str
    changes: dict[str, Any] = field(default_factory=dict)
    energy: bool = False
    qm9: bool = False


ROWS = {
    "gauss-newton": Row("Gauss–Newton"),
    "l-bfgs": Row("L-BFGS", {"optimizer": "l-bfgs"}),
    "adam": Row("Adam", {"optimizer": "adam"}),
    "linear": Row("Gauss–Newton; linear terms alone", {"hidden": 0}),
    "energy": Row("Gauss–Newton; energies too", energy=True),
    "no-tails": Row("Gauss–Newton; tails not weighted", {"tail_weight": 0.0}),
    "no-pairs": Row("Gauss–Newton; neighbours not known", {"pairs": False}),
    "slides": Row("Adam; neither, as in the slides", {"optimizer": "adam", "tail_weight": 0.0, "pairs": False}),
    "qm9": Row("Gauss–Newton; QM9", energy=True, qm9=True),
    "qm9-linear": Row("Gauss–Newton; QM9, linear terms alone", {"hidden": 0}, energy=True, qm9=True),
}
"""The rows, by the names of their runs."""


@own_first
@dataclass(frozen=True, kw_only=True)
class MoleculesConfig(MoleculeFiles):
    """Four molecules in new geometries, with three optimizers and four losses; then molecules of QM9, some held out."""

    plan: Plan = field(default_factory=lambda: Plan(seeds=2, together=100))

    molecules: tuple[str, ...] = ("H2", "H2O", "NH3", "CH4")
    """Training molecules, by formula."""

    rows: tuple[str, ...] = ()
    """Rows to run, by the names of their runs. Default: all."""

    seconds: float = 120.0
    """CPU time for each row of the four molecules, in seconds."""

    distort: float = 0.04
    """Standard deviation of the coordinates' random displacements, in angstrom. Each seed gives other geometries."""

    train_copies: int = 1
    """Distorted copies of every molecule for training, in addition to the molecule itself."""

    validation_copies: int = 1
    """Distorted copies of every molecule for validation, which selects the weights."""

    test_copies: int = 2
    """Distorted copies of every molecule for the test."""

    learning_rate: float = 1e-2
    """Peak learning rate of Adam."""

    energy_weight: float = 1.0
    """Weight of the energy term, in the rows that have one."""

    qm9: str = "qm9"
    """Source of the molecules of the last row: qm9, which is downloaded, or a folder of xyz files."""

    qm9_limit: int = 60
    """Number of QM9 molecules, those with the fewest atoms; 0 omits the row. On grid 1 a molecule of ten atoms takes
    some 640 MB."""

    qm9_held_out: int = 8
    """Number of QM9 molecules for validation only, and the same number for the test only."""

    qm9_seconds: float = 1500.0
    """CPU time for the QM9 row, in seconds."""

    processes: int = 1
    """Processes per run, among which its molecules are divided. The time counted is that of the first, which has the
    largest share."""

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "seconds", "distort", "learning_rate", "energy_weight", "qm9_held_out", "qm9_seconds")
        positive(self, "validation_copies", "test_copies", "processes")
        not_negative(self, "train_copies", "qm9_limit")
        different(self, "molecules")
        known_rows(self.rows, list(ROWS))
        if self.qm9_limit and self.qm9_limit <= 2 * self.qm9_held_out:
            raise UserError(
                f"--qm9-held-out {self.qm9_held_out} takes {2 * self.qm9_held_out} of --qm9-limit {self.qm9_limit} away"
            )


def rows_of(config: MoleculesConfig) -> dict[str, Row]:
    """The rows that are asked for."""
    asked = config.rows or tuple(ROWS)
    return {name: row for name, row in ROWS.items() if name in asked and (config.qm9_limit or not row.qm9)}


def settings_of(config: MoleculesConfig, row: Row, seed: int) -> OrbitalFreeTraining:
    """The settings of a run. The seed determines the weights, and the geometries or the held-out molecules."""
    if row.qm9:
        chosen = results.molecules(
            config, config.qm9, limit=config.qm9_limit, held_out=config.qm9_held_out, geometry_seed=seed
        )
    else:
        chosen = results.molecules(
            config,
            *config.molecules,
            distort=config.distort,
            train_copies=config.train_copies,
            validation_copies=config.validation_copies,
            test_copies=config.test_copies,
            geometry_seed=seed,
        )
    plain = OrbitalFreeTraining(
        molecules=chosen,
        iterations=ENDLESS,
        seconds=config.qm9_seconds if row.qm9 else config.seconds,
        learning_rate=config.learning_rate,
        energy_weight=config.energy_weight if row.energy else 0.0,
        inner_steps=INNER_STEPS,
        processes=config.processes,
        page=False,
        seed=seed,
    )
    return replace(plain, **row.changes)


def jobs(config: MoleculesConfig) -> list[Job]:
    """All jobs, seed by seed so that a slow phase of the machine affects all rows; those of QM9 at the end."""
    return [
        Job(
            f"{name}-{seed}",
            "ofdft-qm9" if row.qm9 else "ofdft-small",
            settings_of(config, row, seed),
            {"row": name, "qm9": row.qm9, "seed": seed},
        )
        for qm9 in (False, True)
        for seed in config.plan.all_seeds
        for name, row in rows_of(config).items()
        if row.qm9 == qm9
    ]


# -- what the runs come to ---------------------------------------------------------------------------------------------


figures = results.figures


def better(runs: Runs, row: str, split: str = "test") -> float:
    """The share of molecules, over all seeds, that beat the superposition of atoms in L and in L1."""
    shares = runs.of(row, split)
    return sum(one["better"] * one["count"] for one in shares) / sum(one["count"] for one in shares)


def kinds(config: MoleculesConfig, runs: Runs) -> tuple[list[str], list[str]]:
    """The rows that have a run: those of the four molecules, and those of QM9."""
    rows = there(rows_of(config), runs)
    return [name for name in rows if not ROWS[name].qm9], [name for name in rows if ROWS[name].qm9]


def sheets(config: MoleculesConfig, runs: Runs) -> Iterator[TitledTable]:
    """Tables of the four molecules, of QM9, and of the first row molecule by molecule."""
    four, qm9 = kinds(config, runs)
    if four:
        yield quality(config, f"{', '.join(config.molecules)}: new geometries", four, runs)
    if qm9:
        yield quality(config, "QM9: new molecules", qm9, runs)
    for name in [*four, *qm9][:1]:
        line = runs.where(row=name)[0]
        title = f"{ROWS[name].label}, seed {line['seed']}: molecule by molecule"
        every = [(split, one) for split in ("train", "test") for one in line[f"molecules.{split}"] or ()]

        def of(figure: str, scale: float = 1.0) -> Callable[[tuple[str, Any]], str]:
            return lambda pair: shown(scale * pair[1][figure], 3)

        yield table.sheet(title, every, [
            Cell("Molecule", lambda pair: f"{pair[1]['name']} ({pair[0]})"),
            Cell("Basis functions", lambda pair: str(pair[1]["size"])),
            Cell("L", of("loss", 1e3), "10⁻³"),
            Cell("L, MINAO", of("guess_loss", 1e3), "10⁻³"),
            Cell("L1 per electron", of("l1")),
            Cell("L1, MINAO", of("guess_l1")),
            Cell("Energy error", of("energy_error", 1e3), "mHa"),
            Cell("Inner steps", lambda pair: f"{pair[1]['steps']}{'' if pair[1]['converged'] else ', not converged'}"),
        ])  # fmt: skip


def quality(config: MoleculesConfig, title: str, rows: list[str], runs: Runs) -> TitledTable:
    """A table of the rows; below them, before training and the superposition of atoms."""
    of = partial(cell, runs)
    checked = any(runs.of(name, "test.finer_loss") for name in rows)
    finer = [
        Cell[str]("as trained", of("test.trained_energy_error", 3, 1e3), "mHa", "by the constants that training had"),
        Cell("Test L, finer grid", of("test.finer_loss", 3, 1e3), "10⁻³", "of the same functional's minimum there"),
        Cell("L1, finer grid", of("test.finer_l1")),
        Cell("Energy error, finer grid", of("test.finer_energy_error", 3, 1e3), "mHa"),
    ] if checked else []  # fmt: skip
    cells = [
        Cell[str]("Row", lambda name: ROWS[name].label),
        Cell("Training L", lambda name: told(map(ratio, runs.where(row=name))), "",
             "at the end over the start; the figures beside it are at the weights that are selected"),
        Cell("Test L", of("test.loss", 3, 1e3), "10⁻³", "∫(ρ−ρ_gs)²/(2N), mean of the test molecules"),
        Cell("Test L1", of("test.l1"), "", "∫|ρ−ρ_gs|/N, mean of the test molecules"),
        Cell("Better", lambda name: f"{100 * better(runs, name):.0f}", "%",
             "of the test molecules of all seeds, by L and by L1 both, than the superposition"),
        Cell("Energy error", of("test.energy_error", 3, 1e3), "mHa", "mean absolute, of the test molecules"),
        *finer,
        Cell("Inner steps", lambda name: f"{max(runs.of(name, 'test.steps')):g}", "",
             "from the superposition of atoms to 1e-8, the worst test molecule"),
        Cell("Iterations", of("iterations", 2)),
        Cell("Seconds", of("seconds"), "s", "of the processor"),
        Cell("Weights", lambda name: str(runs.of(name, "weights")[0])),
        Cell("Seeds", lambda name: str(len(runs.where(row=name)))),
    ]  # fmt: skip
    below = []
    for pairs in (False, True):
        like = [name for name in rows if settings_of(config, ROWS[name], 0).pairs == pairs]
        for name in like[:1]:
            below.append(
                [
                    f"before training, neighbours {'known' if pairs else 'not known'}",
                    "1",
                    of("start_test.loss", 3, 1e3)(name),
                    of("start_test.l1")(name),
                    f"{100 * better(runs, name, 'start_test'):.0f}",
                    of("start_test.energy_error", 3, 1e3)(name),
                    *([of(f"start_test.{one}", 3, scale)(name) for one, scale in FINER] if checked else []),
                    f"{max(runs.of(name, 'start_test.steps')):g}",
                    *[table.NONE] * 3,
                    str(len(runs.where(row=name))),
                ]
            )
    guess = [of("test.guess_loss", 3, 1e3)(rows[0]), of("test.guess_l1")(rows[0])]
    return table.sheet(title, rows, cells, [*below, ["superposition of atoms (MINAO)", table.NONE, *guess]])


def claims(config: MoleculesConfig, runs: Runs) -> Iterator[Claim]:
    """Test whether the targets are met, then the comparisons between rows."""
    rows = there(rows_of(config), runs)
    for name in ("gauss-newton", "energy", "qm9"):
        if name in rows:
            yield fitted(runs, name)
            yield tested(runs, name)
    if "gauss-newton" in rows:
        yield from (ahead(runs, name) for name in ("l-bfgs", "adam") if name in rows)
        if "energy" in rows:
            yield energies(runs)
    for whole, linear in (("gauss-newton", "linear"), ("qm9", "qm9-linear")):
        if {whole, linear} <= set(rows):
            yield learned(runs, whole, linear)


def fitted(runs: Runs, name: str) -> Claim:
    """How much the training molecules' error decreases."""
    ratios = [ratio(line) for line in runs.where(row=name)]
    return Claim(
        f"{ROWS[name].label}: the training molecules' L falls to at most {LOWERED:g} of its start with every seed",
        f"to {shown(max(ratios), 3)} at worst, {shown(fmean(ratios), 3)} in the mean of {len(ratios)} seeds",
        max(ratios) <= LOWERED,
    )


def tested(runs: Runs, name: str) -> Claim:
    """The number of test molecules whose densities beat the superposition of atoms."""
    every = [one for by_seed in runs.of(name, "molecules.test") for one in by_seed]
    what = "molecules that training has not seen" if ROWS[name].qm9 else "test geometries"
    below = [fmean(one[f] < one[f"guess_{f}"] for one in every) if every else nan for f in ("loss", "l1")]
    return Claim(
        f"{ROWS[name].label}: L and L1 per electron are both below those of the superposition of atoms (MINAO) on at "
        f"least {100 * SHARE:.0f} % of the {what}",
        f"on {100 * better(runs, name):.0f} % of {sum(runs.of(name, 'test.count'))}; L below on "
        f"{100 * below[0]:.0f} %, L1 on {100 * below[1]:.0f} %{on_both(every)}",
        better(runs, name) >= SHARE,
    )


def on_both(every: list[dict[str, Any]]) -> str:
    """Says whether a finer grid was used too."""
    return (
        "; each counts if it is better on the finer grid too"
        if every and all(one.get("finer") for one in every)
        else ""
    )


def ahead(runs: Runs, other: str) -> Claim:
    """Compares the trained loss at equal time."""
    pairs = [(a[1], b[1]) for a, b in runs.paired("gauss-newton", other, "loss")]
    words = ", ".join(f"{shown(1e3 * a, 3)} against {shown(1e3 * b, 3)}" for a, b in pairs)
    return Claim(
        f"Gauss–Newton reaches a lower training loss than {ROWS[other].label} in the same time, with every seed",
        f"10³ times the loss: {words or 'no seed of both'}",
        all(a < b for a, b in pairs) if pairs else None,
    )


def learned(runs: Runs, whole: str, linear: str) -> Claim:
    """Compares the network with linear terms trained by the same loss."""
    pairs = [(a["loss"], b["loss"]) for a, b in runs.paired(whole, linear, "test")]
    words = ", ".join(f"{shown(1e3 * a, 3)} against {shown(1e3 * b, 3)}" for a, b in pairs)
    return Claim(
        f"{ROWS[whole].label}: the learned factor lowers the test molecules' L below that of linear terms alone, "
        "trained likewise, with every seed",
        f"10³ L: {words or 'no seed of both'}",
        all(a < b for a, b in pairs) if pairs else None,
    )


def energies(runs: Runs) -> Claim:
    """Compares energies on the test geometries."""

    def over_all(name: str, figure: str) -> float:
        values = runs.of(name, "test")
        return sum(one[figure] * one["count"] for one in values) / sum(one["count"] for one in values)

    error, loss = ([over_all(name, f) for name in ("gauss-newton", "energy")] for f in ("energy_error", "loss"))
    return Claim(
        "The energy term lowers the test geometries' energy error tenfold, and their L by no more than a tenth worse",
        f"energy {shown(1e3 * error[0], 3)} to {shown(1e3 * error[1], 3)} mHa, L "
        f"{shown(1e3 * loss[0], 3)} to {shown(1e3 * loss[1], 3)} (10⁻³)",
        error[1] <= 0.1 * error[0] and loss[1] <= 1.1 * loss[0],
    )


def protocol(config: MoleculesConfig, runs: Runs) -> str:
    """Describe what was run, and how the figures were selected."""
    of_qm9 = (
        f" QM9: {config.qm9_limit} molecules with the fewest atoms, {config.qm9_held_out} of them held out for "
        f"validation and as many for test, others for every seed; {config.qm9_seconds:g} s."
        if any(job.recipe == "ofdft-qm9" for job in jobs(config))
        else ""
    )
    plain = settings_of(config, ROWS["gauss-newton"], 0)
    return (
        f"{', '.join(config.molecules)}, each at its own geometry and in {config.train_copies} distorted "
        f"({config.distort:g} angstrom) to train on, {config.validation_copies} others to select the weights by (the "
        "least L, and what energies add to the loss where they are trained), "
        f"{config.test_copies} others to test on; other geometries for each of {config.plan.seeds} seeds. "
        f"{labelled(config.grid)}. Thomas-Fermi, von Weizsäcker and LDA, a network as enhancement factor, and a linear "
        "term, which is fitted first. The loss is half the squared density error per electron, and a weight of "
        f"{plain.tail_weight:g} for the same over the density; energies, where they are trained, weigh "
        f"{config.energy_weight:g}. Every row has {config.seconds:g} s of the processor's time, "
        f"measurements not counted; Adam's rate {config.learning_rate:g} with a cosine.{of_qm9} Densities: "
        "preconditioned L-BFGS to 1e-8. Gradients: exact implicit differentiation; Gauss–Newton: exact Jacobians by "
        f"the same theorem. {PRECISION}"
    )


def notes(config: MoleculesConfig, runs: Runs) -> Iterator[str]:
    """Caveats for the reader."""
    yield (
        "L is dominated by the cores, where the density is high; L1 is not. A loss without its tails can fall many "
        "times while L1 does not move, so both are told."
    )
    yield (
        "The energy of a functional that is trained by densities alone is free to drift: nothing holds it. With the "
        "energy term its derivative in the weights needs no adjoint (the envelope theorem). No claim of chemical "
        "accuracy (1.6 mHa) is made."
    )
    if rejected := sum(runs.column("rejected")):
        yield f"{rejected} evaluations met a density that was not found within the budget."
    yield from missing(len(jobs(config)), runs)


# -- figures -----------------------------------------------------------------------------------------------------------


def drawings(config: MoleculesConfig, runs: Runs, folders: Mapping[str, Run]) -> Iterator[CaptionedFigure]:
    """Figures of the four molecules, and of QM9, as far as there are runs."""
    four, qm9 = kinds(config, runs)
    if four:
        yield CaptionedFigure(
            "along-training",
            along(runs, four),
            "The training molecules' error against the processor's time, a line a seed: L left, L1 per electron "
            "right; dotted is the superposition of atoms of the first seed.",
        )
        chosen = [name for name in four if name in ("gauss-newton", "energy", "slides")] or four[:3]
        yield CaptionedFigure(
            "test",
            against_guess(runs, chosen),
            "Test geometries of all seeds: L and L1 per electron over those of the superposition of atoms. Below "
            "and left of the lines both are better. Hollow: before training, with the linear term fitted.",
        )
    if qm9:
        caption = "Molecules of QM9 that training has not seen, likewise."
        yield CaptionedFigure("qm9", against_guess(runs, qm9), caption)


def along(runs: Runs, rows: list[str]) -> Figure:
    """The figure, in two panels with a line per run."""
    from torchimplicit.recipes.runtime.page import COLOURS, axes, legend_beside

    figure, panels = axes(2, width=4.9, height=3.9)
    for panel, what, label in zip(panels, ("loss", "l1"), ("L", "L1 per electron"), strict=True):
        for index, name in enumerate(rows):
            colour = COLOURS[index % len(COLOURS)]
            draw_seeds(panel, runs.where(row=name), "looks", "seconds", what, ROWS[name].label, color=colour)
        first = runs.where(row=rows[0])[0]["looks"][0]
        panel.axhline(first[f"guess_{what}"], color="0.5", linestyle=":", linewidth=1)
        panel.set(xlabel="seconds of the processor's time", ylabel=label, yscale="log")
    legend_beside(panels[-1])
    return figure


def against_guess(runs: Runs, rows: list[str]) -> Figure:
    """The figure, with a point per molecule."""
    from torchimplicit.recipes.runtime.page import COLOURS, MARKERS, axes, legend_beside

    figure, (panel,) = axes(width=6.4, height=4.4)
    for index, name in enumerate(rows):
        colour = COLOURS[index % len(COLOURS)]
        for split in ("start_test", "test"):
            every = [one for by_seed in runs.of(name, f"molecules.{split}") for one in by_seed]
            panel.plot(
                [one["loss"] / one["guess_loss"] for one in every],
                [one["l1"] / one["guess_l1"] for one in every],
                linestyle="none",
                marker=MARKERS[index % len(MARKERS)],
                markersize=4.5,
                color=colour,
                markerfacecolor="none" if split == "start_test" else colour,
                label=None if split == "start_test" else ROWS[name].label,
            )
    panel.axhline(1, color="0.6", linewidth=0.9)
    panel.axvline(1, color="0.6", linewidth=0.9)
    panel.set(xscale="log", yscale="log", xlabel="L, over that of the superposition", ylabel="L1, likewise")
    legend_beside(panel)
    return figure


TABLE = table.published(
    globals(),
    "Density functionals for several molecules",
    "Slides on fine-tuning density functionals under an electron-number constraint (Adamowicz): with many "
    "molecules the training loss fell without improving the densities; no figures. Those here are ours.",
)
