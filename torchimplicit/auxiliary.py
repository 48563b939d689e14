"""What a map returns beside the state, noted while a problem is solved."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from torchimplicit._torch import without_function_modes
from torchimplicit.saved import Saved


class Auxiliary:
    """The latest of what a map has returned beside the state, and where.

    Attributes:
        value, z: what it returned, and the flat state that it was called with; ``None`` before the first call.
        recorded: whether autograd saw the call.
        leaves: of the tape that the call was recorded on for the backward pass; ``None``: it was not for that.
        saved: of that tape, see :func:`~torchimplicit.saved.kept`.
        listening: whether further calls are noted.
    """

    def __init__(self) -> None:
        self.listening = True
        self.clear()

    def clear(self) -> None:
        """Forget it: what was returned may hold a graph."""
        self.value: Any = None
        self.z: Tensor | None = None
        self.recorded = False
        self.leaves: tuple[Tensor, ...] | None = None
        self.saved: Saved = ()

    def note(self, value: Any) -> None:
        """The map has returned ``value``."""
        if self.listening:
            self.value, self.recorded = value, torch.is_grad_enabled()

    @contextmanager
    def unheard(self) -> Iterator[None]:
        """Calls in the context are none of the solve's, and not noted."""
        before, self.listening = self.listening, False
        try:
            yield
        finally:
            self.listening = before

    def called(self, z: Any) -> None:
        """That was at ``z``."""
        if self.listening and isinstance(z, Tensor):
            with without_function_modes():  # or it would seem that the map cuts its graph off
                self.z = z.detach()

    def hold(self, leaves: Sequence[Tensor], saved: Saved) -> None:
        """The latest call was the one for the backward pass: it counts, and no later one does."""
        self.leaves, self.saved, self.listening = tuple(leaves), saved, False
