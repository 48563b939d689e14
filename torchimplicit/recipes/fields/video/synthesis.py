"""Videos made on the spot: uint8 ``[frames, height, width, 3]``."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from torchimplicit.recipes.fields.images.pictures import bundled
from torchimplicit.recipes.fields.video.config import ClipName

RATE = 25.0
"""Frames a second, where a source does not say."""

Values = np.ndarray[Any, np.dtype[np.float64]]


def synthesized(name: ClipName, frames: int, size: int) -> Tensor:
    """The clip, ``size`` pixels square.

    Raises:
        UserError: if scikit-image, whose picture is asked for, is missing.
    """
    return _shapes(frames, size) if name == "shapes" else _flight(frames, size)


def _shapes(frames: int, size: int) -> Tensor:
    """A disk that bounces, a square that turns and a ring that grows, before a slow wave."""
    y, x = (np.mgrid[:size, :size] + 0.5) * (2 / size) - 1
    soft = 2 / size  # edges are a pixel wide
    shown = []
    for number in range(frames):
        t = number / max(1, frames - 1)
        wave = 0.5 + 0.3 * np.sin(3 * x + 2 * y + 2 * math.pi * t)
        picture = np.stack([0.2 + 0.3 * wave, 0.35 + 0.3 * wave, 0.6 - 0.2 * wave], -1)
        turn = 0.5 * math.pi * t
        u, v = x + 0.45, y - 0.4 + 0.2 * t
        u, v = math.cos(turn) * u + math.sin(turn) * v, math.cos(turn) * v - math.sin(turn) * u
        away = np.hypot(x - 0.4, y - 0.35)
        for distance, colour in (
            (np.hypot(x + 0.7 - 1.3 * t, y + 0.1 + 0.5 * abs(math.sin(1.5 * math.pi * t))) - 0.28, (0.95, 0.75, 0.2)),
            (np.maximum(np.abs(u), np.abs(v)) - 0.3, (0.85, 0.25, 0.3)),
            (np.abs(away - 0.2 - 0.25 * t) - 0.08, (0.92, 0.95, 0.9)),
        ):
            inside: Values = np.clip(0.5 - distance / soft, 0, 1)[..., None]
            picture = (1 - inside) * picture + inside * np.array(colour)
        shown.append((255 * picture).round().astype(np.uint8))
    return torch.from_numpy(np.stack(shown))


def _flight(frames: int, size: int) -> Tensor:
    """A window that sinks towards a picture and slides over it."""
    picture = Image.fromarray(bundled("chelsea", None).pixels.numpy())
    shown = []
    for number in range(frames):
        t = number / max(1, frames - 1)
        side = (1 - 0.35 * t) * min(picture.size)
        left = (0.15 + 0.35 * t) * (picture.width - side)
        top = (0.1 + 0.3 * t) * (picture.height - side)
        box = (left, top, left + side, top + side)
        shown.append(np.asarray(picture.resize((size, size), Image.Resampling.LANCZOS, box=box)))
    return torch.from_numpy(np.stack(shown))
