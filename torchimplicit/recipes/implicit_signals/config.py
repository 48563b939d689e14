"""The settings of the table."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from torchimplicit.recipes.options import positive
from torchimplicit.recipes.reproduce.settings import Plan
from torchimplicit.recipes.training.settings import Machine


@dataclass(frozen=True, kw_only=True)
class SignalsConfig:
    """Three filters, implicit and explicit, on a sound and on a video."""

    plan: Plan = field(default_factory=lambda: Plan(seeds=2, together=12))

    sound_file: Path | None = None
    """A WAV file; by default a melody that is synthesized."""

    video_file: Path | None = None
    """A video as implicit-video takes it; by default moving shapes that are drawn."""

    sound_from: float = 0.0
    """Where in the sound's file the excerpt begins, in seconds."""

    sound_seconds: float | None = None
    """How long it is; by default 2, and the whole file at the paper's scale."""

    sound_rate: int | None = None
    """Samples a second; by default 8000, and the paper's 44100."""

    video_frames: int | None = None
    """By default 10, and at the paper's scale the whole file."""

    video_size: int | None = None
    """Pixels of the longest side; by default 48, and 512 at the paper's scale."""

    width: int | None = None
    """By default 64; at the paper's scale 256 for the sound and 1024 for the video."""

    steps: int | None = None
    """By default 400; at the paper's scale 3000 for the sound and 10000 for the video."""

    rows: tuple[str, ...] = ()
    """Only these, such as sound-fourier-implicit, video-gabor-explicit and cost; by default all."""

    machine: Machine = field(default_factory=lambda: Machine(tensorboard=False))

    def __post_init__(self) -> None:
        positive(self, "sound_seconds", "sound_rate", "video_frames", "video_size", "width", "steps")


def default() -> SignalsConfig:
    """On a CPU: two seconds at 8 kHz and ten frames of 48 pixels, models of width 64."""
    return SignalsConfig()
