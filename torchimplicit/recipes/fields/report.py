"""What every fit of a field shows: its curve, and a page with its pictures and figures."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence
from html import escape
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from torchimplicit.recipes.fields.task import FieldTask
from torchimplicit.recipes.runtime.page import FIGURE, axes, document, figure, save_figure, style, svg, table
from torchimplicit.recipes.runtime.run import Run
from torchimplicit.recipes.runtime.table import Column, Table
from torchimplicit.recipes.runtime.task import Metric
from torchimplicit.recipes.runtime.trainer import Results

LARGEST_INSIDE = 4 << 20
"""Bytes of a file that is put into the page itself."""


def curve(results: Results, metric: Metric) -> Figure:
    """The metric on the validation points over the steps, and over the seconds."""
    scale, unit = (100.0 if metric.unit == "%" else 1.0), f" ({metric.unit})" if metric.unit else ""
    with matplotlib.rc_context(FIGURE):
        drawn, (left, right) = axes(2, width=4.5, height=3.2)
        found = [(v.step, v.seconds, scale * v.figures[metric.name]) for v in results.validations]
        for ax, place, name in ((left, 0, "step"), (right, 1, "seconds of training")):
            ax.plot([f[place] for f in found], [f[2] for f in found], **style(0))
            ax.set_xlabel(name)
            ax.set_ylabel(metric.name + unit)
    return drawn


def write_page(
    title: str,
    task: FieldTask,
    results: Results,
    run: Run,
    pictures: Sequence[tuple[Path, str]],
    notes: Sequence[str] = (),
) -> None:
    """``index.html`` and ``figures/curve.png``.

    Args:
        title: for people.
        task, results, run: the fit.
        pictures: files to see (PNG, GIF) and to hear (WAV), with their captions.
        notes: paragraphs below the figures.
    """
    folder = run.path / "figures"
    folder.mkdir(exist_ok=True)
    drawn = curve(results, task.metric)
    save_figure(drawn, folder / "curve.png", 130)
    parts = [
        "<p class='tag'>torchimplicit</p>",
        f"<h1>{escape(title)}</h1>",
        f"<p class='lead'>{escape(task.describe())}</p>",
        f"<div class='card'>{table(summary(results))}</div>",
        *(f"<p>{escape(note)}</p>" for note in notes),
        '<div class="grid">',
        *(figure(_shown(path, caption, run), caption) for path, caption in pictures),
        figure(svg(drawn, "curve"), f"The {task.metric.name} on the validation points along training."),
        "</div>",
    ]
    run.write_text("index.html", document(title, parts))


def summary(results: Results) -> Table:
    """The figures of the fit."""
    costs, rows = results.costs, []
    for name, found in (("Validation", results.best), ("Test", results.test)):
        if found is not None:
            rows.append(
                [
                    name,
                    *(f"{value:.4g}" for value in found.figures.values()),
                    str(found.step),
                    f"{found.seconds:.1f}",
                    f"{1e3 * costs.seconds:.1f}" if costs else "–",
                    f"{costs.forward:.2f}" if costs else "–",
                    f"{costs.backward:.2f}" if costs else "–",
                ]
            )
    names = list(results.test.figures) if results.test is not None else ["PSNR", "loss"]
    columns = [
        Column("Split"),
        *(Column(name, "dB") if name in ("PSNR", "SNR") else Column(name.capitalize()) for name in names),
        Column("At step", "", "The weights are those of the best validation."),
        Column("Training", "s", "Until then."),
        Column("Step", "ms", "Median: forward, backward and update."),
        Column("Forward", "evaluations", "Of the cell in a step, mean."),
        Column("Backward", "products", "With the cell's Jacobian in a step, mean."),
    ]
    return Table(columns, rows)


KINDS = {".png": "image/png", ".gif": "image/gif", ".wav": "audio/wav"}


def _shown(path: Path, caption: str, run: Run) -> str:
    """The file inside the page, or beside it where it is large."""
    if path.stat().st_size > LARGEST_INSIDE:
        source = path.relative_to(run.path).as_posix()
    else:
        source = f"data:{KINDS[path.suffix]};base64,{b64encode(path.read_bytes()).decode('ascii')}"
    if path.suffix == ".wav":
        return f"<audio controls preload='none' style='width:100%' src='{source}'></audio>"
    return f"<img alt='{escape(caption, quote=True)}' src='{source}' style='width:100%;image-rendering:pixelated'>"
