"""Linear solvers: batches of systems known by their products, every sample to its own tolerance."""

from torchimplicit.linear.base import LinearSolution, LinearSolver
from torchimplicit.linear.dense import Dense
from torchimplicit.linear.gmres import GMRES
from torchimplicit.linear.neumann import Neumann
from torchimplicit.linear.operator import LinearOperator
from torchimplicit.linear.preconditioners import Diagonal, Factorized, Inverse, Jacobi, Preconditioner

__all__ = [
    "GMRES",
    "Dense",
    "Diagonal",
    "Factorized",
    "Inverse",
    "Jacobi",
    "LinearOperator",
    "LinearSolution",
    "LinearSolver",
    "Neumann",
    "Preconditioner",
]
