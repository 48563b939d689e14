"""Puzzles solved by small weight-tied networks at their equilibrium."""
