"""The pictures of the table."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

from matplotlib.figure import Figure

from torchimplicit.recipes.ofdft_gradients.config import MoleculeGradientsConfig
from torchimplicit.recipes.ofdft_gradients.gathered import ESTIMATORS, Group
from torchimplicit.recipes.plotting import LINES, MARKERS, axes, style
from torchimplicit.recipes.runtime.table import Drawing

LINEAR = ("implicit", "damped")
"""Estimators that solve a linear system, which has a solution at a saddle too."""


def drawings(groups: Sequence[Group], settings: MoleculeGradientsConfig) -> list[Drawing]:
    """All of them; none without runs."""
    if not groups:
        return []
    return [_nudges(groups, settings), _softened(groups[-1], settings), _adjoint(groups[-1], settings)]


def _nudges(groups: Sequence[Group], settings: MoleculeGradientsConfig) -> Drawing:
    nudges = sorted(settings.nudges, reverse=True)
    figure, panels = axes(2, width=4.6)
    for panel, form, order in zip(panels, ("one_sided", "symmetric"), (1, 2), strict=True):
        for index, group in enumerate(groups):
            errors = [median(getattr(one.nudged[place], form) for one in group.results) for place in range(len(nudges))]
            panel.plot(nudges, errors, label=group.name, **style(index))
        low, high = nudges[-2], nudges[1]
        anchor = min(median(getattr(one.nudged[1], form) for one in group.results) for group in groups) / 3
        panel.plot([low, high], [anchor * (low / high) ** order, anchor], ":", color="#6b7280", label=f"slope {order}")
        panel.set(xscale="log", yscale="log", xlabel="nudge β, relative to the cotangent's length")
        panel.set_title(form.replace("_", "-"))
        panel.legend()
    panels[0].set_ylabel("relative error of the gradient")
    return Drawing(
        "error-over-nudge",
        figure,
        "The error of equilibrium propagation beside the exact gradient, over the nudge; medians of the seeds. Where "
        "it flattens or rises again for the smallest nudges, the tolerance of the minimizations shows.",
    )


def _softened(group: Group, settings: MoleculeGradientsConfig) -> Drawing:
    factors = sorted(settings.softness, reverse=True)
    places = range(len(factors))
    figure, (size, direction) = axes(2, width=4.6, height=4.1)
    for index, name in enumerate(ESTIMATORS):
        found = [group.softened(place) for place in places]
        failed = [
            place
            for place, seeds in zip(places, found, strict=True)
            if name not in LINEAR and any(s.status[name] != "CONVERGED" for s in seeds)
        ]
        for panel, figure_of in ((size, "norm"), (direction, "cosine")):
            values = [median(getattr(s, figure_of)[name] for s in seeds) for seeds in found]
            panel.plot(places, values, label=name, **style(index))
            hollow = {**style(index), "linestyle": "", "markerfacecolor": "white"}
            panel.plot(failed, [values[place] for place in failed], **hollow, zorder=3)
    for panel in (size, direction):
        panel.set_xticks(list(places), [f"{factor:g}" for factor in factors], rotation=60)
        panel.set_xlabel("softest eigenvalue, over what it was")
        panel.axvline(sum(factor > 0 for factor in factors) - 0.5, color="#9aa3af", linewidth=0.9)
    size.set(yscale="log", ylabel="length, over the exact one before")
    size.set_ylim(bottom=0.3)
    direction.set(ylabel="cosine with the exact gradient before", ylim=(-1.05, 1.05))
    _legend(figure)
    return Drawing(
        "soft-mode",
        figure,
        f"{group.name}: the gradients as the softest eigenvalue that they feel goes to zero (the line) and below; "
        f"medians of the seeds. Damping: {settings.damping:g} of the eigenvalue. Hollow: a "
        f"minimization of a seed did not converge in {settings.most_steps} steps, and its best point is what counts; "
        "lengths below the axis are zero.",
    )


def _adjoint(group: Group, settings: MoleculeGradientsConfig) -> Drawing:
    figure, panels = axes(2, width=5.2, height=4.3)
    one = group.results[0]
    ways = list(one.adjoint["overlap"])
    for panel, coordinates in zip(panels, ("overlap", "raw"), strict=True):
        for index, way in enumerate(ways):
            found = one.adjoint[coordinates].get(way)
            if found is not None:
                panel.plot(*zip(*found.trace, strict=True), label=way, **_look(index))
        panel.set(xscale="log", yscale="log", xlabel="products with the Hessian", ylim=(1e-15, 30))
        panel.set_title("coordinates of the overlap" if coordinates == "overlap" else "raw coefficients")
    panels[0].set_ylabel("relative error of the solution")
    _legend(figure)
    return Drawing(
        "adjoint-over-products",
        figure,
        f"{group.name}, first seed: the error of the adjoint system's solution over the products with the Hessian. The "
        "dense solution is a point at n products; Adam's rate is the best of three.",
    )


def _look(index: int) -> dict[str, Any]:
    """That of the first eight ways, and another for those beyond."""
    return style(index) if index < len(MARKERS) else {**style(index), "marker": "*<>"[index % 3], "linestyle": LINES[3]}


def _legend(figure: Figure) -> None:
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8)
