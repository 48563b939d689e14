"""The table ``ofdft-single``."""

from __future__ import annotations

import math
from itertools import pairwise
from statistics import median

from torchimplicit.recipes.ofdft_runs import lowered, mean, missing, raw, seconds_to, told
from torchimplicit.recipes.ofdft_single.claims import claims
from torchimplicit.recipes.ofdft_single.config import SingleConfig
from torchimplicit.recipes.ofdft_single.drawings import drawings
from torchimplicit.recipes.ofdft_single.gathered import Row, jobs, name_of, read
from torchimplicit.recipes.orbital_free.history import Results
from torchimplicit.recipes.orbital_free.measure import summarized
from torchimplicit.recipes.reproduce.runner import Reproduction
from torchimplicit.recipes.run import Run
from torchimplicit.recipes.runtime.table import Drawing, Sheet, Summary
from torchimplicit.recipes.tables import Column, Table


def summarize(config: SingleConfig, runs: dict[str, Run]) -> Summary:
    """See :class:`~torchimplicit.recipes.runtime.table.Summary`."""
    rows = read(config, runs)
    drawn: list[Drawing] = drawings(config, rows, runs)
    return Summary(
        title="One molecule by implicit differentiation and by equilibrium propagation",
        source="Slides on fine-tuning density functionals under an electron-number constraint (Adamowicz): implicit "
        "differentiation failed, equilibrium propagation trained a single molecule, slower; no figures. Those here "
        "are ours.",
        protocol=_protocol(config),
        sheets=[Sheet(f"{config.molecule}: loss, time and work", _table(config, rows))] if rows else [],
        claims=claims(config, rows),
        drawings=drawn,
        notes=_notes(config, rows),
        runs={
            name_of(row.estimator, row.optimizer, seed): raw(one) for row in rows for seed, one in row.results.items()
        },
    )


TABLE = Reproduction(jobs, summarize)


def _table(config: SingleConfig, rows: list[Row]) -> Table:
    columns = [
        Column("Gradient; optimizer"),
        Column("Loss at the end", "10⁻³"),
        Column("Over its start"),
        Column("L1 per electron", "", "∫|Δρ|/N at the end"),
        Column(
            f"Time to {config.level:g} of the start",
            "s",
            "of the processor, measurements not counted, mean of the seeds that came there",
        ),
        Column("Time an iteration", "ms", "the median of a run's iterations"),
        Column("Evaluations", "", "of the loss with its gradient, in the whole training"),
        Column("Inner steps", "", "of a minimization that begins at the density found before, mean along training"),
        Column("Backward", "", "products with the Hessian, or gradients of the nudged energies, of one evaluation"),
        Column("Seeds"),
    ]
    lines = []
    for row in rows:
        every = row.every
        lines.append(
            [
                row.label,
                told([one.looks[-1].loss for one in every], 3, 1e3),
                told([lowered(one) for one in every]),
                told([summarized(one.train).l1 for one in every]),
                told([seconds_to(one, config.level) for one in every], 2),
                told([_pace(one) for one in every], 2, 1e3),
                told([one.residuals for one in every], 2),
                told([_along(one, "inner_steps") for one in every], 2),
                told([_along(one, "adjoint") for one in every], 2),
                str(len(every)),
            ]
        )
    first = rows[0].every
    start = [
        told([one.looks[0].loss for one in first], 3, 1e3),
        "1",
        told([summarized(one.start).l1 for one in first]),
    ]
    guess = summarized(first[0].start)
    lines.append(["before training (linear term fitted)", *start, *["–"] * (len(columns) - 4)])
    lines.append(["superposition of atoms (L)", f"{1e3 * guess.guess_loss:.3g}", "–", f"{guess.guess_l1:.3g}"])
    lines[-1] += ["–"] * (len(columns) - 4)
    return Table(columns, lines)


def _along(one: Results, what: str) -> float:
    return mean(getattr(look, what) for look in one.looks)


def _pace(one: Results) -> float:
    """Seconds an iteration, the median: a first step that goes too far takes as long as all others."""
    times = [look.seconds for look in one.looks]
    return median(later - earlier for earlier, later in pairwise(times)) if len(times) > 1 else math.nan


def _protocol(config: SingleConfig) -> str:
    extra = f", and {config.tail_weight:g} times its square over the density" if config.tail_weight else ""
    return (
        f"{config.molecule} at its own geometry, Kohn-Sham density (LDA, def2-SVP) in an even-tempered basis, grid "
        f"level {config.grid}. Thomas-Fermi, von Weizsäcker and LDA, with a network as enhancement factor and a linear "
        f"term that is fitted first. The loss is half the squared density error per electron{extra}, at the density of "
        "least energy, which preconditioned L-BFGS finds to a projected gradient of 1e-8. "
        f"{config.l_bfgs_iterations} iterations of L-BFGS (SciPy's), or {config.adam_iterations} of Adam with a cosine "
        f"from {config.learning_rate:g}; {config.plan.seeds} seeds of the network's weights. Implicit: preconditioned "
        "MINRES to 1e-8. Propagation: the nudge is chosen by the least eigenvalue. Double precision, one thread; times "
        "are the processor's."
    )


def _notes(config: SingleConfig, rows: list[Row]) -> list[str]:
    notes = [
        "The loss contains a small decay of the network's weights, the same in all rows. One-sided propagation "
        "with a curved nudge is damped implicit differentiation; the damping is chosen by the same rule.",
    ]
    rejected = sum(one.rejected for row in rows for one in row.every)
    if rejected:
        notes.append(
            f"{rejected} evaluations met a density that was not found within the budget. L-BFGS begins with a step of "
            "length one, at which that happens: most of a row's time is that one evaluation, the same in all rows."
        )
    asked = config.plan.seeds * len(config.estimators) * len(config.optimizers)
    return notes + missing(asked, sum(len(row.results) for row in rows))
