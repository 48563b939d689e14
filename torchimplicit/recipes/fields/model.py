"""The representation that settings describe."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchimplicit.models import MFN, SIREN, ImplicitMFN, ImplicitRepresentation, ImplicitSIREN
from torchimplicit.nn import WarmStart
from torchimplicit.recipes.fields.settings import FieldSettings
from torchimplicit.recipes.runtime.task import gradient, solver

SAMPLED_AT_ONCE = 65536
"""Points that are evaluated together where no gradient is wanted."""


def representation(
    config: FieldSettings,
    inputs: int,
    outputs: int,
    corner: Sequence[float],
    frequencies: float,
    samples: int | None = None,
) -> nn.Module:
    """The model.

    Args:
        config: the recipe's.
        inputs, outputs, corner: see :class:`~torchimplicit.recipes.fields.points.Points`.
        frequencies: their scale where the settings leave it to the recipe.
        samples: how many points training numbers, where a step does not have them all, in order, at once.
    """
    chosen = config.representation
    scale = chosen.frequencies or frequencies
    windows: dict[str, Any] = {"low": [-side for side in corner], "high": list(corner), "alpha": chosen.window_alpha}
    if not chosen.implicit:
        if chosen.filter == "siren":
            return SIREN(inputs, outputs, chosen.width, chosen.depth, scale)
        return MFN(inputs, outputs, chosen.width, chosen.depth, scale, chosen.filter, **windows)
    start: WarmStart | bool = False
    if chosen.amortize != "off":
        start = WarmStart(samples, refresh=1 if chosen.amortize == "refresh" else None)
    solved: dict[str, Any] = {
        "solver": solver(config.equilibria),
        "gradient": gradient(config.equilibria),
        "warm_start": start,
    }
    if chosen.filter == "siren":
        return ImplicitSIREN(inputs, outputs, chosen.width, chosen.depth, scale, **solved)
    return ImplicitMFN(inputs, outputs, chosen.width, chosen.depth, scale, chosen.filter, **windows, **solved)


def values_at(model: nn.Module, x: Tensor, index: Tensor | None = None) -> Tensor:
    """The model at coordinates; ``index`` says which points they are, for one that remembers each."""
    if index is not None and isinstance(model, ImplicitRepresentation):
        start = model.equilibrium.warm_start
        if start is not None and start.samples is not None:
            return model(x, index)
    return model(x)


@torch.no_grad()
def sampled(model: nn.Module, coordinates: Iterator[Tensor], into: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """The model at chunks of coordinates, or what ``into`` makes of each, put together, on the CPU."""
    where = next(model.parameters()).device
    was_training = model.training
    model.eval()
    parts = []
    for x in coordinates:
        values = model(x.to(where)).cpu()
        parts.append(values if into is None else into(values))
    model.train(was_training)
    return torch.cat(parts)
