"""Linear solvers: batches of systems known by their products, every sample to its own tolerance."""

from torchimplicit.linear.base import LinearSolution, LinearSolver
from torchimplicit.linear.bicgstab import BiCGStab
from torchimplicit.linear.cg import CG
from torchimplicit.linear.dense import Dense
from torchimplicit.linear.gmres import GMRES
from torchimplicit.linear.krylov_or_dense import KrylovOrDense
from torchimplicit.linear.lsmr import LSMR
from torchimplicit.linear.minres import MINRES
from torchimplicit.linear.neumann import Neumann
from torchimplicit.linear.operator import LinearOperator
from torchimplicit.linear.preconditioners import (
    Diagonal,
    Factorized,
    Inverse,
    Jacobi,
    Preconditioner,
    PreparedPreconditioner,
)
from torchimplicit.linear.reference import ReferenceHessian

__all__ = [
    "CG",
    "GMRES",
    "LSMR",
    "MINRES",
    "BiCGStab",
    "Dense",
    "Diagonal",
    "Factorized",
    "Inverse",
    "Jacobi",
    "KrylovOrDense",
    "LinearOperator",
    "LinearSolution",
    "LinearSolver",
    "Neumann",
    "Preconditioner",
    "PreparedPreconditioner",
    "ReferenceHessian",
]
