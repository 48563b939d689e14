"""Grids of images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional


def mosaic(rows: Sequence[Tensor], gap: int = 1) -> Tensor:
    """Images ``[n, channels, height, width]``, a row of the picture each, as one image ``[height, width]``: white
    between, the channels averaged."""
    longest = max(len(row) for row in rows)
    strips = []
    for row in rows:
        grey = row.mean(dim=1).clamp(0, 1)
        grey = torch.cat((grey, grey.new_ones(longest - len(grey), *grey.shape[1:])))
        strips.append(torch.cat([functional.pad(tile, (gap, gap, gap, gap), value=1.0) for tile in grey], dim=1))
    return torch.cat(strips, dim=0)


def grid(named: Mapping[str, Sequence[Tensor]], width: float = 7.0) -> Figure:
    """Mosaics one above the other, each under its name."""
    pictures = {name: mosaic(rows) for name, rows in named.items()}
    heights = [width * picture.shape[0] / picture.shape[1] + 0.3 for picture in pictures.values()]
    figure = Figure(figsize=(width, sum(heights)), layout="constrained")
    panels = figure.subplots(len(pictures), 1, squeeze=False, height_ratios=heights)[:, 0]
    for panel, (name, picture) in zip(panels, pictures.items(), strict=True):
        panel.imshow(picture.numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        panel.set_title(name, loc="left", fontsize=9)
        panel.set_axis_off()
    return figure
