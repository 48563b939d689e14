"""The table's figures."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import TypeVar

from torch import Tensor

from torchimplicit.recipes.fields.audio.config import SoundConfig
from torchimplicit.recipes.fields.audio.figures import spectrograms
from torchimplicit.recipes.fields.audio.task import RUNNER as SOUNDS
from torchimplicit.recipes.fields.audio.task import sound
from torchimplicit.recipes.fields.images.pictures import quantized
from torchimplicit.recipes.fields.settings import FILTERS, FilterKind
from torchimplicit.recipes.fields.video.config import VideoConfig
from torchimplicit.recipes.fields.video.figures import strip
from torchimplicit.recipes.fields.video.task import RUNNER as VIDEOS
from torchimplicit.recipes.fields.video.task import clip
from torchimplicit.recipes.implicit_generalization.rows import NAMES
from torchimplicit.recipes.implicit_signals.config import SignalsConfig
from torchimplicit.recipes.implicit_signals.read import Measured
from torchimplicit.recipes.implicit_signals.rows import KINDS, Row, named, training
from torchimplicit.recipes.plotting import axes, style
from torchimplicit.recipes.reproduce.runner import Drawing
from torchimplicit.recipes.run import Run

C = TypeVar("C", SoundConfig, VideoConfig)

SHOWN: FilterKind = "fourier"
"""The filter whose fits are shown."""


def drawings(config: SignalsConfig, found: Measured, runs: dict[str, Run]) -> list[Drawing]:
    """Those for which there are runs."""
    made = [_curves(found)] if found.runs else []
    seed = config.plan.first_seed
    for kind in KINDS:
        pair = [Row(kind=kind, filter=SHOWN, implicit=implicit) for implicit in (True, False)]
        if all(_tested(found, row, seed) for row in pair):
            made.append(_sound(config, found, runs, pair) if kind == "sound" else _video(config, found, runs, pair))
    return made


def _tested(found: Measured, row: Row, seed: int) -> bool:
    one = found.runs.get((row.name, seed))
    return one is not None and one.test is not None


def _curves(found: Measured) -> Drawing:
    figure, panels = axes(2, width=5.2, height=3.6)
    for panel, kind in zip(panels, KINDS, strict=True):
        for index, name in enumerate(FILTERS):
            for implicit in (True, False):
                row = Row(kind=kind, filter=name, implicit=implicit)
                runs = [one for one in found.of(row) if one.validations]
                if not runs:
                    continue
                length = min(len(one.validations) for one in runs)
                steps = [runs[0].validations[i].step for i in range(length)]
                values = [fmean(one.validations[i].figures["PSNR"] for one in runs) for i in range(length)]
                look = {**style(index), "linestyle": "-" if implicit else "--"}
                panel.plot(steps, values, label=row.label, **look)
        panel.set(xlabel="steps", ylabel="PSNR, dB", title=f"the {kind}")
        if panel.has_data():
            panel.legend()
    return Drawing(
        "training",
        figure,
        "PSNR along training, mean over the seeds: implicit models (solid) and their explicit twins (dashed).",
    )


def _sound(config: SignalsConfig, found: Measured, runs: dict[str, Run], pair: list[Row]) -> Drawing:
    seed = config.plan.first_seed
    heard = sound(_settings(SoundConfig, config, pair[0]))
    lines = {"the sound": heard.samples}
    for row in pair:
        task = SOUNDS.task(training(config, row, seed), runs[named(row, seed)])
        lines[_titled(found, row, seed)] = task.on_grid([len(heard.samples)])
    return Drawing("sound", spectrograms(lines, heard.rate), _caption("Spectrograms of the sound"))


def _video(config: SignalsConfig, found: Measured, runs: dict[str, Run], pair: list[Row]) -> Drawing:
    seed = config.plan.first_seed
    seen = clip(_settings(VideoConfig, config, pair[0])).pixels
    frames: dict[str, Sequence[Tensor]] = {"video": list(seen)}
    for row in pair:
        task = VIDEOS.task(training(config, row, seed), runs[named(row, seed)])
        frames[_titled(found, row, seed)] = list(task.on_grid(seen.shape[:3], quantized))
    return Drawing("video", strip(frames), _caption("Frames of the video"))


def _settings(kind: type[C], config: SignalsConfig, row: Row) -> C:
    found = training(config, row, config.plan.first_seed)
    assert isinstance(found, kind)
    return found


def _titled(found: Measured, row: Row, seed: int) -> str:
    test = found.runs[row.name, seed].test
    assert test is not None
    return f"{row.label}\n{test.figures['PSNR']:.1f} dB"


def _caption(of: str) -> str:
    return f"{of} and of what {NAMES[SHOWN, True]} and {NAMES[SHOWN, False]} make of it, with the PSNR; the first seed."
