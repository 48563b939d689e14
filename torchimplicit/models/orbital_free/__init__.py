"""Orbital-free density functionals: energies of a molecule's density, minimized at a fixed number of electrons."""

from torchimplicit.models.orbital_free.domain import Domain
from torchimplicit.models.orbital_free.functional import OrbitalFree, OrbitalFreeConfig
from torchimplicit.models.orbital_free.molecule import Molecule
from torchimplicit.models.orbital_free.network import CoefficientNetwork, NetworkConfig
from torchimplicit.models.orbital_free.response import response
from torchimplicit.models.orbital_free.starting import element_counts, fit_constants, fit_linear

__all__ = [
    "CoefficientNetwork",
    "Domain",
    "Molecule",
    "NetworkConfig",
    "OrbitalFree",
    "OrbitalFreeConfig",
    "element_counts",
    "fit_constants",
    "fit_linear",
    "response",
]
