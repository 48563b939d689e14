"""Implicit layers for PyTorch: state a problem, solve it, differentiate the solution to any order."""

from torchimplicit import derivatives, nn, regularizers
from torchimplicit.constraints import LinearEquality
from torchimplicit.diagnostics import spectral_radius
from torchimplicit.errors import ConvergenceWarning, SmoothnessWarning, SolveError, UnsupportedDerivativeError
from torchimplicit.gradients import (
    AdaptivePhantom,
    EquilibriumPropagation,
    Implicit,
    NeumannPhantom,
    OneStep,
    SharedInverse,
    UnbiasedNeumann,
    Unrolled,
    UnrolledPhantom,
)
from torchimplicit.linear import CG, GMRES, LSMR, MINRES, BiCGStab, Dense, Neumann
from torchimplicit.problems import FixedPoint, Minimum, Root
from torchimplicit.solution import Report, Solution, Status
from torchimplicit.solve import solve
from torchimplicit.solvers import LBFGS, Anderson, Broyden, FixedPointIteration, GradientDescent, NewtonKrylov

__version__ = "0.1.0"

__all__ = [
    "CG",
    "GMRES",
    "LBFGS",
    "LSMR",
    "MINRES",
    "AdaptivePhantom",
    "Anderson",
    "BiCGStab",
    "Broyden",
    "ConvergenceWarning",
    "Dense",
    "EquilibriumPropagation",
    "FixedPoint",
    "FixedPointIteration",
    "GradientDescent",
    "Implicit",
    "LinearEquality",
    "Minimum",
    "Neumann",
    "NeumannPhantom",
    "NewtonKrylov",
    "OneStep",
    "Report",
    "Root",
    "SharedInverse",
    "SmoothnessWarning",
    "Solution",
    "SolveError",
    "Status",
    "UnbiasedNeumann",
    "Unrolled",
    "UnrolledPhantom",
    "UnsupportedDerivativeError",
    "derivatives",
    "nn",
    "regularizers",
    "solve",
    "spectral_radius",
]
