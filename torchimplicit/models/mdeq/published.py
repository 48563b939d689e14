"""The names of the reference implementations' tensors."""

from __future__ import annotations

from collections.abc import Iterator

from torchimplicit.models.mdeq.config import MDEQConfig

_STAGES = ("fullstage", "full_stage", "deq.func")
"""The cell's name in locuslab's ``mdeq`` and ``deq`` repositories, in TorchDEQ's zoo, and again in ``mdeq``."""


def published_names(config: MDEQConfig) -> dict[str, str]:
    """From the beginnings of the reference implementations' names to those of :class:`MDEQ` with this config."""
    names = dict(_stem(config)) | dict(_head(config))
    for ours, theirs in _cell(config):
        names |= {f"{stage}.{theirs}": f"equilibrium.cell.{ours}" for stage in _STAGES}
    return names


def _stem(config: MDEQConfig) -> Iterator[tuple[str, str]]:
    convolutions = max(2, config.downsamplings)
    for step in range(convolutions):
        conv, norm = (f"DS{step + 1}", f"DS{step + 1}-BN") if step > 1 else (str(3 * step), str(3 * step + 1))
        yield f"downsample.{conv}.", f"stem.{3 * step}."
        yield f"downsample.{norm}.", f"stem.{3 * step + 1}."
    for part in (0, 1):
        yield f"stage0.{part}.", f"stem.{3 * convolutions + part}."


def _cell(config: MDEQConfig) -> Iterator[tuple[str, str]]:
    """Our beginnings and theirs, below the cell."""
    for level, count in enumerate(config.block_counts):
        for block in range(count):
            ours = f"branches.{level}." + (f"others.{block - 1}." if block else "first.")
            theirs = f"branches.{level}.blocks.{block}."
            yield f"{ours}conv", f"{theirs}conv"
            yield f"{ours}norm", f"{theirs}gn"
    levels = range(len(config.channels))
    for target in levels:
        for source in levels:
            ours, theirs = f"paths.{source}to{target}.", f"fuse_layers.{target}.{source}.net."
            if source > target:
                yield f"{ours}0.", f"{theirs}conv."
                yield f"{ours}1.", f"{theirs}gnorm."
            for step in range(target - source):
                yield f"{ours}{3 * step}.", f"{theirs}{step}.conv."
                yield f"{ours}{3 * step + 1}.", f"{theirs}{step}.gnorm."
        yield f"after.{target}.0.", f"post_fuse_layers.{target}.conv."
        yield f"after.{target}.1.", f"post_fuse_layers.{target}.gnorm."


def _head(config: MDEQConfig) -> Iterator[tuple[str, str]]:
    for level in range(len(config.channels)):
        ours, theirs = f"head.widen.{level}.", f"incre_modules.{level}.0."
        for step in range(3):
            yield f"{theirs}conv{step + 1}.", f"{ours}body.{3 * step}."
            yield f"{theirs}bn{step + 1}.", f"{ours}body.{3 * step + 1}."
        yield f"{theirs}downsample.", f"{ours}shortcut."
    yield "downsamp_modules.", "head.merge."
    yield "final_layer.", "head.last."
    yield "classifier.", "head.scores."
