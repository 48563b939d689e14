"""Figures that tell how a solve or an estimate stands."""

from torchimplicit.diagnostics.spectrum import spectral_radius

__all__ = ["spectral_radius"]
