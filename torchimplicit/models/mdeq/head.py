"""The head of the multiscale model: class scores from the state of all resolutions."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional

from torchimplicit.models.mdeq.config import MDEQConfig

WIDENING = 4
"""A bottleneck's outer channels over its inner ones."""


class Bottleneck(nn.Module):
    """The bottleneck block of residual networks (He et al. 2016), whose main path's normalizations have no scale."""

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        outer = WIDENING * inner
        self.body = nn.Sequential(
            nn.Conv2d(channels, inner, 1, bias=False),
            nn.BatchNorm2d(inner, affine=False),
            nn.ReLU(),
            nn.Conv2d(inner, inner, 3, padding=1, bias=False),
            nn.BatchNorm2d(inner, affine=False),
            nn.ReLU(),
            nn.Conv2d(inner, outer, 1, bias=False),
            nn.BatchNorm2d(outer, affine=False),
        )
        self.shortcut: nn.Module = nn.Identity()
        if channels != outer:
            self.shortcut = nn.Sequential(nn.Conv2d(channels, outer, 1, bias=False), nn.BatchNorm2d(outer))

    def forward(self, z: Tensor) -> Tensor:
        """``[batch, 4 * inner, height, width]`` from ``[batch, channels, height, width]``."""
        return functional.relu(self.body(z) + self.shortcut(z))


class ClassificationHead(nn.Module):
    """Widens every resolution, merges from the finest to the coarsest, pools, and scores.

    Args:
        config: the model's.

    Shapes: the state of :class:`MDEQCell` to ``[batch, classes]``.
    """

    def __init__(self, config: MDEQConfig) -> None:
        super().__init__()
        widths = [WIDENING * inner for inner in config.head_channels]
        self.widen = nn.ModuleList(
            Bottleneck(channels, inner) for channels, inner in zip(config.channels, config.head_channels, strict=True)
        )
        self.merge = nn.ModuleList(
            nn.Sequential(nn.Conv2d(fine, coarse, 3, stride=2, padding=1), nn.BatchNorm2d(coarse), nn.ReLU())
            for fine, coarse in pairwise(widths)
        )
        self.last = nn.Sequential(
            nn.Conv2d(widths[-1], config.final_channels, 1), nn.BatchNorm2d(config.final_channels), nn.ReLU()
        )
        self.scores = nn.Linear(config.final_channels, config.classes)

    def forward(self, z: Sequence[Tensor]) -> Tensor:
        """The scores."""
        features = self.widen[0](z[0])
        for merge, widen, state in zip(self.merge, list(self.widen)[1:], z[1:], strict=True):
            features = merge(features) + widen(state)
        return self.scores(self.last(features).mean(dim=(2, 3)))
