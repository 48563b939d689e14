"""The figures of the table."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from torchimplicit.recipes.jiio_meta.gathered import TITLES, UNITS, Found, of
from torchimplicit.recipes.jiio_meta.rows import ROWS
from torchimplicit.recipes.plotting import axes, style
from torchimplicit.recipes.runtime.table import Drawing


def drawings(problems: Sequence[str], found: Found) -> list[Drawing]:
    """Error against time."""
    if not found:
        return []
    figure, panels = axes(len(problems), width=5.6, height=3.9)
    for panel, problem in zip(panels, problems, strict=True):
        index = 0
        for row, (label, _) in ROWS.items():
            first = next((one for key, one in found.items() if key[:2] == (problem, row)), None)
            kinds = ("JIIO", "descent") if row == "jiio" else ("descent",) if row == "descent" else ("JIIO",)
            for kind in kinds if first is not None else ():
                names = [name for name in first or {} if name.startswith(kind)]
                times = [1e3 * fmean(of(found, problem, row, name, "seconds")) for name in names]
                values = [fmean(of(found, problem, row, name, "error")) for name in names]
                panel.plot(times, values, label=f"{kind}; trained by {label}", **style(index))
                index += 1
        panel.set(xlabel="CPU time of the adaptation, ms", ylabel=UNITS[problem], title=TITLES[problem])
        if problem == "sinusoid":
            panel.set_yscale("log")
        panel.legend(fontsize=7.5)
    return [
        Drawing(
            "error",
            figure,
            "Error on the queries of all test tasks against the time of adapting to them, with more and more steps, "
            "each with the step size that suits it. Means over the seeds.",
        )
    ]
