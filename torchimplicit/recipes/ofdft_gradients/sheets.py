"""The sheets of the table."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from torchimplicit.recipes.ofdft_gradients.adjoint import TOLERANCE
from torchimplicit.recipes.ofdft_gradients.config import MoleculeGradientsConfig
from torchimplicit.recipes.ofdft_gradients.gathered import ESTIMATORS, Group
from torchimplicit.recipes.ofdft_gradients.results import MoleculeResults, Solved
from torchimplicit.recipes.runtime.table import Sheet
from torchimplicit.recipes.tables import Column, Table

COORDINATES = ("overlap", "raw")
FAILED = "✗"


def sheets(groups: Sequence[Group], settings: MoleculeGradientsConfig) -> list[Sheet]:
    """All of them."""
    return [
        Sheet("The minima, and finite differences of the loss there", _minima(groups)),
        Sheet("Equilibrium propagation: relative error over the nudge", _nudges(groups, settings)),
        Sheet(
            "Minimizations that end too early: relative error of the symmetric difference with the whole loss",
            _loosened(groups, settings),
        ),
        Sheet("The weight of the loss over the least eigenvalue: the symmetric difference", _beyond(groups, settings)),
        Sheet("One-sided propagation beside damped implicit differentiation", _damped(groups, settings)),
        *(
            Sheet(f"As the softest eigenvalue goes to zero: {group.name}", _softened(group, settings))
            for group in groups
        ),
        *(Sheet(f"The adjoint system: {group.name}", _adjoint(group, settings)) for group in groups),
    ]


def _minima(groups: Sequence[Group]) -> Table:
    columns = [
        Column("Molecule, functional"),
        Column("n", note="Basis functions."),
        Column("L / N", note="Half the squared distance to the Kohn-Sham density per electron; median of the seeds."),
        Column("λ min", note="Of the projected Hessian, in coordinates of the overlap; median, as are the next three."),
        Column("λ max"),
        Column("condition"),
        Column("condition, raw", note="In the coefficients themselves."),
        Column("steps", note="Of preconditioned L-BFGS, the most of a seed."),
        Column("saddles", note="Minimizations that ended at one and began again beside it, all seeds together."),
        Column("finite differences", note="Beside the implicit gradient: relative distance, the worst seed."),
    ]
    rows = [
        [
            group.name,
            str(group.results[0].point.size),
            f"{group.middle(lambda one: one.point.loss):.2g}",
            f"{group.middle(lambda one: one.point.least):.2g}",
            f"{group.middle(lambda one: one.point.largest):.3g}",
            f"{group.middle(lambda one: one.point.condition):.2g}",
            f"{group.middle(lambda one: one.point.raw_condition):.2g}",
            f"{group.worst(lambda one: one.point.steps):.0f}",
            str(sum(one.point.saddles for one in group.results)),
            f"{group.worst(lambda one: one.difference.error):.1e}",
        ]
        for group in groups
    ]
    return Table(columns, rows)


def _nudges(groups: Sequence[Group], settings: MoleculeGradientsConfig) -> Table:
    shown = [i for i, nudge in enumerate(sorted(settings.nudges, reverse=True)) if nudge in (0.1, 1e-2, 1e-3)]
    nudges = sorted(settings.nudges, reverse=True)
    columns = [
        Column("Molecule, functional, form", note="Errors: the worst of the seeds."),
        *(Column(f"β = {nudges[i]:g}", note="Relative to the cotangent's length.") for i in shown),
        Column(
            "slope", note="Of log error over log β, by least squares over falling errors from 1e-6 to 0.01; median."
        ),
        Column("β chosen", note="The error with nudge=None, which is set from the least eigenvalue."),
    ]
    rows = []
    for group in groups:
        for form, label in (("one_sided", "one-sided"), ("symmetric", "symmetric")):

            def error(one: MoleculeResults, place: int, form: str = form) -> float:
                return float(getattr(one.nudged[place], form))

            rows.append(
                [
                    f"{group.name}, {label}",
                    *(f"{max(error(one, i) for one in group.results):.1e}" for i in shown),
                    f"{median(one.slope(form) for one in group.results):.2f}",
                    f"{max(one.automatic[form] for one in group.results):.1e}",
                ]
            )
    return Table(columns, rows)


def _loosened(groups: Sequence[Group], settings: MoleculeGradientsConfig) -> Table:
    weights = sorted(settings.loss_nudges, reverse=True)
    columns = [
        Column("Molecule, functional, tolerance", note="Of the projected gradient's norm, of all three minimizations."),
        *(
            Column(f"weight {weight:g}", note="Of the loss in the energy. The worst of the seeds.")
            for weight in weights
        ),
    ]
    rows = []
    for group in groups:
        for tolerance in sorted(settings.loose, reverse=True):
            cells = []
            for weight in weights:
                errors = [
                    entry.symmetric
                    for one in group.results
                    for entry in one.loosened
                    if (entry.nudge, entry.tolerance) == (weight, tolerance)
                ]
                cells.append(f"{max(errors):.1e}")
            rows.append([f"{group.name}, {tolerance:g}", *cells])
    return Table(columns, rows)


def _beyond(groups: Sequence[Group], settings: MoleculeGradientsConfig) -> Table:
    shares = sorted(settings.beyond)
    columns = [
        Column(
            "Molecule, functional",
            note=f"Relative errors, the median of the seeds; {FAILED}: of so many seeds a minimization did not end at "
            "a minimum.",
        ),
        *(Column(f"{share:g} λ min") for share in shares),
    ]
    rows = []
    for group in groups:
        cells = []
        for place in range(len(shares)):
            entries = [one.beyond[place] for one in group.results]
            failed = sum(entry.status != "CONVERGED" for entry in entries)
            cells.append(f"{median(e.error for e in entries):.1e}" + (f", {FAILED} {failed}" if failed else ""))
        rows.append([group.name, *cells])
    return Table(columns, rows)


def _damped(groups: Sequence[Group], settings: MoleculeGradientsConfig) -> Table:
    weights = sorted(settings.loss_nudges, reverse=True)
    columns = [
        Column("Molecule, functional", note="The worst of the seeds."),
        *(
            Column(f"weight {w:g}", note="Of the whole loss, and the damping: their relative distance.")
            for w in weights
        ),
        *(Column(f"exact, {w:g}", note="The damped gradient's relative error.") for w in weights),
    ]
    rows = [
        [
            group.name,
            *(f"{max(one.damped[i].apart for one in group.results):.1e}" for i in range(len(weights))),
            *(f"{max(one.damped[i].exact for one in group.results):.1e}" for i in range(len(weights))),
        ]
        for group in groups
    ]
    return Table(columns, rows)


def _softened(group: Group, settings: MoleculeGradientsConfig) -> Table:
    factors = sorted(settings.softness, reverse=True)
    columns = [
        Column(
            "Eigenvalue",
            note="Over what it was, of the softest mode that the gradient feels. The gradients: length over that of "
            f"the exact one before, and cosine with it; medians of the seeds. {FAILED}: of so many seeds the backward "
            "pass did not converge, or (implicit, damped) named a saddle.",
        ),
        *(Column(name) for name in ESTIMATORS),
    ]
    rows = []
    for place, factor in enumerate(factors):
        seeds = group.softened(place)
        cells = []
        for name in ESTIMATORS:
            norm, cosine = (
                median(figures) for figures in zip(*((s.norm[name], s.cosine[name]) for s in seeds), strict=True)
            )
            failed = sum(s.status[name] != "CONVERGED" for s in seeds)
            cells.append(f"{norm:.2g}, {cosine:+.2f}" + (f", {FAILED} {failed}" if failed else ""))
        rows.append([f"{factor:g}", *cells])
    return Table(columns, rows)


def _adjoint(group: Group, settings: MoleculeGradientsConfig) -> Table:
    columns = [
        Column(
            "Solver",
            note=f"To a residual of {TOLERANCE:g}, relative; descent for {settings.descent_steps} steps. Medians of "
            "the seeds.",
        )
    ]
    for coordinates in COORDINATES:
        columns += [
            Column(f"products, {coordinates}", note="With the Hessian; not those of assembling the reference."),
            Column(
                f"seconds, {coordinates}", note="CPU time, medians of runs in turn; of long runs, scaled from a part."
            ),
            Column(f"error, {coordinates}", note="Of the solution, relative."),
        ]
    ways = list(group.results[0].adjoint["overlap"])
    rows = []
    for way in ways:
        cells = [way]
        for coordinates in COORDINATES:
            found: list[Solved] = [
                one.adjoint[coordinates][way] for one in group.results if way in one.adjoint[coordinates]
            ]
            if not found:
                cells += ["–"] * 3
                continue
            cells += [
                f"{median(one.products for one in found):.0f}",
                f"{median(one.seconds for one in found):.2g}",
                f"{median(one.error for one in found):.1e}",
            ]
        rows.append(cells)
    return Table(columns, rows)
