"""Gradients through a density functional's minimum: exact, damped, and by equilibrium propagation."""
