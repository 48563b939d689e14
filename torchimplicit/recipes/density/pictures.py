"""Figures and page of a trained functional."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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

CAPTIONS = {
    "line": "The error of the density along a line through two atoms (ticks), by the trained functional, and by the "
    "superposition of atoms that its minimization begins at.",
    "plane": "The error of both on the plane of three atoms, in electrons per cubic bohr.",
    "training": "The error of the density, in the mean of the molecules; dotted: the superposition of atoms.",
    "inner": "Steps that it takes to find a density, the worst molecule; and, where they were asked for, the extreme "
    "eigenvalues of the Hessians.",
}


def figures(results: Results, split: Split, functional: OrbitalFree) -> dict[str, Figure]:
    """The figures, by the names in :data:`CAPTIONS`."""
    molecules = split.test or split.train
    shown = max(molecules, key=lambda one: len(one.charges))
    basis = storage.read(split.files[shown.name]).basis
    case = Case.of(shown)
    with torch.no_grad():
        p = case.solved(functional, results.config, cold=True).value
    errors = {"trained": p - shown.reference, "superposition of atoms": shown.guess - shown.reference}
    with styled():
        along, panel = error_along_line(shown.name, basis, errors, [(COLOURS[0], "-"), (COLOURS[1], "-")])
        panel.legend()
        drawn = {"line": along, "training": _training(results.looks)}
        if len(shown.charges) > 1:
            drawn["plane"] = _plane(shown.name, basis, errors)
        drawn["inner"] = _inner(results.looks)
    return drawn


def write_report(results: Results, table: Table, split: Split, functional: OrbitalFree, run: Run) -> None:
    """Write ``figures/*.png`` and a self-contained ``index.html`` with the table."""
    drawn = figures(results, split, functional)
    with styled():
        pictures = saved(
            [CaptionedFigure(name, drawn[name], text) for name, text in CAPTIONS.items() if name in drawn], run
        )
    lead = (
        f"{results.weights} weights after {results.iterations} iterations of {results.config.optimizer} "
        f"({results.config.gradient}), {results.seconds:.0f} s; those of iteration {results.selected} were selected."
    )
    run.write_text(
        "index.html", document("An orbital-free density functional", [lead], [Section(table=table, pictures=pictures)])
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
    measured = [look for look in looks if look.train is not None]
    spectrum = [look for look in measured if look.train is not None and look.train.least == look.train.least]
    drawn, plots = axes(2 if spectrum else 1, width=5.0)
    steps = [look.train.steps for look in measured if look.train is not None]
    plots[0].plot([look.iteration for look in measured], steps, "o-", color=COLOURS[0], markersize=3)
    plots[0].set(xlabel="iteration", ylabel="steps of a minimization", ylim=(0, None))
    if spectrum:
        x = [look.iteration for look in spectrum]
        for index, what in enumerate(("least", "largest")):
            values = [getattr(look.train, what) for look in spectrum]
            plots[1].plot(x, values, "o-", color=COLOURS[index], markersize=3, label=f"{what} eigenvalue")
        plots[1].set(xlabel="iteration", ylabel="hartree")
        plots[1].set_yscale("symlog", linthresh=1e-2)
        plots[1].legend()
    return drawn
