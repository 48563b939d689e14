"""Orbital-free density functionals that are trained so that their minima are the right densities."""
