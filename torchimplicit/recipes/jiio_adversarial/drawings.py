"""The figures of the table."""

from __future__ import annotations

from statistics import fmean

from matplotlib.figure import Figure

from torchimplicit.recipes import files
from torchimplicit.recipes.jiio_adversarial.config import AttacksConfig
from torchimplicit.recipes.jiio_adversarial.gathered import Found, of
from torchimplicit.recipes.jiio_adversarial.rows import ROWS
from torchimplicit.recipes.plotting import axes, style
from torchimplicit.recipes.run import Run
from torchimplicit.recipes.runtime.table import Drawing


def drawings(kind: AttacksConfig, found: Found, runs: dict[tuple[str, int], Run]) -> list[Drawing]:
    """Strength against time, and images."""
    if not found:
        return []
    rows = [row for row in ("clean", "pgd", "jiio") if any(own == row for own, _ in found)]
    figure, panels = axes(len(rows), width=4.2, height=3.6)
    for panel, row in zip(panels, rows, strict=True):
        groups = {
            "PGD": [f"PGD-{steps}" for steps in sorted(kind.pgd_steps)],
            "JIIO": [f"JIIO-{steps}" for steps in sorted(kind.jiio_steps)],
        }
        for index, (label, names) in enumerate(groups.items()):
            times = [1e3 * fmean(of(found, row, name, "seconds")) for name in names]
            strong = [fmean(of(found, row, name, "cross_entropy")) for name in names]
            panel.plot(times, strong, label=label, **style(index))
            for name, x, y in zip(names, times, strong, strict=True):
                panel.annotate(name.split("-")[1], (x, y), textcoords="offset points", xytext=(4, -10), fontsize=7.5)
        panel.set(xlabel="CPU time, ms", ylabel="cross-entropy", title=f"trained on {ROWS[row][0]}")
        panel.legend()
    made = [
        Drawing(
            "strength",
            figure,
            "The attacks' strength, after an exact solve, against the time for all test images; the numbers are steps. "
            "Means over the seeds.",
        )
    ]
    shown = _pictures(runs)
    return [*made, shown] if shown is not None else made


def _pictures(runs: dict[tuple[str, int], Run]) -> Drawing | None:
    """Images of the first seed, as they are and attacked."""
    chosen = {row: run for (row, _), run in reversed(list(runs.items())) if (run.path / "pictures.pt").is_file()}
    lines = [
        (row, name, *pictures)
        for row in ("clean", "jiio")
        if row in chosen
        for name, pictures in files.load(chosen[row].path / "pictures.pt").items()
    ]
    if not lines:
        return None
    columns = len(lines[0][2])
    figure = Figure(figsize=(1.05 * columns + 1.6, 1.2 * len(lines)), layout="constrained")
    grid = figure.subplots(len(lines), columns, squeeze=False)
    for panels, (row, name, images, answers) in zip(grid, lines, strict=True):
        for place, (panel, image, answer) in enumerate(zip(panels, images, answers, strict=True)):
            panel.imshow(image[0].numpy(), cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
            panel.set(xticks=[], yticks=[])
            panel.grid(visible=False)
            panel.set_title(str(int(answer)), fontsize=8, pad=2)
            if not place:
                panel.set_ylabel(f"trained on\n{ROWS[row][0]}\n{name}", fontsize=7, rotation=0, ha="right", va="center")
    return Drawing(
        "pictures",
        figure,
        "Test images as they are and attacked, with what the model takes each for: one trained on clean images, and "
        "one against JIIO. The first seed.",
    )
