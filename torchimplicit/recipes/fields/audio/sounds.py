"""Sounds from WAV files, and back."""

from __future__ import annotations

import math
import struct
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchimplicit.recipes.fields.audio.config import HIGHEST_RATE, SoundConfig
from torchimplicit.recipes.fields.audio.synthesis import synthesized
from torchimplicit.recipes.runtime.errors import UserError
from torchimplicit.recipes.runtime.files import replacing

MOST_SAMPLES = 1 << 23
"""A field's coordinates are 32-bit numbers: more samples than that they hardly tell apart."""

MOST_VALUES = 1 << 28
"""In the part of a file that is read into memory."""

LEAST_SAMPLES = 64
"""Below it there is nothing to fit."""

MOST_CHANNELS = 8

KINDS = {
    b"ID3": "an MP3",
    b"\xff\xfb": "an MP3",
    b"\xff\xf3": "an MP3",
    b"OggS": "an Ogg",
    b"fLaC": "a FLAC",
    b"FORM": "an AIFF",
}
"""What other sound files begin with."""


DAMAGED = (OSError, ValueError, EOFError, ArithmeticError, struct.error, TypeError, LookupError, NameError, MemoryError)
"""What SciPy's reader raises for files whose headers make no sense."""


@dataclass(frozen=True)
class Sound:
    """A sound, and what was done to it on the way.

    Attributes:
        name: for people.
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
        """How long it is."""
        return len(self.samples) / self.rate


def sound_of(config: SoundConfig) -> Sound:
    """The sound that the settings ask for.

    Raises:
        UserError: if it cannot be read, or there is nothing in it to fit.
    """
    if config.file is not None:
        return read_file(config.file, config.start, config.seconds, config.rate, config.mono)
    assert config.seconds is not None
    _check_length(config.sound, config.seconds * config.rate)
    samples = synthesized(config.sound, config.seconds, config.rate)[:, None]
    return Sound(f"synthesized {config.sound}", torch.from_numpy(samples.astype(np.float32)), config.rate, 1.0)


def read_file(path: Path, start: float, seconds: float | None, rate: int, mono: bool) -> Sound:
    """An excerpt of a WAV file, at ``rate`` at most.

    Raises:
        UserError: as above.
    """
    own, raw, notes = _opened(path)
    if raw.shape[0] == 0:
        raise UserError(f"{path} holds no samples")
    if not 0 < own <= 10 * HIGHEST_RATE:
        raise UserError(f"{path} says it has {own} samples a second; the file may be damaged")
    length = raw.shape[0] / own
    if start >= length:
        raise UserError(f"--start {start:g} is past the end of {path}, which lasts {length:.3g} s")
    first = int(start * own)
    last = raw.shape[0] if seconds is None else min(raw.shape[0], first + round(seconds * own))
    _check_length(path.name, (last - first) * min(1.0, rate / own))
    if (last - first) * raw.shape[1] > MOST_VALUES:
        raise UserError(f"{path} is too large; give a shorter --seconds")
    values = _scaled(np.asarray(raw[first:last]))
    if not np.isfinite(values).all():
        raise UserError(f"{path} holds NaN or infinity")
    if first > 0 or last < raw.shape[0]:
        notes.append(f"from {first / own:.3g} s to {last / own:.3g} s of {length:.3g} s")
    if mono and values.shape[1] > 1:
        notes.append(f"the mean of {values.shape[1]} channels")
        values = values.mean(axis=1, keepdims=True)
    if values.shape[1] > MOST_CHANNELS:
        raise UserError(f"{path} has {values.shape[1]} channels, and {MOST_CHANNELS} at most are fitted; add --mono")
    if rate < own:
        from scipy.signal import resample_poly

        common = math.gcd(rate, own)
        values = resample_poly(values, rate // common, own // common, axis=0)
        notes.append(f"reduced from {own} Hz")
    if len(values) < LEAST_SAMPLES:
        raise UserError(f"{path} has {len(values)} samples there; {LEAST_SAMPLES} at least are needed")
    peak = float(np.abs(values).max())
    if peak == 0:
        raise UserError(f"{path} is silent there; choose another --start")
    if peak > 1 + 1e-3 and rate >= own:
        notes.append(f"louder than full scale ({peak:.3g}): written at full scale")
    samples = torch.from_numpy((values / peak).astype(np.float32))
    return Sound(path.name, samples, min(rate, own), min(peak, 1.0), tuple(notes))


def save(samples: Tensor, rate: int, path: Path) -> None:
    """Write int16 ``[samples, channels]`` as a WAV file, in one move."""
    from scipy.io import wavfile

    with replacing(path) as draft:
        wavfile.write(draft, rate, samples.numpy())


def quantized(samples: Tensor) -> Tensor:
    """Values from -1 to 1 as integers of 16 bits."""
    return (samples.clamp(-1, 1) * 32767).round().to(torch.int16)


def _check_length(name: str, samples: float) -> None:
    if samples > MOST_SAMPLES:
        raise UserError(
            f"{name} would have {samples:.3g} samples, and {MOST_SAMPLES} at most are fitted; give fewer --seconds or "
            "a lower --rate"
        )


def _opened(path: Path) -> tuple[int, np.ndarray[Any, Any], list[str]]:
    """The rate and the samples ``[samples, channels]`` as they are in the file, which is mapped where it can be."""
    from scipy.io import wavfile

    if path.is_dir():
        raise UserError(f"--file {path} is a folder; give a WAV file")
    if not path.is_file():
        raise UserError(f"--file {path} does not exist")
    notes: list[str] = []
    try:
        _check_kind(path)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always", wavfile.WavFileWarning)
            try:
                rate, raw = wavfile.read(path, mmap=True)
            except ValueError as error:
                if "mmap" not in str(error):
                    raise
                if path.stat().st_size > 4 * MOST_VALUES:  # samples of three bytes, or fewer than promised
                    raise UserError(f"{path} is too large for a file of its format; cut it first") from None
                rate, raw = wavfile.read(path)
        if any("prematurely" in str(one.message) for one in said) or _promises_more(path):
            notes.append("the file is cut short: what there is of it")
    except DAMAGED as error:
        told = isinstance(error, OSError | ValueError)
        reason = " ".join(str(error).split()).rstrip(".") if told else "its header makes no sense"
        raise UserError(f"{path} cannot be read ({reason}); the file may be damaged, or compressed") from None
    return int(rate), raw[:, None] if raw.ndim == 1 else raw, notes


def _check_kind(path: Path) -> None:
    with path.open("rb") as file:
        head = file.read(12)
    if not head:
        raise UserError(f"{path} is empty")
    if head[:4] in (b"RIFF", b"RIFX", b"RF64") and (head[8:] == b"WAVE" or len(head) < 12):
        return
    kind = next((name for start, name in KINDS.items() if head.startswith(start)), None)
    if head[4:8] == b"ftyp":
        kind = "an MPEG-4"
    found = f"is {kind} file, and only WAV files are read" if kind else "is no WAV file"
    raise UserError(f"{path} {found}; convert it, for instance with: ffmpeg -i {path.name} {path.stem}.wav")


def _promises_more(path: Path) -> bool:
    """Whether the samples of a WAV file should go on where it ends."""
    size = path.stat().st_size
    with path.open("rb") as file:
        form = file.read(4)
        order = ">I" if form == b"RIFX" else "<I"
        place = 12
        while place + 8 <= size:
            file.seek(place)
            kind, length = file.read(4), struct.unpack(order, file.read(4))[0]
            if kind == b"data":
                return form != b"RF64" and place + 8 + length > size  # RF64 says the length elsewhere
            place += 8 + length + length % 2
    return False


def _scaled(raw: np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """From -1 to 1. Integers of fewer bits than their container fill it from the top."""
    values = raw.astype(np.float64)
    if raw.dtype.kind == "u":
        return values / 128 - 1
    if raw.dtype.kind == "i":
        return values / 2.0 ** (8 * raw.dtype.itemsize - 1)
    return values
