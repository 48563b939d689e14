"""Frames side by side, and how well each is fitted."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib
from matplotlib.figure import Figure
from torch import Tensor

from torchimplicit.recipes.runtime.page import FIGURE, axes, style

SHOWN = 6
"""Frames in the figure, spread evenly over the video."""


def chosen(count: int) -> list[int]:
    """Which frames are shown."""
    shown = min(SHOWN, count)
    return sorted({round(i * (count - 1) / max(1, shown - 1)) for i in range(shown)})


def strip(rows: dict[str, Sequence[Tensor]]) -> Figure:
    """Frames of videos, each a row under its name: pictures uint8 ``[height, width, channels]``."""
    first, *_ = rows.values()
    numbers = chosen(len(first))
    height, width = first[0].shape[:2]
    across = 9.0 / len(numbers)
    with matplotlib.rc_context(FIGURE):
        figure = Figure(figsize=(9.0, len(rows) * across * height / width + 0.35), layout="constrained")
        grid = figure.subplots(len(rows), len(numbers), squeeze=False)
        for line, (name, pictures) in zip(grid, rows.items(), strict=True):
            for ax, number in zip(line, numbers, strict=True):
                shown = pictures[number].numpy()
                ax.imshow(shown[:, :, 0] if shown.shape[2] == 1 else shown, cmap="gray", vmin=0, vmax=255)
                ax.set(xticks=[], yticks=[])
                ax.spines[:].set_visible(False)
                if pictures is first:
                    ax.set_title(f"frame {number}", fontsize=8)
            line[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
    return figure


def over_frames(decibels: Sequence[float]) -> Figure:
    """The PSNR of every frame."""
    with matplotlib.rc_context(FIGURE):
        figure, (ax,) = axes(1, width=6.0, height=3.0)
        ax.plot(range(len(decibels)), decibels, **style(0))
        ax.set(xlabel="frame", ylabel="PSNR (dB)")
    return figure
