"""Solves as compiled code: the loop, its condition and the map in one graph (``compile=True``)."""

from torchimplicit.captured.capture import Capture, Capturing
from torchimplicit.captured.program import compilations

__all__ = ["Capture", "Capturing", "compilations"]
