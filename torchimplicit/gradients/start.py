"""Where a solve begins."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from torchimplicit.problems import Point


class Start:
    """The state that a solve begins at, and what is known of it: each is taken by whoever goes on from it.

    A solver leaves its start behind, and a frame on the way to the solver that kept it would hold one state more than a
    loop written by hand for as long as the solve lasts.

    Args:
        z: flat, ``[batch, dim]``.
        point: the evaluation there, where it has been made already.
        recorded: where no step leads away from it: the function's value there with its history, and the tensors that
            this leads back to.
    """

    def __init__(
        self,
        z: Tensor,
        point: Point | None = None,
        recorded: tuple[Tensor, Sequence[Tensor]] | None = None,
    ):
        self._z: Tensor | None = z
        self._point, self._recorded = point, recorded

    @property
    def z(self) -> Tensor:
        """The state, which stays here."""
        assert self._z is not None, "the start has been taken"
        return self._z

    def take(self) -> Tensor:
        """The state."""
        z, self._z = self.z, None
        return z

    def take_point(self) -> Point | None:
        """The evaluation there; ``None`` where it is not known, or has been taken."""
        point, self._point = self._point, None
        return point

    def take_recorded(self) -> tuple[Tensor, Sequence[Tensor]] | None:
        """The value there with its history, likewise."""
        recorded, self._recorded = self._recorded, None
        return recorded

    def fixed(self) -> Start:
        """The same, without a derivative in the state."""
        self._z = self.z.detach()
        return self
