"""A module as a map that stays the same while it is solved for."""

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
    return PerSolve(module, weights=weights, dropouts=dropouts) if weights or dropouts else module


class PerSolve:
    """A module with the values of one solve.

    Attributes:
        module: it.
        weights: parametrizations and what they give.
        vectors: spectral norms and their vectors, where weights are computed in every evaluation.
        dropouts: those that draw a mask in the first call that uses them, and keep it.
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
        """While the context lasts, the same function, for a compiler to read: it could not follow how parametrizations
        are given their values."""
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
            "per_solve: the first call of the map was inside a torch.func transform, which the dropout masks drawn in "
            "it would not outlive. Call the map once before, with the arguments of the solve"
        )
    return mask
