"""The table and the page in which a training of a density functional tells how good its densities are."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from rich.console import Console

from torchimplicit.recipes.density.quality import Quality, summarized
from torchimplicit.recipes.density.stepping import Course
from torchimplicit.recipes.runtime.page import COLOURS, Section, axes, document, saved, styled
from torchimplicit.recipes.runtime.run import Run
from torchimplicit.recipes.runtime.table import NONE, CaptionedFigure, Column, Table


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


def table_of(parts: Iterable[Part]) -> Table:
    """A line for each part; columns in which nothing was measured are left out."""
    parts = [part for part in parts if part.found]
    means = [summarized(part.found) for part in parts]
    refitted = [abs(one.trained_energy_error - one.energy_error) > 0 for one in means]

    def numbers(values: Iterable[float], digits: int, scale: float = 1.0) -> list[str]:
        return [NONE if math.isnan(value) else f"{scale * value:.{digits}f}" for value in values]

    energies = [(Column("ΔE", "mHa"), numbers((one.energy_error for one in means), 1, 1e3))]
    if any(refitted):  # a part whose constants are those of training has no others
        own = [one.energy_error if its else math.nan for one, its in zip(means, refitted, strict=True)]
        energies = [
            (Column("ΔE, constants refitted", "mHa"), numbers(own, 1, 1e3)),
            (Column("ΔE, as trained", "mHa"), numbers((one.trained_energy_error for one in means), 1, 1e3)),
        ]

    columns = [
        (Column("Molecules"), [part.name for part in parts]),
        (Column("L", "10⁻³"), [f"{1e3 * one.loss:.3f} (MINAO {1e3 * one.guess_loss:.3f})" for one in means]),
        (Column("L1 per electron"), [f"{one.l1:.4f} (MINAO {one.guess_l1:.4f})" for one in means]),
        *energies,
        (
            Column("ΔE at the reference", "mHa"),
            numbers((fmean(map(abs, part.reference or [math.nan])) for part in parts), 1, 1e3),
        ),
        (Column("L, finer grid", "10⁻³"), numbers((one.finer_loss for one in means), 3, 1e3)),
        (Column("ΔE, finer grid", "mHa"), numbers((one.finer_energy_error for one in means), 1, 1e3)),
        (Column("Better than MINAO", "%"), numbers((one.better for one in means), 0, 100)),
        (Column("Better than before", "%"), numbers((part.improved for part in parts), 0, 100)),
        (Column("Spurious minima", "%"), numbers((part.spurious for part in parts), 0, 100)),
        (Column("Converged", "%"), numbers((1 - one.unconverged for one in means), 0, 100)),
        (Column("Steps"), numbers((one.mean_steps for one in means), 1)),
        (Column("λmin", "Ha"), numbers((one.least for one in means), 3)),
    ]
    kept = [(column, cells) for column, cells in columns if any(cell != NONE for cell in cells)]
    return Table([column for column, _ in kept], [list(line) for line in zip(*(c for _, c in kept), strict=True)])


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
