"""The table's figures."""

from __future__ import annotations

from statistics import fmean

import matplotlib.image
from matplotlib.figure import Figure

from torchimplicit.recipes.fields.settings import FILTERS
from torchimplicit.recipes.fields.shape.points import LONGEST
from torchimplicit.recipes.implicit_shapes.read import Measured
from torchimplicit.recipes.implicit_shapes.rows import ROWS, TASKS, Row, TaskKind
from torchimplicit.recipes.plotting import axes, style
from torchimplicit.recipes.runtime.table import Drawing

DASHES = {"implicit": "-", "one-step": ":", "explicit": "--"}


def drawings(found: Measured) -> list[Drawing]:
    """Those for which there are runs."""
    made = [_curves(found)] if found.runs else []
    for task in TASKS:
        shown = _surfaces(found, task)
        if shown is not None:
            made.append(shown)
    return made


def _curves(found: Measured) -> Drawing:
    figure, panels = axes(2, width=5.4, height=3.8)
    for panel, task, name, label, scale in zip(
        panels,
        TASKS,
        ("IoU", "loss"),
        ("IoU, %", "mean absolute error of the distance,\n% of the longest side"),
        (100.0, 100 / LONGEST),
        strict=True,
    ):
        for row in ROWS.values():
            runs = [one for one in found.of(row) if one.validations]
            if row.task != task or not runs:
                continue
            length = min(len(one.validations) for one in runs)
            steps = [runs[0].validations[i].step for i in range(length)]
            values = [scale * fmean(one.validations[i].figures[name] for one in runs) for i in range(length)]
            look = {**style(FILTERS.index(row.filter)), "linestyle": DASHES[row.kind]}
            panel.plot(steps, values, label=row.label, **look)
        panel.set(xlabel="steps", ylabel=label, title={"occupancy": "occupancy", "sdf": "signed distance"}[task])
        if panel.has_data():
            panel.legend(fontsize=7, handlelength=3.6)
    panels[1].set_yscale("log")
    return Drawing(
        "training",
        figure,
        "Along training, on the validation points, mean over the seeds: implicit models (solid), the same by one-step "
        "gradients (dotted), and explicit twins (dashed).",
    )


def _surfaces(found: Measured, task: TaskKind) -> Drawing | None:
    """The truth and what each model makes of it, with the distance as colour."""
    seed = found.seeds[0]
    rows = [row for row in ROWS.values() if row.task == task and (row.name, seed) in found.folders]
    if not rows:
        return None
    kinds = sorted({row.kind for row in rows}, key=list(DASHES).index)
    first = found.folders[rows[0].name, seed].path / "figures" / "original.png"
    figure = Figure(figsize=(2.2 * (len(FILTERS) + 1), 2.5 * len(kinds)), layout="constrained")
    grid = figure.subplots(len(kinds), len(FILTERS) + 1, squeeze=False)
    for line, kind in zip(grid, kinds, strict=True):
        for place, ax in enumerate(line):
            ax.set_axis_off()
            if place == 0:
                if kind == kinds[0] and first.is_file():
                    ax.imshow(_left(first))
                    ax.set_title("the mesh\n", fontsize=8)
                continue
            row = Row(task=task, filter=FILTERS[place - 1], kind=kind)
            if (row.name, seed) not in found.folders:
                continue
            file = found.folders[row.name, seed].path / "figures" / "error.png"
            iou, chamfer = found.figure(row, seed, "IoU"), found.figure(row, seed, "chamfer")
            title = f"IoU {100 * iou:.1f} %" if iou is not None else ""
            if file.is_file() and chamfer is not None:
                ax.imshow(_left(file))
                title += f", Chamfer {100 * chamfer:.2f} %"
            else:
                title += ", no surface"
            ax.set_title(f"{row.label}\n{title}", fontsize=8)
    return Drawing(
        "occupancy" if task == "occupancy" else "distance",
        figure,
        "The surfaces by marching cubes; colours are distances from the mesh, dark for none and bright for 2 % of its "
        "longest side. The first seed.",
    )


def _left(file: object) -> object:
    picture = matplotlib.image.imread(str(file))
    return picture[:, : picture.shape[1] // 2]
