"""The table's figures."""

from __future__ import annotations

from statistics import fmean

import matplotlib.image
from matplotlib.figure import Figure

from torchimplicit.recipes.fields.settings import FILTERS
from torchimplicit.recipes.implicit_generalization.read import Measured
from torchimplicit.recipes.implicit_generalization.rows import KINDS, NAMES, TABLE, Row
from torchimplicit.recipes.plotting import axes, style
from torchimplicit.recipes.runtime.table import Drawing

SHOWN = (("1L", True), ("1L", False), ("1L-wide", False), ("4L", False))


def drawings(found: Measured, labels: dict[str, str]) -> list[Drawing]:
    """Those for which there are runs."""
    made = []
    if any(name in TABLE for name, _, _ in found.runs):
        made.append(_curves(found, labels))
    shown = _pictures(found, labels)
    return [*made, shown] if shown is not None else made


def _curves(found: Measured, labels: dict[str, str]) -> Drawing:
    figure, panels = axes(3, width=4.2, height=3.6)
    for panel, name in zip(panels, FILTERS, strict=True):
        for index, (size, implicit) in enumerate(SHOWN):
            row = Row(filter=name, implicit=implicit, size=size)
            runs = [one for (own, _, _), one in found.runs.items() if own == row.name and one.validations]
            if not runs:
                continue
            length = min(len(one.validations) for one in runs)
            steps = [runs[0].validations[i].step for i in range(length)]
            values = [fmean(one.validations[i].figures["PSNR"] for one in runs) for i in range(length)]
            panel.plot(steps, values, label=labels[row.name], **style(index))
        panel.set(xlabel="steps", ylabel="validation PSNR, dB", title=f"{NAMES[name, True]} and {NAMES[name, False]}")
        if panel.has_data():
            panel.legend()
    return Drawing(
        "training",
        figure,
        "PSNR on the validation pixels along training, mean over all pictures and seeds: the implicit model of one "
        "layer, and explicit ones of one layer, of one layer twice as wide, and of four.",
    )


def _pictures(found: Measured, labels: dict[str, str]) -> Drawing | None:
    """The first picture of each kind and what became of it."""
    firsts = [next((one for one in found.pictures if one.kind == kind), None) for kind in KINDS]
    seed = found.seeds[0]
    rows = [Row(filter="fourier", implicit=implicit, size=size) for size, implicit in SHOWN]
    there = [
        one for one in firsts if one is not None and all((row.name, one.name, seed) in found.folders for row in rows)
    ]
    files = [(one, found.folders[row.name, one.name, seed].path / "figures") for one in there for row in rows]
    if not there or not all((folder / "reconstruction.png").is_file() for _, folder in files):
        return None
    figure = Figure(figsize=(2.1 * (len(rows) + 1), 2.25 * len(there)), layout="constrained")
    grid = figure.subplots(len(there), len(rows) + 1, squeeze=False)
    for line, one in zip(grid, there, strict=True):
        for place, ax in enumerate(line):
            row = rows[max(0, place - 1)]
            folder = found.folders[row.name, one.name, seed].path / "figures"
            shown = matplotlib.image.imread(folder / ("reconstruction.png" if place else "original.png"))
            ax.imshow(shown, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            ax.set_axis_off()
            tested = found.tested(row, one.name, seed)
            title = "picture" if not place else labels[row.name]
            ax.set_title(title + (f"\n{tested:.1f} dB" if place and tested is not None else "\n"), fontsize=8)
    return Drawing(
        "pictures",
        figure,
        "The whole picture from a quarter of its pixels, by Fourier filters; below each model its PSNR on the test "
        "pixels. The first seed.",
    )
