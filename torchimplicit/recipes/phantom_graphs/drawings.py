"""The figures of the table."""

from __future__ import annotations

from statistics import fmean, stdev

from matplotlib.figure import Figure

from torchimplicit.recipes.phantom_graphs.jobs import LOOSE
from torchimplicit.recipes.phantom_graphs.published import MAJORITY, TABLE
from torchimplicit.recipes.phantom_graphs.read import Found
from torchimplicit.recipes.plotting import COLOURS, axes, style


def bars(found: Found) -> Figure:
    """Ours beside the published ones, a panel a set."""
    figure, panels = axes(len(found.sets), width=4.6, height=3.6)
    for panel, (name, rows) in zip(panels, found.sets.items(), strict=True):
        there = [row for row in rows.values() if row.accuracy]
        published = [TABLE.get((name, row.damping)) for row in there]
        series = (
            ("ours, selected on validation", [_moments(row.accuracy) for row in there]),
            ("ours, best test epoch", [_moments(row.peeked) for row in there]),
            ("published, best test epoch", [(p.mean, p.deviation) if p else (float("nan"), 0.0) for p in published]),
        )
        for index, (label, values) in enumerate(series):
            panel.bar(
                [place + 0.27 * (index - 1) for place in range(len(there))],
                [mean for mean, _ in values],
                yerr=[deviation for _, deviation in values],
                width=0.25,
                color=COLOURS[index],
                label=label,
                capsize=2,
                error_kw={"linewidth": 0.9},
            )
        panel.axhline(MAJORITY[name], color="#6b7280", linewidth=1, linestyle="--", label="constant answer")
        panel.set_xticks(range(len(there)), ["implicit" if r.damping is None else f"λ = {r.damping:g}" for r in there])
        panel.set_ylim(50, 100)
        panel.set_title(name)
        panel.set_ylabel("test accuracy (%)")
        panel.grid(axis="x", visible=False)
        panel.set_axisbelow(True)
    panels[0].legend(loc="upper left", ncols=2, fontsize=7.5)
    return figure


def lengths(found: Found) -> Figure:
    """Accuracy against length."""
    labels = {
        "identity": "W from 0.8 I",
        "uniform": "W uniform, as in the paper",
        "loose": f"W from 0.8 I, tolerance {LOOSE:g}",
    }
    figure, (panel,) = axes()
    for index, (variant, by_length) in enumerate(found.chains.items()):
        if not by_length:
            continue
        known = sorted(by_length)
        look = style(index)
        panel.plot(known, [100 * fmean(by_length[n]) for n in known], label=labels[variant], **look)
        panel.fill_between(
            known,
            [100 * min(by_length[n]) for n in known],
            [100 * max(by_length[n]) for n in known],
            color=look["color"],
            alpha=0.15,
            linewidth=0,
        )
    panel.set_xlabel("nodes in a chain")
    panel.set_ylabel("test accuracy (%)")
    panel.set_ylim(40, 102)
    panel.legend(loc="lower left")
    return figure


def _moments(by_fold: dict[int, float]) -> tuple[float, float]:
    values = [100 * value for value in by_fold.values()]
    return fmean(values), stdev(values) if len(values) > 1 else 0.0
