"""The table and the page in which a training of a density functional tells how good its densities are."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from rich.console import Console

from torchimplicit.recipes.density.quality import SPURIOUS_ENERGY, SPURIOUS_LOSS, Quality, Summary, summarized
from torchimplicit.recipes.density.stepping import Course
from torchimplicit.recipes.runtime.page import COLOURS, Section, axes, document, saved, styled
from torchimplicit.recipes.runtime.run import Run
from torchimplicit.recipes.runtime.table import NONE, CaptionedFigure, Cell, Table, sheet


@dataclass(frozen=True)
class Part:
    """Molecules that one line of the table is about.

    Attributes:
        name: what they are, and by which functional their densities are.
        found: their densities; without any, there is no line.
        spurious: the share of spurious minima; NaN: not counted.
        improved: the share whose L is less than before; NaN: there is no before.
        reference: errors of the energies at the reference densities, in hartree.
    """

    name: str
    found: Sequence[Quality]
    spurious: float = math.nan
    improved: float = math.nan
    reference: Sequence[float] = ()


Row = tuple[Part, Summary]


def table_of(parts: Iterable[Part]) -> Table:
    """A line for each part; columns in which nothing was measured are left out."""
    rows = [(part, summarized(part.found)) for part in parts if part.found]

    def mean(name: str, digits: int, scale: float = 1.0) -> Callable[[Row], str]:
        return lambda row: _number(scale * getattr(row[1], name), digits)

    def refitted(row: Row) -> bool:
        return row[1].trained_energy_error != row[1].energy_error and not math.isnan(row[1].trained_energy_error)

    at_minimum = "mean absolute error of the energy at the density found"
    energies = [Cell("ΔE", mean("energy_error", 1, 1e3), "mHa", at_minimum)]
    if any(map(refitted, rows)):
        energies = [
            Cell("ΔE, constants refitted",
                 lambda row: mean("energy_error", 1, 1e3)(row) if refitted(row) else NONE, "mHa",
                 f"{at_minimum}, with elements' constants that were fitted afterwards to the training molecules' "
                 "energies"),
            Cell("ΔE, as trained", mean("trained_energy_error", 1, 1e3), "mHa", at_minimum),
        ]  # fmt: skip
    whole = sheet("", rows, [
        Cell("Molecules", lambda row: row[0].name),
        Cell("L", lambda row: f"{1e3 * row[1].loss:.3f} (MINAO {1e3 * row[1].guess_loss:.3f})", "10⁻³",
             "∫(ρ−ρ_gs)²/(2N), mean of the molecules; MINAO is the superposition of atoms at which searches begin"),
        Cell("L1 per electron", lambda row: f"{row[1].l1:.4f} (MINAO {row[1].guess_l1:.4f})", "",
             "∫|ρ−ρ_gs|/N, likewise"),
        *energies,
        Cell("ΔE at the reference",
             lambda row: _number(1e3 * fmean(map(abs, row[0].reference or [math.nan])), 1), "mHa",
             "the same at the Kohn-Sham density"),
        Cell("L, finer grid", mean("finer_loss", 3, 1e3), "10⁻³", "of the same functional's minimum there"),
        Cell("ΔE, finer grid", mean("finer_energy_error", 1, 1e3), "mHa"),
        Cell("Better than MINAO", mean("better", 0, 100), "%",
             "of the molecules, in L and in L1, on the finer grid too"),
        Cell("Better than before", lambda row: _number(100 * row[0].improved, 0), "%", "in L"),
        Cell("Spurious minima", lambda row: _number(100 * row[0].spurious, 0), "%",
             f"found, but unrelated to the Kohn-Sham density: more than {1e3 * SPURIOUS_ENERGY:g} mHa per electron or "
             f"{SPURIOUS_LOSS:g} times MINAO's L away"),
        Cell("Converged", lambda row: _number(100 * (1 - row[1].unconverged), 0), "%"),
        Cell("Steps", mean("mean_steps", 1), "", "of a minimization, mean of the molecules"),
        Cell("λmin", mean("least", 3), "Ha", "least eigenvalue of a Hessian at a density found, on the constraint"),
    ]).table  # fmt: skip
    kept = [place for place in range(len(whole.columns)) if any(line[place] != NONE for line in whole.rows)]
    return Table([whole.columns[place] for place in kept], [[line[place] for place in kept] for line in whole.rows])


def _number(value: float, digits: int) -> str:
    return NONE if math.isnan(value) else f"{value:.{digits}f}"


@dataclass(frozen=True)
class Page:
    """What a page says beside its table.

    Attributes:
        title, lead: heading and first paragraph.
        panels: labels of the figures of a glance that are drawn, by their names.
        caption: of that drawing.
        logarithmic: whether it is.
    """

    title: str
    lead: str
    panels: Mapping[str, str]
    caption: str
    logarithmic: bool = False


def tell(table: Table, page: Page | None, course: Course, run: Run, console: Console) -> None:
    """Print the table; with a page, write ``index.html`` and its figure of the validation molecules in training."""
    if page is not None:
        with styled():
            drawn, plots = axes(len(page.panels), width=5.0)
            for plot, (what, label) in zip(plots, page.panels.items(), strict=True):
                there = [glance for glance in course.glances if what in glance.figures]
                if there:
                    values = [glance.figures[what] for glance in there]
                    plot.plot([glance.step for glance in there], values, "o-", color=COLOURS[0], markersize=3)
                    plot.set(xlabel="step", ylabel=label, title="validation")
                    plot.set_yscale("log" if page.logarithmic else "linear")
            pictures = saved([CaptionedFigure("training", drawn, page.caption)], run)
        sections = [Section(pictures=pictures, table=table)]
        run.write_text("index.html", document(page.title, [page.lead], sections))
    console.print(table.rich())
