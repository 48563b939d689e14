"""The pictures of the table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from torchimplicit.recipes.phantom_precision.config import LayerConfig
from torchimplicit.recipes.phantom_precision.gathered import GRADIENTS, TRAINED, WEIGHTS, Gathered, mean
from torchimplicit.recipes.phantom_precision.training import LABELS
from torchimplicit.recipes.plotting import COLOURS, axes, style
from torchimplicit.recipes.runtime.table import Drawing

SHOWN = ("npg-1-1", "npg-2-0.5", "upg-5-0.5", "npg-9-0.5", "adaptive-0.3", "adaptive-0.1", "unbiased-5-0.5")
"""What Fig. 2 draws; NPG(5, 0.5) nearly covers UPG(5, 0.5)."""


def drawings(found: Gathered, layer: LayerConfig) -> list[Drawing]:
    """Those that there is data for."""
    drawn = []
    if any(found.layers.values()):
        drawn.append(grid(found, layer))
    if any(found.trainings.values()):
        drawn += [along(found), choices(found)]
    return drawn


def grid(found: Gathered, layer: LayerConfig) -> Drawing:
    """Fig. 1."""
    figure, panels = axes(len(WEIGHTS), width=4.6)
    for panel, weight in zip(panels, WEIGHTS, strict=True):
        for index, damping in enumerate(layer.lambdas):
            curves = {
                name: [
                    [p.cosine for p in one.grid if (p.estimator, p.damping) == (name, damping)]
                    for one in found.layers[weight]
                ]
                for name in ("UPG", "NPG")
            }
            look = {**style(index), "marker": ""}
            _band(panel, layer.ks, curves["UPG"], look, f"λ = {damping:g}")
            middle = [mean(values) for values in zip(*curves["NPG"], strict=True)]
            panel.plot(layer.ks[: len(middle)], middle, "o", color=look["color"], markersize=4, fillstyle="none")
        panel.set(title=f"{weight} weight", xlabel="k, steps or terms", ylabel="cosine to the exact gradient")
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    panels[0].legend(loc="lower right")
    return Drawing(
        "cosine-over-steps-and-damping",
        figure,
        "Cosine of the phantom gradients to the exact gradient on random layers whose weight has the spectral norm "
        f"{layer.norm:g}: UPG as lines (mean over the seeds, the band from least to largest), NPG as circles, which "
        "coincide with UPG where the fixed point is exact. After Geng et al. (2021), Fig. 1.",
    )


def along(found: Gathered) -> Drawing:
    """Fig. 2."""
    figure, panels = axes(len(GRADIENTS), width=4.9)
    for panel, gradient in zip(panels, GRADIENTS, strict=True):
        for index, name in enumerate(SHOWN):
            _over_steps(panel, found, gradient, f"{name}/cosine", index, LABELS[name])
        panel.axhline(0, color="#9aa3af", linewidth=0.8)
        panel.set(title=TRAINED[gradient], xlabel="step", ylabel="cosine to the exact gradient")
    figure.legend(*panels[-1].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return Drawing(
        "cosine-along-training",
        figure,
        "Cosine to the exact gradient along the training of an MDEQ, every estimator at the same weights, batches and "
        "equilibria: mean over the seeds, the band from least to largest. Above zero the estimate is an ascent "
        "direction. After Geng et al. (2021), Fig. 2; the adaptive and the unbiased series are beyond the paper.",
    )


def choices(found: Gathered) -> Drawing:
    """The spectrum along training, and what the adaptive phantom gradient makes of it."""
    figure, (radius, steps, damping) = axes(3, width=3.5)
    for index, gradient in enumerate(GRADIENTS):
        label = TRAINED[gradient]
        _over_steps(radius, found, gradient, "spectral_radius", index, label)
        for panel, figure_name in ((steps, "steps"), (damping, "damping")):
            _over_steps(panel, found, gradient, f"adaptive-0.1/{figure_name}", index, label)
    radius.axhline(1, color="#9aa3af", linewidth=0.8)
    radius.set(title="the Jacobian", xlabel="step", ylabel="spectral radius, median over samples")
    steps.set(title="adaptive, residual 0.1", xlabel="step", ylabel="chosen k, mean over samples")
    damping.set(title="adaptive, residual 0.1", xlabel="step", ylabel="chosen λ, mean over samples")
    radius.legend(loc="upper right", fontsize=7.5)
    return Drawing(
        "spectrum-and-choices",
        figure,
        "The Jacobian's spectral radius at the equilibrium along training, and how many steps the adaptive phantom "
        "gradient takes there for a relative residual of 0.1, with which damping.",
    )


def _over_steps(panel: Axes, found: Gathered, gradient: str, figure: str, index: int, label: str) -> None:
    trainings = found.trainings[gradient]
    if not trainings:
        return
    steps = [look.step for look in trainings[0]]
    curves = [[look.figure(figure) for look in looks] for looks in trainings if [look.step for look in looks] == steps]
    _band(panel, steps, curves, {**style(index), "color": COLOURS[index % len(COLOURS)], "markersize": 3}, label)


def _band(panel: Axes, x: Sequence[float], curves: Sequence[Sequence[float]], look: dict[str, Any], label: str) -> None:
    if not curves:
        return
    columns = list(zip(*curves, strict=True))
    panel.plot(x, [mean(column) for column in columns], label=label, **look)
    panel.fill_between(
        x, list(map(min, columns)), list(map(max, columns)), color=look["color"], alpha=0.12, linewidth=0
    )
