"""The settings of the recipe that fits a sound."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from torchimplicit.recipes.fields.settings import Representation, full_batch, truncated
from torchimplicit.recipes.runtime.errors import UserError
from torchimplicit.recipes.runtime.settings import Equilibria, Machine, Optimization, not_negative, positive

SoundName = Literal["melody", "vowels"]

LOWEST_RATE = 100
HIGHEST_RATE = 384_000


@dataclass(frozen=True, kw_only=True)
class SoundConfig:
    """A field fitted to a sound."""

    file: Path | None = None
    """Your own sound: WAV, of integers or floating-point numbers, of up to eight channels."""

    sound: SoundName = "melody"
    """Where --file is not given: a sound that is synthesized on the spot, of plucked notes or of sung vowels."""

    start: float = 0.0
    """Where in a file the excerpt begins, in seconds."""

    seconds: float | None = 3.0
    """Of the excerpt; None takes all that follows."""

    rate: int = 8000
    """Samples a second; a file of a higher rate is reduced to it."""

    mono: bool = False
    """Average the channels. Otherwise the field has a value for each."""

    export_size: int | None = None
    """Also sample the field so many times a second: into export.wav."""

    representation: Representation = field(default_factory=Representation)
    optimization: Optimization = field(default_factory=Optimization)
    equilibria: Equilibria = field(default_factory=Equilibria)
    machine: Machine = field(default_factory=Machine)

    def __post_init__(self) -> None:
        positive(self, "seconds", "rate", "export_size")
        not_negative(self, "start")
        if self.file is None and self.seconds is None:
            raise UserError("--seconds None takes all of a file, and there is none; add --file sound.wav")
        for name, value in (("--rate", self.rate), ("--export-size", self.export_size)):
            if value is not None and not LOWEST_RATE <= value <= HIGHEST_RATE:
                raise UserError(f"{name} {value} must lie in [{LOWEST_RATE}, {HIGHEST_RATE}] samples a second")


def audio() -> SoundConfig:
    """Three seconds at 8 kHz, a few minutes on one core. The paper's: --seconds None --rate 44100 --width 256
    --steps 3000, on the seven seconds of its file."""
    return SoundConfig(optimization=full_batch(1000, 100), equilibria=truncated())
