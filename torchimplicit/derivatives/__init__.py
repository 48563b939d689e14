"""Derivatives of a solution, of any order, with the fewest linear solves."""

from torchimplicit.derivatives.at_solution import Derivatives

__all__ = ["Derivatives"]
