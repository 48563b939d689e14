"""The map of the multiscale model; its fixed point is the joint state of all resolutions."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional

from torchimplicit.models.mdeq.config import MDEQConfig
from torchimplicit.nn import VariationalDropout, weight_norm


class ResidualBlock(nn.Module):
    """``N₃(relu(z + N₂(x + D(conv₂(relu(N₁(conv₁(z))))))))`` with group normalizations ``N`` and dropout ``D``
    (Bai et al. 2020, eq. 3 and figure 2).

    Args:
        channels: channels of ``z`` and ``x``.
        config: the sizes of the model.

    Shapes: ``z`` and ``x``: ``[batch, channels, height, width]``; the result is like ``z``.
    """

    def __init__(self, channels: int, config: MDEQConfig) -> None:
        super().__init__()
        inner = config.expansion * channels
        self.conv1 = _normalized(nn.Conv2d(channels, inner, 3, padding=1, bias=False), config)
        self.norm1 = nn.GroupNorm(config.groups, inner)
        self.conv2 = _normalized(nn.Conv2d(inner, channels, 3, padding=1, bias=False), config)
        self.dropout = VariationalDropout(config.dropout)
        self.norm2 = nn.GroupNorm(config.groups, channels)
        self.norm3 = nn.GroupNorm(config.groups, channels)

    def forward(self, z: Tensor, x: Tensor | None = None) -> Tensor:
        """One application, with the injection ``x`` where there is one."""
        branch = self.dropout(self.conv2(functional.relu(self.norm1(self.conv1(z)))))
        branch = self.norm2(branch if x is None else branch + x)
        return self.norm3(functional.relu(branch + z))


class Branch(nn.Module):
    """The residual blocks of one resolution; the injection goes into the first."""

    def __init__(self, channels: int, blocks: int, config: MDEQConfig) -> None:
        super().__init__()
        self.first = ResidualBlock(channels, config)
        self.others = nn.Sequential(*(ResidualBlock(channels, config) for _ in range(blocks - 1)))

    def forward(self, z: Tensor, x: Tensor | None) -> Tensor:
        """One application."""
        return self.others(self.first(z, x))


class Downsampling(nn.Sequential):
    """Halves the resolution ``halvings`` times, by convolutions of stride 2."""

    def __init__(self, source: int, target: int, halvings: int, groups: int) -> None:
        steps: list[nn.Module] = []
        for step in range(halvings):
            last = step == halvings - 1
            channels = target if last else source
            steps += [
                nn.Conv2d(source, channels, 3, stride=2, padding=1, bias=False),
                nn.GroupNorm(groups, channels),
            ]
            if not last:
                steps.append(nn.ReLU())
        super().__init__(*steps)


class Upsampling(nn.Sequential):
    """To the channels of a finer branch; the pixels are repeated when they are added there."""

    def __init__(self, source: int, target: int, groups: int) -> None:
        super().__init__(nn.Conv2d(source, target, 1, bias=False), nn.GroupNorm(groups, target))


class MDEQCell(nn.Module):
    """One residual step on every resolution, then the fusion of all with all (Bai et al. 2020, section 4).

    Every sample is treated on its own, so that ``rowwise=True`` holds, with dropout too.

    Args:
        config: the sizes of the model.

    Shapes: the state is a list of ``[batch, channels[i], height_i, width_i]``, each resolution half the one before
    (rounded up); the injection ``x`` is like its first entry.
    """

    def __init__(self, config: MDEQConfig) -> None:
        super().__init__()
        channels, groups = config.channels, config.groups
        self.channels = channels
        self.branches = nn.ModuleList(
            Branch(width, count, config) for width, count in zip(channels, config.block_counts, strict=True)
        )
        self.paths = nn.ModuleDict()
        self.after = nn.ModuleList()
        if len(channels) == 1:
            return
        for target, wide in enumerate(channels):
            for source, narrow in enumerate(channels):
                if source < target:
                    self.paths[_path(source, target)] = Downsampling(narrow, wide, target - source, groups)
                elif source > target:
                    self.paths[_path(source, target)] = Upsampling(narrow, wide, groups)
            self.after.append(
                nn.Sequential(
                    _normalized(nn.Conv2d(wide, wide, 1, bias=False), config),
                    nn.GroupNorm(config.groups_after_fusion, wide, affine=config.affine_after_fusion),
                )
            )

    def initial_state(self, x: Tensor) -> list[Tensor]:
        """Zeros, in the precision of the parameters: under autocast the injection comes in a lower one."""
        batch, _, height, width = x.shape
        dtype = next(self.parameters()).dtype
        state = []
        for channels in self.channels:
            state.append(x.new_zeros(batch, channels, height, width, dtype=dtype))
            height, width = (height + 1) // 2, (width + 1) // 2
        return state

    def forward(self, z: Sequence[Tensor], x: Tensor) -> list[Tensor]:
        """One application of the map."""
        refined = [
            branch(state, None if level else x)
            for level, (state, branch) in enumerate(zip(z, self.branches, strict=True))
        ]
        if len(refined) == 1:
            return refined
        return [after(functional.relu(self._gathered(refined, level))) for level, after in enumerate(self.after)]

    def _gathered(self, refined: Sequence[Tensor], level: int) -> Tensor:
        """Return the sum of what all branches contribute to the branch ``level``."""
        total = refined[level]
        for source, state in enumerate(refined):
            if source == level:
                continue
            state = self.paths[_path(source, level)](state)
            total = total + (functional.interpolate(state, total.shape[2:]) if source > level else state)
        return total


def _path(source: int, target: int) -> str:
    return f"{source}to{target}"


def _normalized(conv: nn.Conv2d, config: MDEQConfig) -> nn.Conv2d:
    return weight_norm(conv) if config.weight_norm else conv
