"""The table: what its runs come to."""

from __future__ import annotations

from statistics import fmean
from typing import Any

from torchimplicit.recipes.fields.cost import COLUMNS, cells
from torchimplicit.recipes.fields.shape.points import LONGEST
from torchimplicit.recipes.fields.shape.subject import subject
from torchimplicit.recipes.implicit_shapes.claims import claims
from torchimplicit.recipes.implicit_shapes.config import ShapesConfig
from torchimplicit.recipes.implicit_shapes.drawing import drawings
from torchimplicit.recipes.implicit_shapes.measure import ShapesCost
from torchimplicit.recipes.implicit_shapes.read import Measured, measured
from torchimplicit.recipes.implicit_shapes.rows import COST, ROWS, TASKS, Row, TaskKind, jobs, training
from torchimplicit.recipes.plain import to_plain
from torchimplicit.recipes.reproduce.runner import Reproduction
from torchimplicit.recipes.run import Run
from torchimplicit.recipes.runtime.table import Sheet, Summary, spread
from torchimplicit.recipes.tables import Column, Table
from torchimplicit.recipes.training.results import Results, still_rising

TITLES = {"occupancy": "Occupancy", "sdf": "Signed distance, with slopes in the loss"}


def summarize(config: ShapesConfig, runs: dict[str, Run]) -> Summary:
    """See :class:`~torchimplicit.recipes.runtime.table.Summary`."""
    found = measured(config, runs)
    sheets = [
        Sheet(TITLES[task], _quality(found, task))
        for task in TASKS
        if any(row.task == task and found.of(row) for row in ROWS.values())
    ]
    if found.cost is not None:
        rows = [
            [f"{'Occupancy' if ROWS[name].task == 'occupancy' else 'Distance'}: {ROWS[name].label}", *cells(cost)]
            for name, cost in found.cost.costs.items()
        ]
        sheets.append(Sheet("A training step", Table([Column("Model"), *COLUMNS], rows)))
        sheets.append(Sheet("The one-step estimate beside the exact gradient", _directions(found.cost)))
    return Summary(
        title="A mesh: implicit and explicit representations, and exact slopes",
        source="Huang, Bai and Kolter 2021, (Implicit)²: Implicit Layers for Implicit Representations (NeurIPS 2021): "
        "occupancy of 3D shapes; the signed distances, and the gradients compared on them, are ours",
        protocol=_protocol(config, found),
        sheets=sheets,
        claims=claims(found),
        drawings=drawings(found),
        notes=_notes(config, found),
        runs={
            **{f"{name}-seed{seed}": _figures(found, name, seed, one) for (name, seed), one in found.runs.items()},
            **({COST: to_plain(found.cost)} if found.cost is not None else {}),
        },
    )


def _quality(found: Measured, task: TaskKind) -> Table:
    columns = [
        Column("Model"),
        Column("Parameters"),
        Column(
            "IoU", "%", "Of the insides, on test points anywhere in the box, at the weights of the best validation."
        ),
        Column("Near", "%", "The same on test points near the surface."),
        *([Column("Error", "%", "Mean absolute error of the distance.")] if task == "sdf" else []),
        Column(
            "Chamfer",
            "%",
            "Mean distance from the surface by marching cubes to the mesh and back, over two. Lengths are shares of "
            "the mesh's longest side.",
        ),
        Column("Normals", "", "Mean absolute cosine between normals of nearest points, both ways."),
        Column("At step", "", "Of the best validation, mean."),
    ]
    rows = []
    for row in ROWS.values():
        if row.task != task:
            continue
        several = found.of(row)
        best = [one.best.step for one in several if one.best is not None]
        rows.append(
            [
                row.label,
                str(several[0].parameters) if several else "–",
                spread(found.figures(row, "IoU"), 2, 100),
                spread(found.figures(row, "IoU near"), 2, 100),
                *([spread(found.figures(row, "loss"), 3, 100 / LONGEST)] if task == "sdf" else []),
                spread(found.figures(row, "chamfer"), 3, 100),
                spread(found.figures(row, "normals"), 4),
                f"{fmean(best):.0f}" if best else "–",
            ]
        )
    return Table(columns, rows)


def _directions(cost: ShapesCost) -> Table:
    columns = [
        Column("Model"),
        Column("Weights"),
        Column("Values", "cosine", "Of the loss of values alone: the estimate is what the library offers."),
        Column("Slopes", "cosine", "Of the loss of slopes alone (normals and the eikonal term)."),
        Column("Whole loss", "cosine", "Of both, in the weights that training gives them."),
        Column("Norm", "×", "The estimate's over the exact gradient's, of the whole loss."),
    ]
    rows = []
    for name in cost.begun:
        for label, one in (("initial", cost.begun[name]), ("after some steps", cost.trained[name])):
            rows.append(
                [
                    ROWS[name].label.split(",")[0],
                    label,
                    f"{one.values:.4f}",
                    f"{one.slopes:.4f}",
                    f"{one.cosine:.4f}",
                    f"{one.norm:.2f}",
                ]
            )
    return Table(columns, rows)


def _protocol(config: ShapesConfig, found: Measured) -> str:
    first, distance = (
        training(config, Row(task=task, filter="fourier", kind="implicit"), config.plan.first_seed) for task in TASKS
    )
    chosen, other, weights = first.optimization, distance.optimization, distance
    return (
        f"{subject(first).describe()} Models of one layer of width {first.representation.width}. {first.samples} "
        "points to train on, half of them near the surface and half anywhere in its box; for the distance a third on "
        f"the surface. {first.held_out_samples} points select the weights by the IoU, as many are the test. "
        f"{_seeds(found)} Occupancy: cross-entropy, {chosen.steps} steps of {chosen.batch_size} points, "
        f"Adam at {chosen.learning_rate:g} ({chosen.schedule}); implicit models are solved when a point is first seen "
        "after a validation, and then take one evaluation a step, with the Neumann series after its first product. "
        f"Distance: {weights.distance_weight:g} |f - d| + {weights.normal_weight:g} (1 - cosine to the normal on the "
        f"surface) + {weights.eikonal_weight:g} (|∇f| - 1)², {other.steps} steps of {other.batch_size} points; "
        f"implicit models are solved to {distance.equilibria.tolerance:g} (Anderson) from the last state and "
        f"differentiated twice exactly, by GMRES to {distance.equilibria.backward_tolerance:g}. One step: the cell is "
        "applied once more to the detached fixed point, and that is differentiated, once in the coordinates and again "
        f"in the weights; the library refuses this. Surfaces on a grid of {first.resolution} points."
    )


def _seeds(found: Measured) -> str:
    """How many there are of each row."""
    counts = {sum(1 for name, _ in found.runs if name == row) for row, _ in found.runs}
    if len(counts) == 1:
        (count,) = counts
        return f"{count} seeds." if count > 1 else "One seed."
    return "Seeds: those that were run so far; a figure without ± is of one." if counts else ""


def _notes(config: ShapesConfig, found: Measured) -> list[str]:
    notes = ["The published figures for 3D occupancy are not known here, so that none stand beside ours."]
    if config.plan.scale == "cpu":
        notes.append("Narrower models, fewer points and steps than the paper's: rows compare among themselves.")
    if config.mesh_file is not None:
        notes.append("The mesh is a file (--mesh-file), which the command does not name; without one a knot is made.")
    notes += still_rising(found.runs.values())
    without = [f"{name}, seed {seed}" for (name, seed), one in found.surfaces.items() if not one]
    if without:
        notes.append(f"Without a surface: {', '.join(without)}.")
    diverged = [f"{name}, seed {seed}" for (name, seed), one in found.runs.items() if one.state == "diverged"]
    if diverged:
        notes.append(f"Diverged: {', '.join(diverged)}.")
    return notes


def _figures(found: Measured, name: str, seed: int, one: Results) -> dict[str, Any]:
    return {
        "state": one.state,
        "test": None if one.test is None else one.test.figures,
        "best": None if one.best is None else {"step": one.best.step, **one.best.figures},
        "surface": found.surfaces.get((name, seed)),
        "parameters": one.parameters,
        "costs": to_plain(one.costs),
        "seconds": one.seconds,
        "validations": [{"step": v.step, "seconds": v.seconds, **v.figures} for v in one.validations],
    }


TABLE = Reproduction(jobs, summarize)
