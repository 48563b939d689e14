"""Sine waves of random amplitude and phase (Finn et al. 2017, section 5.1)."""

from __future__ import annotations

import math

import torch

from torchimplicit.recipes.jiio_meta.tasks import Tasks


def draw(count: int, shots: int, queries: int, generator: torch.Generator) -> Tasks:
    """Waves :math:`a\\sin(s+\\varphi)` with a in [0.1, 5] and φ in [0, π], seen at points in [-5, 5]."""
    amplitude = 0.1 + 4.9 * torch.rand(count, 1, 1, generator=generator)
    phase = math.pi * torch.rand(count, 1, 1, generator=generator)
    points = 10 * torch.rand(count, shots + queries, 1, generator=generator) - 5
    values = amplitude * torch.sin(points + phase)
    return Tasks(points[:, :shots], values[:, :shots], points[:, shots:], values[:, shots:])
