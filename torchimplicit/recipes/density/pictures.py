"""Figures and page of a trained functional."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from torchimplicit.models.orbital_free import OrbitalFree
from torchimplicit.models.orbital_free.basis import DensityBasis
from torchimplicit.recipes.density import storage
from torchimplicit.recipes.density.case import Case
from torchimplicit.recipes.density.history import Measurement, Results
from torchimplicit.recipes.density.places import line, plane
from torchimplicit.recipes.density.split import Split
from torchimplicit.recipes.runtime.page import COLOURS, Section, axes, document, saved, styled
from torchimplicit.recipes.runtime.run import Run
from torchimplicit.recipes.runtime.table import CaptionedFigure, Table


def write_report(results: Results, table: Table, split: Split, functional: OrbitalFree, run: Run) -> None:
    """Write ``figures/*.png`` and a self-contained ``index.html`` with the table."""
    with styled():
        pictures = saved(list(drawings(results, split, functional)), run)
    lead = (
        f"{results.weights} weights after {results.iterations} iterations of {results.config.optimizer} "
        f"({results.config.gradient}), {results.seconds:.0f} s; those of iteration {results.selected} were selected."
    )
    sections = [Section(table=table, pictures=pictures)]
    run.write_text("index.html", document("An orbital-free density functional", [lead], sections))


def drawings(results: Results, split: Split, functional: OrbitalFree) -> Iterator[CaptionedFigure]:
    """The errors of the largest molecule's density, and the course of the training."""
    shown = max(split.test or split.train, key=lambda one: len(one.charges))
    basis = storage.read(split.files[shown.name]).basis
    with torch.no_grad():
        p = Case.of(shown).solved(functional, results.config, cold=True).value
    errors = {"trained": p - shown.reference, "superposition of atoms": shown.guess - shown.reference}
    along, panel = error_along_line(shown.name, basis, errors, [(COLOURS[0], "-"), (COLOURS[1], "-")])
    panel.legend()
    yield CaptionedFigure(
        "line",
        along,
        "The error of the density along a line through two atoms (ticks), by the trained functional, and by the "
        "superposition of atoms that its minimization begins at.",
    )
    if len(shown.charges) > 1:
        caption = "The error of both on the plane of three atoms, in electrons per cubic bohr."
        yield CaptionedFigure("plane", _plane(shown.name, basis, errors), caption)
    caption = "The error of the density, in the mean of the molecules; dotted: the superposition of atoms."
    yield CaptionedFigure("training", _training(results.looks), caption)
    yield CaptionedFigure(
        "inner",
        _inner(results.looks),
        "Steps that it takes to find a density, the worst molecule; and, where they were asked for, the extreme "
        "eigenvalues of the Hessians.",
    )


def error_along_line(
    name: str,
    basis: DensityBasis,
    errors: Mapping[str, torch.Tensor],
    looks: Sequence[tuple[str, str]],
    width: float = 6.0,
) -> tuple[Figure, Axes]:
    """Errors of densities along the line through the first two atoms (grey), or along z through a single one.

    Args:
        name: the molecule's.
        basis: of the coefficients.
        errors: differences of coefficients ``[n]``, by the labels of their lines.
        looks: colour and dashes of each.
        width: of the figure, in inches.
    """
    drawn, (plot,) = axes(width=width)
    points, places, atoms = line(basis.centres)
    values = basis.values(points)
    for (label, error), (colour, dashes) in zip(errors.items(), looks, strict=True):
        plot.plot(places, values @ error, color=colour, linestyle=dashes, label=label, linewidth=1.2)
    for place in atoms:
        plot.axvline(float(place), color="0.8", linewidth=0.8, zorder=0)
    plot.set(xlabel="bohr", ylabel="Δρ, electrons per cubic bohr", title=name)
    plot.set_yscale("symlog", linthresh=1e-3)
    return drawn, plot


def _plane(name: str, basis: DensityBasis, errors: dict[str, torch.Tensor]) -> Figure:
    points, (x, y), atoms = plane(basis.centres)
    values = basis.values(points)
    fields = {label: (values @ error).reshape(len(y), len(x)) for label, error in errors.items()}
    largest = 0.05
    drawn, plots = axes(len(fields), width=4.8, height=3.9)
    for plot, (label, shown) in zip(plots, fields.items(), strict=True):
        image = plot.pcolormesh(x, y, shown, cmap="RdBu_r", vmin=-largest, vmax=largest, rasterized=True)
        plot.plot(atoms[:, 0], atoms[:, 1], "k+", markersize=6)
        drawn.colorbar(image, ax=plot)
        plot.set(xlabel="bohr", title=f"{name}, {label}", aspect="equal")
        plot.grid(False)
    return drawn


def _training(looks: list[Measurement]) -> Figure:
    drawn, plots = axes(2, width=5.0)
    for plot, what, label in zip(plots, ("loss", "l1"), ("L", "L1 per electron"), strict=True):
        for index, split in enumerate(("train", "validation")):
            there = [look for look in looks if getattr(look, split) is not None]
            if not there:
                continue
            values = [getattr(getattr(look, split), what) for look in there]
            plot.plot([look.iteration for look in there], values, "o-", color=COLOURS[index], label=split, markersize=3)
            guess = getattr(getattr(there[0], split), f"guess_{what}")
            plot.axhline(guess, color=COLOURS[index], linestyle=":", linewidth=1)
        plot.set(xlabel="iteration", ylabel=label, yscale="log")
        plot.legend()
    return drawn


def _inner(looks: list[Measurement]) -> Figure:
    measured = [(look.iteration, look.train) for look in looks if look.train is not None]
    spectrum = [(iteration, train) for iteration, train in measured if not math.isnan(train.least)]
    drawn, plots = axes(2 if spectrum else 1, width=5.0)
    plots[0].plot(*zip(*((k, train.steps) for k, train in measured), strict=True), "o-", color=COLOURS[0], markersize=3)
    plots[0].set(xlabel="iteration", ylabel="steps of a minimization", ylim=(0, None))
    if spectrum:
        for index, what in enumerate(("least", "largest")):
            values = [getattr(train, what) for _, train in spectrum]
            label = f"{what} eigenvalue"
            plots[1].plot([k for k, _ in spectrum], values, "o-", color=COLOURS[index], markersize=3, label=label)
        plots[1].set(xlabel="iteration", ylabel="hartree")
        plots[1].set_yscale("symlog", linthresh=1e-2)
        plots[1].legend()
    return drawn
