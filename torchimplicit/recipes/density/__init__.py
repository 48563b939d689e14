"""Orbital-free density functionals, and their tables."""
