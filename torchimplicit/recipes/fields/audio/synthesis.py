"""Sounds made on the spot, by adding up harmonics."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from torchimplicit.recipes.fields.audio.config import SoundName

Waveform = np.ndarray[Any, np.dtype[np.float64]]

NOTES = ((0.0, 220.0), (0.125, 277.18), (0.25, 329.63), (0.375, 440.0), (0.5, 369.99), (0.625, 293.66), (0.75, 246.94))
"""Of the melody: when each begins, as a share of the whole, and its frequency in Hz."""

VOWELS = (
    ((730.0, 90.0), (1090.0, 110.0), (2440.0, 160.0)),
    ((530.0, 70.0), (1840.0, 110.0), (2480.0, 160.0)),
    ((270.0, 60.0), (2290.0, 110.0), (3010.0, 170.0)),
    ((570.0, 80.0), (840.0, 100.0), (2410.0, 160.0)),
    ((300.0, 60.0), (870.0, 100.0), (2240.0, 160.0)),
)
"""Formants of a, e, i, o and u: their frequencies and widths in Hz."""


def synthesized(name: SoundName, seconds: float, rate: int) -> Waveform:
    """The sound, ``[samples]``, whose greatest size is 1."""
    time = np.arange(max(1, round(seconds * rate))) / rate
    made = _melody(time, seconds, rate) if name == "melody" else _vowels(time, seconds, rate)
    found: Waveform = made / np.abs(made).max()
    return found


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
