"""The recipe that fits a sound."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

from torchimplicit.recipes.fields.audio.config import SoundConfig
from torchimplicit.recipes.fields.audio.show import export, show
from torchimplicit.recipes.fields.audio.sounds import Sound, sound_of
from torchimplicit.recipes.fields.memory import chunk_points
from torchimplicit.recipes.fields.points import Grid
from torchimplicit.recipes.fields.runner import FieldRunner
from torchimplicit.recipes.fields.task import FieldTask, Parts, SignalToNoise
from torchimplicit.recipes.runtime.run import Run
from torchimplicit.recipes.runtime.trainer import Results

SCALE_A_SECOND = 25000 / 7
"""Of the frequencies: the paper's for its file of seven seconds, and the same pitches in a sound of another length."""


def build(config: SoundConfig) -> FieldTask:
    """The task."""
    found = sound(config)
    grid = Grid(found.samples)
    power = float(found.samples.double().square().mean())
    count, channels = found.samples.shape
    about = (
        f"{found.name}: {count / found.rate:.3g} s at {found.rate} Hz, {count} samples"
        + (f" in {channels} channels" if channels > 1 else "")
        + "".join(f", {note}" for note in found.notes)
        + "."
    )
    scoring = SignalToNoise(low=-1.0, high=1.0, power=power)
    return FieldTask(config, grid, Parts.same(grid), SCALE_A_SECOND * found.seconds, about=about, scoring=scoring)


def sound(config: SoundConfig) -> Sound:
    """What is fitted."""
    return _read(config.file, config.sound, config.start, config.seconds, config.rate, config.mono)


@lru_cache(maxsize=1)
def _read(*chosen: Any) -> Sound:
    """Kept, for it is asked for when the settings are checked, when the model is made and when the fit is shown."""
    file, name, start, seconds, rate, mono = chosen
    return sound_of(SoundConfig(file=file, sound=name, start=start, seconds=seconds, rate=rate, mono=mono))


def ready(config: SoundConfig) -> None:
    """Raise where the sound cannot be read, or its states have no room."""
    chunk_points(config, len(sound(config).samples))


def _show(config: SoundConfig, task: FieldTask, results: Results, run: Run) -> None:
    show(config, sound(config), task, results, run)


def _export(config: SoundConfig, task: FieldTask, sizes: tuple[int, ...], run: Run) -> Path:
    return export(sound(config), task, sizes, run)


RUNNER = FieldRunner(build, _show, ready, _export)
