"""The figures of the table."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from torchimplicit.recipes.jiio.curves import JOINT, Curves
from torchimplicit.recipes.jiio.nested import METHODS
from torchimplicit.recipes.jiio_generation.read import at
from torchimplicit.recipes.plotting import axes, style

LABELS = {
    JOINT: "joint inference",
    "adam": "Adam",
    "adam-one-step": "Adam, one-step gradient",
    "gradient-descent": "gradient descent",
}


def against_time(found: Sequence[Curves]) -> Figure:
    """Loss against time, a line a method: means over seeds, each point so many steps."""
    figure, (panel,) = axes()
    for index, method in enumerate((JOINT, *METHODS)):
        steps = sorted({p.steps for one in found for p in one.points if p.method == method})
        look = style(index)
        for one in found:
            panel.plot(*zip(*(at(one, method, n) for n in steps), strict=True), color=look["color"], alpha=0.2, lw=0.8)
        points = [[at(one, method, n) for one in found] for n in steps]
        means = [(fmean(p[0] for p in each), fmean(p[1] for p in each)) for each in points]
        panel.plot([m[0] for m in means], [m[1] for m in means], label=LABELS[method], **look)
        for n, mean in zip(steps, means, strict=True):
            if n in (10, 20, 40):
                panel.annotate(str(n), mean, xytext=(4, 4), textcoords="offset points", fontsize=7.5)
    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.xaxis.set_major_formatter("{x:g}")
    panel.xaxis.set_minor_formatter(NullFormatter())
    panel.set_xlabel("CPU time (s)")
    panel.set_ylabel("loss after an exact solve")
    panel.legend()
    return figure
