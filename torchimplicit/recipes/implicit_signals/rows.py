"""The rows: which signal, which model, and what was published."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from torchimplicit.recipes.fields.audio.config import SoundConfig, audio
from torchimplicit.recipes.fields.cost import FieldCostConfig
from torchimplicit.recipes.fields.settings import FILTERS, FilterKind, Representation, full_batch
from torchimplicit.recipes.fields.video.config import VideoConfig, video
from torchimplicit.recipes.implicit_generalization.rows import NAMES
from torchimplicit.recipes.implicit_signals.config import SignalsConfig
from torchimplicit.recipes.options import known_rows
from torchimplicit.recipes.reproduce.jobs import Job

COST = "cost"
Kind = Literal["sound", "video"]
KINDS: tuple[Kind, ...] = ("sound", "video")

# Huang et al. 2021, (Implicit)²: PSNR in dB of the video, one layer of width 1024.
PUBLISHED_VIDEO: dict[tuple[FilterKind, bool], float] = {
    ("siren", True): 26.03,
    ("siren", False): 25.12,
    ("fourier", True): 25.85,
    ("fourier", False): 24.97,
    ("gabor", True): 26.45,
    ("gabor", False): 26.15,
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One model of one signal."""

    kind: Kind
    filter: FilterKind
    implicit: bool

    @property
    def name(self) -> str:
        """For folders and the command line."""
        return f"{self.kind}-{self.filter}-{'implicit' if self.implicit else 'explicit'}"

    @property
    def label(self) -> str:
        """For people."""
        return NAMES[self.filter, self.implicit]

    @property
    def twin(self) -> Row:
        """The explicit model of as many parameters."""
        return replace(self, implicit=False)

    @property
    def published(self) -> float | None:
        """In dB, as far as known here."""
        return PUBLISHED_VIDEO[self.filter, self.implicit] if self.kind == "video" else None


ROWS = {
    row.name: row
    for row in (
        Row(kind=kind, filter=name, implicit=implicit)
        for kind in KINDS
        for name in FILTERS
        for implicit in (True, False)
    )
}


def jobs(config: SignalsConfig) -> list[Job]:
    """Seed by seed, so that all rows have seen the machine alike, and the costs after the first seed."""
    known_rows(config.rows, (*ROWS, COST))
    made: list[Job] = []
    for seed in config.plan.all_seeds:
        for row in ROWS.values():
            if not config.rows or row.name in config.rows:
                recipe = "implicit-audio" if row.kind == "sound" else "implicit-video"
                made.append(Job(named(row, seed), recipe, training(config, row, seed)))
        if seed == config.plan.first_seed and (not config.rows or COST in config.rows):
            made.append(Job(COST, "fields-cost", costs(config, seed)))
    return made


def named(row: Row, seed: int) -> str:
    """The name of a run."""
    return f"{row.name}-seed{seed}"


def costs(config: SignalsConfig, seed: int) -> FieldCostConfig:
    """The job that measures steps of all rows in turn."""
    several = [(name, training(config, row, seed)) for name, row in ROWS.items()]
    return FieldCostConfig(
        names=tuple(name for name, _ in several),
        sounds=tuple(one for _, one in several if isinstance(one, SoundConfig)),
        videos=tuple(one for _, one in several if isinstance(one, VideoConfig)),
        warm_steps=10,
        rounds=7,
        steps_a_turn=1,
    )


def training(config: SignalsConfig, row: Row, seed: int) -> SoundConfig | VideoConfig:
    """The settings of one run."""
    paper = config.plan.scale == "paper"
    steps = config.steps or ((3000 if row.kind == "sound" else 10000) if paper else 400)
    width = config.width or ((256 if row.kind == "sound" else 1024) if paper else 64)
    model = Representation(filter=row.filter, implicit=row.implicit, width=width)
    optimization = replace(full_batch(steps, max(1, steps // 8)), seed=seed)
    if row.kind == "sound":
        whole = paper and config.sound_file is not None
        return replace(
            audio(),
            file=config.sound_file,
            start=config.sound_from,
            seconds=config.sound_seconds or (None if whole else 7.0 if paper else 2.0),
            rate=config.sound_rate or (44100 if paper else 8000),
            representation=model,
            optimization=optimization,
            machine=config.machine,
        )
    whole = paper and config.video_file is not None
    return replace(
        video(),
        file=config.video_file,
        frames=config.video_frames or (None if whole else 250 if paper else 10),
        size=config.video_size or (512 if paper else 48),
        # the states of every pixel of a long video have no room
        representation=replace(model, amortize="off", frequencies=128.0) if paper else model,
        optimization=replace(optimization, batch_size=65536),
        machine=config.machine,
    )
