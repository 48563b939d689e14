"""Table: gradients through a density functional's minimum by several estimators and adjoint solvers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any

from torchimplicit.recipes.density import chemistry as known
from torchimplicit.recipes.density.gradient_figures import (
    FELT,
    LEARNING_RATE,
    SPREAD,
    STATES,
    TOLERANCE,
    WEIZSAECKER,
    MoleculeGradientsConfig,
    MoleculeResults,
    Point,
    Softened,
    State,
)
from torchimplicit.recipes.density.results import PRECISION, labelled
from torchimplicit.recipes.density.settings import MoleculeFiles
from torchimplicit.recipes.runtime import table
from torchimplicit.recipes.runtime.settings import different, from_plain, not_negative, own_first
from torchimplicit.recipes.runtime.table import CaptionedFigure, Cell, Claim, Job, Plan, Runs, TitledTable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from torchimplicit.recipes.runtime.run import Run

FINITE_DIFFERENCES = 1e-6
AUTOMATIC = 1e-3
ILL = 1e3
IDENTITY = 0.025
"""The largest difference seen in a prototype."""

COORDINATES = ("overlap", "raw")
FAILED = "✗"

LINEAR = ("implicit", "damped")
"""Estimators that solve a linear system, which has a solution at a saddle point too."""


@own_first
@dataclass(frozen=True, kw_only=True)
class TableConfig(MoleculeFiles):
    """Gradients through the minimum of a density functional, for several molecules."""

    molecules: tuple[str, ...] = ("H2", "H2O")
    """Molecules, by formula. NH3 and CH4 take minutes longer."""

    sigma: float = 0.04
    """Standard deviation of the nuclei's random displacements, in angstrom. Each seed gives another geometry."""

    plan: Plan = field(default_factory=lambda: Plan(seeds=2))

    def __post_init__(self) -> None:
        super().__post_init__()
        not_negative(self, "sigma")
        different(self, "molecules")


ESTIMATORS = ("implicit", "damped", "one-sided, whole loss", "symmetric")
REFERENCE = "reference Hessian"


@dataclass(frozen=True)
class Group:
    """The seeds of one molecule and one functional."""

    molecule: str
    state: State
    results: list[MoleculeResults]

    @property
    def name(self) -> str:
        return f"{self.molecule}, {self.state}"

    def worst(self, figure: Callable[[MoleculeResults], float]) -> float:
        """The largest over the seeds."""
        return max(figure(one) for one in self.results)

    def middle(self, figure: Callable[[MoleculeResults], float]) -> float:
        """The median over the seeds."""
        return median(figure(one) for one in self.results)

    def softened(self, factor: int) -> list[Softened]:
        """The softened results of every seed, at index ``factor`` of the list of eigenvalues."""
        return [one.softened[factor] for one in self.results]


STEP = 1e-3
"""Step of the finite differences. At three times this (the recipe's own) the fifth derivative is visible where a
functional is stiff; a shorter one would suffer from rounding where the loss is nearly zero, which it is not here."""


def settings_of(config: TableConfig, molecule: str, state: State, seed: int) -> MoleculeGradientsConfig:
    """The settings of a run."""
    return MoleculeGradientsConfig(
        step=STEP,
        molecule=molecule,
        state=state,
        seed=seed,
        sigma=config.sigma,
        grid=config.grid,
        data_dir=config.data_dir,
    )


def usual(config: TableConfig) -> MoleculeGradientsConfig:
    """The settings that all runs share."""
    return settings_of(config, config.molecules[0], "fitted", 0)


def jobs(config: TableConfig) -> list[Job]:
    """All jobs, seed by seed.

    Raises:
        UserError: a molecule is not known.
    """
    for molecule in config.molecules:
        known.named(molecule)
    return [
        Job(
            f"{molecule}-{state}-seed{seed}",
            "ofdft-gradients-molecule",
            settings_of(config, molecule, state, seed),
            {"molecule": molecule, "state": state, "seed": seed},
            recorded=f"{molecule}, {state}, {seed - config.plan.first_seed}",
        )
        for seed in config.plan.all_seeds
        for molecule in config.molecules
        for state in STATES
    ]


def figures(config: TableConfig, run: Run) -> dict[str, Any] | None:
    """All measurements, rounded to five digits."""
    results = table.read("results.json")(config, run)
    return None if results is None else _short(results)


def _short(plain: Any) -> Any:
    """Plain data with figures rounded to five digits."""
    if isinstance(plain, dict):
        return {key: _short(value) for key, value in plain.items()}
    if isinstance(plain, list):
        return [_short(value) for value in plain]
    return float(f"{plain:.5g}") if isinstance(plain, float) else plain


def groups_of(config: TableConfig, runs: Runs) -> list[Group]:
    """The molecules and functionals that have runs."""
    groups = []
    for molecule in config.molecules:
        for state in STATES:
            of_seeds = [
                from_plain(MoleculeResults, line.figures) for line in runs.where(molecule=molecule, state=state)
            ]
            if of_seeds:
                groups.append(Group(molecule, state, of_seeds))
    return groups


# -- sheets ------------------------------------------------------------------------------------------------------------


def sheets(config: TableConfig, runs: Runs) -> Iterator[TitledTable]:
    """All tables; none without runs."""
    groups, settings = groups_of(config, runs), usual(config)
    if groups:
        yield _minima(groups)
        yield from (one(groups, settings) for one in (_nudges, _loosened, _beyond, _damped))
        yield from (_softened(group, settings) for group in groups)
        yield from (_adjoint(group, settings) for group in groups)


def _minima(groups: Sequence[Group]) -> TitledTable:
    def middle(figure: Callable[[Point], float], form: str) -> Callable[[Group], str]:
        return lambda group: format(group.middle(lambda one: figure(one.point)), form)

    return table.sheet("The minima, and finite differences of the loss there", groups, [
        Cell("Molecule, functional", lambda group: group.name),
        Cell("n", lambda group: str(group.results[0].point.size), "", "Basis functions."),
        Cell("L / N", middle(lambda point: point.loss, ".2g"), "",
             "Half the squared distance to the Kohn-Sham density per electron; median of the seeds."),
        Cell("λ min", middle(lambda point: point.least, ".2g"), "",
             "Eigenvalue of the projected Hessian, in the overlap's coordinates; median, as in the next three "
             "columns."),
        Cell("λ max", middle(lambda point: point.largest, ".3g")),
        Cell("condition", middle(lambda point: point.condition, ".2g")),
        Cell("condition, raw", middle(lambda point: point.raw_condition, ".2g"), "",
             "Condition number in the coefficients themselves."),
        Cell("steps", lambda group: f"{group.worst(lambda one: one.point.steps):.0f}", "",
             "Steps of preconditioned L-BFGS, largest over the seeds."),
        Cell("saddles", lambda group: str(sum(one.point.saddles for one in group.results)), "",
             "Minimizations that ended at one and began again beside it, all seeds together."),
        Cell("finite differences", lambda group: f"{group.worst(lambda one: one.difference.error):.1e}", "",
             "Beside the implicit gradient: relative distance, the worst seed."),
    ])  # fmt: skip


def _nudges(groups: Sequence[Group], settings: MoleculeGradientsConfig) -> TitledTable:
    def error(place: int) -> Callable[[tuple[Group, str]], str]:
        return lambda row: f"{row[0].worst(lambda one: float(getattr(one.nudged[place], row[1]))):.1e}"

    rows = [(group, form) for group in groups for form in ("one_sided", "symmetric")]
    return table.sheet("Equilibrium propagation: relative error over the nudge", rows, [
        Cell("Molecule, functional, form", lambda row: f"{row[0].name}, {row[1].replace('_', '-')}", "",
             "Errors: the worst of the seeds."),
        *(
            Cell(f"β = {nudge:g}", error(place), "", "Relative to the cotangent's length.")
            for place, nudge in enumerate(sorted(settings.nudges, reverse=True))
            if nudge in (0.1, 1e-2, 1e-3)
        ),
        Cell("slope", lambda row: f"{row[0].middle(lambda one: one.slope(row[1])):.2f}", "",
             "Slope of log error over log β, by least squares over decreasing errors from 1e-6 to 0.01; median."),
        Cell("β chosen", lambda row: f"{row[0].worst(lambda one: one.automatic[row[1]]):.1e}", "",
             "The error with nudge=None, which is set from the least eigenvalue."),
    ])  # fmt: skip


def _loosened(groups: Sequence[Group], settings: MoleculeGradientsConfig) -> TitledTable:
    def error(weight: float) -> Callable[[tuple[Group, float]], str]:
        return lambda row: f"{row[0].worst(lambda one: one.symmetric(weight, row[1])):.1e}"

    rows = [(group, tolerance) for group in groups for tolerance in sorted(settings.loose, reverse=True)]
    title = "Minimizations that end too early: relative error of the symmetric difference with the whole loss"
    return table.sheet(title, rows, [
        Cell("Molecule, functional, tolerance", lambda row: f"{row[0].name}, {row[1]:g}", "",
             "Tolerance on the projected gradient's norm, in all three minimizations."),
        *(
            Cell(f"weight {weight:g}", error(weight), "", "Weight of the loss in the energy. Worst over the seeds.")
            for weight in sorted(settings.loss_nudges, reverse=True)
        ),
    ])  # fmt: skip


def _beyond(groups: Sequence[Group], settings: MoleculeGradientsConfig) -> TitledTable:
    def error(place: int) -> Callable[[Group], str]:
        def of(group: Group) -> str:
            entries = [one.beyond[place] for one in group.results]
            return f"{median(one.error for one in entries):.1e}{failed(one.status for one in entries)}"

        return of

    return table.sheet("The weight of the loss over the least eigenvalue: the symmetric difference", groups, [
        Cell("Molecule, functional", lambda group: group.name, "",
             f"Relative errors, the median of the seeds; {FAILED}: of so many seeds a minimization did not end at a "
             "minimum."),
        *(Cell(f"{share:g} λ min", error(place)) for place, share in enumerate(sorted(settings.beyond))),
    ])  # fmt: skip


def _damped(groups: Sequence[Group], settings: MoleculeGradientsConfig) -> TitledTable:
    def worst(place: int, what: str) -> Callable[[Group], str]:
        return lambda group: f"{group.worst(lambda one: float(getattr(one.damped[place], what))):.1e}"

    weights = list(enumerate(sorted(settings.loss_nudges, reverse=True)))
    both = "Relative distance of the two gradients, with the whole loss and with damping."
    return table.sheet("One-sided propagation beside damped implicit differentiation", groups, [
        Cell("Molecule, functional", lambda group: group.name, "", "The worst of the seeds."),
        *(Cell(f"weight {weight:g}", worst(place, "apart"), "", both) for place, weight in weights),
        *(
            Cell(f"exact, {weight:g}", worst(place, "exact"), "", "The damped gradient's relative error.")
            for place, weight in weights
        ),
    ])  # fmt: skip


def _softened(group: Group, settings: MoleculeGradientsConfig) -> TitledTable:
    def gradient(name: str) -> Callable[[tuple[int, float]], str]:
        def of(row: tuple[int, float]) -> str:
            seeds = group.softened(row[0])
            norm, cosine = median(one.norm[name] for one in seeds), median(one.cosine[name] for one in seeds)
            return f"{norm:.2g}, {cosine:+.2f}{failed(one.status[name] for one in seeds)}"

        return of

    rows = list(enumerate(sorted(settings.softness, reverse=True)))
    return table.sheet(f"As the softest eigenvalue goes to zero: {group.name}", rows, [
        Cell("Eigenvalue", lambda row: f"{row[1]:g}", "",
             "Over what it was, of the softest mode that the gradient feels. The gradients: length over that of the "
             f"exact one before, and cosine with it; medians of the seeds. {FAILED}: of so many seeds the backward "
             "pass did not converge, or (implicit, damped) named a saddle."),
        *(Cell(name, gradient(name)) for name in ESTIMATORS),
    ])  # fmt: skip


def _adjoint(group: Group, settings: MoleculeGradientsConfig) -> TitledTable:
    def middle(coordinates: str, what: str, form: str) -> Callable[[str], str]:
        def of(way: str) -> str:
            values = [one.adjoint[coordinates][way] for one in group.results if way in one.adjoint[coordinates]]
            return format(median(getattr(one, what) for one in values), form) if values else table.NONE

        return of

    cells = [
        Cell[str]("Solver", lambda way: way, "",
                  f"To a residual of {TOLERANCE:g}, relative; descent for {settings.descent_steps} steps. Medians of "
                  "the seeds.")
    ]  # fmt: skip
    for coordinates in COORDINATES:
        cells += [
            Cell(f"products, {coordinates}", middle(coordinates, "products", ".0f"), "",
                 "Products with the Hessian, without those for assembling the reference."),
            Cell(f"seconds, {coordinates}", middle(coordinates, "seconds", ".2g"), "",
                 "CPU time, medians of runs in turn; of long runs, scaled from a part."),
            Cell(f"error, {coordinates}", middle(coordinates, "error", ".1e"), "", "Relative error of the solution."),
        ]  # fmt: skip
    return table.sheet(f"The adjoint system: {group.name}", group.results[0].adjoint["overlap"], cells)


def failed(statuses: Iterable[str]) -> str:
    """A mark with the number of seeds that did not converge; empty if there are none."""
    count = sum(status != "CONVERGED" for status in statuses)
    return f", {FAILED} {count}" if count else ""


# -- claims ------------------------------------------------------------------------------------------------------------


def claims(config: TableConfig, runs: Runs) -> Iterator[Claim]:
    """All claims; none without runs."""
    groups, settings = groups_of(config, runs), usual(config)
    if every := [one for group in groups for one in group.results]:
        yield from _exact_claims(every)
        yield from _propagated_claims(every)
        yield from _softened_claims(every, settings)
        yield from _solved_claims(every)


def _exact_claims(every: Sequence[MoleculeResults]) -> Iterator[Claim]:
    worst = max(one.difference.error for one in every)
    yield Claim(
        f"Finite differences of the loss agree with the implicit gradient to {FINITE_DIFFERENCES:g}",
        f"at worst {worst:.1e}, over {len(every)} minima",
        worst < FINITE_DIFFERENCES,
    )


def _propagated_claims(every: Sequence[MoleculeResults]) -> Iterator[Claim]:
    one_sided, symmetric = ([one.slope(form) for one in every] for form in ("one_sided", "symmetric"))
    yield Claim(
        "The error of one-sided propagation is of first order in the nudge, that of the symmetric one of second: "
        "slopes 1 and 2, to 0.2",
        f"{between(one_sided, '.2f')}, and {between(symmetric, '.2f')}",
        all(abs(s - 1) < 0.2 for s in one_sided) and all(abs(s - 2) < 0.2 for s in symmetric),
    )
    chosen = max(one.automatic["symmetric"] for one in every)
    yield Claim(
        f"With the nudge that it chooses, symmetric propagation is within {AUTOMATIC:g} of the exact gradient",
        f"at worst {chosen:.1e}",
        chosen < AUTOMATIC,
    )
    early, late = ([one.symmetric(1e-4, tolerance) for one in every] for tolerance in (1e-4, 1e-8))
    yield Claim(
        "With a weight of 1e-4, minimizing to 1e-4 spoils the gradient (more than half of it is wrong) and "
        "minimizing to 1e-8 does not (less than 5 %)",
        f"errors from {between(early, '.2g')}, and from {between(late, '.1e')}",
        min(early) > 0.5 and max(late) < 0.05,
    )
    inside = [entry.error for one in every for entry in one.beyond if entry.share == 0.1]
    outside = [entry for one in every for entry in one.beyond if entry.share >= 2]
    lost = sum(entry.status != "CONVERGED" or entry.error > 0.5 for entry in outside)
    yield Claim(
        "The symmetric difference with the whole loss needs a weight below the least eigenvalue: at a tenth of it "
        "the error is below 10 %, from twice on the gradient is lost (no minimum is found, or half of it is wrong)",
        f"at a tenth {between(inside, '.1e')}; lost in {lost} of {len(outside)}",
        max(inside) < 0.1 and lost == len(outside),
    )
    apart = [entry.apart for one in every for entry in one.damped]
    yield Claim(
        f"One-sided propagation with the whole loss is damped implicit differentiation, to {IDENTITY:.1%} for "
        "weights up to 0.1",
        between(apart, ".1e"),
        max(apart) < IDENTITY,
    )


def _softened_claims(every: Sequence[MoleculeResults], settings: MoleculeGradientsConfig) -> Iterator[Claim]:
    factors = sorted(settings.softness, reverse=True)
    grown = [one.softened[factors.index(1e-3)].norm["implicit"] for one in every]
    yield Claim(
        "As an eigenvalue goes to a thousandth of what it was, the exact gradient grows at least 50 times",
        f"{between(grown, '.0f')} times",
        min(grown) >= 50,
    )
    turned = [one.softened[factors.index(-1e-2)] for one in every]
    flipped = [entry.cosine["implicit"] for entry in turned]
    yield Claim(
        "Where it is slightly negative (-0.01 of what it was), the exact gradient points the other way",
        f"cosines {between(flipped, '.2f')}",
        max(flipped) < 0,
    )
    saddles = sum(entry.status["implicit"] == "SADDLE" for entry in turned)
    yield Claim("There the adjoint solve names the saddle", f"in {saddles} of {len(turned)}", saddles == len(turned))
    above = [one.softened[factors.index(1e-2)].cosine["implicit"] for one in every]
    held = [
        (entry.cosine[way], entry.norm[way], cosine)
        for entry, cosine in zip(turned, above, strict=True)
        for way in ("damped", "one-sided, whole loss")
    ]
    cosines, sizes = [cosine for cosine, _, _ in held], [size for _, size, _ in held]
    yield Claim(
        "There damped differentiation and one-sided propagation keep the direction (a cosine with the gradient "
        "before that is no less than the exact gradient has at +0.01) and a size below 20 times the first, with a "
        f"damping of {settings.damping:g} of the eigenvalue",
        f"cosines {between(cosines, '.2f')}, of the exact gradient at +0.01 {between(above, '.2f')}; "
        f"sizes up to {max(sizes):.2g}",
        all(c > 0 and c > exact - 0.01 and n < 20 for c, n, exact in held),
    )
    below = [entry for one in every for entry in one.softened if entry.eigenvalue < 0]
    lost = sum(entry.status["symmetric"] != "CONVERGED" for entry in below)
    yield Claim("At a saddle symmetric propagation finds no minimum", f"in {lost} of {len(below)}", lost == len(below))


def _solved_claims(every: Sequence[MoleculeResults]) -> Iterator[Claim]:
    descents = ("gradient descent, least squares", "Adam, least squares")
    if ill := [one for one in every if one.point.raw_condition > ILL]:
        errors = {way: [one.adjoint["raw"][way].error for one in ill] for way in descents}
        yield Claim(
            f"In raw coordinates, where the condition is above {ILL:g}, the slides' least-squares form is not "
            "solved in 2000 steps by gradient descent or by Adam (errors above 10 %)",
            "; ".join(f"{way.split(',')[0]} {between(e, '.2g')}" for way, e in errors.items()),
            min(map(min, errors.values())) > 0.1,
        )
    for method in ("CG", "MINRES"):
        reference = [one.adjoint["overlap"][f"{method}, {REFERENCE}"] for one in every]
        plain = median(one.adjoint["raw"][method].products for one in every)
        most, error = max(one.products for one in reference), max(one.error for one in reference)
        yield Claim(
            f"{method} with the reference Hessian solves all of them to 1e-6 within 40 products",
            f"at most {most:.0f} products, errors up to {error:.1e}; in raw coordinates without it {plain:.0f} "
            "products (median)",
            most <= 40 and error < 1e-6,
        )


def between(values: Sequence[float], form: str) -> str:
    """The least and the largest."""
    return f"{min(values):{form}} to {max(values):{form}}"


def protocol(config: TableConfig, runs: Runs) -> str:
    """Describe what was run, and how the figures were selected."""
    settings = usual(config)
    functionals = "; ".join(
        f"{state}: {WEIZSAECKER[state]:g} times the von Weizsäcker energy, last layer of deviation {SPREAD[state]:g}"
        + (f", then {settings.training_steps} steps of Adam at {LEARNING_RATE:g}" if state == "trained" else "")
        for state in STATES
    )
    return (
        f"{', '.join(config.molecules)} with nuclei displaced at random by {config.sigma:g} angstrom, another geometry "
        f"and other weights for each of {config.plan.seeds} seeds; {labelled(config.grid)}. Thomas-Fermi, von "
        f"Weizsäcker and LDA with a network as enhancement factor and a linear term that is fitted; {functionals}. The "
        "loss is half the squared distance to the Kohn-Sham density; gradients are in all parameters. Minimizations: "
        "L-BFGS, preconditioned by a reference Hessian, in coordinates of the overlap, to a projected gradient of "
        f"{settings.tolerance:g}. The exact gradient: implicit, by the dense adjoint system. {PRECISION}"
    )


def notes(config: TableConfig, runs: Runs) -> Iterator[str]:
    """Caveats for the reader."""
    yield from (
        "An eigenvalue is moved by taking half its change times the squared coordinate along its eigenvector off the "
        "energy: the point stays stationary, the rest of the spectrum what it is, and the gradient before is what the "
        f"others are compared with. The mode is the softest that carries at least {FELT:.0%} of the gradient: symmetry "
        "hides others from the loss.",
        "The adjoint solve names a saddle by the inertia of the assembled Hessian; MINRES does where one of its "
        "residuals is a direction of negative curvature.",
        "Propagation with the whole loss is one-sided propagation with curved=True; damping and weight are the same "
        "number. Beyond its reach (a negative eigenvalue near the damping) the nudged density leaves the region where "
        "the energy is quadratic, which the damped linear system does not know.",
        "The reference Hessian is the one that preconditioned the minimization, made near its start (anew, where one "
        "takes over 25 steps): its n products are not counted again. It exists in coordinates of the overlap, in which "
        "the minimization runs.",
        "Gradient descent takes the largest safe step, one over the largest eigenvalue's square; Adam's rate is the "
        "best of three by the final error, which favours it.",
    )
    if saddles := sum(result.point.saddles for group in groups_of(config, runs) for result in group.results):
        yield (
            f"{saddles} minimizations ended at a saddle, with a projected gradient below the tolerance, and began "
            "again a little off it: L-BFGS from a symmetric start keeps the symmetry."
        )
    yield from table.missing(jobs(config), runs, "Not measured")


# -- figures -----------------------------------------------------------------------------------------------------------


def drawings(config: TableConfig, runs: Runs, folders: Mapping[str, Run]) -> Iterator[CaptionedFigure]:
    """All figures; none without runs."""
    groups, settings = groups_of(config, runs), usual(config)
    if groups:
        yield _nudges_figure(groups, settings)
        yield _softened_figure(groups[-1], settings)
        yield _adjoint_figure(groups[-1], settings)


def _nudges_figure(groups: Sequence[Group], settings: MoleculeGradientsConfig) -> CaptionedFigure:
    nudges = sorted(settings.nudges, reverse=True)
    from torchimplicit.recipes.runtime.page import axes, style

    figure, panels = axes(2, width=4.6)
    for panel, form, order in zip(panels, ("one_sided", "symmetric"), (1, 2), strict=True):
        for index, group in enumerate(groups):
            errors = [median(getattr(one.nudged[place], form) for one in group.results) for place in range(len(nudges))]
            panel.plot(nudges, errors, label=group.name, **style(index))
        low, high = nudges[-2], nudges[1]
        anchor = min(median(getattr(one.nudged[1], form) for one in group.results) for group in groups) / 3
        panel.plot([low, high], [anchor * (low / high) ** order, anchor], ":", color="#6b7280", label=f"slope {order}")
        panel.set(xscale="log", yscale="log", xlabel="nudge β, relative to the cotangent's length")
        panel.set_title(form.replace("_", "-"))
        panel.legend()
    panels[0].set_ylabel("relative error of the gradient")
    return CaptionedFigure(
        "error-over-nudge",
        figure,
        "The error of equilibrium propagation beside the exact gradient, over the nudge; medians of the seeds. Where "
        "it flattens or rises again for the smallest nudges, the tolerance of the minimizations shows.",
    )


def _softened_figure(group: Group, settings: MoleculeGradientsConfig) -> CaptionedFigure:
    factors = sorted(settings.softness, reverse=True)
    places = range(len(factors))
    from torchimplicit.recipes.runtime.page import axes, style

    figure, (size, direction) = axes(2, width=4.6, height=4.1)
    for index, name in enumerate(ESTIMATORS):
        points = [group.softened(place) for place in places]
        failed = [
            place
            for place, seeds in zip(places, points, strict=True)
            if name not in LINEAR and any(s.status[name] != "CONVERGED" for s in seeds)
        ]
        for panel, figure_of in ((size, "norm"), (direction, "cosine")):
            values = [median(getattr(s, figure_of)[name] for s in seeds) for seeds in points]
            panel.plot(places, values, label=name, **style(index))
            hollow = {**style(index), "linestyle": "", "markerfacecolor": "white"}
            panel.plot(failed, [values[place] for place in failed], **hollow, zorder=3)
    for panel in (size, direction):
        panel.set_xticks(list(places), [f"{factor:g}" for factor in factors], rotation=60)
        panel.set_xlabel("softest eigenvalue, over what it was")
        panel.axvline(sum(factor > 0 for factor in factors) - 0.5, color="#9aa3af", linewidth=0.9)
    size.set(yscale="log", ylabel="length, over the exact one before")
    size.set_ylim(bottom=0.3)
    direction.set(ylabel="cosine with the exact gradient before", ylim=(-1.05, 1.05))
    _legend(figure)
    return CaptionedFigure(
        "soft-mode",
        figure,
        f"{group.name}: the gradients as the softest eigenvalue that they feel goes to zero (the line) and below; "
        f"medians of the seeds. Damping: {settings.damping:g} of the eigenvalue. Hollow: a "
        f"minimization of a seed did not converge in {settings.most_steps} steps, and its best point is what counts; "
        "lengths below the axis are zero.",
    )


def _adjoint_figure(group: Group, settings: MoleculeGradientsConfig) -> CaptionedFigure:
    from torchimplicit.recipes.runtime.page import axes

    figure, panels = axes(2, width=5.2, height=4.3)
    one = group.results[0]
    ways = list(one.adjoint["overlap"])
    for panel, coordinates in zip(panels, ("overlap", "raw"), strict=True):
        for index, way in enumerate(ways):
            solved = one.adjoint[coordinates].get(way)
            if solved is not None:
                panel.plot(*zip(*solved.trace, strict=True), label=way, **_look(index))
        panel.set(xscale="log", yscale="log", xlabel="products with the Hessian", ylim=(1e-15, 30))
        panel.set_title("coordinates of the overlap" if coordinates == "overlap" else "raw coefficients")
    panels[0].set_ylabel("relative error of the solution")
    _legend(figure)
    return CaptionedFigure(
        "adjoint-over-products",
        figure,
        f"{group.name}, first seed: the error of the adjoint system's solution over the products with the Hessian. The "
        "dense solution is a point at n products; Adam's rate is the best of three.",
    )


def _look(index: int) -> dict[str, Any]:
    """The look of one of the first eight solvers, and another one for all others."""
    from torchimplicit.recipes.runtime.page import LINES, MARKERS, style

    return style(index) if index < len(MARKERS) else {**style(index), "marker": "*<>"[index % 3], "linestyle": LINES[3]}


def _legend(figure: Figure) -> None:
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8)


TABLE = table.published(
    globals(),
    "Gradients through the minimum of a density functional",
    "Slides on fine-tuning density functionals under an electron-number constraint (Adamowicz), which "
    "report that the adjoint solve failed, without figures; the figures here are ours.",
)
