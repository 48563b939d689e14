"""The table: its runs, and what they come to."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from torchimplicit.recipes.images.cost import CONVERGED, Cost, evaluations, read
from torchimplicit.recipes.images.cost import table as cost_table
from torchimplicit.recipes.phantom_ablation.config import PhantomAblationConfig
from torchimplicit.recipes.phantom_ablation.drawing import drawings
from torchimplicit.recipes.phantom_ablation.rows import (
    ADAM_RATE,
    CONTROL,
    COST,
    IMPLICIT,
    NPG,
    SWEEP,
    TABLE_1,
    UPG,
    Row,
    jobs,
    named,
    training,
)
from torchimplicit.recipes.plain import to_plain
from torchimplicit.recipes.reproduce.runner import Reproduction
from torchimplicit.recipes.run import Run
from torchimplicit.recipes.runtime.table import Claim, Sheet, Summary, spread
from torchimplicit.recipes.tables import Column, Table
from torchimplicit.recipes.training.results import Results


@dataclass(frozen=True)
class Measured:
    """The runs that are there.

    Attributes:
        rows: of each row, the results by seed.
        cost: of a step with each estimator; empty where it was not measured.
    """

    rows: dict[str, dict[int, Results]]
    cost: dict[str, Cost]

    def accuracies(self, row: str) -> list[float]:
        """Of the test images, in %, of the runs that came to their end."""
        return [100 * one.test.figures["accuracy"] for one in self.rows[row].values() if one.test is not None]

    def cost_of(self, row: str, figure: str, digits: int, scale: float = 1.0) -> str:
        """A figure of :class:`StepCosts`, as a cell: its mean over the seeds, or a dash."""
        values = [getattr(one.costs, figure) for one in self.rows[row].values() if one.costs is not None]
        return f"{scale * fmean(values):.{digits}f}" if values else "–"


def summarize(config: PhantomAblationConfig, runs: dict[str, Run]) -> Summary:
    """See :class:`~torchimplicit.recipes.runtime.table.Summary`."""
    found = Measured(
        {
            name: {
                seed: Results.of(runs[named(name, seed)])
                for seed in config.plan.all_seeds
                if named(name, seed) in runs and (runs[named(name, seed)].path / "results.json").is_file()
            }
            for name in (*TABLE_1, *SWEEP)
        },
        read(runs[COST]) if COST in runs and (runs[COST].path / "costs.json").is_file() else {},
    )
    sheets = [Sheet("Table 1", _accuracy_table(found)), Sheet("Sweep over k and λ (Fig. 3)", _sweep_table(found))]
    if found.cost:
        sheets.insert(1, Sheet("A training step, by gradient, at the same trained weights", cost_table(found.cost)))
    return Summary(
        title="An image classifier trained with implicit and with phantom gradients",
        source="Geng et al. 2021, On Training Implicit Models (arXiv 2111.05177), table 1 and figure 3",
        protocol=_protocol(config),
        sheets=sheets,
        claims=_claims(found),
        drawings=drawings(found.rows, {**TABLE_1, **SWEEP}, found.cost),
        notes=_notes(config, found),
        runs={
            **{named(name, seed): _figures(one) for name, by in found.rows.items() for seed, one in by.items()},
            **({COST: to_plain(found.cost)} if found.cost else {}),
        },
    )


def _figures(one: Results) -> dict[str, Any]:
    """Of one run, for the record."""
    return {
        "state": one.state,
        "test": None if one.test is None else one.test.figures,
        "best": None if one.best is None else {"step": one.best.step, **one.best.figures},
        "costs": to_plain(one.costs),
        "seconds": one.seconds,
        "validations": [{"step": v.step, "seconds": v.seconds, **v.figures} for v in one.validations],
    }


def _accuracy_table(found: Measured) -> Table:
    columns = [
        Column("Training"),
        Column(
            "Accuracy",
            "%",
            "Of the test images; the weights are those of the best validation. Mean ± deviation over seeds.",
        ),
        Column("Published", "%", "Of MDEQ-Tiny after 50 epochs on all of CIFAR-10 (the best epoch on the test set)."),
        Column("Forward", "evaluations", "Of the cell a step, after pretraining."),
        Column("Backward", "products", "With the cell's Jacobian a step, after pretraining."),
        Column("At budget", "%", "Samples whose forward solve was stopped by its budget."),
        Column("Step", "s", "Wall seconds, medians; the machine was shared, so see the table of costs for ratios."),
        Column("Runs", "", "Finished, of those begun."),
    ]
    return Table(columns, [_accuracy_row(found, name, row) for name, row in TABLE_1.items()])


def _accuracy_row(found: Measured, name: str, row: Row) -> list[str]:
    return [
        row.label,
        spread(found.accuracies(name)),
        "–" if row.published is None else "{:.1f} ± {:.1f}".format(*row.published),
        found.cost_of(name, "forward", 1),
        found.cost_of(name, "backward", 1),
        found.cost_of(name, "unconverged", 0, scale=100),
        found.cost_of(name, "seconds", 2),
        f"{len(found.accuracies(name))} of {len(found.rows[name])}",
    ]


def _sweep_table(found: Measured) -> Table:
    columns = [
        Column("Gradient"),
        Column("Accuracy", "%", "As above."),
        Column("Forward", "evaluations", "As above."),
        Column("Backward", "products", "As above."),
    ]
    points = {UPG: TABLE_1[UPG], **SWEEP}
    order = sorted(points, key=lambda name: (points[name].damping, points[name].steps))
    rows = [
        [
            points[name].label.removesuffix(": SGD"),
            spread(found.accuracies(name)),
            found.cost_of(name, "forward", 1),
            found.cost_of(name, "backward", 1),
        ]
        for name in order
    ]
    return Table(columns, rows)


def _claims(found: Measured) -> list[Claim]:
    claims = []
    for name, other in ((UPG, IMPLICIT), (NPG, IMPLICIT), (UPG, CONTROL)):
        ours, theirs = found.accuracies(name), found.accuracies(other)
        if ours and theirs:
            margin = max((stdev(values) for values in (ours, theirs) if len(values) > 1), default=0.0)
            claims.append(
                Claim(
                    f"{TABLE_1[name].label}: as accurate as {TABLE_1[other].label}, or more, within one deviation",
                    f"{spread(ours)} % and {spread(theirs)} %",
                    fmean(ours) >= fmean(theirs) - margin,
                )
            )
    with_it, without = found.accuracies(IMPLICIT), found.accuracies("implicit-nopre")
    if with_it and without:
        claims.append(
            Claim(
                "Implicit training loses accuracy without pretraining",
                f"{spread(with_it)} % with and {spread(without)} % without",
                fmean(without) < fmean(with_it),
            )
        )
    if not found.cost:
        return claims
    converged, implicit, phantom = (found.cost[name] for name in (CONVERGED, "implicit", "UPG(5, 0.5)"))
    evaluation_ratio = evaluations(converged) / evaluations(phantom)
    step_ratio = implicit.seconds / phantom.seconds
    return [
        *claims,
        Claim(
            "The backward pass of UPG(5, 0.5) takes at least 12 times fewer evaluations than a converged implicit one",
            f"{evaluations(phantom):.0f} instead of {evaluations(converged):.0f} evaluations, {evaluation_ratio:.1f} "
            f"times fewer; {converged.backward_seconds / phantom.backward_seconds:.1f} times less time",
            evaluation_ratio >= 12,
        ),
        Claim(
            "A whole step with UPG(5, 0.5) is at least 1.4 times as fast as an implicit one with the paper's budgets",
            f"{step_ratio:.2f} times",
            step_ratio >= 1.4,
        ),
    ]


def _protocol(config: PhantomAblationConfig) -> str:
    one = training(config, TABLE_1[IMPLICIT], config.plan.first_seed)
    chosen, equilibria = one.optimization, one.equilibria
    amount = f"{one.train_images or 'all other'} training images of {one.data}, {one.validation_images} set apart"
    return (
        f"MDEQ {one.model}, {amount}; the weights of the best validation are tested on "
        f"{one.test_images or 'all'} test images; {config.plan.seeds} seeds. {chosen.steps} steps of "
        f"{chosen.batch_size}, cosine; Adam {ADAM_RATE[config.plan.scale]:g} with weight decay 2.5e-6, or SGD 0.1 with "
        f"Nesterov momentum 0.9 and weight decay 1e-4. Forward: Broyden, at most {equilibria.solver_steps} steps; "
        f"implicit backward: GMRES, at most {equilibria.backward_steps} steps, both to a relative residual of "
        f"{equilibria.tolerance:g}. Pretraining: {equilibria.pretrain_steps} of the steps, with "
        f"{equilibria.pretrain_depth} weight-tied applications unrolled. "
        f"Dropout {one.dropout:g} where a row has it."
    )


def _notes(config: PhantomAblationConfig, found: Measured) -> list[str]:
    notes = [
        "The published table has no row with the phantom rows' settings and the exact gradient; 'Implicit: SGD' is "
        "ours, and tells apart what the gradient does from what the other settings do.",
        "The published accuracies were selected on the test set, ours on a validation split.",
        "Broyden's method in the backward pass is replaced by GMRES, whose residual never grows; evaluations are "
        "counted per sample, and samples that have converged cost nothing more.",
    ]
    if config.plan.scale == "cpu":
        notes.insert(
            0,
            "A small model, few steps and another data set than the paper's CIFAR-10: rows compare among themselves. "
            "Adam's rate is higher than the paper's 0.001, which learns too slowly for so few steps; it was chosen on "
            "a validation split of CIFAR-10, by one run of each.",
        )
    if found.cost:
        needed = evaluations(found.cost[CONVERGED])
        notes.append(
            "For A(5, 0.5) to be 12 times as cheap, the converged backward pass must take 60 evaluations; on this "
            f"model GMRES converges in {needed:.0f}. The applications that UPG unrolls count as forward evaluations."
        )
    states = {named(name, seed): one.state for name, by in found.rows.items() for seed, one in by.items()}
    diverged = [name for name, state in states.items() if state == "diverged"]
    if diverged:
        notes.append(f"Diverged: {', '.join(diverged)}.")
    return notes


TABLE = Reproduction(jobs, summarize)
