"""A module as a map that stays the same while it is solved for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from torchimplicit.closure import is_transformed
from torchimplicit.nn.dropout import VariationalDropout, active_dropouts, drawing
from torchimplicit.nn.normalization import fixed, holding, parametrizations


def per_solve(module: nn.Module) -> Callable[..., Any]:
    """The module as a function whose parametrized weights are those of now, computed once, with their gradient, and
    not in every call; every :class:`VariationalDropout` draws its mask in the first call that uses it, and keeps it.
    What :class:`Equilibrium` does for its cell, for a map that is given to :func:`solve` by hand.

    Make a new one for every solve, or for every training step. The masks carry the batch: a problem with dropout must
    not be ``rowwise=True``, and the first call must not be inside a ``torch.func`` transform.

    Raises:
        RuntimeError: masks that were drawn inside a transform, or for another batch; both when the function is called.
    """
    weights = [(chain, chain()) for chain in parametrizations(module)]
    dropouts = active_dropouts(module)
    masks: dict[VariationalDropout, Tensor] = {}

    def function(*args: Any) -> Any:
        missing = [dropout for dropout in dropouts if dropout not in masks]
        with fixed(weights), holding(list(masks.items())):
            if not missing:
                return module(*args)
            outer = {dropout: dropout.held for dropout in missing}
            try:
                with drawing(missing):
                    result = module(*args)
                masks.update({dropout: _lasting(dropout.held) for dropout in missing if dropout.held is not None})
            finally:
                for dropout, held in outer.items():
                    if not dropout.drawing:
                        dropout.held = held
            return result

    return function if weights or dropouts else module


def _lasting(mask: Tensor) -> Tensor:
    if is_transformed(mask):
        raise RuntimeError(
            "per_solve: the first call of the map was inside a torch.func transform, which the dropout masks drawn in "
            "it would not outlive. Call the map once before, with the arguments of the solve"
        )
    return mask
