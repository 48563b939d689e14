"""Waveforms and spectrograms."""

from __future__ import annotations

import math

import matplotlib
import torch
from matplotlib.figure import Figure
from torch import Tensor

from torchimplicit.recipes.runtime.page import COLOURS, FIGURE

MOST_DRAWN = 4000
"""Points of a line: a longer one is drawn by the least and the greatest value of each stretch."""


def waveforms(truth: Tensor, values: Tensor, rate: int) -> Figure:
    """The sound and the error over all of it, and the sound and the field where it is loudest: first channel."""
    truth, values = truth[:, 0], values[:, 0]
    with matplotlib.rc_context(FIGURE):
        figure = Figure(figsize=(9, 2.9), layout="constrained")
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
    """The power over time and frequency of sounds under their names, in dB below the greatest of the first one, and on
    one scale for all: first channel."""
    length = len(next(iter(lines.values())))
    window = min(length, 2 ** round(math.log2(max(16, 0.032 * rate))))
    powers = {name: _power(line[:, 0], window) for name, line in lines.items()}
    top = 10 * math.log10(max(float(next(iter(powers.values())).max()), 1e-20))
    with matplotlib.rc_context({**FIGURE, "axes.grid": False}):
        figure = Figure(figsize=(9, 2.9), layout="constrained")
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
        several[0].set_ylabel("kHz")
        figure.colorbar(shown, ax=list(several), label="dB", shrink=0.9)
    return figure


def _power(line: Tensor, window: int) -> Tensor:
    hop = max(1, window // 2, len(line) // 300)
    found = torch.stft(
        line.float(), window, hop_length=hop, window=torch.hann_window(window), return_complex=True, pad_mode="constant"
    )
    return found.abs().square()


def _envelope(line: Tensor, rate: int) -> tuple[Tensor, Tensor, Tensor]:
    """Times in seconds, and the least and the greatest value of the stretch that begins there."""
    stretch = max(1, len(line) // MOST_DRAWN)
    cut = line[: len(line) // stretch * stretch].reshape(-1, stretch)
    return torch.arange(len(cut)) * stretch / rate, cut.amin(1), cut.amax(1)


def _loudest(line: Tensor, length: int) -> slice:
    power = line.square().cumsum(0)
    sums = power[length - 1 :] - torch.cat([power.new_zeros(1), power])[: len(line) - length + 1]
    start = int(sums.argmax())
    return slice(start, start + length)
