"""Solves as compiled code: the loop, its condition and the map in one graph (``compile=True``)."""

from torchimplicit.captured.adjoint import Adjoint
from torchimplicit.captured.capture import Capture, Capturing, Passes
from torchimplicit.captured.continued import Continuation
from torchimplicit.captured.program import compilations

__all__ = ["Adjoint", "Capture", "Capturing", "Continuation", "Passes", "compilations"]
