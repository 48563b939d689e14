"""Molecules for density functionals: from a name, an xyz file or QM9 to data files, by PySCF."""
