"""Orbital-free density functionals: energies of a molecule's density, minimized at a fixed number of electrons."""

from torchimplicit.models.orbital_free.molecule import Molecule

__all__ = ["Molecule"]
