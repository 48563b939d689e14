"""The auxiliary value that a map returns beside the state, noted during a solve."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from torchimplicit._torch import without_function_modes
from torchimplicit.saved import Saved


class Auxiliary:
    """The latest auxiliary value of a map, and where it was evaluated.

    Attributes:
        value: the auxiliary value; ``None`` before the first call.
        z: the flat state that the map was called with; ``None`` before the first call.
        recorded: whether autograd recorded the call.
        leaves: the leaves of the tape, if the call was recorded for the backward pass; else ``None``.
        saved: the tape's saved tensors, see :func:`~torchimplicit.saved.kept`.
        listening: whether further calls are noted.
    """

    def __init__(self) -> None:
        self.listening = True
        self.clear()

    def clear(self) -> None:
        """Forget the value, which may hold a graph."""
        self.value: Any = None
        self.z: Tensor | None = None
        self.recorded = False
        self.leaves: tuple[Tensor, ...] | None = None
        self.saved: Saved = ()

    def note(self, value: Any) -> None:
        """Note that the map has returned ``value``."""
        if self.listening:
            self.value, self.recorded = value, torch.is_grad_enabled()

    @contextmanager
    def unheard(self) -> Iterator[None]:
        """A context in which calls are not noted, since they do not belong to the solve."""
        before, self.listening = self.listening, False
        try:
            yield
        finally:
            self.listening = before

    def called(self, z: Any) -> None:
        """Note that the latest call was at ``z``."""
        if self.listening and isinstance(z, Tensor):
            with without_function_modes():  # a recording mode would take this detach for one of the user's map
                self.z = z.detach()

    def hold(self, leaves: Sequence[Tensor], saved: Saved) -> None:
        """Keep the value of the latest call, which was recorded for the backward pass, and ignore later ones."""
        self.leaves, self.saved, self.listening = tuple(leaves), saved, False
