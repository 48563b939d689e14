"""The table: what its runs come to."""

from __future__ import annotations

from statistics import median

import numpy as np

from torchimplicit.recipes.physics.config import EquationName
from torchimplicit.recipes.physics.equations import EQUATIONS
from torchimplicit.recipes.physics.equations.initial_value import InitialValueProblem
from torchimplicit.recipes.physics_informed.claims import claims, notes
from torchimplicit.recipes.physics_informed.config import PhysicsInformedConfig
from torchimplicit.recipes.physics_informed.drawings import MEASURES, against_seconds, solution
from torchimplicit.recipes.physics_informed.jobs import MODELS, OPTIMIZERS, equations, jobs, optimizers, settings_of
from torchimplicit.recipes.physics_informed.read import MEASURE, Found, read
from torchimplicit.recipes.reproduce.runner import Reproduction
from torchimplicit.recipes.run import Run
from torchimplicit.recipes.runtime.table import Drawing, Sheet, Summary
from torchimplicit.recipes.tables import Column, Table


def summarize(config: PhysicsInformedConfig, runs: dict[str, Run]) -> Summary:
    """See :class:`~torchimplicit.recipes.reproduce.runner.Reproduction`."""
    found = read(config, runs)
    there = [equation for equation in equations(config) if found.of(equation)]
    return Summary(
        title="Physics-informed equilibrium models beside plain networks",
        source="Pacheco and Camponogara 2024 (arXiv 2406.03472): the Van der Pol oscillator. Raissi et al. 2019: plain "
        "networks. The other equations are further tests.",
        protocol=protocol(config),
        sheets=[sheet(found, equation) for equation in there],
        claims=claims(config, found),
        drawings=[drawing for equation in there for drawing in drawings(config, found, runs, equation)],
        notes=notes(config, found),
        runs=found.raw,
    )


TABLE = Reproduction(jobs, summarize)


def protocol(config: PhysicsInformedConfig) -> str:
    """What was run, in words."""
    parts = []
    for equation in equations(config):
        chosen = settings_of(config, equation, "equilibrium-5", optimizers(config)[0], 0)
        parts.append(f"{EQUATIONS[equation].title} {chosen.seconds:g} s and {chosen.points} points")
    rate = settings_of(config, equations(config)[0], "equilibrium-5", "adam", 0).learning_rate
    return (
        "Every model and optimizer gets the same time of one processor core, and the same collocation points: "
        f"{'; '.join(parts)}. {config.plan.seeds} seeds each, double precision. Gauss–Newton is SciPy's trust region "
        "(trf) with exact Jacobians, L-BFGS is SciPy's with 30 pairs, both with all points; Adam likewise, learning "
        f"rate {rate:g} with a cosine over the time. Trusted solutions: SciPy's DOP853 to 1e-12, the Cole–Hopf "
        "transform, a closed form. No model has seen them."
    )


def sheet(found: Found, equation: EquationName) -> Sheet:
    """The errors on one equation."""
    measure = MEASURES[MEASURE[equation]]
    other = "relative_l2" if MEASURE[equation] == "iae" else "iae" if _has_iae(found, equation) else None
    columns = [
        Column("Model and optimizer"),
        Column("Weights"),
        Column(measure, "", "median over the seeds"),
        Column("Least–largest"),
        *([Column(MEASURES[other], "", "median")] if other else []),
        Column("Loss", "", "median, at the end"),
        Column("Iterations", "", "median"),
        Column("An iteration", "ms", "of the processor's time, median"),
        Column("Seconds", "s", "median; less than the budget where the optimizer found nothing more to gain"),
        Column("Seeds"),
    ]
    lines = []
    for optimizer in OPTIMIZERS:
        for cell in found.of(equation, optimizer):
            results, errors = list(cell.results.values()), cell.errors()
            lines.append(
                [
                    f"{MODELS[cell.model].label}; {OPTIMIZERS[optimizer]}",
                    str(results[0].parameters),
                    f"{cell.error():.1e}",
                    f"{min(errors):.1e} – {max(errors):.1e}",
                    *([f"{median(cell.errors(other)):.1e}"] if other else []),
                    f"{median(one.loss for one in results):.1e}",
                    f"{median(one.iterations for one in results):.0f}",
                    f"{cell.pace():.1f}",
                    f"{median(one.seconds for one in results):.1f}",
                    str(len(results)),
                ]
            )
    still = constant(equation)
    first = still[MEASURE[equation]]
    row = ["constant (the start, or zero)", "–", f"{first:.1e}", "–", *([f"{still[other]:.1e}"] if other else [])]
    lines.append([*row, *["–"] * (len(columns) - len(row))])
    return Sheet(EQUATIONS[equation].title, Table(columns, lines))


def constant(equation: EquationName) -> dict[str, float]:
    """The errors of a constant: the start of an initial value problem, else zero."""
    stated = EQUATIONS[equation]
    grid = stated.grid()
    value = stated.start if isinstance(stated, InitialValueProblem) else (0.0,) * len(stated.outputs)
    return stated.errors(np.tile(np.array(value), (len(grid), 1)))


def drawings(
    config: PhysicsInformedConfig, found: Found, runs: dict[str, Run], equation: EquationName
) -> list[Drawing]:
    """Solution and error, and the error against time."""
    title = EQUATIONS[equation].title
    made = []
    optimizer = optimizers(config)[0]
    seed = config.plan.first_seed
    if cells := found.of(equation, optimizer):
        shown = solution(cells, runs, seed)
        if shown is not None:
            caption = f"{title}: what was found, and its error; {OPTIMIZERS[optimizer]}, seed {seed}."
            made.append(Drawing(f"{equation}-solution", shown, caption))
    caption = f"{title}: the error along every run, against the processor's time; dashed are the plain networks."
    made.append(Drawing(f"{equation}-seconds", against_seconds(found, equation), caption))
    return made


def _has_iae(found: Found, equation: EquationName) -> bool:
    return any("iae" in one.errors for cell in found.of(equation) for one in cell.results.values())
