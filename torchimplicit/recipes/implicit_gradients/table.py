"""The figure: what its runs come to."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean

from torchimplicit.recipes.fields.cost import FieldCost
from torchimplicit.recipes.fields.cost import read as read_costs
from torchimplicit.recipes.fields.settings import FILTERS, FilterKind
from torchimplicit.recipes.implicit_generalization.rows import NAMES
from torchimplicit.recipes.implicit_gradients.config import GradientsConfig
from torchimplicit.recipes.implicit_gradients.rows import (
    CONVERGED,
    COST,
    Cut,
    Row,
    cuts,
    jobs,
    named,
    pictures,
    rows,
    training,
)
from torchimplicit.recipes.plain import to_plain
from torchimplicit.recipes.plotting import axes, style
from torchimplicit.recipes.reproduce.runner import Reproduction
from torchimplicit.recipes.run import Run
from torchimplicit.recipes.runtime.table import Claim, Drawing, Sheet, Summary, spread
from torchimplicit.recipes.tables import Column, Table
from torchimplicit.recipes.training.results import Results


@dataclass(frozen=True)
class Measured:
    """The runs that are there, by the row's name, the picture and the seed; and the costs of the rows."""

    runs: dict[tuple[str, str, int], Results]
    cost: dict[str, FieldCost]

    def tested(self, row: Row, picture: str | None = None) -> list[float]:
        """The test PSNR of the runs that came to their end."""
        return [
            one.test.figures["PSNR"]
            for (name, own, _), one in self.runs.items()
            if name == row.name and picture in (None, own) and one.test is not None
        ]


def summarize(config: GradientsConfig, runs: dict[str, Run]) -> Summary:
    """See :class:`~torchimplicit.recipes.runtime.table.Summary`."""
    found: dict[tuple[str, str, int], Results] = {}
    for row in rows(config):
        for picture in pictures(config):
            for seed in config.plan.all_seeds:
                run = runs.get(named(row, picture.name, seed))
                if run is not None and (run.path / "results.json").is_file():
                    found[row.name, picture.name, seed] = Results.of(run)
    seen = Measured(found, read_costs(runs[COST]) if COST in runs else {})
    return Summary(
        title="How far the backward pass must go: PSNR over the products in it",
        source="Huang, Bai and Kolter 2021, (Implicit)²: Implicit Layers for Implicit Representations (NeurIPS 2021), "
        "figure 4",
        protocol=_protocol(config),
        sheets=[Sheet(NAMES[name, True], _table(config, seen, name)) for name in FILTERS],
        claims=[claim for name in FILTERS for claim in _claims(seen, name)],
        drawings=_drawings(config, seen),
        notes=_notes(config, seen),
        runs={
            **{
                named_run: {
                    "state": one.state,
                    "test": None if one.test is None else one.test.figures,
                    "best": None if one.best is None else {"step": one.best.step, **one.best.figures},
                    "costs": to_plain(one.costs),
                    "seconds": one.seconds,
                }
                for (name, picture, seed), one in found.items()
                for named_run in [f"{name}-{picture}-seed{seed}"]
            },
            **({COST: to_plain(seen.cost)} if seen.cost else {}),
        },
    )


def _label(cut: Cut) -> str:
    return CONVERGED if cut is None else f"T = {cut}"


def _table(config: GradientsConfig, seen: Measured, name: FilterKind) -> Table:
    columns = [
        Column("Backward", "", "T products with the Jacobian after the incoming gradient; T = 0 is the one-step one."),
        *(Column(one.name, "dB", "Test PSNR; ± deviation over seeds.") for one in pictures(config)),
        Column("Step", "ms", "CPU time (wall time on a GPU), medians, measured in turn at weights of 40 steps."),
        Column("Backward pass", "ms", "Likewise."),
        Column("Products", "", "With the Jacobian in a step."),
        Column("Cosine", "", "Of the gradient in all weights to the exact one, at those weights."),
        Column("Norm", "", "Of the gradient over that of the exact one."),
    ]
    lines = []
    for cut in cuts(config):
        row = Row(filter=name, products=cut)
        cost = seen.cost.get(row.name)
        lines.append(
            [
                _label(cut),
                *(spread(seen.tested(row, one.name), 2) for one in pictures(config)),
                *(
                    ["–"] * 5
                    if cost is None
                    else [
                        f"{1e3 * cost.seconds:.2f}",
                        f"{1e3 * cost.backward_seconds:.2f}",
                        f"{cost.backward:.1f}",
                        f"{cost.cosine:.4f}",
                        f"{cost.norm:.2f}",
                    ]
                ),
            ]
        )
    return Table(columns, lines)


def _claims(seen: Measured, name: FilterKind) -> list[Claim]:
    short, whole = Row(filter=name, products=1), Row(filter=name, products=None)
    a, b = seen.tested(short), seen.tested(whole)
    if not a or len(a) != len(b):
        return []
    label, lost = NAMES[name, True], fmean(b) - fmean(a)
    made = [
        Claim(
            f"{label}: one product (T = 1) is within 1 dB of the converged backward pass",
            f"{fmean(a):.2f} and {fmean(b):.2f} dB",
            lost <= 1,
        )
    ]
    if short.name in seen.cost and whole.name in seen.cost:
        ratio = seen.cost[whole.name].backward_seconds / seen.cost[short.name].backward_seconds
        made.append(
            Claim(
                f"{label}: its backward pass is at least twice as fast as the converged one",
                f"{ratio:.1f} times as fast; a whole step is "
                f"{seen.cost[whole.name].seconds / seen.cost[short.name].seconds:.1f} times as fast",
                ratio >= 2,
            )
        )
    return made


def _drawings(config: GradientsConfig, seen: Measured) -> list[Drawing]:
    if not seen.runs:
        return []
    places = cuts(config)
    ticks = range(len(places))
    figure, (quality, error) = axes(2, width=4.8)
    for index, name in enumerate(FILTERS):
        measured = [(x, seen.tested(Row(filter=name, products=cut))) for x, cut in zip(ticks, places, strict=True)]
        points = [(x, fmean(values)) for x, values in measured if values]
        quality.plot([x for x, _ in points], [y for _, y in points], label=NAMES[name, True], **style(index))
        costs = [(x, seen.cost.get(Row(filter=name, products=cut).name)) for x, cut in zip(ticks, places, strict=True)]
        known = [(x, max(1 - cost.cosine, 1e-7)) for x, cost in costs if cost is not None]
        error.plot([x for x, _ in known], [y for _, y in known], **style(index))
    for panel in (quality, error):
        panel.set_xticks(list(ticks), ["conv." if cut is None else str(cut) for cut in places])
        panel.set_xlabel("products T in the backward pass")
    quality.set_ylabel("test PSNR, dB")
    quality.legend()
    error.set(ylabel="1 - cosine to the exact gradient", yscale="log")
    return [
        Drawing(
            "products",
            figure,
            "Test PSNR (mean over the pictures and seeds), and how far the gradient points from the exact one, over "
            "the products with the Jacobian in the backward pass.",
        )
    ]


def _protocol(config: GradientsConfig) -> str:
    one = training(config, rows(config)[0], pictures(config)[0], config.plan.first_seed)
    chosen = one.optimization
    return (
        f"Implicit representations of one layer of width {one.representation.width} from a quarter of the pixels of "
        f"{', '.join(picture.name for picture in pictures(config))}, at most {one.size} a side; validation and test on "
        f"a quarter each. {chosen.steps} steps of Adam at {chosen.learning_rate:g}, validated every "
        f"{chosen.validate_every}; {config.plan.seeds} seeds. One evaluation a step from the last state; the backward "
        "pass is the Neumann series of the adjoint after T products, or GMRES to a relative residual of "
        f"{one.equilibria.backward_tolerance:g}."
    )


def _notes(config: GradientsConfig, seen: Measured) -> list[str]:
    notes = [
        "The figure's own values are not at hand, so that none stand beside ours.",
        "The exact gradient is that of the solved equilibrium. What is left of the distance to it at many products, "
        "and at the converged adjoint too, is that of the state, which is carried along and not solved for.",
    ]
    if config.plan.scale == "cpu":
        notes.append("Smaller pictures, a narrower model and fewer steps than the paper's.")
    diverged = [name for (name, _, _), one in seen.runs.items() if one.state == "diverged"]
    if diverged:
        notes.append(f"Diverged: {', '.join(sorted(set(diverged)))}.")
    return notes


TABLE = Reproduction(jobs, summarize)
