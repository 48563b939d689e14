"""The sizes of a multiscale deep equilibrium model, and the published ones by name."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, final

from torchimplicit.validation import at_least


@final
@dataclass(frozen=True, kw_only=True)
class MDEQConfig:
    """The sizes of a multiscale deep equilibrium model. One entry of each tuple belongs to one branch, the highest
    resolution first; every branch has half the resolution of the one before.

    Args:
        image_channels: channels of the images.
        classes: number of classes.
        channels: channels of each branch's state.
        head_channels: inner channels of each branch's block in the head, whose output has four times as many.
        final_channels: channels of the last convolution, before pooling.
        blocks: residual blocks of each branch; ``None``: one each.
        expansion: a residual block's inner channels over its outer ones.
        groups: groups of the normalizations; half as many after the fusion (at least one).
        downsamplings: how often the stem halves the resolution before the equilibrium.
        dropout: the share of entries that variational dropout drops in each residual block, in [0, 1).
        weight_norm: whether the convolutions of the residual blocks and those after the fusion are weight-normalized.
        affine_after_fusion: whether the last normalization of the cell has a scale and a shift.

    Raises:
        ValueError: a number that makes no sense, or tuples of different lengths.
    """

    image_channels: int = 3
    classes: int = 10
    channels: tuple[int, ...]
    head_channels: tuple[int, ...]
    final_channels: int
    blocks: tuple[int, ...] | None = None
    expansion: int = 5
    groups: int = 8
    downsamplings: int = 0
    dropout: float = 0.0
    weight_norm: bool = True
    affine_after_fusion: bool = True

    def __post_init__(self) -> None:
        for name in ("image_channels", "classes", "final_channels", "expansion", "groups"):
            at_least("MDEQConfig", name, getattr(self, name), 1)
        at_least("MDEQConfig", "downsamplings", self.downsamplings, 0)
        branches = len(self.channels)
        at_least("MDEQConfig", "the number of branches (the length of channels)", branches, 1)
        for name, entries in (("head_channels", self.head_channels), ("blocks", self.block_counts)):
            if len(entries) != branches:
                raise ValueError(
                    f"MDEQConfig.{name} is {entries}, and needs one entry for each of the {branches} branches of "
                    f"channels = {self.channels}"
                )
        for name in ("channels", "head_channels", "block_counts"):
            for entry in getattr(self, name):
                at_least("MDEQConfig", f"an entry of {name}", entry, 1)
        for entry in self.channels:
            if entry % self.groups:
                raise ValueError(
                    f"MDEQConfig: {entry} channels cannot be normalized in {self.groups} groups of one size; take a "
                    f"multiple of {self.groups}, or other groups"
                )
            if entry % self.groups_after_fusion:
                raise ValueError(
                    f"MDEQConfig: {entry} channels cannot be normalized in {self.groups_after_fusion} groups, half of "
                    f"groups = {self.groups}, after the fusion; take an even number of groups"
                )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"MDEQConfig.dropout is {self.dropout}, and must lie in [0, 1)")

    @property
    def block_counts(self) -> tuple[int, ...]:
        """``blocks``, with its default filled in."""
        return (1,) * len(self.channels) if self.blocks is None else self.blocks

    @property
    def groups_after_fusion(self) -> int:
        """How many groups the last normalization of the cell has."""
        return max(self.groups // 2, 1)


def mdeq_tiny(**changes: Any) -> MDEQConfig:
    """MDEQ-Tiny for CIFAR-10: two branches of 24 channels, 158,890 parameters.

    The papers (Bai et al. 2020, table 1; Geng et al. 2021, table 1) give 170K for the model whose settings were
    published; the published settings have what is counted here, which agrees with a count of the reference code.

    Args:
        changes: fields of :class:`MDEQConfig` to set otherwise, such as ``dropout=0.25`` for the implicit rows.
    """
    config = MDEQConfig(channels=(24, 24), head_channels=(8, 16), final_channels=200, affine_after_fusion=False)
    return replace(config, **changes)


def mdeq_large(**changes: Any) -> MDEQConfig:
    """MDEQ-Large for CIFAR-10: four branches. 11,097,438 parameters; the papers say 10M and 11M.

    Args:
        changes: fields of :class:`MDEQConfig` to set otherwise, such as ``dropout=0.3``.
    """
    config = MDEQConfig(
        channels=(32, 64, 128, 256), head_channels=(14, 28, 56, 112), final_channels=1680, affine_after_fusion=False
    )
    return replace(config, **changes)


def mdeq_imagenet(**changes: Any) -> MDEQConfig:
    """MDEQ-Small for ImageNet, images of 224 pixels, whose resolution the stem halves twice: 16,808,936 parameters.

    The papers say 18M; the published settings give what is counted here, by the same rules that reproduce the counts
    of the other two. Where the rest would be is not known.

    Args:
        changes: fields of :class:`MDEQConfig` to set otherwise.
    """
    config = MDEQConfig(
        classes=1000,
        channels=(32, 64, 128, 256),
        head_channels=(24, 48, 96, 192),
        final_channels=2048,
        downsamplings=2,
    )
    return replace(config, **changes)


def mdeq_small(**changes: Any) -> MDEQConfig:
    """A model for images of 8 to 32 pixels that trains on a CPU in minutes: two branches of 16 channels, 54,650
    parameters for grey images. Downsampled twice, an image of 28 or 32 pixels costs a quarter of what it costs
    downsampled once.

    Args:
        changes: fields of :class:`MDEQConfig` to set otherwise, such as ``image_channels`` and ``downsamplings``.
    """
    config = MDEQConfig(
        image_channels=1,
        channels=(16, 16),
        head_channels=(8, 16),
        final_channels=64,
        expansion=2,
        groups=4,
        downsamplings=1,
    )
    return replace(config, **changes)
