"""A module as a map whose weights and dropout masks stay the same during a solve."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from torchimplicit.closure import is_transformed
from torchimplicit.nn.dropout import VariationalDropout, active_dropouts, drawing
from torchimplicit.nn.normalization import fixed, holding, parametrizations


def per_solve(module: nn.Module) -> Callable[..., Any]:
    """The module as a function with fixed weights and dropout masks, for :func:`solve`.

    Its parametrized weights are computed once, here, with their gradient, and not in every call. Every
    :class:`VariationalDropout` draws its mask in the first call that uses it, and keeps it. :class:`Equilibrium` does
    the same for its cell.

    Make a new function for every solve or for every training step. The masks have one row per sample: a problem with
    dropout must not be ``rowwise=True``, and the first call must not be inside a ``torch.func`` transform.

    Raises:
        RuntimeError: when the function is called, if its masks would be drawn inside a transform or were drawn for
            another batch.
    """
    weights = [(chain, chain()) for chain in parametrizations(module)]
    dropouts = active_dropouts(module)
    return PerSolve(module, weights=weights, dropouts=dropouts) if weights or dropouts else module


class PerSolve:
    """A module with the values of one solve.

    Attributes:
        module: the module.
        weights: pairs of a parametrization and its weight.
        vectors: pairs of a spectral norm and its vectors, where weights are computed in every evaluation.
        dropouts: the dropouts that draw a mask in the first call that uses them, and keep it.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        weights: Sequence[tuple[ParametrizationList, Tensor]] = (),
        vectors: Sequence[tuple[nn.Module, Tensor]] = (),
        dropouts: Sequence[VariationalDropout] = (),
    ):
        self.module, self.weights, self.vectors, self.dropouts = module, weights, vectors, dropouts
        self._masks: dict[VariationalDropout, Tensor] = {}

    @contextmanager
    def settled(self) -> Iterator[PerSolve]:
        """Return the same function with its weights set for the length of the context, so that a compiler, which cannot
        trace the replacement of parametrizations in every call, need not see it."""
        with fixed(self.weights, read=True), holding(self.vectors):
            yield PerSolve(self.module, dropouts=self.dropouts)

    def __call__(self, *args: Any) -> Any:
        missing = [dropout for dropout in self.dropouts if dropout not in self._masks]
        with fixed(self.weights), holding(self.vectors), holding(list(self._masks.items())):
            if not missing:
                return self.module(*args)
            outer = {dropout: dropout.held for dropout in missing}
            try:
                with drawing(missing):
                    result = self.module(*args)
                drawn = {dropout: dropout.held for dropout in missing}
                self._masks.update({dropout: _lasting(mask) for dropout, mask in drawn.items() if mask is not None})
            finally:
                for dropout, held in outer.items():
                    if not dropout.drawing:  # otherwise an enclosing equilibrium, which is drawing, collects it
                        dropout.held = held
            return result


def _lasting(mask: Tensor) -> Tensor:
    if is_transformed(mask):
        raise RuntimeError(
            "per_solve: the first call of the map was inside a torch.func transform, outside which the dropout masks "
            "drawn in it cannot be used. Call the map once before, with the arguments of the solve"
        )
    return mask
