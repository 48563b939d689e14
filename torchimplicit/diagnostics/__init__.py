"""Figures that tell how a solve or an estimate stands."""

from torchimplicit.diagnostics.ascent import AscentCondition, ascent_condition
from torchimplicit.diagnostics.compare import GradientComparison, GradientProbe, compare_gradients, probe_gradient
from torchimplicit.diagnostics.spectrum import spectral_radius

__all__ = [
    "AscentCondition",
    "GradientComparison",
    "GradientProbe",
    "ascent_condition",
    "compare_gradients",
    "probe_gradient",
    "spectral_radius",
]
