"""What there is to see and to hear of a sound's fit."""

from __future__ import annotations

import math
from pathlib import Path

from torchimplicit.recipes.fields.audio.config import HIGHEST_RATE, LOWEST_RATE, SoundConfig
from torchimplicit.recipes.fields.audio.figures import spectrograms, waveforms
from torchimplicit.recipes.fields.audio.sounds import MOST_SAMPLES, Sound, quantized, save
from torchimplicit.recipes.fields.report import write_page
from torchimplicit.recipes.fields.task import FieldTask, decibels
from torchimplicit.recipes.runtime.errors import UserError
from torchimplicit.recipes.runtime.page import save_figure
from torchimplicit.recipes.runtime.run import Run
from torchimplicit.recipes.runtime.trainer import Results


def show(config: SoundConfig, sound: Sound, task: FieldTask, results: Results, run: Run) -> None:
    """Write the reconstruction, the error, the export where one is asked for, and the page."""
    folder = run.path / "figures"
    folder.mkdir(exist_ok=True)
    truth = sound.samples
    values = task.on_grid([len(truth)]).clamp(-1, 1)
    heard = [
        (run.product("original.wav"), "The sound.", truth),
        (run.product("reconstruction.wav"), "The field at its samples.", values),
        (run.product("error.wav"), "The error, as loud as it is.", values - truth),
    ]
    for path, _, samples in heard:
        save(quantized(samples * sound.peak), sound.rate, path)
    pictures = [
        (folder / "waveform.png", "The sound and the field: the whole, and the loudest hundredth of a second or so."),
        (
            folder / "spectrogram.png",
            "Spectrograms of the sound, the field and the error: the power in each band of frequencies over time.",
        ),
    ]
    save_figure(waveforms(truth, values, sound.rate), pictures[0][0], 110)
    drawn = spectrograms({"sound": truth, "field": values, "error": values - truth}, sound.rate)
    save_figure(drawn, pictures[1][0], 110)
    error = float((values - truth).double().square().mean())
    power = float(truth.double().square().mean())
    notes = [
        f"Over all samples: {decibels(error, 2.0):.2f} dB PSNR, whose peak is the range from -1 to 1 of the sound at "
        f"full scale, and {10 * math.log10(power / max(error, 1e-20)):.2f} dB beside the sound's own power "
        "(SNR). All samples were fitted: the validation and the test are on the same ones.",
    ]
    shown = [*pictures, *((path, caption) for path, caption, _ in heard)]
    if config.export_size is not None:
        written = export(sound, task, (config.export_size,), run)
        shown.append((written, f"The field at {config.export_size} samples a second (export.wav)."))
    write_page("A sound as a field", task, results, run, shown, notes)


def export(sound: Sound, task: FieldTask, sizes: tuple[int, ...], run: Run) -> Path:
    """Write ``export.wav``: the field so many times a second."""
    if len(sizes) != 1:
        raise UserError("--export-size takes one number for a sound: its samples a second")
    (rate,) = sizes
    count = round(sound.seconds * rate)
    if not LOWEST_RATE <= rate <= HIGHEST_RATE or count > 4 * MOST_SAMPLES:
        raise UserError(f"--export-size {rate} must lie in [{LOWEST_RATE}, {HIGHEST_RATE}] samples a second")
    path = run.product("export.wav")
    samples = task.on_grid([count], lambda values: quantized(values * sound.peak))
    save(samples, rate, path)
    return path
