"""The table ``ofdft-stability``."""

from __future__ import annotations

import math
from statistics import fmean

from torchimplicit.recipes.ofdft_runs import lowered, missing, raw, told
from torchimplicit.recipes.ofdft_stability.claims import claims
from torchimplicit.recipes.ofdft_stability.config import StabilityConfig
from torchimplicit.recipes.ofdft_stability.drawings import drawings
from torchimplicit.recipes.ofdft_stability.growth import at_end, hardest, own, softest, steps
from torchimplicit.recipes.ofdft_stability.rows import CORRECTED, DECAY, INNER_STEPS, PENALTY, Row, jobs, name_of, read
from torchimplicit.recipes.orbital_free.measure import Quality
from torchimplicit.recipes.reproduce.runner import Reproduction
from torchimplicit.recipes.run import Run
from torchimplicit.recipes.runtime.table import Sheet, Summary
from torchimplicit.recipes.tables import Column, Table


def summarize(config: StabilityConfig, runs: dict[str, Run]) -> Summary:
    """See :class:`~torchimplicit.recipes.runtime.table.Summary`."""
    rows = read(config, runs)
    return Summary(
        title="How hard a density is to find while its functional is trained",
        source="Slides on fine-tuning density functionals under an electron-number constraint (Adamowicz): with many "
        "molecules the search takes longer and longer, and fixed-point correction helps but may cost performance; no "
        "figures. Those here are ours.",
        protocol=_protocol(config),
        sheets=[Sheet("Along training", _along(rows)), Sheet("Both ways, before and after", _both(rows))]
        if rows
        else [],
        claims=claims(rows),
        drawings=drawings(rows),
        notes=_notes(config, rows),
        runs={
            name_of(row.name, seed): {
                **raw(one),
                "growth": _finite(own(one)),
                "least": _finite(softest(one)),
                "largest": _finite(hardest(one)),
            }
            for row in rows
            for seed, one in row.results.items()
        },
    )


TABLE = Reproduction(jobs, summarize)


def _along(rows: list[Row]) -> Table:
    columns = [
        Column("Densities found by; help"),
        Column("Growth", "", "steps of a minimization, the most that were counted along training over the start"),
        Column("Least eigenvalue", "hartree", "the least along training, of the Hessian on the constraint"),
        Column("Largest", "hartree", "the largest along training"),
        Column("Loss", "", "at the end over its start, the penalties included"),
        Column("Not found", "", "of the evaluations of the loss, those with a density not found within the budget"),
        Column("Time", "s", "of the processor"),
        Column("Seeds"),
    ]
    return Table(
        columns,
        [
            [
                row.label,
                _many([own(one) for one in row.results.values()]),
                told([softest(one) for one in row.results.values()], 2),
                told([hardest(one) for one in row.results.values()], 3),
                told([lowered(one) for one in row.results.values()], 2),
                f"{sum(one.rejected for one in row.results.values())} of "
                f"{sum(one.residuals for one in row.results.values())}",
                told([one.seconds for one in row.results.values()], 2),
                str(len(row.results)),
            ]
            for row in rows
        ],
    )


def _both(rows: list[Row]) -> Table:
    columns = [
        Column("Trained with; help"),
        Column("Descent, before", "steps", "to 1e-4, from the superposition of atoms, mean of the molecules"),
        Column("Descent, after", "steps"),
        Column("Descent, ratio"),
        Column("Its L", "", "after training, over L of what L-BFGS finds: 1 where both find the same density"),
        Column("L-BFGS, before", "steps", "to 1e-8, the Hessian of the superposition as preconditioner"),
        Column("L-BFGS, after", "steps"),
        Column("L-BFGS, ratio"),
    ]
    lines = []
    for row in rows:
        counts, ratios = list(row.counted.values()), at_end(row)
        lines.append(
            [
                row.label,
                _mean([one.descent_before for one in counts]),
                _mean([one.descent_after for one in counts]),
                _many([descent for descent, _ in ratios]),
                told([_losses(one.descent_after) / _losses(one.l_bfgs_after) for one in counts], 3),
                _mean([one.l_bfgs_before for one in counts]),
                _mean([one.l_bfgs_after for one in counts]),
                _many([quick for _, quick in ratios]),
            ]
        )
    return Table(columns, lines)


def _losses(found: list[Quality]) -> float:
    return fmean(one.loss for one in found)


def _mean(found: list[list[Quality]]) -> str:
    return _many([steps(one) for one in found])


def _many(values: list[float]) -> str:
    """With those that are infinite."""
    if any(math.isinf(value) for value in values):
        return f"not found ({sum(math.isinf(value) for value in values)} of {len(values)})"
    return told(values, 3)


def _finite(value: float) -> float | None:
    return float(f"{value:.5g}") if math.isfinite(value) else None


def _protocol(config: StabilityConfig) -> str:
    how = {
        "least-squares": "Gauss-Newton (SciPy's trust region) with exact Jacobians",
        "l-bfgs": "L-BFGS (SciPy's) with exact implicit gradients",
        "adam": f"Adam from {config.learning_rate:g} with a cosine and exact implicit gradients",
    }[config.optimizer]
    return (
        f"{', '.join(config.molecules)}; Kohn-Sham densities (LDA, def2-SVP) in an even-tempered basis, grid level "
        f"{config.grid}. Thomas-Fermi, {config.weizsaecker:g} of von Weizsäcker's energy, LDA, a network as "
        f"enhancement factor and a linear term fitted first; ∫ρ₋² weighs {config.penalty:g}. {config.iterations} "
        f"iterations of {how}, {config.plan.seeds} seeds. Every {config.measure_every} iterations all densities are "
        "found from the superposition of atoms and the steps are counted. Gradient descent as in the slides: rate "
        f"3e-3, momentum 0.9, to 1e-4, at most 10,000 steps ({config.descent_steps} in training by it); L-BFGS: to "
        f"1e-8, with the Hessian of the start as preconditioner, at most {INNER_STEPS} steps in training. There a "
        "search begins at the density found last, and its Hessian is made anew after more than 15 steps; in the rows "
        f"with fixed-point correction, and in one that is for comparison, at the superposition. The correction: "
        f"{CORRECTED} iterates more in the loss, weights 0.8 to the power of their distance. Penalties: "
        + (
            ""
            if config.optimizer == "least-squares"
            else f"{config.hessian_weight:g} times the Hessian's mean square (along random vectors), "
        )
        + f"{config.floor_weight:g} times the square of what a least eigenvalue lacks of {config.floor:g}, relative to "
        f"it; {PENALTY:g} times ∫ρ₋² in the energy. The network's weights decay only in the row that tries it, by "
        f"{DECAY:g} times half their squares."
    )


def _notes(config: StabilityConfig, rows: list[Row]) -> list[str]:
    notes = [
        "A count always begins at the superposition of atoms, so that what the training had found before does not "
        "help; the steps during training itself, from the density before, are fewer.",
        "Both ways run in coordinates of the overlap, in which the Hessian is far better conditioned than in those of "
        "the raw coefficients. Descent with momentum 0.9 takes a number of steps that hardly depends on the least "
        "eigenvalue as long as that is above (1 − √0.9)²/rate, some 0.9 hartree; only below does it slow down.",
    ]
    if config.optimizer == "least-squares":
        notes.append(
            "Gauss-Newton cannot take what is drawn at random in every evaluation: fixed-point correction at random "
            "iterates and the penalty on the Hessian are rows of --optimizer l-bfgs and adam."
        )
    return notes + missing(len(jobs(config)), sum(len(row.results) for row in rows))
