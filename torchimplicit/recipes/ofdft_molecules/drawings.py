"""The figures of the table."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from torchimplicit.recipes.ofdft_molecules.gathered import Group
from torchimplicit.recipes.ofdft_runs import measured
from torchimplicit.recipes.orbital_free.measure import Quality
from torchimplicit.recipes.plotting import COLOURS, LINES, MARKERS, axes
from torchimplicit.recipes.runtime.table import Drawing


def drawings(groups: list[Group]) -> list[Drawing]:
    """Those of the four molecules, and that of QM9; what has no runs is left out."""
    four, qm9 = ([group for group in groups if group.row.qm9 == kind] for kind in (False, True))
    made = []
    if four:
        made.append(
            Drawing(
                "along-training",
                _along(four),
                "The training molecules' error against the processor's time, a line a seed: L left, L1 per electron "
                "right; dotted is the superposition of atoms of the first seed.",
            )
        )
        shown = [group for group in four if group.name in ("gauss-newton", "energy", "slides")] or four[:3]
        made.append(
            Drawing(
                "test",
                _against_guess(shown),
                "Test geometries of all seeds: L and L1 per electron over those of the superposition of atoms. Below "
                "and left of the lines both are better. Hollow: before training, with the linear term fitted.",
            )
        )
    if qm9:
        made.append(
            Drawing(
                "qm9",
                _against_guess(qm9),
                "Molecules of QM9 that training has not seen, likewise.",
            )
        )
    return made


def _along(groups: list[Group]) -> Figure:
    figure, panels = axes(2, width=4.9, height=3.9)
    for panel, what, label in zip(panels, ("loss", "l1"), ("L", "L1 per electron"), strict=True):
        for index, group in enumerate(groups):
            for number, one in enumerate(group.results.values()):
                looks = measured(one)
                panel.plot(
                    [look.seconds for look, _ in looks],
                    [getattr(found, what) for _, found in looks],
                    color=COLOURS[index % len(COLOURS)],
                    linestyle=LINES[number % len(LINES)],
                    linewidth=1.2,
                    label=None if number else group.row.label,
                )
        (_, first), *_ = measured(next(iter(groups[0].results.values())))
        panel.axhline(getattr(first, f"guess_{what}"), color="0.5", linestyle=":", linewidth=1)
        panel.set(xlabel="seconds of the processor's time", ylabel=label, yscale="log")
    panels[-1].legend(fontsize=7.5, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def _against_guess(groups: list[Group]) -> Figure:
    figure, (panel,) = axes(width=6.4, height=4.4)
    for index, group in enumerate(groups):
        colour, marker = COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
        before = [one for found in group.results.values() for one in found.start_test]
        _points(panel, before, colour, marker, None)
        _points(panel, group.tested(), colour, marker, group.row.label)
    panel.axhline(1, color="0.6", linewidth=0.9)
    panel.axvline(1, color="0.6", linewidth=0.9)
    panel.set(xscale="log", yscale="log", xlabel="L, over that of the superposition", ylabel="L1, likewise")
    panel.legend(fontsize=7.5, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def _points(panel: Axes, found: list[Quality], colour: str, marker: str, label: str | None) -> None:
    panel.plot(
        [one.loss / one.guess_loss for one in found],
        [one.l1 / one.guess_l1 for one in found],
        linestyle="none",
        marker=marker,
        markersize=4.5,
        color=colour,
        markerfacecolor="none" if label is None else colour,
        label=label,
    )
