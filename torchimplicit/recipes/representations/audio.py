"""A sound as a field of time."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from torchimplicit.recipes.representations.fit import (
    FieldRunner,
    FieldTask,
    Grid,
    Parts,
    Representation,
    SignalToNoise,
    chunk_points,
    decibels,
    full_batch,
    noted,
    truncated,
    write_page,
)
from torchimplicit.recipes.runtime.errors import UserError
from torchimplicit.recipes.runtime.files import replacing
from torchimplicit.recipes.runtime.page import COLOURS, canvas, save_figure, styled
from torchimplicit.recipes.runtime.run import Run
from torchimplicit.recipes.runtime.settings import Equilibria, Machine, Optimization, not_negative, positive
from torchimplicit.recipes.runtime.trainer import Results

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# -- settings ----------------------------------------------------------------------------------------------------------


SoundName = Literal["melody", "vowels"]

LOWEST_RATE = 100
HIGHEST_RATE = 384_000


@dataclass(frozen=True, kw_only=True)
class SoundConfig:
    """A field fitted to a sound."""

    file: Path | None = None
    """Your own sound: WAV, FLAC, Ogg, MP3 or another format of libsndfile, with up to eight channels."""

    sound: SoundName = "melody"
    """Synthesized sound, if --file is not given: plucked notes or sung vowels."""

    start: float = 0.0
    """Start of the excerpt, in seconds."""

    seconds: float | None = 3.0
    """Length of the excerpt, in seconds; None takes the rest of the file."""

    rate: int = 8000
    """Sampling rate, in samples per second. Files with a higher rate are resampled."""

    mono: bool = False
    """Average the channels. By default the field has one value per channel."""

    export_size: int | None = None
    """Also sample the field at this rate, in samples per second, into export.wav."""

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


# -- Sounds made on the spot, by adding up harmonics -------------------------------------------------------------------


Waveform = np.ndarray[Any, np.dtype[np.float64]]

NOTES = ((0.0, 220.0), (0.125, 277.18), (0.25, 329.63), (0.375, 440.0), (0.5, 369.99), (0.625, 293.66), (0.75, 246.94))
"""The melody's notes: onset as a share of the whole, and frequency in Hz."""

VOWELS = (
    ((730.0, 90.0), (1090.0, 110.0), (2440.0, 160.0)),
    ((530.0, 70.0), (1840.0, 110.0), (2480.0, 160.0)),
    ((270.0, 60.0), (2290.0, 110.0), (3010.0, 170.0)),
    ((570.0, 80.0), (840.0, 100.0), (2410.0, 160.0)),
    ((300.0, 60.0), (870.0, 100.0), (2240.0, 160.0)),
)
"""Formants of a, e, i, o and u: frequencies and widths in Hz."""


def synthesized(name: SoundName, seconds: float, rate: int) -> Waveform:
    """The sound, ``[samples]``, whose greatest size is 1."""
    time = np.arange(max(1, round(seconds * rate))) / rate
    signal = _melody(time, seconds, rate) if name == "melody" else _vowels(time, seconds, rate)
    normalized: Waveform = signal / np.abs(signal).max()
    return normalized


def _melody(time: Waveform, seconds: float, rate: int) -> Waveform:
    """Plucked notes that ring into each other; higher harmonics die sooner."""
    total = np.zeros_like(time)
    for begin, pitch in NOTES:
        after = np.maximum(time - begin * seconds, 0.0)
        attack = 1 - np.exp(-after / 0.004)
        for k in range(1, 9):
            if k * pitch < 0.45 * rate:
                decay = np.exp(-(1.5 + 1.2 * k) * after)
                total += attack * decay * np.sin(2 * math.pi * k * pitch * after) / k**1.2
    return total


def _vowels(time: Waveform, seconds: float, rate: int) -> Waveform:
    """Five vowels sung one into the next: harmonics of a gliding voice, as loud as the formants let them through."""
    place = time / seconds
    pitch = 130 * (1 + 0.12 * np.sin(2 * math.pi * 0.8 * place)) * (1 + 0.01 * np.sin(2 * math.pi * 5.5 * time))
    phase = 2 * math.pi * np.cumsum(pitch) / rate
    turn = place * len(VOWELS)
    total = np.zeros_like(time)
    for k in range(1, int(0.45 * rate / pitch.max()) + 1):
        loudness = np.zeros_like(time)
        for number, formants in enumerate(VOWELS):
            share = np.clip(1.5 - 2 * np.abs(turn - number - 0.5), 0.0, 1.0)
            through = sum(1 / (1 + ((k * pitch - at) / width) ** 2) for at, width in formants)
            loudness += share * through
        total += loudness * np.sin(k * phase) / k**0.5
    fade = np.minimum(1.0, np.minimum(place, 1 - place) * seconds / 0.05)
    return total * fade


# -- Sounds from files, and back ---------------------------------------------------------------------------------------


MOST_SAMPLES = 1 << 23
"""Largest number of samples: beyond it the field's 32-bit coordinates hardly tell samples apart."""

MOST_VALUES = 1 << 28
"""Largest number of values in the part of a file that is read into memory."""

LEAST_SAMPLES = 64
"""Smallest number of samples worth fitting."""

MOST_CHANNELS = 8


@dataclass(frozen=True)
class Sound:
    """A sound, with notes on how it was read.

    Attributes:
        name: name to display.
        samples: float32 ``[samples, channels]``, whose greatest size is 1.
        rate: samples a second.
        peak: what 1 was in the file.
        notes: what a person who gave the file should know.
    """

    name: str
    samples: Tensor
    rate: int
    peak: float
    notes: tuple[str, ...] = ()

    @property
    def seconds(self) -> float:
        """The sound's length in seconds."""
        return len(self.samples) / self.rate


def sound(config: SoundConfig) -> Sound:
    """Read or synthesize the sound of the settings.

    Raises:
        UserError: if it cannot be read, or there is nothing in it to fit.
    """
    return _sound(config.file, config.sound, config.start, config.seconds, config.rate, config.mono)


@lru_cache(maxsize=1)
def _sound(file: Path | None, name: SoundName, start: float, seconds: float | None, rate: int, mono: bool) -> Sound:
    """Cached, as the check, the model and the display need it."""
    if file is not None:
        return read_file(file, start, seconds, rate, mono)
    assert seconds is not None
    _check_length(name, seconds * rate)
    samples = synthesized(name, seconds, rate)[:, None]
    return Sound(f"synthesized {name}", torch.from_numpy(samples.astype(np.float32)), rate, 1.0)


def read_file(path: Path, start: float, seconds: float | None, rate: int, mono: bool) -> Sound:
    """An excerpt of a sound file, at ``rate`` at most.

    Raises:
        UserError: as above.
    """
    import soundfile

    if not path.is_file():
        what = "is a folder; give a WAV file" if path.is_dir() else "does not exist"
        raise UserError(f"--file {path} {what}")
    try:
        with soundfile.SoundFile(path) as file:
            file_rate, count, channels = file.samplerate, file.frames, file.channels
            short = re.search(r"^data : \d+ \(should be", file.extra_info, re.MULTILINE)
            notes = ["the file is cut short: what there is of it"] if short else []
            first, last = _excerpt(path, file_rate, count, start, seconds)
            _check_length(path.name, (last - first) * min(1.0, rate / file_rate))
            if (last - first) * channels > MOST_VALUES:
                raise UserError(f"{path} is too large; give a shorter --seconds")
            file.seek(first)
            values = file.read(last - first, dtype="float64", always_2d=True)
    except (soundfile.SoundFileError, OSError, ValueError, MemoryError) as error:
        raise UserError(
            f"{path} cannot be read ({error}); it is damaged, or no sound file that libsndfile knows, such as WAV, "
            f"FLAC, Ogg and MP3; convert it, for instance with: ffmpeg -i {path.name} {path.stem}.wav"
        ) from None
    if not np.isfinite(values).all():
        raise UserError(f"{path} holds NaN or infinity")
    if first > 0 or last < count:
        notes.append(f"from {first / file_rate:.3g} s to {last / file_rate:.3g} s of {count / file_rate:.3g} s")
    if mono and channels > 1:
        notes.append(f"the mean of {channels} channels")
        values = values.mean(axis=1, keepdims=True)
    if values.shape[1] > MOST_CHANNELS:
        raise UserError(f"{path} has {channels} channels, and {MOST_CHANNELS} at most are fitted; add --mono")
    if rate < file_rate:
        from scipy.signal import resample_poly

        common = math.gcd(rate, file_rate)
        values = resample_poly(values, rate // common, file_rate // common, axis=0)
        notes.append(f"reduced from {file_rate} Hz")
    if len(values) < LEAST_SAMPLES:
        raise UserError(f"{path} has {len(values)} samples there; {LEAST_SAMPLES} at least are needed")
    peak = float(np.abs(values).max())
    if peak == 0:
        raise UserError(f"{path} is silent there; choose another --start")
    if peak > 1 + 1e-3 and rate >= file_rate:
        notes.append(f"louder than full scale ({peak:.3g}): written at full scale")
    samples = torch.from_numpy((values / peak).astype(np.float32))
    return Sound(path.name, samples, min(rate, file_rate), min(peak, 1.0), tuple(notes))


def _excerpt(path: Path, rate: int, count: int, start: float, seconds: float | None) -> tuple[int, int]:
    """The first sample to read, and the one after the last."""
    if count == 0:
        raise UserError(f"{path} holds no samples")
    if not 0 < rate <= 10 * HIGHEST_RATE:
        raise UserError(f"{path} says it has {rate} samples a second; the file may be damaged")
    if start >= count / rate:
        raise UserError(f"--start {start:g} is past the end of {path}, which lasts {count / rate:.3g} s")
    first = int(start * rate)
    return first, count if seconds is None else min(count, first + round(seconds * rate))


def save(samples: Tensor, rate: int, path: Path) -> None:
    """Write int16 ``[samples, channels]`` as a WAV file, atomically."""
    import soundfile

    with replacing(path) as draft:
        soundfile.write(draft, samples.numpy(), rate, format="WAV")


def quantized(samples: Tensor) -> Tensor:
    """Values from -1 to 1 as integers of 16 bits."""
    return (samples.clamp(-1, 1) * 32767).round().to(torch.int16)


def _check_length(name: str, samples: float) -> None:
    if samples > MOST_SAMPLES:
        raise UserError(
            f"{name} would have {samples:.3g} samples, and {MOST_SAMPLES} at most are fitted; give fewer --seconds or "
            "a lower --rate"
        )


# -- Waveforms and spectrograms ----------------------------------------------------------------------------------------


MOST_DRAWN = 4000
"""Points in a line plot. Longer lines are drawn by the minimum and maximum of each stretch."""


def waveforms(truth: Tensor, values: Tensor, rate: int) -> Figure:
    """Waveforms of the sound and the error over the whole length, and of the sound and the field at the loudest place,
    for the first channel."""
    truth, values = truth[:, 0], values[:, 0]
    with styled():
        figure = canvas(9, 2.9)
        whole, close = figure.subplots(1, 2)
        for line, label, colour in ((truth, "sound", COLOURS[0]), (values - truth, "error", COLOURS[1])):
            time, low, high = _envelope(line, rate)
            whole.fill_between(time, low, high, color=colour, label=label, linewidth=0.4, edgecolor=colour)
        part = _loudest(truth, max(32, min(len(truth), rate // 100)))
        time = 1000 * torch.arange(part.start, part.stop) / rate
        close.plot(time, truth[part], label="sound", color=COLOURS[0], linewidth=2.6, alpha=0.45)
        close.plot(time, values[part], label="field", color=COLOURS[1], linewidth=1.1)
        whole.set_axisbelow(True)
        whole.set(xlabel="seconds", ylabel="amplitude")
        close.set(xlabel="milliseconds")
        for ax in (whole, close):
            ax.legend(loc="upper right")
    return figure


def spectrograms(lines: dict[str, Tensor], rate: int) -> Figure:
    """Spectrograms of named sounds on a common scale, in dB below the maximum of the first one, for the first
    channel."""
    length = len(next(iter(lines.values())))
    window = min(length, 2 ** round(math.log2(max(16, 0.032 * rate))))
    powers = {name: _power(line[:, 0], window) for name, line in lines.items()}
    top = 10 * math.log10(max(float(next(iter(powers.values())).max()), 1e-20))
    with styled():
        figure = canvas(9, 2.9)
        several = figure.subplots(1, len(powers), sharey=True, squeeze=False)[0]
        for ax, (name, power) in zip(several, powers.items(), strict=True):
            shown = ax.imshow(
                (10 * power.clamp_min(1e-20).log10() - top).numpy(),
                origin="lower",
                aspect="auto",
                extent=(0, length / rate, 0, rate / 2000),
                vmin=-80,
                vmax=0,
                cmap="magma",
                interpolation="nearest",
            )
            ax.set(title=name, xlabel="seconds")
            ax.grid(False)
        several[0].set_ylabel("kHz")
        figure.colorbar(shown, ax=list(several), label="dB", shrink=0.9)
    return figure


FLOOR = 60.0
"""Level relative to the loudest, in dB, below which everything counts as this quiet: it is masked by the loudest."""


def spectral_distance(truth: Tensor, values: Tensor, rate: int) -> float:
    """The log-spectral distance of sounds ``[samples, channels]`` in dB: the root mean square, over frequency bands and
    32 ms windows, of the difference of their powers in dB, cut off :data:`FLOOR` below the sound's maximum. A field
    that lacks high frequencies can have a high signal-to-noise ratio but has a large distance."""
    window = min(len(truth), 2 ** round(math.log2(max(16, 0.032 * rate))))
    squares = []
    for one, other in zip(truth.T, values.T, strict=True):
        powers = [_power(line, window).double() for line in (one, other)]
        floor = powers[0].max() * 10 ** (-FLOOR / 10)
        low, high = (10 * power.clamp_min(floor).log10() for power in powers)
        squares.append((low - high).square().mean())
    return float(torch.stack(squares).mean().sqrt())


def octaves(truth: Tensor, values: Tensor, rate: int) -> dict[str, float]:
    """Signal-to-noise ratio in dB of each octave below half the sampling rate; the lowest one includes everything below
    it."""
    sound, error = (torch.fft.rfft(line.double(), dim=0).abs().square().sum(1) for line in (truth, values - truth))
    hertz = torch.fft.rfftfreq(len(truth), 1 / rate)
    shares, high = {}, rate / 2
    for number in range(4, 0, -1):
        low = 0.0 if number == 1 else high / 2
        band = (hertz > low) & (hertz <= high) if low else hertz <= high
        ratio = float(sound[band].sum() / error[band].sum().clamp_min(1e-20))
        shares[f"{low:.0f} to {high:.0f} Hz"] = 10 * math.log10(max(ratio, 1e-20))
        high = low
    return shares


def _power(line: Tensor, window: int) -> Tensor:
    hop = max(1, window // 2, len(line) // 300)
    spectrum = torch.stft(
        line.float(), window, hop_length=hop, window=torch.hann_window(window), return_complex=True, pad_mode="constant"
    )
    return spectrum.abs().square()


def _envelope(line: Tensor, rate: int) -> tuple[Tensor, Tensor, Tensor]:
    """Times in seconds, with the minimum and maximum of the stretch that begins there."""
    stretch = max(1, len(line) // MOST_DRAWN)
    cut = line[: len(line) // stretch * stretch].reshape(-1, stretch)
    return torch.arange(len(cut)) * stretch / rate, cut.amin(1), cut.amax(1)


def _loudest(line: Tensor, length: int) -> slice:
    power = line.square().cumsum(0)
    sums = power[length - 1 :] - torch.cat([power.new_zeros(1), power])[: len(line) - length + 1]
    start = int(sums.argmax())
    return slice(start, start + length)


# -- What there is to see and to hear of a sound's fit -----------------------------------------------------------------


def show(config: SoundConfig, task: FieldTask, results: Results, run: Run) -> None:
    """Write the reconstruction, the error, the export if asked for, and the page."""
    folder = run.path / "figures"
    folder.mkdir(exist_ok=True)
    known = sound(config)
    truth, rate = known.samples, known.rate
    values = task.on_grid([len(truth)]).clamp(-1, 1)
    heard = [
        (run.product("original.wav"), "The sound.", truth),
        (run.product("reconstruction.wav"), "The field at its samples.", values),
        (run.product("error.wav"), "The error, as loud as it is.", values - truth),
    ]
    for path, _, samples in heard:
        save(quantized(samples * known.peak), rate, path)
    pictures = [
        (folder / "waveform.png", "The sound and the field: the whole, and the loudest hundredth of a second or so."),
        (
            folder / "spectrogram.png",
            "Spectrograms of the sound, the field and the error: the power in each band of frequencies over time.",
        ),
    ]
    save_figure(waveforms(truth, values, rate), pictures[0][0], 110)
    drawn = spectrograms({"sound": truth, "field": values, "error": values - truth}, rate)
    save_figure(drawn, pictures[1][0], 110)
    error = float((values - truth).double().square().mean())
    power = float(truth.double().square().mean())
    distance, bands = spectral_distance(truth, values, rate), octaves(truth, values, rate)
    notes = [
        f"The PSNR over all samples is {decibels(error, 2.0):.2f} dB; its peak is the range from -1 to 1 of the sound "
        f"at full scale. The signal-to-noise ratio (SNR) is {10 * math.log10(power / max(error, 1e-20)):.2f} dB. "
        f"The log-spectral distance is {distance:.2f} dB. All samples were fitted: the validation and the test "
        "are on the same ones.",
        "The SNR by octaves: " + ", ".join(f"{ratio:.1f} dB in {band}" for band, ratio in bands.items()) + ".",
    ]
    run.write_json("sound.json", {"spectral_distance": distance, "octaves": bands})
    shown = [*pictures, *((path, caption) for path, caption, _ in heard)]
    if config.export_size is not None:
        written = export(config, task, (config.export_size,), run)
        shown.append((written, f"The field at {config.export_size} samples a second (export.wav)."))
    write_page("A sound as a field", task, results, run, shown, notes)


def export(config: SoundConfig, task: FieldTask, sizes: tuple[int, ...], run: Run) -> Path:
    """Write ``export.wav``: the field at this sampling rate."""
    if len(sizes) != 1:
        raise UserError("--export-size takes one number for a sound: its samples a second")
    (rate,), known = sizes, sound(config)
    count = round(known.seconds * rate)
    if not LOWEST_RATE <= rate <= HIGHEST_RATE or count > 4 * MOST_SAMPLES:
        raise UserError(f"--export-size {rate} must lie in [{LOWEST_RATE}, {HIGHEST_RATE}] samples a second")
    path = run.product("export.wav")
    samples = task.on_grid([count], lambda values: quantized(values * known.peak))
    save(samples, rate, path)
    return path


# -- The recipe that fits a sound --------------------------------------------------------------------------------------


SCALE_A_SAMPLE = 0.7
"""Scale of the frequencies per sample. Sines of one filter start below three tenths of half the sampling rate, products
of two below six tenths. The paper's 25000 for seven seconds is .08 per sample at 44.1 kHz. At 8 kHz it would be .45, at
which everything above 2 kHz, which makes speech intelligible, was lost."""

PAPER_SCALE_A_SECOND = 25000 / 7
"""The published scale, for a file of seven seconds."""


def build(config: SoundConfig) -> FieldTask:
    """The task of the settings."""
    waveform = sound(config)
    grid = Grid(waveform.samples)
    power = float(waveform.samples.double().square().mean())
    count, channels = waveform.samples.shape
    several = f" in {channels} channels" if channels > 1 else ""
    about = noted(
        f"{waveform.name}: {waveform.seconds:.3g} s at {waveform.rate} Hz, {count} samples{several}", waveform.notes
    )
    scoring = SignalToNoise(low=-1.0, high=1.0, power=power)
    return FieldTask(
        config, grid, Parts.same(grid), SCALE_A_SAMPLE * count, about=about, scoring=scoring, held="neither"
    )


def ready(config: SoundConfig) -> None:
    """Raise if the sound cannot be read, or its states do not fit in memory."""
    chunk_points(config, len(sound(config).samples))


RUNNER = FieldRunner(build, show, ready, export)
