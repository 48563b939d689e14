"""One look for every picture: matplotlib's settings, colours, and a figure with axes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from torchimplicit.recipes.files import replacing

COLOURS = ("#0b63a5", "#d1495b", "#2e8b57", "#8a5fbf", "#c77d0a", "#3d7f86", "#6b7280", "#b0417f")
LINES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (4, 1.2, 1, 1.2)), (0, (2, 1)))
MARKERS = "os^DvPX*"

FIGURE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9aa3af",
    "axes.labelcolor": "#1f2937",
    "axes.linewidth": 0.8,
    "axes.grid": True,
    "grid.color": "#e5e7eb",
    "grid.linewidth": 0.7,
    "xtick.color": "#4b5563",
    "ytick.color": "#4b5563",
    "lines.linewidth": 1.7,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "figure.facecolor": "white",
    "figure.constrained_layout.h_pad": 0.06,
    "figure.constrained_layout.w_pad": 0.06,
}


def axes(columns: int = 1, width: float = 6.0, height: float = 3.9) -> tuple[Figure, list[Axes]]:
    """A figure with ``columns`` axes side by side, each ``width`` × ``height`` inches; no global state is touched."""
    figure = Figure(figsize=(columns * width, height), layout="constrained")
    return figure, list(figure.subplots(1, columns, squeeze=False)[0])


def style(index: int) -> dict[str, Any]:
    """Colour, line and marker of the series ``index``: each tells the first few series apart on its own."""
    return {
        "color": COLOURS[index % len(COLOURS)],
        "linestyle": LINES[index % len(LINES)],
        "marker": MARKERS[index % len(MARKERS)],
        "markersize": 4.5,
    }


def save_figure(figure: Figure, path: Path, dpi: int) -> None:
    """Write it as PNG, in one move."""
    with replacing(path) as draft:
        figure.savefig(draft, dpi=dpi)
