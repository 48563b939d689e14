"""The start of a solve."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from torchimplicit.problems import Point


class Start:
    """The state that a solve begins at, and what is known of it. Each is *taken*, and can be taken once.

    A solver soon leaves its start. If a stack frame on the way to the solver kept a reference, one state more than in a
    loop written by hand would stay in memory for as long as the solve lasts.

    Args:
        z: the state in flat form, ``[batch, dim]``.
        point: the evaluation there, if it has been made already.
        recorded: for a solve of zero steps, the function's value there with its graph, and the leaves of the graph.
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
        """The state, without taking it."""
        assert self._z is not None, "the start has been taken"
        return self._z

    def take(self) -> Tensor:
        """Take the state."""
        z, self._z = self.z, None
        return z

    def take_point(self) -> Point | None:
        """Take the evaluation there; ``None`` if it is not known or has been taken."""
        point, self._point = self._point, None
        return point

    def take_recorded(self) -> tuple[Tensor, Sequence[Tensor]] | None:
        """Take the recorded value there; ``None`` if there is none or it has been taken."""
        recorded, self._recorded = self._recorded, None
        return recorded

    def fixed(self) -> Start:
        """Detach the state; returns this object."""
        self._z = self.z.detach()
        return self
