"""Functions of coordinates that represent a signal: an image, a sound, a shape.

The implicit ones of Huang, Bai and Kolter, *(Implicit)²: Implicit Layers for Implicit Representations* (NeurIPS 2021),
and their explicit counterparts, which have the same parameters and apply the same cell once.
"""

from torchimplicit.models.representations.base import ExplicitRepresentation, ImplicitRepresentation, Norm
from torchimplicit.models.representations.filters import FilterName, GaborFilter
from torchimplicit.models.representations.mfn import MFN, ImplicitMFN, MultiplicativeCell
from torchimplicit.models.representations.siren import SIREN, ImplicitSIREN, SineCell

__all__ = [
    "MFN",
    "SIREN",
    "ExplicitRepresentation",
    "FilterName",
    "GaborFilter",
    "ImplicitMFN",
    "ImplicitRepresentation",
    "ImplicitSIREN",
    "MultiplicativeCell",
    "Norm",
    "SineCell",
]
