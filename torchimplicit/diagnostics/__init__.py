"""Figures that tell how a solve or an estimate stands."""

from torchimplicit.diagnostics.ascent import AscentCondition, ascent_condition
from torchimplicit.diagnostics.certificate import Certificate, certify
from torchimplicit.diagnostics.compare import GradientComparison, GradientProbe, compare_gradients, probe_gradient
from torchimplicit.diagnostics.curvature import Curvature, curvature
from torchimplicit.diagnostics.spectrum import spectral_radius

__all__ = [
    "AscentCondition",
    "Certificate",
    "Curvature",
    "GradientComparison",
    "GradientProbe",
    "ascent_condition",
    "certify",
    "compare_gradients",
    "curvature",
    "probe_gradient",
    "spectral_radius",
]
