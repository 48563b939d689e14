"""Puts the report into the run's directory."""

from __future__ import annotations

from torchimplicit.recipes.digits.report.figures import figures
from torchimplicit.recipes.digits.report.page import page
from torchimplicit.recipes.digits.results import Results
from torchimplicit.recipes.runtime.page import save_figure, svg
from torchimplicit.recipes.runtime.run import Run


def write_report(results: Results, run: Run) -> None:
    """``figures/*.png`` and ``index.html``, which holds its pictures itself and needs no network."""
    folder = run.path / "figures"
    folder.mkdir(exist_ok=True)
    drawn = figures(results)
    for name, figure in drawn.items():
        save_figure(figure, folder / f"{name}.png", 160)
    run.write_text("index.html", page(results, {name: svg(figure, name) for name, figure in drawn.items()}))
